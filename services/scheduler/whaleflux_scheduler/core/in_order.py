"""The jobs of a queue in their order, kept as they come and go: where one stands is found without looking at the others. Pure.

A list of short sorted lists: one more or less costs a step in one of them, a position the number of lists (one for hundreds of jobs).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

from whaleflux_scheduler.core.model import Job

Order = tuple[float, float, str]
_MOST = 512  # in one list


def order_of(job: Job) -> Order:
    """Priority, then submission; among jobs of one queue a smaller key goes first."""
    return (-job.spec.priority, job.create_time.timestamp(), job.name)


class InOrder:
    """Keys of jobs, each once."""

    def __init__(self, keys: Iterable[Order] = ()) -> None:
        known = sorted(keys)
        self._lists = [known[at : at + _MOST // 2] for at in range(0, len(known), _MOST // 2)]
        self._last = [part[-1] for part in self._lists]

    def add(self, key: Order) -> None:
        """One more."""
        if not self._lists:
            self._lists, self._last = [[key]], [key]
            return
        at = min(bisect.bisect_left(self._last, key), len(self._lists) - 1)
        part = self._lists[at]
        bisect.insort(part, key)
        if len(part) > _MOST:
            self._lists[at : at + 1] = [part[: _MOST // 2], part[_MOST // 2 :]]
            self._last[at : at + 1] = [part[_MOST // 2 - 1], part[-1]]
        else:
            self._last[at] = part[-1]

    def remove(self, key: Order) -> None:
        """It is not among them any more. Raises ValueError when it was not."""
        at = bisect.bisect_left(self._last, key)
        part = self._lists[at] if at < len(self._lists) else []
        del part[part.index(key, bisect.bisect_left(part, key))]
        if part:
            self._last[at] = part[-1]
        else:
            del self._lists[at], self._last[at]

    def before(self, key: Order) -> int:
        """How many have a smaller one."""
        at = bisect.bisect_left(self._last, key)
        earlier = sum(map(len, self._lists[:at]))
        return earlier + bisect.bisect_left(self._lists[at], key) if at < len(self._lists) else earlier

    def __iter__(self) -> Iterator[Order]:
        for part in self._lists:
            yield from part
