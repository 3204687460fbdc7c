"""Whose turn it is: priority first, then the queue that holds least for its weight, then the order of submission."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from whaleflux_scheduler.core.model import Job, Queue
from whaleflux_scheduler.core.pending import QueueBucket, QueueBuckets


def order_of(job: Job) -> tuple[int, float, str]:
    """Priority, then submission; among jobs of one queue a smaller key goes first."""
    return (-job.spec.priority, job.create_time.timestamp(), job.name)


def next_turn(
    waiting: QueueBuckets, buckets: Collection[QueueBucket], queues: Mapping[str, Queue], held: Mapping[str, int]
) -> QueueBucket | None:
    """The bucket whose first goes next; `held`: GPUs by queue id as they are now. Empty buckets are skipped."""
    keyed = [
        ((-bucket.priority, load(bucket.queue, queues, held), *first), bucket)
        for bucket in buckets
        if (first := waiting.first(bucket)) is not None
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
