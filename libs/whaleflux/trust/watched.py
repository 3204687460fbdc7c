"""A watch as one caller sees it: what is not there for the caller is left out, and what ceases to be is told as deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from whaleflux.clock import Clock
from whaleflux.errors import Compacted
from whaleflux.rpc.watching import Kind, WatchMessage
from whaleflux.trust.sight import Sight

T = TypeVar("T")
LOOK_AGAIN_S = 1.0  # whether the caller sees other queues than before


@dataclass(frozen=True, slots=True)
class Rules(Generic[T]):
    """Whose what is watched is."""

    hides: Callable[[T], bool]  # whether a resource is not there for the caller
    names: Callable[
        [str], bool | None
    ]  # whether the caller may be told of a key of which there is no record; None: nobody knows any more
    queues: Callable[[], Iterable[str]]  # ids of those that decide


class Watched(Generic[T]):
    """One stream's. Each change costs the same, however many there are; who sees everything pays nothing."""

    def __init__(self, sight: Sight, clock: Clock, rules: Rules[T]) -> None:
        self._sight, self._clock, self._rules = sight, clock, rules
        self._told: set[str] = set()  # keys that this stream has told of
        self._look_at_s = clock.monotonic() + LOOK_AGAIN_S
        sight.look_again(rules.queues())

    def as_told(self, change: WatchMessage[T]) -> WatchMessage[T] | None:
        """The change as the caller is told it; None: it is not. Raises Compacted where the caller sees other queues now: list again."""
        if self._sight.everything:
            return change
        if self._clock.monotonic() >= self._look_at_s:
            self._look_at_s = self._clock.monotonic() + LOOK_AGAIN_S
            if self._sight.look_again(self._rules.queues()):
                raise Compacted(change.resource_version)
        if change.kind is Kind.BOOKMARK:
            return replace(change, unreadable=tuple(filter(self._rules.names, change.unreadable)))
        if change.value is None:
            known = change.key in self._told or self._rules.names(change.key)
            self._told.discard(change.key)
            if known is None:  # an earlier stream may have told of it: only a new list tells whether it is gone
                raise Compacted(change.resource_version)
            return change if known else None
        if not self._rules.hides(change.value):
            self._told.add(change.key)
            return change
        if change.key in self._told:
            self._told.discard(change.key)
            return WatchMessage(Kind.DELETED, change.resource_version, change.key)
        return None
