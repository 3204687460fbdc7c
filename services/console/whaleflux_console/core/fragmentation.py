"""Which free devices are of no use to those that wait: nobody has them, somebody wants such, and as they lie they fit nobody. Pure.

Per kind of device: with F of them free and D wanted by gangs that find no place, the lesser of both is fragmented; the rest is idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from whaleflux import names
from whaleflux_console.core.chronicle import Device


@dataclass(frozen=True, slots=True)
class WaitingGang:
    """A job that waits for want of a place: not for its turn, a quota, a time or another job."""

    job: str
    gpus: int
    gpu_classes: tuple[str, ...] = ()  # any of these; none: any at all
    min_memory_bytes: int = 0
    sites: tuple[str, ...] = ()

    def takes(self, device: Device) -> bool:
        """Whether the device would do, wherever it is."""
        return (
            (not self.gpu_classes or device.gpu_class in self.gpu_classes)
            and device.memory_bytes >= self.min_memory_bytes
            and (not self.sites or names.top(device.node) in self.sites)
        )


def fragmented(devices: Iterable[Device], held: Mapping[str, int], waiting: Sequence[WaitingGang]) -> frozenset[str]:
    """The devices that are fragmented now; of equal ones those of the lowest names. Costs what is free, once for each kind of demand."""
    free = sorted((d for d in devices if d.available and not held.get(d.device, 0)), key=lambda d: d.device)
    demand: Counter[WaitingGang] = Counter()
    for gang in waiting:
        demand[replace(gang, job="", gpus=0)] += gang.gpus
    found: set[str] = set()
    for kind in sorted(demand, key=repr):
        left = (d.device for d in free if d.device not in found and kind.takes(d))
        found.update(list(islice(left, demand[kind])))
    return frozenset(found)
