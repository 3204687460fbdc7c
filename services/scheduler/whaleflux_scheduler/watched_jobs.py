"""A watch of jobs as one caller sees it: what is not there for the caller is left out, and what ceases to be is told as deleted."""

from __future__ import annotations

from dataclasses import replace

from whaleflux.clock import Clock
from whaleflux.errors import Compacted
from whaleflux.rpc.watching import Kind, WatchMessage
from whaleflux.store import keys
from whaleflux.trust.sight import Sight
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.job_access import JobAccess

LOOK_AGAIN_S = 1.0  # whether the caller sees other queues than before


class WatchedJobs:
    """One stream's. Each change costs the same, however many there are; who sees everything pays nothing."""

    def __init__(self, access: JobAccess, sight: Sight, clock: Clock) -> None:
        self._access, self._sight, self._clock = access, sight, clock
        self._told: set[str] = set()  # keys of jobs that this stream has told of
        self._look_at_s = clock.monotonic() + LOOK_AGAIN_S
        sight.look_again(access.queues())

    def as_told(self, change: WatchMessage[StoredJob]) -> WatchMessage[StoredJob] | None:
        """The change as the caller is told it; None: it is not. Raises Compacted where the caller sees other queues now: list again."""
        if self._sight.everything:
            return change
        if self._clock.monotonic() >= self._look_at_s:
            self._look_at_s = self._clock.monotonic() + LOOK_AGAIN_S
            if self._sight.look_again(self._access.queues()):
                raise Compacted(change.resource_version)
        if change.kind is Kind.BOOKMARK:
            return replace(change, unreadable=tuple(filter(self._is_named, change.unreadable)))
        if change.value is None:
            known = change.key in self._told or self._is_named(change.key)
            self._told.discard(change.key)
            return change if known else None
        if not self._access.hides(change.value, self._sight):
            self._told.add(change.key)
            return change
        if change.key in self._told:
            self._told.discard(change.key)
            return WatchMessage(Kind.DELETED, change.resource_version, change.key)
        return None

    def _is_named(self, key: str) -> bool:
        return self._sight.sees_named(keys.name_of(key))
