"""The availability profile of backfilling: when running work is expected to have left its GPUs, and the earliest start of a gang from that.

Pure. `Availability` keeps the expected ends in order, with how many GPUs come free by any time: a bound that costs O(sqrt n) and mostly says
that nothing is to be had sooner. Only where it does not, `earliest` asks the placement engine itself, so that whatever a request says (models,
topology, groups) holds for the promised place too.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine

MOST_RELEASED = 4_096  # jobs that are looked at for one promise: a bound of its cost
BLOCK = 256  # ends that are kept in one list
_LAST = chr(0x10FFFF)

End = tuple[float, str]
"""Seconds since the epoch, and who leaves."""


class Availability:
    """Ends by name, seconds since the epoch, and the GPUs that come free then; who is not in here never leaves.

    A list of sorted lists: a change costs O(sqrt n), and so does a count.
    """

    def __init__(self) -> None:
        self._blocks: list[list[End]] = []
        self._lasts: list[End] = []  # of each block
        self._sums: list[int] = []  # GPUs of each block
        self._at: dict[str, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def set(self, name: str, end_s: float | None, gpus: int = 0) -> None:
        """When it is expected to have left, and what is free for anybody then; None: never."""
        known = self._at.get(name)
        if known is None and end_s is None:
            return
        if known is not None:
            if known[0] == end_s:
                self._recount(name, known, gpus)
                return
            self._remove(name, *known)
        if end_s is not None:
            self._add(name, end_s, gpus)

    def end_s(self, name: str) -> float | None:
        known = self._at.get(name)
        return known[0] if known else None

    def leaves_by(self, name: str, at_s: float) -> bool:
        """Whether it is expected to have left by then."""
        known = self._at.get(name)
        return known is not None and known[0] <= at_s

    def gpus(self, name: str) -> int:
        """That come free with it."""
        known = self._at.get(name)
        return known[1] if known else 0

    def freed_by(self, at_s: float) -> int:
        """GPUs that have come free by then."""
        upto = bisect.bisect_right(self._lasts, (at_s, _LAST))
        freed = sum(self._sums[:upto])
        if upto < len(self._blocks):
            freed += sum(self._at[name][1] for _, name in _head(self._blocks[upto], at_s))
        return freed

    def overdue(self, now_s: float) -> list[str]:
        """Who should have left by now."""
        return [name for _, name in self.until(now_s)]

    def until(self, end_s: float) -> Iterator[End]:
        """Who leaves by then, the first one first."""
        for block, last in zip(self._blocks, self._lasts, strict=True):
            if last[0] > end_s:
                yield from _head(block, end_s)
                return
            yield from block

    def _recount(self, name: str, known: tuple[float, int], gpus: int) -> None:
        if known[1] != gpus:
            self._sums[self._block_of((known[0], name))] += gpus - known[1]
            self._at[name] = known[0], gpus

    def _block_of(self, end: End) -> int:
        return min(bisect.bisect_left(self._lasts, end), len(self._lasts) - 1)

    def _remove(self, name: str, end_s: float, gpus: int) -> None:
        at = self._block_of((end_s, name))
        block = self._blocks[at]
        del block[bisect.bisect_left(block, (end_s, name))]
        del self._at[name]
        self._sums[at] -= gpus
        if block:
            self._lasts[at] = block[-1]
        else:
            del self._blocks[at], self._lasts[at], self._sums[at]

    def _add(self, name: str, end_s: float, gpus: int) -> None:
        self._at[name] = end_s, gpus
        if not self._blocks:
            self._blocks, self._lasts, self._sums = [[(end_s, name)]], [(end_s, name)], [gpus]
            return
        at = self._block_of((end_s, name))
        block = self._blocks[at]
        bisect.insort(block, (end_s, name))
        self._lasts[at] = block[-1]
        self._sums[at] += gpus
        if len(block) > 2 * BLOCK:
            self._split(at)

    def _split(self, at: int) -> None:
        block = self._blocks[at]
        halves = [block[:BLOCK], block[BLOCK:]]
        self._blocks[at : at + 1] = halves
        self._lasts[at : at + 1] = [half[-1] for half in halves]
        self._sums[at : at + 1] = [sum(self._at[name][1] for _, name in half) for half in halves]


def _head(block: Sequence[End], end_s: float) -> Sequence[End]:
    return block[: bisect.bisect_right(block, (end_s, _LAST))]


Vacate = Callable[[Sequence[str]], None]
"""Makes the engine look as if these jobs had left their GPUs, but for what others claim of them; inside of a transaction."""


@dataclass(frozen=True, slots=True)
class Start:
    """The earliest start: where, seconds since the epoch, and who has to have left by then."""

    placement: Placement
    at_s: float
    leaving: tuple[str, ...]


def earliest(
    engine: Engine,
    request: PlaceRequest,
    ends: Iterable[End],
    vacate: Vacate,
    *,
    now_s: float,
    least: int = 0,
) -> Start | None:
    """When the request first fits if those who hold GPUs leave at their `ends` (in order) and nobody else starts; None: not by the last of them.

    `least`: it is known not to fit before so many of them have left. From there on jobs leave in order until it is feasible: by doubling, then
    by bisection of the last step, as victims are found in `placement.preempt`. The transaction is rolled back.
    """
    gone: list[End] = []
    with engine.transaction():
        count = _fewest(engine, request, itertools.islice(ends, MOST_RELEASED), vacate, gone, least)
        placement = None if count is None else engine.fits(request)
    if count is None or placement is None:
        return None
    inside = set(placement.node_names)
    there = tuple((at_s, name) for at_s, name in gone[:count] if _touches(engine, name, inside))
    return Start(placement, max((at_s for at_s, _ in there), default=now_s), tuple(name for _, name in there))


def _touches(engine: Engine, name: str, nodes: set[str]) -> bool:
    return any(part.node in nodes for part in engine.placements[name].nodes)


def _fewest(
    engine: Engine, request: PlaceRequest, ends: Iterator[End], vacate: Vacate, gone: list[End], least: int
) -> int | None:
    """The length of the shortest prefix that makes room, left vacated; `gone` is as much of `ends` as was looked at."""
    low, left, more = least - 1, 0, least  # `low` are too few, `left` have left
    while True:
        leave = list(itertools.islice(ends, more))
        gone += leave
        with engine.transaction() as step:
            vacate([name for _, name in leave])
            enough = engine.feasible(request)
            if not enough or low + 1 == len(gone):
                left = len(gone)
                step.commit()
        if enough:
            return _bisected(engine, request, [name for _, name in gone], vacate, low, left)
        if len(leave) < more:
            return None
        low, more = left, max(8, left)


def _bisected(engine: Engine, request: PlaceRequest, names: Sequence[str], vacate: Vacate, low: int, left: int) -> int:
    """It is enough when all of the names have left, and too little when the first `low` of them have; `left` of them have."""
    high = len(names)
    while low + 1 < high:
        middle = (low + high) // 2
        with engine.transaction() as step:
            vacate(names[left:middle])
            if engine.feasible(request):
                high = middle
            else:
                low = left = middle
                step.commit()
    vacate(names[left:high])
    return high
