"""A prefix of the store as a dict at a known revision, kept current by one watch.

Loops read from it and wait for their own writes with `at_least`; servicers answer lists from it. It outlives restarts
of the store (what it holds is then as old as `revision` says) and lists again when its history was compacted.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Generic, Self, TypeAlias, TypeVar

from whaleflux.errors import Compacted, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff
from whaleflux.store.api import Entry, Snapshot, Store

T = TypeVar("T")
log = logging.getLogger(__name__)

QUIET_AFTER_S = (
    0.02  # a watch tells of quiet revisions late: after this a waiter asks whether there was anything to tell
)
REFRESH_AFTER_S = 1.0  # after this it looks for itself
_RETRY = Backoff()


_Mark: TypeAlias = tuple[int, int]


def _mark(entry: Entry) -> _Mark:
    """Tells an entry from others of its key, also from one with its revision in a history that was lost."""
    return entry.revision, hash(entry.value)


@dataclass(frozen=True, slots=True)
class ValueChange(Generic[T]):
    """One key's value before and after; None is absent. `revision` is the store's."""

    key: str
    old: T | None
    new: T | None
    revision: int


class Cache(Generic[T]):
    """`async with Cache(store, prefix, decode) as cache:` returns once the first listing is in.

    A failure that no retry heals (permission, another cluster) cancels the body and is raised at its end.

    A value that `decode` cannot read is logged and named in `unreadable`; it is not gone. Its last known value stays in
    `values`, or what `stand_in` makes of the entry and of that value (None: there was none).
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        decode: Callable[[Entry], T],
        *,
        stand_in: Callable[[Entry, T | None], T | None] = lambda _, last: last,
    ) -> None:
        self._store, self._prefix, self._decode, self._stand_in = store, prefix, decode, stand_in
        self._values: dict[str, T] = {}
        self._seen: dict[str, _Mark] = {}
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []  # heap by revision
        self._order = itertools.count()
        self._subscribers: set[_Pending[T]] = set()
        self._catching_up, self._asking = asyncio.Lock(), asyncio.Lock()
        self._ask_again_s = 0.0
        self._group = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None
        self.revision = 0
        self.unreadable: dict[str, str] = {}
        self.values: Mapping[str, T] = MappingProxyType(self._values)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._task = self._group.create_task(self._run())
        try:
            await self._wait_for(1)
        except BaseException as cancelled:
            await self.__aexit__(type(cancelled), cancelled, cancelled.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def get(self, key: str) -> T | None:
        return self._values.get(key)

    async def at_least(self, revision: int, *, timeout_s: float = 5.0, asks_after_s: float = QUIET_AFTER_S) -> None:
        """Returns when everything up to `revision`, which a commit returned, is in `values`; Unavailable when it takes longer.

        After `asks_after_s` the store is asked whether anything was written here: 0 for who expects that nothing was.
        A store that went back to a backup has lost that commit; then `values` are what the backup has.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if await self._comes_within(revision, asks_after_s) or await self._is_quiet(revision):
                    return None
                if await self._comes_within(revision, REFRESH_AFTER_S) or await self._catch_up(revision):
                    return None
                return await self._wait_for(revision)
        except TimeoutError:
            told = f"{self._prefix} is known up to revision {self.revision}, not {revision}, after {timeout_s:g} s"
            raise Unavailable(told, reason=ErrorReason.CACHE_BEHIND) from None

    async def _comes_within(self, revision: int, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._wait_for(revision)
                return True
        except TimeoutError:
            return False

    async def _is_quiet(self, wanted: int) -> bool:
        """True: nothing was written here up to `wanted`, or what was has come meanwhile. One waiter asks for all, and now and then."""
        async with self._asking:
            if self.revision >= wanted:
                return True
            if (now_s := asyncio.get_running_loop().time()) < self._ask_again_s:
                return False
            extent = await self._store.extent(self._prefix)
            if not wanted <= extent.revision > self.revision:
                return self.revision >= wanted
            if extent.written > self.revision or extent.keys != len(self._seen):
                self._ask_again_s = now_s + REFRESH_AFTER_S  # the watch is behind, and will tell
                return False
            self._apply({}, extent.revision)
            return True

    async def changes(self) -> AsyncGenerator[tuple[ValueChange[T], ...], None]:
        """First what is there (as changes from None), then what changed since the last turn, for ever.

        A key that changed several times in between appears once, from its first old to its last new value, so a slow
        reader holds at most one change per key. Ends when the cache is closed.
        """
        pending = _Pending[T]()
        pending.add(ValueChange(key, None, value, self.revision) for key, value in self._values.items())
        self._subscribers.add(pending)
        try:
            while True:
                if group := pending.take():
                    yield group
                elif self._task is None or self._task.done():
                    return
                else:
                    await pending.some.wait()
        finally:
            self._subscribers.discard(pending)

    async def _run(self) -> None:
        try:
            await self._load_patiently()
            while True:
                with contextlib.suppress(Compacted):
                    await self._follow()
                await self._load_patiently()  # whatever its revision: a restored backup goes back in time
        finally:
            asyncio.get_running_loop().call_soon(self._wake_all)

    def _wake_all(self) -> None:
        for pending in self._subscribers:
            pending.some.set()

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._store.watch(self._prefix, after=self.revision)) as batches:
            async for batch in batches:
                if batch.revision > self.revision:  # else a listing in between has shown it already
                    entries = {event.key: event.entry for event in batch.events}
                    self._apply(entries, batch.revision)

    async def _load_patiently(self) -> None:
        failures = 0
        while True:
            try:
                return self._adopt(await self._store.list(self._prefix))
            except (Unavailable, Compacted) as reason:
                log.warning("listing %s failed, trying again: %s", self._prefix, reason)
            failures += 1
            await asyncio.sleep(_RETRY.pause_s(failures))

    async def _catch_up(self, wanted: int) -> bool:
        """Lists for a waiter, beside the watch. True: the store itself is not as far as `wanted`, it went back to a backup."""
        async with self._catching_up:
            snapshot = await self._store.list(self._prefix)
        lost = snapshot.revision < wanted
        if lost or snapshot.revision > self.revision:
            self._adopt(snapshot)
        return lost

    def _adopt(self, snapshot: Snapshot) -> None:
        listed = {entry.key: entry for entry in snapshot.entries}
        changed: dict[str, Entry | None] = dict.fromkeys(key for key in self._seen if key not in listed)
        changed |= {key: entry for key, entry in listed.items() if self._seen.get(key) != _mark(entry)}
        self._apply(changed, snapshot.revision)

    def _apply(self, entries: Mapping[str, Entry | None], revision: int) -> None:
        changes = [change for key, entry in entries.items() if (change := self._set(key, entry, revision))]
        self.revision = revision
        if changes:
            for pending in self._subscribers:
                pending.add(changes)
        while self._waiters and self._waiters[0][0] <= revision:
            waiter = heapq.heappop(self._waiters)[2]
            if not waiter.done():
                waiter.set_result(None)

    def _set(self, key: str, entry: Entry | None, revision: int) -> ValueChange[T] | None:
        self.unreadable.pop(key, None)
        old = self._values.pop(key, None)
        new = self._read(entry, old) if entry else None
        if entry:
            self._seen[key] = _mark(entry)
        else:
            self._seen.pop(key, None)
        if new is not None:
            self._values[key] = new
        return None if old is None and new is None else ValueChange(key, old, new, revision)

    def _read(self, entry: Entry, last: T | None) -> T | None:
        try:
            return self._decode(entry)
        except Exception as error:
            log.exception("cannot read %s at revision %d", entry.key, entry.revision)
            self.unreadable[entry.key] = f"{type(error).__name__}: {error}"
            return self._stand_in(entry, last)

    async def _wait_for(self, revision: int) -> None:
        if self.revision < revision:
            waiter = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiters, (revision, next(self._order), waiter))
            await waiter


class _Pending(Generic[T]):
    """One subscriber's untaken changes, at most one per key."""

    def __init__(self) -> None:
        self._changes: dict[str, ValueChange[T]] = {}
        self.some = asyncio.Event()

    def add(self, changes: Iterable[ValueChange[T]]) -> None:
        for change in changes:
            earlier = self._changes.pop(change.key, None)
            old = earlier.old if earlier else change.old
            if old is not None or change.new is not None:
                self._changes[change.key] = ValueChange(change.key, old, change.new, change.revision)
        if self._changes:
            self.some.set()

    def take(self) -> tuple[ValueChange[T], ...]:
        taken = tuple(self._changes.values())
        self._changes.clear()
        self.some.clear()
        return taken
