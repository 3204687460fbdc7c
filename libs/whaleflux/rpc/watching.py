"""Watch rpcs, both ends: `watch_resources` for servicers, `follow` for clients.

`watch_resources` turns a store's watch into the changes to stream; `follow` keeps a client's stream open through
restarts, resuming where it was.

The contract is that of Kubernetes: from `resource_version` 0 everything that exists comes first as added, then a
bookmark, then changes. A message's `resource_version` is where a broken stream may safely resume: 0 until the first
listing is complete, and within one transaction that changed several resources the revision before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import FieldViolation, InvalidArgument, OutOfRange, StatusError
from whaleflux.retry import Backoff
from whaleflux.store import keys
from whaleflux.store.api import Batch, Entry, Snapshot, Store
from whaleflux.store.reading import read_all

T = TypeVar("T")
R = TypeVar("R")
BOOKMARK_EVERY_S = 10.0
LIST_AT_ONCE = 500
RETRY = Backoff(longest_s=2.0)


class Kind(Enum):
    """The fields of the oneof in every Watch response."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"
    BOOKMARK = "bookmark"


@dataclass(frozen=True, slots=True)
class WatchMessage(Generic[T]):
    """One message of a watch. `value` is set for ADDED and MODIFIED, `key` for all but BOOKMARK.

    `resource_version` is where a watch that breaks after this message resumes. `unreadable` of the BOOKMARK that ends a first
    listing: keys that exist and were not added, since their records cannot be read.
    """

    kind: Kind
    resource_version: int
    key: str = ""
    value: T | None = None
    unreadable: tuple[str, ...] = ()


async def watch_resources(
    store: Store,
    prefix: str,
    since: int,
    decode: Callable[[Entry], T],
    *,
    clock: Clock | None = None,
    bookmark_every_s: float = BOOKMARK_EVERY_S,
) -> AsyncGenerator[WatchMessage[T], None]:
    """Changes under `prefix` after revision `since`; 0: first everything that exists. Endless.

    Raises Compacted when the history after `since` is gone, InvalidArgument for a negative `since`. What cannot be read is
    logged and left out; the bookmark of a first listing names it, since what is not listed counts as gone.
    """
    if since < 0:
        raise InvalidArgument(
            FieldViolation("resource_version", f"{since} is negative; use 0 or one that a listing gave")
        )
    if since == 0:
        unreadable: list[str] = []
        async for page in _pages(store, prefix):
            read = read_all(page.entries, decode)
            for entry, value in read.values:
                yield WatchMessage(Kind.ADDED, 0, entry.key, value)
            unreadable += read.unreadable
            since = page.revision
        yield WatchMessage(Kind.BOOKMARK, since, unreadable=tuple(unreadable))
    time = clock or SystemClock()
    told_s = time.monotonic()
    async with contextlib.aclosing(store.watch(prefix, after=since)) as batches:
        async for batch in batches:
            if not batch.events and time.monotonic() - told_s < bookmark_every_s:
                continue
            for change in _changes(batch, decode):
                yield change
            told_s = time.monotonic()


async def _pages(store: Store, prefix: str) -> AsyncIterator[Snapshot]:
    """All entries of one state, in pages; at least one page, so that the state's revision is known."""
    page = await store.list(prefix, limit=LIST_AT_ONCE)
    yield page
    while page.after:
        page = await store.list(prefix, after=page.after, limit=LIST_AT_ONCE, at=page.revision)
        yield page


def _changes(batch: Batch, decode: Callable[[Entry], T]) -> list[WatchMessage[T]]:
    if not batch.events:
        return [WatchMessage(Kind.BOOKMARK, batch.revision)]
    changes: list[WatchMessage[T]] = []
    for position, event in enumerate(batch.events, start=1):
        resume = batch.revision if position == len(batch.events) else batch.revision - 1
        if event.entry is None:
            changes.append(WatchMessage(Kind.DELETED, resume, event.key))
        else:
            kind = Kind.ADDED if event.entry.created == event.entry.revision else Kind.MODIFIED
            for _, value in read_all([event.entry], decode).values:  # else who watches keeps what it knows of it
                changes.append(WatchMessage(kind, resume, event.key, value))
    return changes


def fill(response: R, change: WatchMessage[Any], shown: Any = None) -> R:
    """Says the change in a response of one of our watches, whose `event` has a field for each kind; `shown`: instead of its value."""
    said: Any = response
    said.resource_version = change.resource_version
    match change.kind:
        case Kind.BOOKMARK:
            said.bookmark.unreadable.extend(map(keys.name_of, change.unreadable))
            said.bookmark.SetInParent()
        case Kind.DELETED:
            said.deleted = keys.name_of(change.key)
        case kind:
            getattr(said, kind.value).CopyFrom(shown or change.value)
    return response


@dataclass(frozen=True, slots=True)
class Followed(Generic[T]):
    """What a follower is told: `value` exists now, or None: the resource `name` is gone; `synced` marks a full picture.

    Each time the stream had to start from nothing, names that exist no more are told as gone before `synced`; what exists and
    cannot be read stays as it was known.
    """

    name: str = ""
    value: T | None = None
    synced: bool = False


class Following:
    """What a client knows of a collection, over streams of which each goes on where the last broke. Pure.

    `since` is the `resource_version` that the next stream asks for. The responses need the oneof `event` of all our watches.
    """

    def __init__(self) -> None:
        self.since = 0
        self._known: set[str] = set()
        self._listed: set[str] | None = set()  # names of the first listing while it is being delivered, else None

    def received(self, response: Any) -> list[Followed[Any]]:
        """What is to be told of a message."""
        told = self._apply(response)
        if response.WhichOneof("event") == Kind.BOOKMARK.value and self._listed is not None:
            self._listed.update(response.bookmark.unreadable)
            told += [Followed(name) for name in self._known - self._listed]
            self._known &= self._listed
            self._listed = None
            told.append(Followed(synced=True))
        self.since = max(self.since, response.resource_version)
        return told

    def ended(self, error: StatusError | None) -> None:
        """A stream broke, or ended without an error."""
        if isinstance(error, OutOfRange):  # Compacted, or what a proxy left of it
            self.since = 0
        if self.since == 0:
            self._listed = set()

    def _apply(self, response: Any) -> list[Followed[Any]]:
        which = response.WhichOneof("event")
        if which == Kind.DELETED.value:
            self._known.discard(response.deleted)
            return [Followed(response.deleted)]
        if which in {Kind.ADDED.value, Kind.MODIFIED.value}:
            value = getattr(response, which)
            self._known.add(value.name)
            if self._listed is not None:
                self._listed.add(value.name)
            return [Followed(value.name, value)]
        return []


async def follow(
    open_watch: Callable[[int], AsyncIterator[Any]],
    *,
    clock: Clock | None = None,
    on_broken: Callable[[StatusError], None] = lambda _: None,
) -> AsyncGenerator[Followed[Any], None]:
    """A resource collection of another service, for ever: `open_watch(resource_version)` is its Watch rpc.

    Broken streams are opened again with growing pauses (0.1 to 2 s) after the last message; on Compacted everything
    is listed anew. `on_broken` hears why each stream ended.
    """
    time, following, failures = clock or SystemClock(), Following(), 0
    while True:
        broken: StatusError | None = None
        try:
            async for response in open_watch(following.since):
                failures = 0
                for told in following.received(response):
                    yield told
        except StatusError as error:
            broken = error
            on_broken(error)
        following.ended(broken)
        failures += 1
        await time.sleep(RETRY.pause_s(failures))
