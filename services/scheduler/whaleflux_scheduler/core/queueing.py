"""Whose turn it is: priority first, then the queue that holds least for its weight, then the order of submission."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from whaleflux_scheduler.core.model import Job, Queue


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may be placed now, and the nodes that it should not get."""

    job: Job
    exclude: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Line:
    """Jobs of one queue and priority that ask for the same: when the first does not fit, none does."""

    priority: int
    queue: str
    shape: int


def order_of(job: Job) -> tuple[int, float, str]:
    """Priority, then submission; among jobs of one queue a smaller key goes first."""
    return (-job.spec.priority, job.create_time.timestamp(), job.name)


class Lines:
    """All waiting jobs, in lines."""

    def __init__(self) -> None:
        self._members: dict[Line, list[tuple[float, str]]] = {}  # heaps by submission; may hold names that left
        self._line_of: dict[str, Line] = {}

    def __len__(self) -> int:
        return len(self._line_of)

    def join(self, line: Line, job: Job) -> None:
        """At the place that its submission gives it."""
        if self._line_of.get(job.name) != line:
            self._line_of[job.name] = line
            heapq.heappush(self._members.setdefault(line, []), (job.create_time.timestamp(), job.name))

    def leave(self, name: str) -> None:
        self._line_of.pop(name, None)

    def line_of(self, name: str) -> Line | None:
        return self._line_of.get(name)

    def first(self, line: Line) -> tuple[float, str] | None:
        """When the first of the line was submitted, and its name; None: the line is empty, and forgotten."""
        members = self._members.get(line, [])
        while members:
            if self._line_of.get(members[0][1]) == line:
                return members[0]
            heapq.heappop(members)
        self._members.pop(line, None)
        return None

    def all(self) -> set[Line]:
        return set(self._members)

    def next_turn(self, lines: Collection[Line], queues: Mapping[str, Queue], held: Mapping[str, int]) -> Line | None:
        """The line whose first goes next; `held`: GPUs by queue id as they are now. Empty lines are skipped."""
        keyed = [
            ((-line.priority, load(line.queue, queues, held), *first), line)
            for line in lines
            if (first := self.first(line)) is not None
        ]
        return min(keyed, key=lambda pair: pair[0])[1] if keyed else None


def load(queue: str, queues: Mapping[str, Queue], held: Mapping[str, int]) -> float:
    """GPUs held per weight."""
    known = queues.get(queue)
    return held.get(queue, 0) / (known.weight if known and known.weight > 0 else 1.0)


def over_limit(job: Job, queues: Mapping[str, Queue], held: Mapping[str, int], own: int = 0) -> str:
    """Why its queue may not take that many GPUs now, or "". `own`: GPUs that the job itself still holds."""
    queue = queues.get(job.queue)
    if queue is None or not queue.max_gpus:
        return ""
    others = held.get(job.queue, 0) - own
    if others + job.spec.gpus <= queue.max_gpus:
        return ""
    return f"queue {job.queue} holds {others} of at most {queue.max_gpus} GPUs"
