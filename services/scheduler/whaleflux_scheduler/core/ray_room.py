"""Room on a node for bundles of a Ray cluster, device by device: how many of a shape fit, in closed form. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from whaleflux_scheduler.core.ray_demand import UNIT, Item, Shape

_MOST_PACKED = 1_024  # STRICT_PACK groups on one node


class Devices(NamedTuple):
    """`number` devices that have as much left: ten-thousandths of a device, and of a MiB of its memory."""

    share: int
    memory: int
    number: int = 1


@dataclass(slots=True)
class Room:
    """What is left on one node. `full` is the memory of an unused device; one that is used by whole bundles is not there any more."""

    full: int
    devices: list[Devices]
    cpu: int
    memory: int
    custom: dict[str, int] = field(default_factory=dict)
    of_spread: dict[int, int] = field(default_factory=dict)  # bundles of each STRICT_SPREAD gang that lie here

    def put(self, item: Item, most: int) -> int:
        """Lays as many of the item here as fit, `most` at most; how many these are."""
        if item.spread >= 0:
            most = min(most, item.per_node - self.of_spread.get(item.spread, 0))
        if len(item.bundles) == 1 and item.bundles[0][1] == 1:
            placed = self._put(item.shape, most)
        else:
            placed = self._put_packed(item, min(most, _MOST_PACKED))
        if item.spread >= 0:
            self.of_spread[item.spread] = self.of_spread.get(item.spread, 0) + placed
        return placed

    def _put_packed(self, item: Item, most: int) -> int:
        for placed in range(most):
            before = self.devices, self.cpu, self.memory, dict(self.custom)
            if any(self._put(shape, n) < n for shape, n in item.bundles):
                self.devices, self.cpu, self.memory, self.custom = before
                return placed
        return max(0, most)

    def _put(self, shape: Shape, most: int) -> int:
        most = self._beside_devices(shape, most)
        if most <= 0:
            return 0
        if shape.gpu >= UNIT:
            most = self._put_whole(shape, most)
        elif shape.needs_gpu:
            most = self._put_shares(shape, most)
        self.cpu -= most * shape.cpu
        self.memory -= most * shape.memory
        for name, amount in shape.custom:
            self.custom[name] -= most * amount
        return most

    def _beside_devices(self, shape: Shape, most: int) -> int:
        if shape.cpu:
            most = min(most, self.cpu // shape.cpu)
        if shape.memory:
            most = min(most, self.memory // shape.memory)
        for name, amount in shape.custom:
            most = min(most, self.custom.get(name, 0) // amount)
        return most

    def _put_whole(self, shape: Shape, most: int) -> int:
        """On devices that nobody uses; they are gone for others, with all of their memory."""
        if shape.gpu % UNIT or shape.memory_per_device > self.full:
            return 0
        at = next((n for n, left in enumerate(self.devices) if left.share == UNIT and left.memory == self.full), None)
        if at is None:
            return 0
        whole = self.devices[at]
        most = min(most, whole.number // shape.devices)
        rest = whole.number - most * shape.devices
        kept = [Devices(UNIT, self.full, rest)] if rest else []
        self.devices = self.devices[:at] + kept + self.devices[at + 1 :]
        return most

    def _put_shares(self, shape: Shape, most: int) -> int:
        """On the fullest devices first; each bundle lies on one device."""
        memory = shape.gpu_memory or -(-shape.gpu * self.full // UNIT)
        left, after = most, list[Devices]()
        for group in sorted(self.devices, key=lambda group: (group.memory, group.share)):
            fit = min(group.memory // memory if memory else left, group.share // shape.gpu if shape.gpu else left)
            if fit <= 0 or left <= 0:
                after.append(group)
                continue
            filled = min(group.number, left // fit)
            rest = min(left - filled * fit, fit) if filled < group.number else 0
            for used, count in ((fit, filled), (rest, 1 if rest else 0), (0, group.number - filled - (rest > 0))):
                if count:
                    after.append(Devices(group.share - used * shape.gpu, group.memory - used * memory, count))
            left -= filled * fit + rest
        self.devices = after
        return most - left

    @property
    def unused(self) -> int:
        """Devices that nothing lies on."""
        return sum(group.number for group in self.devices if group.share == UNIT and group.memory == self.full)

    @property
    def freest(self) -> int:
        """Memory that the freest device has left; -1 without any."""
        return max((group.memory for group in self.devices), default=-1)


def left_of(total: Mapping[str, float], free: Mapping[str, float], memory_mib: int) -> tuple[Devices, ...]:
    """What the devices of a Ray node surely have left, of the sums that Ray tells; `memory_mib` is the memory of each.

    As Ray puts shares onto devices in use first, as many devices are free as its free `GPU` has ones. Memory that is free may all lie on the
    other devices, as far as it finds room there; of what is then sure to be left on the free ones the i-th freest of n has at least
    (left - (i - 1) x full) / (n - i + 1). So a busy node is said to have less rather than more: what fits there Ray puts there by itself.
    """
    count, full = int(total.get("GPU", 0)), memory_mib * UNIT
    gpus = round(free.get("GPU", 0) * UNIT)
    unused, rest = divmod(min(gpus, count * UNIT), UNIT)
    used_memory = max(0, round((total.get("gpu_memory", 0.0) - free.get("gpu_memory", 0.0)) * UNIT))
    if not used_memory:
        found = [Devices(UNIT, full, unused)] * (unused > 0) + [Devices(rest, rest * full // UNIT)] * (rest > 0)
        return tuple(found)
    sure = unused * full - used_memory
    memories = [max(0, min(full, (sure - at * full) // (unused - at))) for at in range(unused)]
    return tuple(Devices(UNIT, memory, n) for memory, n in Counter(memories).items() if memory)
