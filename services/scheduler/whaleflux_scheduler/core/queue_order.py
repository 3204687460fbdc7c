"""Whose turn it is: guarantees, priorities and shares of queues (`queue_shares`), then the order of submission."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.pending import QueueBucket, QueueBuckets
from whaleflux_scheduler.core.queue_shares import Turn


def order_of(job: Job) -> tuple[int, float, str]:
    """Priority, then submission; among jobs of one queue a smaller key goes first."""
    return (-job.spec.priority, job.create_time.timestamp(), job.name)


def next_turn(
    waiting: QueueBuckets, buckets: Collection[QueueBucket], turn: Callable[[QueueBucket, str], Turn]
) -> QueueBucket | None:
    """The bucket whose first goes next; `turn` is asked of each and the name of its first job. Empty buckets are skipped."""
    keyed = [
        ((*turn(bucket, first[1]), *first), bucket)
        for bucket in buckets
        if (first := waiting.first(bucket)) is not None
    ]
    return min(keyed, key=lambda pair: pair[0])[1] if keyed else None


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
