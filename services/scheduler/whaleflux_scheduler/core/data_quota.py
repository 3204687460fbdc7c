"""How much data a queue may hold on nodes: what its jobs and pins hold, and those of queues below it, against the quota of each. Pure.

A copy that several queues hold counts once in each of them, so that nobody's room depends on who else reads it; in a queue above both it counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from whaleflux.quantities import shown_bytes
from whaleflux_scheduler.core.placement.pin_book import Copy, PinBook
from whaleflux_scheduler.core.quota import QueueNode, QuotaTree


class DataLimit(NamedTuple):
    """What keeps a queue from holding more: bytes that it (or one above it) holds, the most that it may, and what more was asked for."""

    queue: str
    held_bytes: int
    most_bytes: int
    more_bytes: int

    @property
    def words(self) -> str:
        held, most, more = map(shown_bytes, (self.held_bytes, self.most_bytes, self.more_bytes))
        return f"queue {self.queue} holds {held} of at most {most} of data on nodes, and {more} more would be needed"


def held(quota: QuotaTree, book: PinBook) -> Counter[str]:
    """Bytes that each queue and those below it hold, by id; of those that hold any."""
    sums = Counter[str]()
    for of in book.queues():
        for up in quota.node(of).path():
            sums[up.id] += book.charged_bytes(of)
    return sums


def over(quota: QuotaTree, book: PinBook, queue: str, holder: str, copies: Collection[Copy]) -> DataLimit | None:
    """What keeps the holder from holding these for its queue, instead of what it holds; None: nothing."""
    limited: list[QueueNode] = [up for up in quota.node(queue).path() if up.queue.data_quota_bytes]
    more = book.more_bytes(queue, holder, copies) if limited else 0
    if more <= 0:
        return None
    for up in limited:
        now = _held_by(up, book)
        if now + more > up.queue.data_quota_bytes:
            return DataLimit(up.id, now, up.queue.data_quota_bytes, more)
    return None


def _held_by(queue: QueueNode, book: PinBook) -> int:
    """Bytes that it and those below it hold: asked at each start, so that the other queues are not looked at."""
    return book.charged_bytes(queue.id) + sum(_held_by(one, book) for one in queue.below)
