"""The availability profile of backfilling: when running work is expected to have left its GPUs, and the earliest start of a gang from that.

Pure. `Availability` keeps the expected ends in order, O(log n) to find a place in it for a change; `earliest` asks the placement engine itself,
so that whatever a request says (models, topology, shares) holds for the promised place too.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine

MOST_RELEASED = 4_096  # jobs that are looked at for one promise: a bound of its cost


class Availability:
    """Ends by name, seconds since the epoch; who is not in here never leaves."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, str]] = []
        self._at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def set(self, name: str, end_s: float | None) -> None:
        """When it is expected to have left; None: never."""
        known = self._at.pop(name, None)
        if known == end_s and end_s is not None:
            self._at[name] = end_s
            return
        if known is not None:
            del self._ends[bisect.bisect_left(self._ends, (known, name))]
        if end_s is not None:
            self._at[name] = end_s
            bisect.insort(self._ends, (end_s, name))

    def end_s(self, name: str) -> float | None:
        return self._at.get(name)

    def overdue(self, now_s: float) -> list[str]:
        """Who should have left by now."""
        return [name for _, name in self._ends[: bisect.bisect_right(self._ends, (now_s, chr(0x10FFFF)))]]

    def until(self, end_s: float) -> Iterator[tuple[float, str]]:
        """Who leaves by then, the first one first."""
        for at_s, name in self._ends:
            if at_s > end_s:
                return
            yield at_s, name


class Leaving(Protocol):
    """How the engine is made to look as if a job had left; inside of a transaction."""

    def vacate(self, name: str) -> None:
        """Its GPUs are free, but for what others claim of them."""

    def come_back(self, name: str) -> None:
        """As it was."""


@dataclass(frozen=True, slots=True)
class Start:
    """The earliest start: where, seconds since the epoch, and who has to have left by then."""

    placement: Placement
    at_s: float
    leaving: tuple[str, ...]


def earliest(
    engine: Engine, request: PlaceRequest, ends: Sequence[tuple[float, str]], leaving: Leaving, *, now_s: float
) -> Start | None:
    """When the request first fits if those who hold GPUs leave at their `ends` (in order) and nobody else starts; None: not by the last of them.

    Jobs leave in order until it is feasible: by doubling, then by bisection of the last step, as victims are found in `placement.preempt`.
    The transaction is rolled back.
    """
    ends = ends[:MOST_RELEASED]
    with engine.transaction():
        count = _fewest(engine, request, [name for _, name in ends], leaving)
        placement = None if count is None else engine.fits(request)
    if count is None or placement is None:
        return None
    inside = set(placement.node_names)
    gone = ends[:count]
    there = tuple((at_s, name) for at_s, name in gone if _touches(engine, name, inside))
    return Start(placement, max((at_s for at_s, _ in there), default=now_s), tuple(name for _, name in there))


def _touches(engine: Engine, name: str, nodes: set[str]) -> bool:
    return any(part.node in nodes for part in engine.placements[name].nodes)


def _fewest(engine: Engine, request: PlaceRequest, names: Sequence[str], leaving: Leaving) -> int | None:
    """The length of the shortest prefix that makes room, left vacated."""
    low = high = 0
    while not engine.feasible(request):
        if high == len(names):
            return None
        low, high = high, min(len(names), 2 * high + 8)
        _each(leaving.vacate, names[low:high])
    at = high
    while low + 1 < high:  # `high` is enough, `low` is not, `at` have left
        middle = (low + high) // 2
        _each(leaving.come_back, names[middle:at])
        _each(leaving.vacate, names[at:middle])
        at = middle
        low, high = (low, middle) if engine.feasible(request) else (middle, high)
    _each(leaving.vacate, names[at:high])
    return high


def _each(change: Callable[[str], None], names: Sequence[str]) -> None:
    for name in names:
        change(name)
