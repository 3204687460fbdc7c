"""The publisher: turns what an owner wrote into the store into events, however often either side restarts.

Events are derived, not sent on the side: a crash between a commit and its event loses nothing, since the loop goes on
after the last revision that it saved as published, and repeats carry the same id (`key@revision-digest`), which the stream's
duplicate window drops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Compacted, StatusError, Unavailable
from whaleflux.events.api import Bus
from whaleflux.events.subjects import change_id
from whaleflux.retry import Backoff
from whaleflux.store import keys
from whaleflux.store.api import Batch, Entry, Fenced, Held, Leadership, Put, Snapshot, Store
from whaleflux.telemetry import Event, Metric, counter, get_logger

log = get_logger(__name__)
SAVE_EVERY_S = 1.0  # what a crash makes it publish again, at most
SAVE_IDLE_REVISIONS = 1_000  # saved without events too, or an idle prefix falls behind compaction
RETRY = Backoff(longest_s=2.0)


@dataclass(frozen=True, slots=True)
class EntryChange:
    """One key's change. `old` is None when it was created (or its past is compacted), `new` when it was deleted.

    `history` is 0, or after a restored backup, which gives revisions again, the second (Unix time) in which that was noticed.
    """

    key: str
    old: Entry | None
    new: Entry | None
    revision: int
    history: int = 0

    @property
    def id(self) -> str:
        """Of its event."""
        return change_id(self.key, self.revision, self.new.value if self.new else None, self.history)


@dataclass(frozen=True, slots=True)
class OutgoingEvent:
    """What to publish about a change. Put a stored `traceparent` into the headers, so that traces go on."""

    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    id: str = ""  # empty: the change's own, of which there is one


Describe = Callable[[EntryChange], OutgoingEvent | Iterable[OutgoingEvent] | None]
"""Makes the events of a change, or None when it is nobody's business. Pure; what it raises is logged and skipped."""


class Publisher:
    """Publishes what changes under `prefix`; at most one runs per `name`, so give it the owner's leadership.

    The revision up to which everything is published is kept at `keys.PUBLISHERS + name`. On its first start, and when
    history was compacted while it was away, it publishes the current state of what is new since; what was deleted
    meanwhile it cannot know then (consumers re-list). A store that went back to a backup under a running publisher is noticed:
    what differs from what was told is published, under ids that were never used. One that was away then goes on from the position
    in the backup, and what it tells is not taken for what was told in the history that is lost.
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
        self._complete = False  # `_known` is all of it
        self._begun = self._must_list = False
        self._history = 0  # see EntryChange
        self._changed = False  # something was published since the last save
        self._saved = 0
        self.revision = 0  # everything up to here is published

    async def run(self) -> None:
        """Until cancelled or, with Fenced, until the leadership is lost; waits out everything else.

        It runs beside its leader's loops: news that cannot be told must not end the leadership.
        """
        failures = 0
        while True:
            before = self.revision
            try:
                await self._follow()
            except Fenced:
                raise
            except Exception as failure:
                failures = failures + 1 if self.revision == before else 1
                self._explain(failure)
            await self._clock.sleep(RETRY.pause_s(failures))

    def _explain(self, failure: Exception) -> None:
        if isinstance(failure, Compacted):
            self._must_list = True
            log.warning(Event.PUBLISHER_RELISTED, prefix=self._prefix, revision=self.revision)
        elif isinstance(failure, Unavailable):
            log.warning(Event.PUBLISHER_WAITING, prefix=self._prefix, reason=str(failure))
        else:
            log.error(Event.PUBLISHER_WAITING, prefix=self._prefix, reason=repr(failure), exc_info=failure)

    async def _follow(self) -> None:
        if not self._begun:
            await self._begin()
            self._begun = True
        if self._must_list:
            await self._catch_up()
            self._must_list = False
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                group.create_task(self._keep_saving())
        except BaseExceptionGroup as failed:
            fenced = [error for error in failed.exceptions if isinstance(error, Fenced)]
            raise (fenced or failed.exceptions)[0] from None

    async def _begin(self) -> None:
        """Learns the state at the saved revision, so that the next change has its `old`."""
        kept, newest = await self._store.get(self._key), (await self._store.list(self._prefix, limit=1)).revision
        position = _position(kept) if kept else None
        if position is None or position[0] > newest:
            if kept:
                log.error(
                    Event.HISTORY_LOST, prefix=self._prefix, revision=newest, kept=kept.value[:40].decode("latin-1")
                )
                self._history = int(self._clock.now().timestamp())
            self._must_list = True
            return
        self.revision, self._history = position
        self._saved = self.revision
        try:
            then = await self._store.list(self._prefix, at=self.revision)
        except Compacted:
            self._must_list = True
            return
        self._known, self._complete = {entry.key: entry for entry in then.entries}, True

    async def _catch_up(self) -> None:
        """Publishes the current state of whatever differs from what is known, then goes on from there."""
        now = await self._store.list(self._prefix)
        if self._is_another_history(now):
            log.error(Event.HISTORY_LOST, prefix=self._prefix, revision=now.revision, kept=self.revision)
            self._history = int(self._clock.now().timestamp())
        listed = {entry.key: entry for entry in now.entries}
        gone = [self._change(key, None, now.revision) for key in self._known if key not in listed]
        differs = [
            e for e in now.entries if (self._known.get(e.key) != e if self._complete else e.revision > self.revision)
        ]
        await self._publish([*gone, *(self._change(e.key, e, e.revision) for e in differs)])
        self._known, self._complete = listed, True
        self._advance(now.revision, changed=True)

    def _is_another_history(self, now: Snapshot) -> bool:
        """Whether the store has told something else before: a backup was restored, and it gives revisions again."""
        told = [entry for entry in now.entries if entry.revision <= self.revision] if self._complete else []
        return now.revision < self.revision or any(self._known.get(entry.key) != entry for entry in told)

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

    def _changes(self, batch: Batch) -> list[EntryChange]:
        return [self._change(event.key, event.entry, batch.revision) for event in batch.events]

    def _change(self, key: str, new: Entry | None, revision: int) -> EntryChange:
        return EntryChange(key, self._known.get(key), new, revision, self._history)

    def _advance(self, revision: int, *, changed: bool) -> None:
        self.revision = revision  # lower than before when a backup was restored
        self._changed = self._changed or changed

    async def _publish(self, changes: Iterable[EntryChange]) -> None:
        """All of one transaction side by side (they concern different keys); returns when all are acknowledged."""
        described = [(change, news) for change in changes for news in self._described(change)]
        try:
            async with asyncio.TaskGroup() as group:
                for change, news in described:
                    group.create_task(self._publish_one(change, news))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _described(self, change: EntryChange) -> Sequence[OutgoingEvent]:
        try:
            news = self._describe(change)
            return (news,) if isinstance(news, OutgoingEvent) else tuple(news or ())
        except Exception:  # one malformed value must not hold up all others for ever
            log.exception(Event.EVENT_SKIPPED, key=change.key, revision=change.revision)
            return ()

    async def _publish_one(self, change: EntryChange, news: OutgoingEvent) -> None:
        failures = 0
        while True:
            try:
                await self._bus.publish(news.subject, news.data, id=news.id or change.id, headers=news.headers)
                counter(Metric.EVENTS_PUBLISHED).labels(news.subject.rpartition(".")[2]).inc()
                return
            except Unavailable as outage:  # the id makes repeating safe
                if failures == 0:
                    log.warning(Event.EVENT_DELAYED, key=change.key, reason=str(outage))
                failures += 1
                await self._clock.sleep(RETRY.pause_s(failures))
            except StatusError as error:
                log.error(Event.EVENT_SKIPPED, key=change.key, revision=change.revision, reason=str(error))
                return

    async def _keep_saving(self) -> None:
        while True:
            await self._clock.sleep(SAVE_EVERY_S)
            behind = self.revision - self._saved  # negative after a restored backup
            if behind and (self._changed or behind >= SAVE_IDLE_REVISIONS):
                await self._save()

    async def _save(self) -> None:
        revision, self._changed = self.revision, False
        fence = [Held(self._leader)] if self._leader else []
        try:
            await self._store.commit(Put(self._key, b"%d %d" % (revision, self._history)), when=fence)
            self._saved = revision
        except Unavailable:  # also Unknown: writing the same or a later number again is harmless
            self._changed = True


def _position(kept: Entry) -> tuple[int, int] | None:
    """Revision and history as they were saved; None for what nobody of us has written."""
    numbers = kept.value.split()
    if not numbers or not all(number.isdigit() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
