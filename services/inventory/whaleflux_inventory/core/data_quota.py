"""Which queues' data quotas count a pin, and whether it is within them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from whaleflux.errors import FailedPrecondition
from whaleflux.quantities import shown_bytes
from whaleflux.reasons import ErrorReason

MOST_LEVELS = 64  # of queues: a record that is wrong makes no loop


@dataclass(frozen=True, slots=True)
class QueueQuota:
    """A queue's place and its quota: `above` is a name, "" at the top; `most_bytes` 0: no limit."""

    name: str
    above: str
    most_bytes: int


def chain(queues: Mapping[str, QueueQuota], name: str) -> Iterator[QueueQuota]:
    """The queue and those above it; none that is not known."""
    for _ in range(MOST_LEVELS):
        if (one := queues.get(name)) is None:
            return
        yield one
        name = one.above


def below(queues: Mapping[str, QueueQuota], top: str, charged: Iterable[tuple[str, int]]) -> int:
    """Bytes, of what is charged to queues, that count in `top`."""
    return sum(size for queue, size in charged if any(one.name == top for one in chain(queues, queue)))


def check(queue: QueueQuota, held_bytes: int, more_bytes: int, dataset: str) -> None:
    """Raises FailedPrecondition with the numbers when so much more would be beyond the quota."""
    if not queue.most_bytes or held_bytes + more_bytes <= queue.most_bytes:
        return
    short = queue.name.removeprefix("queues/")
    raise FailedPrecondition(
        f"{dataset} cannot be pinned: {queue.name} may hold {shown_bytes(queue.most_bytes)} of data on nodes and holds "
        f"{shown_bytes(held_bytes)}: of {shown_bytes(more_bytes)} more {shown_bytes(held_bytes + more_bytes - queue.most_bytes)} are too many; "
        f"unpin others (whaleflux datasets unpin), name another queue (--queue), or raise it: whaleflux queue set {short} --data-quota SIZE",
        reason=ErrorReason.DATA_QUOTA,
        metadata={"name": dataset, "queue": queue.name},
    )
