"""Whose turn it is: priority first, then the queue that holds least for its weight, then the order of submission."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from whaleflux_scheduler.core.model import Job, Queue


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may be placed now, and the nodes that it should not get."""

    job: Job
    exclude: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class QueueBucket:
    """Jobs of one queue and priority that ask for the same: when the first does not fit, none does.

    `alone` names a job that holds or claims GPUs: it may fit where others of its kind do not. `array` is one of which only so many
    members may run: those behind it are not to wait for that.
    """

    priority: int
    queue: str
    shape: int
    alone: str = ""
    array: str = ""


def order_of(job: Job) -> tuple[int, float, str]:
    """Priority, then submission; among jobs of one queue a smaller key goes first."""
    return (-job.spec.priority, job.create_time.timestamp(), job.name)


class QueueBuckets:
    """All waiting jobs, in buckets."""

    def __init__(self) -> None:
        self._members: dict[QueueBucket, list[tuple[float, str]]] = {}  # heaps by submission; may hold names that left
        self._bucket_of: dict[str, QueueBucket] = {}

    def __len__(self) -> int:
        return len(self._bucket_of)

    def join(self, bucket: QueueBucket, job: Job) -> None:
        """At the place that its submission gives it."""
        if self._bucket_of.get(job.name) != bucket:
            self._bucket_of[job.name] = bucket
            heapq.heappush(self._members.setdefault(bucket, []), (job.create_time.timestamp(), job.name))

    def leave(self, name: str) -> None:
        self._bucket_of.pop(name, None)

    def first(self, bucket: QueueBucket) -> tuple[float, str] | None:
        """When the first of the bucket was submitted, and its name; None: the bucket is empty, and forgotten."""
        members = self._members.get(bucket, [])
        while members:
            if self._bucket_of.get(members[0][1]) == bucket:
                return members[0]
            heapq.heappop(members)
        self._members.pop(bucket, None)
        return None

    def all(self) -> set[QueueBucket]:
        return set(self._members)

    def above(self, priority: int) -> list[QueueBucket]:
        """Those whose jobs may have others stopped that are of this priority."""
        return [bucket for bucket in self._members if bucket.priority > priority]

    def next_turn(
        self, buckets: Collection[QueueBucket], queues: Mapping[str, Queue], held: Mapping[str, int]
    ) -> QueueBucket | None:
        """The bucket whose first goes next; `held`: GPUs by queue id as they are now. Empty buckets are skipped."""
        keyed = [
            ((-bucket.priority, load(bucket.queue, queues, held), *first), bucket)
            for bucket in buckets
            if (first := self.first(bucket)) is not None
        ]
        return min(keyed, key=lambda pair: pair[0])[1] if keyed else None


def load(queue: str, queues: Mapping[str, Queue], held: Mapping[str, int]) -> float:
    """GPUs held per weight."""
    known = queues.get(queue)
    return held.get(queue, 0) / (known.weight if known and known.weight > 0 else 1.0)


class QueueLimit(NamedTuple):
    """GPUs that a queue holds, and the most that it may; None: that is not known, so nothing more is given to it."""

    queue: str
    held: int
    most: int | None


def over_limit(job: Job, queues: Mapping[str, Queue], held: Mapping[str, int], own: int = 0) -> QueueLimit | None:
    """The limit that keeps its queue from taking that many GPUs now, None when it may. `own`: GPUs that the job itself still holds."""
    queue, others = queues.get(job.queue), held.get(job.queue, 0) - own
    if queue is None:
        return QueueLimit(job.queue, others, None)
    if not job.spec.gpus or not queue.max_gpus or others + job.spec.gpus <= queue.max_gpus:
        return None
    return QueueLimit(job.queue, others, queue.max_gpus)


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
