"""Nodes that are alike, of the fleet or of a Ray cluster, and one of them filled: what it costs and what it leaves to nobody. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux_scheduler.core.ray_demand import UNIT
from whaleflux_scheduler.core.ray_room import Devices, Room


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that are alike: `count` of them can be had, or are there already (`held`).

    Those that are there come first and cost nothing more. `devices` is what each has left, `device_memory_mib` the memory of one of its devices.
    Of a node whose `parts` can be had only the devices that are used are paid for. `names` are the nodes, in the order in which they are taken.
    """

    name: str
    model: str = ""
    devices: tuple[Devices, ...] = ()
    device_memory_mib: int = 0
    cpu: int = 0  # ten-thousandths
    memory: int = 0  # ten-thousandths of a byte
    custom: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    count: int = 1
    usd_per_gpu_hour: float = 0.0
    link_bytes_per_s: float = 0.0
    parts: bool = True
    held: bool = False
    names: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        return sum(group.number for group in self.devices)

    @property
    def full(self) -> int:
        """Memory of an unused device, in ten-thousandths of a MiB."""
        return self.device_memory_mib * UNIT

    @property
    def unused(self) -> int:
        """Devices that nothing lies on."""
        return sum(group.number for group in self.devices if group.share == UNIT and group.memory == self.full)

    def room(self) -> Room:
        return Room(self.full, list(self.devices), self.cpu, self.memory, dict(self.custom))


def whole_devices(gpus: int, memory_mib: int) -> tuple[Devices, ...]:
    """Devices that nobody uses."""
    return (Devices(UNIT, memory_mib * UNIT, gpus),) if gpus else ()


@dataclass(frozen=True, slots=True)
class Filling:
    """One node of a kind, filled: how many of each item, by the item's place; devices used; US dollars per hour for the node."""

    kind: Kind
    items: tuple[tuple[int, int], ...]
    gpus: int
    usd_per_hour: float  # of a held one what it would cost
    memory_used_mib: float  # that bundles asked for
    value_usd: float  # what its items would cost at the least

    @property
    def by_price(self) -> tuple[float, float, float]:
        """Smaller is better."""
        ratio = round(self.usd_per_hour / self.value_usd, 9)
        return ratio, -self.kind.link_bytes_per_s, 1 - self.memory_share

    @property
    def by_memory(self) -> tuple[float, float, float]:
        """Smaller is better."""
        return round(1 - self.memory_share, 9), *self.by_price[:2]

    @property
    def memory_share(self) -> float:
        """Of the GPU memory that is paid for, what bundles asked for."""
        return self.memory_used_mib / max(1.0, self.gpus_paid * self.kind.device_memory_mib)

    @property
    def gpus_paid(self) -> int:
        return self.gpus if self.kind.parts else self.kind.gpus
