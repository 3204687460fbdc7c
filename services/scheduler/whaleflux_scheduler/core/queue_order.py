"""Whose turn it is among lines of jobs: the least key of its queue (`queue_shares`) first, then the order of submission.

Every class of requests has a heap of its lines, and those that are to be tried have one of their heads. A key that grew since it was
looked at (the queue took something) is found when it comes to the top. One that fell (a job of the queue ended) is told by `fell`, and
each class takes that in when it is looked at next. So a start and an end cost O(log n), however many lines wait.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

from whaleflux_scheduler.core.lazy_heap import LazyHeap
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.pending import Line, RequestClass

_MOST_FALLS = 10_000  # that are remembered for classes that were not looked at


class Turns:
    """The classes that are to be tried, and whose turn it is among all their lines.

    `key(queue, gpus, priority)` orders queues that want so many GPUs; `family(queue)` names the queues whose keys may fall together.
    """

    def __init__(
        self, key: Callable[[str, int, int], Any], family: Callable[[str], Hashable] = lambda queue: queue
    ) -> None:
        self._key, self._family = key, family
        self._heads: LazyHeap[RequestClass] = LazyHeap()
        self._active: dict[RequestClass, None] = {}
        self._falls: list[Hashable] = []  # families
        self._forgotten = 0  # falls that are not in the list any more
        self._seen = 0

    @property
    def active(self) -> Mapping[RequestClass, None]:
        """The classes that are to be tried."""
        return self._active

    def activate(self, kind: RequestClass) -> None:
        """It is to be tried."""
        if kind not in self._active:
            if not self._active:
                self._heads.clear()
            self._active[kind] = None
            self._put_head(kind)

    def drop(self, kind: RequestClass) -> None:
        """It is not to be tried for now."""
        if kind in self._active:
            del self._active[kind]
            kind.entry = None

    def enter(self, line: Line) -> None:
        """The line is new, its first is another, or it is not parked any more."""
        kind = line.kind
        if line.parked or line in kind.passed:
            return
        kind.families.setdefault(self._family(line.queue), {})[line] = None
        kind.heap.put(line, self.key_of(line))
        if kind in self._active:
            self._put_head(kind)

    def leave(self, line: Line) -> None:
        """Nobody is in the line any more."""
        line.entry = None
        line.kind.passed.pop(line, None)
        family = self._family(line.queue)
        alike = line.kind.families.get(family, {})
        alike.pop(line, None)
        if not alike:
            line.kind.families.pop(family, None)
        if not line.kind.lines:
            self.drop(line.kind)

    def park(self, line: Line) -> None:
        """The line is passed over until `unpark`."""
        line.parked, line.entry = True, None

    def pass_over(self, line: Line) -> None:
        """Nobody makes room for its first: it is passed over until `reopen`."""
        line.kind.passed[line] = None
        line.entry = None

    def reopen(self, kind: RequestClass) -> None:
        """All its lines are to be tried again."""
        if kind.passed:
            passed, kind.passed = kind.passed, {}
            for line in passed:
                if line.names:
                    self.enter(line)
        self.activate(kind)

    def unpark(self, line: Line) -> None:
        if line.parked:
            line.parked = False
            if line.first() is not None:
                self.enter(line)

    def fell(self, queue: str) -> None:
        """The queue holds less than before, so its key may have fallen, and those of its family."""
        self._falls.append(self._family(queue))
        if len(self._falls) > _MOST_FALLS:
            self._forgotten += len(self._falls)
            self._falls.clear()

    def regroup(self, kinds: Iterable[RequestClass]) -> None:
        """Any queue may have another key and another family now; `kinds`: all that there are."""
        self._forgotten += len(self._falls) + 1
        self._falls.clear()
        for kind in kinds:
            kind.families.clear()
            for line in kind.lines.values():
                kind.families.setdefault(self._family(line.queue), {})[line] = None

    def next(self) -> Line | None:
        """The line whose first goes next; None: nothing is to be tried."""
        if self._seen != (now := self._now):
            self._seen = now
            for kind in self._active:
                if kind.seen != now:
                    self._put_head(kind)
        while (head := self._heads.top()) is not None:
            kind = head[2]
            first = self._first(kind)
            if first is None:
                self.drop(kind)
            elif first.entry is not None and first.entry[0] == head[0]:
                return first
            else:
                self._put_head(kind)
        return None

    # keys

    @property
    def _now(self) -> int:
        return self._forgotten + len(self._falls)

    def key_of(self, line: Line) -> tuple[Any, float, str]:
        """Its first's turn; the least goes first."""
        first = line.first()
        assert first is not None
        kind = line.kind
        return (self._key(line.queue, kind.gpus, kind.priority), *first)

    def _put_head(self, kind: RequestClass) -> None:
        """With its least key as it is now."""
        first = self._first(kind)
        self._heads.put(kind, first.entry[0] if first is not None and first.entry is not None else ())

    def _first(self, kind: RequestClass) -> Line | None:
        if len(kind.lines) == 1:
            return self._only(kind, next(iter(kind.lines.values())))
        if kind.seen != self._now:
            self._take_in_falls(kind)
        while (top := kind.heap.top()) is not None:
            key, _, line = top
            first = line.first()
            if first is None:
                line.entry = None
                continue
            turn = self._key(line.queue, kind.gpus, kind.priority)
            if key[0] == turn and key[2] == first[1]:
                return line
            kind.heap.put(line, (turn, *first))
        return None

    def _only(self, kind: RequestClass, line: Line) -> Line | None:
        """The only line of its class, as many shapes have: what is in its heap is not looked through."""
        kind.seen = self._now
        if line.entry is None:
            return None
        if (first := line.first()) is None:
            line.entry = None
            return None
        key = (self._key(line.queue, kind.gpus, kind.priority), *first)
        if line.entry[0] != key:
            kind.heap.clear()
            kind.heap.put(line, key)
        return line

    def _take_in_falls(self, kind: RequestClass) -> None:
        seen, kind.seen = kind.seen, self._now
        fallen: Iterable[Hashable] = kind.families
        if seen >= self._forgotten and kind.seen - seen <= len(kind.families):
            fallen = set(self._falls[seen - self._forgotten :])
        for family in fallen:
            for line in kind.families.get(family, ()):
                if line.entry is not None:
                    kind.heap.put(line, self.key_of(line))


class ArrayLimit(NamedTuple):
    """Members of an array that run, and the most that may."""

    array: str
    running: int
    most: int


def over_array_limit(job: Job, running: Mapping[tuple[str, str], int], *, own: bool = False) -> ArrayLimit | None:
    """What keeps a member from starting now, None when it may. `own`: it is counted in `running`."""
    spec = job.spec
    if not spec.array_name or not spec.array_max_running:
        return None
    others = running.get((job.queue, spec.array_name), 0) - own
    return ArrayLimit(spec.array_name, others, spec.array_max_running) if others >= spec.array_max_running else None
