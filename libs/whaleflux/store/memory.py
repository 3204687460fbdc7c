"""The store as a model in memory: what the contract means, a fake for tests, and the oracle of robustness runs.

It keeps the history that watches and old listings need, until `compact` or until `history_limit` revisions.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Compacted, FieldViolation, InvalidArgument, NotFound, Unavailable
from whaleflux.store.api import (
    Batch,
    Condition,
    Entry,
    Extent,
    KeyEvent,
    Lease,
    NoneCreated,
    Put,
    Snapshot,
    Write,
    check,
    conflict,
    holds,
)

LOST_AFTER = 0.8  # of the TTL without an answered keepalive: its holder must stop before others may start


@dataclass(frozen=True, slots=True)
class _Revision:
    number: int
    events: tuple[KeyEvent, ...]
    before: tuple[Entry | None, ...]  # what each event replaced, so that old states can be read


class MemoryStore:
    """A Store in this process. `down = True` makes every call raise Unavailable and stills keepalives and watches."""

    def __init__(self, clock: Clock | None = None, *, history_limit: int = 100_000) -> None:
        self._clock = clock or SystemClock()
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []  # sorted
        self._revision, self._compacted = 1, 0  # etcd starts at 1, too
        self._history: deque[_Revision] = deque()
        self._history_limit = history_limit
        self._changed = asyncio.Event()
        self._leases: dict[int, _MemoryLease] = {}
        self._attached: dict[str, int] = {}  # key -> lease id
        self._lease_ids = itertools.count(1)
        self._down, self._restored = False, 0

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self._wake()

    async def get(self, key: str) -> Entry | None:
        self._reach()
        return self._entries.get(key)

    async def list(self, prefix: str, *, after: str = "", limit: int = 0, at: int = 0) -> Snapshot:
        self._reach()
        revision = at or self._revision
        if revision > self._revision:
            raise InvalidArgument(
                FieldViolation("at", f"{revision} is a future revision; the newest is {self._revision}")
            )
        keys, entries = (self._keys, self._entries) if revision == self._revision else self._state_at(revision)
        first = max(bisect.bisect_left(keys, prefix), bisect.bisect_right(keys, after) if after else 0)
        found = itertools.takewhile(lambda key: key.startswith(prefix), map(keys.__getitem__, range(first, len(keys))))
        page = tuple(entries[key] for key in itertools.islice(found, limit + 1 if limit else None))
        more = bool(limit) and len(page) > limit
        page = page[:limit] if more else page
        return Snapshot(page, revision, page[-1].key if more else "")

    async def extent(self, prefix: str) -> Extent:
        found = (await self.list(prefix)).entries
        return Extent(self._revision, len(found), max((entry.revision for entry in found), default=0))

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        check(writes, when)
        self._reach()
        if failed := [condition for condition in when if not holds(condition, self._compared(condition))]:
            raise conflict(failed)
        leases = [write.lease.id for write in writes if isinstance(write, Put) and write.lease]
        if unknown := [lease for lease in leases if lease not in self._leases]:
            raise NotFound("lease", f"{unknown[0]:x}", "it expired or was revoked")
        return self._apply(writes)

    def _compared(self, condition: Condition) -> Entry | None:
        if not isinstance(condition, NoneCreated):
            return self._entries.get(condition.key)
        below = itertools.islice(self._keys, bisect.bisect_left(self._keys, condition.prefix), None)
        under = itertools.takewhile(lambda key: key.startswith(condition.prefix), below)
        return max((self._entries[key] for key in under), key=condition.made, default=None)

    async def watch(self, prefix: str, *, after: int) -> AsyncGenerator[Batch, None]:
        position = told = max(after, 1)  # the empty store's own revision has no events
        if not self._down and position > self._revision:  # told by a history that is lost
            raise Compacted(self._revision)
        restored = self._restored
        while True:
            changed = self._changed
            if not self._down and restored != self._restored:
                raise Compacted(self._revision)
            while not self._down and position < self._revision:
                if position < self._compacted:
                    raise Compacted(self._compacted)
                revision = self._history[position - self._revision]  # the history ends with the newest revision
                position = revision.number
                if events := tuple(event for event in revision.events if event.key.startswith(prefix)):
                    told = position
                    yield Batch(position, events)
            if not self._down and told < position:
                told = position
                yield Batch(position)
                continue  # the world may have moved while the caller held the bookmark
            await changed.wait()

    async def lease(self, ttl_s: float) -> Lease:
        self._reach()
        lease = _MemoryLease(self, next(self._lease_ids), ttl_s, self._clock)
        self._leases[lease.id] = lease
        return lease

    async def close(self) -> None:
        for lease in self._leases.values():
            lease.silence()

    async def compact(self, revision: int) -> None:
        """Forgets the history up to `revision`; watches behind it and older listings raise Compacted."""
        self._reach()
        self._forget(min(revision, self._revision))

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease from outside, as an operator or the server's clock would."""
        if lease := self._leases.pop(lease_id, None):
            lease.end()
            keys = [key for key, owner in self._attached.items() if owner == lease_id]
            if keys:
                self._write([(key, None) for key in keys])

    async def restore(self, revision: int) -> None:
        """Goes back to the state at `revision`, as after a restored backup: what came later never was.

        Revisions are given again; watches raise Compacted. Leases go on without the keys that the backup lacks.
        """
        self._reach()
        self._keys, self._entries = list(self._state_at(revision)[0]), self._state_at(revision)[1]
        while self._history and self._history[-1].number > revision:
            self._history.pop()
        self._revision, self._restored = revision, self._restored + 1
        self._attached = {key: lease for key, lease in self._attached.items() if key in self._entries}
        self._wake()

    def _reach(self) -> None:
        if self._down:
            raise Unavailable("the store does not answer")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _apply(self, writes: Sequence[Write]) -> int:
        changes: list[tuple[str, Put | None]] = []
        for write in writes:
            if isinstance(write, Put):
                changes.append((write.key, write))
            elif write.key in self._entries:
                changes.append((write.key, None))
        return self._write(changes) if changes else self._revision

    def _write(self, changes: Sequence[tuple[str, Put | None]]) -> int:
        self._revision += 1
        before = tuple(self._entries.get(key) for key, _ in changes)
        events = tuple(KeyEvent(key, self._set(key, put)) for key, put in changes)
        self._history.append(_Revision(self._revision, events, before))
        if len(self._history) > self._history_limit:
            self._forget(self._revision - self._history_limit)
        self._wake()
        return self._revision

    def _set(self, key: str, put: Put | None) -> Entry | None:
        self._attached.pop(key, None)
        old = self._entries.pop(key, None)
        if put is None:
            del self._keys[bisect.bisect_left(self._keys, key)]
            return None
        if old is None:
            bisect.insort(self._keys, key)
        created, version = (old.created, old.version + 1) if old else (self._revision, 1)
        self._entries[key] = entry = Entry(key, put.value, self._revision, created, version)
        if put.lease:
            self._attached[key] = put.lease.id
        return entry

    def _forget(self, revision: int) -> None:
        self._compacted = max(self._compacted, revision)
        while self._history and self._history[0].number <= self._compacted:
            self._history.popleft()

    def _state_at(self, revision: int) -> tuple[Sequence[str], dict[str, Entry]]:
        if revision < self._compacted:
            raise Compacted(self._compacted)
        entries = dict(self._entries)
        for past in reversed(self._history):
            if past.number <= revision:
                break
            for event, old in zip(past.events, past.before, strict=True):
                entries.pop(event.key, None)
                if old is not None:
                    entries[event.key] = old
        return sorted(entries), entries


class _MemoryLease:
    """Kept alive on the store's clock; `silence` stops the keepalives as a dead or cut-off holder would."""

    def __init__(self, store: MemoryStore, lease_id: int, ttl_s: float, clock: Clock) -> None:
        self.id, self.ttl_s, self.lost = lease_id, ttl_s, asyncio.Event()
        self._store, self._clock, self._silent = store, clock, False
        self._renewed_s = clock.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def revoke(self) -> None:
        await self._store.revoke(self.id)

    def silence(self) -> None:
        self._silent = True

    def end(self) -> None:
        self.lost.set()
        if self._task is not asyncio.current_task():
            self._task.cancel()

    async def _live(self) -> None:
        while True:
            await self._clock.sleep(self.ttl_s / 10)
            if not (self._silent or self._store.down):
                self._renewed_s = self._clock.monotonic()
            silent_s = self._clock.monotonic() - self._renewed_s
            if silent_s >= LOST_AFTER * self.ttl_s:
                self.lost.set()
            if silent_s >= self.ttl_s:
                await self._store.revoke(self.id)
                return
