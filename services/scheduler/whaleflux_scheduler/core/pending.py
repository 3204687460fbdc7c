"""Jobs that wait, in classes: those of one queue and priority that ask for the same, so that one answer does for all of them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from whaleflux_scheduler.core.model import Job


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
