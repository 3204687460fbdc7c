"""Which free devices are of no use to those that wait: nobody has them, somebody wants such, and as they lie they fit nobody. Pure.

Per kind of device: as many as the gangs want that would fit on the free ones if those lay together, the smallest first, are fragmented; the
rest is idle, and so is everything beside a gang for which too few are free wherever they lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

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
    """The devices that are fragmented now; of equal ones those of the lowest names. Costs what is free and who waits, once for each kind of demand."""
    free = sorted((d for d in devices if d.available and not held.get(d.device, 0)), key=lambda d: d.device)
    demand: dict[WaitingGang, list[int]] = defaultdict(list)
    for gang in waiting:
        demand[replace(gang, job="", gpus=0)].append(gang.gpus)
    found: set[str] = set()
    for kind in sorted(demand, key=repr):
        left = [d.device for d in free if d.device not in found and kind.takes(d)]
        found.update(left[: _would_fit(demand[kind], len(left))])
    return frozenset(found)


def _would_fit(gangs: Iterable[int], free: int) -> int:
    """GPUs of the gangs that fit on so many free ones, the smallest first."""
    return max((taken for taken in accumulate(sorted(gangs)) if taken <= free), default=0)
