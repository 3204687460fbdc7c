"""The leader writes down what was decided about each job, beside its record: bounded per job, and late rather than often.

A reason to wait is noted when it has lasted for a moment and is of another kind than the last one, and at most twice a minute. What a
crash leaves unwritten of placements and ends is made up for from the job's record, by the next write or by who reads.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from whaleflux.clock import Clock
from whaleflux.errors import StatusError, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Fenced, Held, Leadership, Present, Put, Store, Unchanged
from whaleflux.store.cache import Cache
from whaleflux_scheduler import decision_records
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import decision_history
from whaleflux_scheduler.core.decision_history import Noted
from whaleflux_scheduler.core.model import Job, SchedulingDecision
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.planner_thread import PlannerThread

WRITE_EVERY_S = 1.0
WRITTEN_AT_ONCE = 50  # jobs: it has time, decisions have not
WORTH_NOTING = timedelta(seconds=2)  # of waiting
SAME_JOB_AGAIN = timedelta(seconds=30)
MOST_PENDING, MOST_KNOWN = 20_000, 2_000  # jobs with something to be written; logs kept in memory


def log_key(job: str) -> str:
    """The store's key of what was decided about a job."""
    return keys.of_name(keys.JOB_DECISIONS, job)


class DecisionLog:
    """Lives as long as its leadership."""

    def __init__(
        self, store: Store, leader: Leadership, jobs: Cache[StoredJob], planner: PlannerThread, clock: Clock
    ) -> None:
        self._store, self._leader, self._jobs, self._planner, self._clock = store, leader, jobs, planner, clock
        self._notes: dict[str, list[Noted]] = {}  # to be written
        self._waits: dict[str, Noted] = {}  # the same, the newest reason of each job
        self._kinds: dict[str, tuple[str, datetime]] = {}  # of the reason that was given last, and when another may be
        self._due_at: dict[str, datetime] = {}
        self._dues: list[tuple[datetime, str]] = []  # heap; may hold what is not due any more
        self._known: OrderedDict[str, Entry] = OrderedDict()
        self._written: set[str] = set()  # jobs of which something may be written down, whatever is known here
        self._some = asyncio.Event()

    def waits(self, name: str, decision: SchedulingDecision) -> None:
        """The job waits for this reason; told at every look at it."""
        kind, (known, again_at) = decision_history.kind_of_wait(decision), self._kinds.get(name, ("", decision.time))
        if kind != known and self._has_room(name):
            self._kinds[name] = kind, again_at
            self._waits[name] = decision_history.of_wait(decision)
            self._schedule(name, max(decision.time + WORTH_NOTING, again_at))

    def changed(self, old: Job | None, new: Job) -> None:
        """The job's record changed; None: it is new."""
        if not new.readable or not self._has_room(new.name):
            return
        now = self._clock.now()
        notes = list(decision_history.of_change(old, new, now)) if old is not None and old.readable else []
        if not notes and (old is None or _told_by(old) == _told_by(new)) and not (old is None and new.attempt):
            return
        if _is_placed(old, new) or new.ended:
            self._waits.pop(new.name, None)
            self._kinds.pop(new.name, None)
        self._notes.setdefault(new.name, []).extend(notes)
        self._schedule(new.name, now)

    def forget(self, name: str) -> None:
        """The job is deleted, and with it what was decided about it."""
        for known in (self._notes, self._waits, self._kinds, self._due_at, self._known):
            known.pop(name, None)
        self._written.discard(name)

    def _has_room(self, name: str) -> bool:
        return name in self._due_at or len(self._due_at) < MOST_PENDING

    def _schedule(self, name: str, at: datetime) -> None:
        if name not in self._due_at or at < self._due_at[name]:
            self._due_at[name] = at
            heapq.heappush(self._dues, (at, name))
        self._some.set()

    async def run(self) -> None:
        """Writes for ever; an outage only delays it."""
        while True:
            await self._some.wait()
            await self._clock.sleep(WRITE_EVERY_S)
            await self._write(self._take_due(self._clock.now()))
            if not self._due_at:
                self._some.clear()

    def _take_due(self, now: datetime) -> list[str]:
        due: list[str] = []
        while self._dues and self._dues[0][0] <= now and len(due) < WRITTEN_AT_ONCE:
            at, name = heapq.heappop(self._dues)
            if self._due_at.get(name) == at:
                del self._due_at[name]
                due.append(name)
        return due

    async def _write(self, names: Collection[str]) -> None:
        waits = {name: wait for name in names if (wait := self._waits.pop(name, None)) is not None}
        positions = await self._positions(waits)
        async with asyncio.TaskGroup() as group:
            for name in names:
                notes = self._notes.pop(name, [])
                if name in waits:
                    notes.append(decision_history.placed_at(waits[name], positions.get(name, 0)))
                    kind, _ = self._kinds.get(name, ("", None))
                    self._kinds[name] = kind, self._clock.now() + SAME_JOB_AGAIN
                group.create_task(self._add(name, notes))

    async def _positions(self, names: Collection[str]) -> dict[str, int]:
        if not names:
            return {}
        try:
            return await self._planner.ask(lambda plan: plan.positions(names))
        except StatusError:  # it has no time: then they are not known
            return {}

    async def _add(self, name: str, notes: Iterable[Noted]) -> None:
        stored = self._jobs.get(key_of(name))
        if stored is None or not stored.value.readable:
            return
        try:
            entry = await self._entry(stored)
            before = decision_records.read(entry.value, stored.value.uid) if entry is not None else ()
            after = decision_history.joined(
                before, (*decision_history.in_record(stored.value, stored.message.decision.summary), *notes)
            )
            if after != before:
                await self._put(stored, entry, decision_records.write(stored.value.uid, after))
        except Fenced:
            raise
        except (ConditionFailed, Unavailable):  # the job is deleted, or the store is away: tried once more
            self._known.pop(name, None)
            if key_of(name) in self._jobs.values:
                self._written.add(name)
                self._notes.setdefault(name, [])[:0] = notes
                self._schedule(name, self._clock.now() + WORTH_NOTING)

    async def _entry(self, stored: StoredJob) -> Entry | None:
        """What is written down already. Of a job that was made since this leader leads there is nothing but its own."""
        name = stored.value.name
        if name in self._known:
            return self._known[name]
        older = stored.entry.created < self._leader.created
        return await self._store.get(log_key(name)) if older or name in self._written else None

    async def _put(self, stored: StoredJob, entry: Entry | None, value: bytes) -> None:
        name, key = stored.value.name, log_key(stored.value.name)
        place = Absent(key) if entry is None else Unchanged(entry)
        revision = await self._store.commit(
            Put(key, value), when=[place, Present(stored.entry.key), Held(self._leader)]
        )
        self._written.add(name)
        self._known[name] = Entry(key, value, revision, entry.created if entry else revision)
        self._known.move_to_end(name)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)


def _is_placed(old: Job | None, new: Job) -> bool:
    before = old.attempt.epoch if old is not None and old.attempt is not None else 0
    return new.attempt is not None and new.attempt.epoch != before


def _told_by(job: Job) -> object:
    """What of a record is told of in the end: where its attempts stand."""
    return job.ended, [(one.epoch, one.run_time, one.end_time) for one in job.attempts()]
