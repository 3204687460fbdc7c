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
_TIDY_FROM = 128


class LazyHeap(Generic[T]):
    """The least key first. A thing is in one such heap at most: it knows its own entry."""

    __slots__ = ("_entries", "_tidy_at")

    def __init__(self) -> None:
        self._entries: list[Entry[T]] = []
        self._tidy_at = _TIDY_FROM  # entries; what was put again lies below the least for as long as that stays

    def __len__(self) -> int:
        """Entries, those that were replaced included."""
        return len(self._entries)

    def put(self, thing: T, key: Any) -> None:
        """With this key from now on."""
        thing.entry = entry = (key, next(_numbers), thing)
        heapq.heappush(self._entries, entry)
        if len(self._entries) > self._tidy_at:
            self._tidy()

    def _tidy(self) -> None:
        self._entries = [entry for entry in self._entries if _stands(entry)]
        heapq.heapify(self._entries)
        self._tidy_at = max(_TIDY_FROM, 2 * len(self._entries))

    def things(self) -> list[T]:
        """Those that are in it, in no order."""
        return [entry[2] for entry in self._entries if _stands(entry)]

    def clear(self) -> None:
        """Of things that have left all the same."""
        self._entries.clear()

    def top(self) -> Entry[T] | None:
        """The one with the least key."""
        while self._entries:
            if _stands(first := self._entries[0]):
                return first
            heapq.heappop(self._entries)
        return None


def _stands(entry: Entry[T]) -> bool:
    stands: object = entry[2].entry
    return stands is entry
