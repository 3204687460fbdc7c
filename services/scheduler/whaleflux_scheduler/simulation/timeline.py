"""The virtual time of a simulation: what happens when, in an order that never depends on anything but the input."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)  # what second 0 is called in records
NEVER_S = float("inf")


def instant(at_s: float) -> datetime:
    """A second of the simulation as the records of jobs have it."""
    return BEGIN + timedelta(seconds=at_s)


def second_of(at: datetime) -> float:
    """The second of the simulation that a record names."""
    return (at - BEGIN).total_seconds()


class Timeline:
    """Events by their second; those of one second in the order in which they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._added = 0

    @property
    def next_s(self) -> float:
        """When the next one is; infinity where nothing will happen any more."""
        return self._heap[0][0] if self._heap else NEVER_S

    def add(self, at_s: float, happen: Callable[..., None], *about: Any) -> None:
        """`happen(at_s, *about)` is called when its time has come."""
        self._added += 1
        heapq.heappush(self._heap, (at_s, self._added, happen, about))

    def run_until(self, now_s: float) -> None:
        """All that happens up to and with this second, what follows of it included."""
        heap = self._heap
        while heap and heap[0][0] <= now_s:
            at_s, _, happen, about = heapq.heappop(heap)
            happen(at_s, *about)
