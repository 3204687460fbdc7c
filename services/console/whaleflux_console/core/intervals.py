"""Time as half-open intervals of whole milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol, TypeVar


class Interval(Protocol):
    """What has a beginning and an end."""

    @property
    def start_ms(self) -> int: ...

    @property
    def end_ms(self) -> int: ...


T = TypeVar("T", bound=Interval)


def overlap_ms(one: Interval, start_ms: int, end_ms: int) -> int:
    """How much of [start_ms, end_ms) it covers."""
    return max(0, min(one.end_ms, end_ms) - max(one.start_ms, start_ms))


def sweep(items: Iterable[T], start_ms: int, end_ms: int) -> Iterator[tuple[int, int, list[T]]]:
    """Cuts [start_ms, end_ms) wherever one begins or ends: (from, to, those that cover it, in the order given). Uncovered time is left out."""
    known = [one for one in items if overlap_ms(one, start_ms, end_ms)]
    changes = [(max(one.start_ms, start_ms), 1, i) for i, one in enumerate(known)]
    changes += [(min(one.end_ms, end_ms), 0, i) for i, one in enumerate(known)]
    active: set[int] = set()
    before = start_ms
    for at, begins, i in sorted(changes):
        if active and at > before:
            yield before, at, [known[n] for n in sorted(active)]
        before = at
        if begins:
            active.add(i)
        else:
            active.remove(i)


def disjoint(items: Iterable[T]) -> list[tuple[int, int, T]]:
    """In order of time and without overlap: of time that several claim, the one that began first has it, however they were ordered."""
    ordered = sorted(items, key=_times)
    if any(_times(one) == _times(other) for one, other in pairwise(ordered)):
        ordered.sort(key=lambda one: (_times(one), repr(one)))
    found: list[tuple[int, int, T]] = []
    taken: int | None = None
    for one in ordered:
        start = one.start_ms if taken is None else max(one.start_ms, taken)
        if one.end_ms > start:
            found.append((start, one.end_ms, one))
            taken = one.end_ms
    return found


def _times(one: Interval) -> tuple[int, int]:
    return one.start_ms, one.end_ms
