"""The publisher: turns what an owner wrote into the store into events, however often either side restarts.

Events are derived, not sent on the side: a crash between a commit and its event loses nothing, since the loop goes on
after the last revision that it saved as published, and repeats carry the same id (`key@revision`), which the stream's
duplicate window and the consumers' `LastSeen` drop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Compacted, Refusal, Unavailable
from whaleflux.events.api import Bus
from whaleflux.events.subjects import change_id
from whaleflux.store import keys
from whaleflux.store.api import Batch, Entry, Held, Leadership, Put, Store
from whaleflux.telemetry import Event, Metric, counter, get_logger

log = get_logger(__name__)
SAVE_EVERY_S = 1.0  # what a crash makes it publish again, at most
SAVE_IDLE_REVISIONS = 1_000  # saved without events too, or an idle prefix falls behind compaction
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change. `old` is None when it was created (or its past is compacted), `new` when it was deleted."""

    key: str
    old: Entry | None
    new: Entry | None
    revision: int


@dataclass(frozen=True, slots=True)
class News:
    """What to publish about a change. Put a stored `traceparent` into the headers, so that traces go on."""

    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None


Describe = Callable[[Change], News | None]
"""Makes the event of a change, or None when it is nobody's business. Pure; what it raises is logged and skipped."""


class Publisher:
    """Publishes what changes under `prefix`; at most one runs per `name`, so give it the owner's leadership.

    The revision up to which everything is published is kept at `keys.PUBLISHERS + name`. On its first start, and when
    history was compacted while it was away, it publishes the current state of what is new since; what was deleted
    meanwhile it cannot know then (consumers re-list).
    """

    def __init__(
        self,
        store: Store,
        bus: Bus,
        prefix: str,
        describe: Describe,
        *,
        name: str,
        leader: Leadership | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._store, self._bus, self._prefix, self._describe = store, bus, prefix, describe
        self._key = keys.PUBLISHERS + name
        self._leader = leader
        self._clock: Clock = clock or SystemClock()
        self._known: dict[str, Entry] = {}  # the state under the prefix at `revision`
        self._begun = False
        self._changed = False  # something was published since the last save
        self._saved = 0
        self.revision = 0  # everything up to here is published

    async def run(self) -> None:
        """Until cancelled. Raises Fenced when the leadership is lost; outages of store and bus it waits out."""
        failures = 0
        while True:
            before = self.revision
            try:
                await self._follow()
            except Compacted:
                log.warning(Event.PUBLISHER_RELISTED, prefix=self._prefix, revision=self.revision)
                self._begun = True
                await self._catch_up()
            except Unavailable as outage:
                failures = failures + 1 if self.revision == before else 0
                log.warning(Event.PUBLISHER_WAITING, prefix=self._prefix, reason=str(outage))
                await self._clock.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])

    async def _follow(self) -> None:
        if not self._begun:
            await self._begin()
            self._begun = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                group.create_task(self._keep_saving())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _begin(self) -> None:
        """Learns the state at the saved revision, so that the next change has its `old`."""
        saved = await self._store.get(self._key)
        if saved is None:
            return await self._catch_up()
        self.revision = self._saved = int(saved.value)
        try:
            then = await self._store.list(self._prefix, at=self.revision)
        except Compacted:
            return await self._catch_up()
        self._known = {entry.key: entry for entry in then.entries}

    async def _catch_up(self) -> None:
        """Publishes the current state of whatever differs from what is known, then goes on from there."""
        while True:
            try:
                now = await self._store.list(self._prefix)
                break
            except Unavailable:
                await self._clock.sleep(RETRY_S[-1])
        listed = {entry.key: entry for entry in now.entries}
        gone = [Change(key, old, None, now.revision) for key, old in self._known.items() if key not in listed]
        newer = [e for e in now.entries if e.revision > self.revision]
        await self._publish([*gone, *(Change(e.key, self._known.get(e.key), e, e.revision) for e in newer)])
        self._known = listed
        self._advance(now.revision, changed=True)

    async def _watch(self) -> None:
        async with contextlib.aclosing(self._store.watch(self._prefix, after=self.revision)) as batches:
            async for batch in batches:
                await self._publish(self._changes(batch))
                for event in batch.events:
                    if event.entry is None:
                        self._known.pop(event.key, None)
                    else:
                        self._known[event.key] = event.entry
                self._advance(batch.revision, changed=bool(batch.events))

    def _changes(self, batch: Batch) -> list[Change]:
        return [Change(e.key, self._known.get(e.key), e.entry, batch.revision) for e in batch.events]

    def _advance(self, revision: int, *, changed: bool) -> None:
        self.revision = max(self.revision, revision)
        self._changed = self._changed or changed

    async def _publish(self, changes: Iterable[Change]) -> None:
        """All of one transaction side by side (they concern different keys); returns when all are acknowledged."""
        described = [(change, news) for change in changes if (news := self._news(change))]
        try:
            async with asyncio.TaskGroup() as group:
                for change, news in described:
                    group.create_task(self._publish_one(change, news))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _news(self, change: Change) -> News | None:
        try:
            return self._describe(change)
        except Exception:  # one malformed value must not hold up all others for ever
            log.exception(Event.EVENT_SKIPPED, key=change.key, revision=change.revision)
            return None

    async def _publish_one(self, change: Change, news: News) -> None:
        failures = 0
        while True:
            try:
                event_id = change_id(change.key, change.revision)
                await self._bus.publish(news.subject, news.data, id=event_id, headers=news.headers)
                counter(Metric.EVENTS_PUBLISHED).labels(news.subject.rpartition(".")[2]).inc()
                return
            except Unavailable as outage:  # the id makes repeating safe
                if failures == 0:
                    log.warning(Event.EVENT_DELAYED, key=change.key, reason=str(outage))
                await self._clock.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
            except Refusal as refusal:
                log.error(Event.EVENT_SKIPPED, key=change.key, revision=change.revision, reason=str(refusal))
                return

    async def _keep_saving(self) -> None:
        while True:
            await self._clock.sleep(SAVE_EVERY_S)
            behind = self.revision - self._saved
            if behind > 0 and (self._changed or behind >= SAVE_IDLE_REVISIONS):
                await self._save()

    async def _save(self) -> None:
        revision, self._changed = self.revision, False
        fence = [Held(self._leader)] if self._leader else []
        try:
            await self._store.commit(Put(self._key, b"%d" % revision), when=fence)
            self._saved = revision
        except Unavailable:  # also Unknown: writing the same or a later number again is harmless
            self._changed = True
