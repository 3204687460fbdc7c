"""Whose turn it is: priority first, then the queue that holds least for its weight, then the order of submission."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from whaleflux_scheduler.core.model import Job, Queue


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may be placed now, and the nodes that it should not get."""

    job: Job
    exclude: frozenset[str] = frozenset()


def line_key(candidate: Candidate) -> tuple[float, str]:
    """Order within one queue and priority."""
    return (candidate.job.create_time.timestamp(), candidate.job.name)


@dataclass(slots=True)
class Turns:
    """Hands out candidates one by one; `held` is kept current by the caller, so that each choice sees the last one."""

    candidates: Iterable[Candidate]
    queues: Mapping[str, Queue]
    held: dict[str, int]  # GPUs by queue id
    _lines: dict[tuple[int, str], list[tuple[tuple[float, str], Candidate]]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Candidate]:
        for candidate in self.candidates:
            job = candidate.job
            line = self._lines.setdefault((-job.spec.priority, job.queue), [])
            line.append((line_key(candidate), candidate))
        for line in self._lines.values():
            heapq.heapify(line)
        for priority in sorted({priority for priority, _ in self._lines}):
            names = [queue for p, queue in self._lines if p == priority]
            while names:
                queue = min(names, key=lambda name: (self._load(name), self._lines[priority, name][0][0]))
                line = self._lines[priority, queue]
                yield heapq.heappop(line)[1]
                if not line:
                    names.remove(queue)

    def _load(self, queue: str) -> float:
        known = self.queues.get(queue)
        return self.held.get(queue, 0) / (known.weight if known and known.weight > 0 else 1.0)


def over_limit(job: Job, queues: Mapping[str, Queue], held: Mapping[str, int], own: int = 0) -> str:
    """Why its queue may not take that many GPUs now, or "". `own`: GPUs that the job itself still holds."""
    queue = queues.get(job.queue)
    if queue is None or not queue.max_gpus:
        return ""
    others = held.get(job.queue, 0) - own
    if others + job.spec.gpus <= queue.max_gpus:
        return ""
    return f"queue {job.queue} holds {others} of at most {queue.max_gpus} GPUs"
