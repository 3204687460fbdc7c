"""A heap of things whose keys change: what is put again replaces what was there, which is skipped when it comes to the top."""

from __future__ import annotations

import heapq
import itertools
from typing import Any, Generic, Protocol, TypeVar


class _HasEntry(Protocol):
    entry: Any  # what stands for it in the heap at present; None: nothing does


T = TypeVar("T", bound=_HasEntry)
Entry = tuple[Any, int, T]
"""Its key, a number that makes it comparable, the thing."""
_numbers = itertools.count()


class LazyHeap(Generic[T]):
    """The least key first. A thing is in one such heap at most: it knows its own entry."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[Entry[T]] = []

    def put(self, thing: T, key: Any) -> None:
        """With this key from now on."""
        thing.entry = entry = (key, next(_numbers), thing)
        heapq.heappush(self._entries, entry)

    def clear(self) -> None:
        """Of things that have left all the same."""
        self._entries.clear()

    def top(self) -> Entry[T] | None:
        """The one with the least key."""
        while self._entries:
            first = self._entries[0]
            stands: object = first[2].entry
            if stands is first:
                return first
            heapq.heappop(self._entries)
        return None
