"""Transitions into the store: each under its job's revision and this leadership, with the fence in the same transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Fenced, Held, Leadership, Put, Store, Unchanged, Write
from whaleflux.store.cache import Cache
from whaleflux.store.once import commit_once
from whaleflux.telemetry import Event, Metric
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.lifecycle import written_down
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.plan import Move
from whaleflux_scheduler.job_tracking import PendingReport
from whaleflux_scheduler.placements import placement_of

TRANSITIONS_AT_ONCE = 1_000  # being written
_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class Transition:
    """A job's next state, and the reports that it accounts for."""

    stored: StoredJob
    after: Job
    reports: tuple[PendingReport, ...] = ()
    move: Move | None = None


@dataclass(frozen=True, slots=True)
class WriterCallbacks:
    """What the writer calls: a transition is in the store, a job has to be looked at again, a record is too large to be stored."""

    written: Callable[[Transition], None]
    look_again: Callable[[str], None]
    refused: Callable[[Transition, str], None]


class Writer:
    """A job that is being written is left alone; the others go on."""

    def __init__(
        self, store: Store, leader: Leadership, cache: Cache[StoredJob], callbacks: WriterCallbacks, clock: Clock
    ) -> None:
        self._clock = clock
        self._store, self._held, self._cache, self._callbacks = store, Held(leader), cache, callbacks
        self._tasks: asyncio.TaskGroup | None = None
        self._again: set[str] = set()
        self._room = asyncio.Event()
        self._busy: set[str] = set()

    def runs_in(self, tasks: asyncio.TaskGroup) -> None:
        """The group whose end is the end of all writing."""
        self._tasks = tasks

    def writes(self, name: str) -> bool:
        """Whether the job is being written."""
        return name in self._busy

    def later(self, name: str) -> None:
        """A busy job has news: it is looked at again when it is written."""
        self._again.add(name)

    async def room(self) -> None:
        """Returns when not too many transitions are under way."""
        while len(self._busy) >= TRANSITIONS_AT_ONCE:
            self._room.clear()
            await self._room.wait()

    def write(self, transitions: Mapping[str, Transition]) -> None:
        """Starts writing all of them."""
        assert self._tasks is not None
        now = self._clock.now()
        for name, transition in transitions.items():
            self._busy.add(name)
            after = written_down(transition.stored.value, transition.after, now)
            self._tasks.create_task(self._carry_out(replace(transition, after=after)))

    async def _carry_out(self, transition: Transition) -> None:
        name = transition.after.name
        try:
            if revision := await self._commit(transition):
                await self._cache.at_least(revision)
                self._callbacks.written(transition)
        finally:
            self._busy.discard(name)
            self._room.set()
        if name in self._again:
            self._again.discard(name)
            self._callbacks.look_again(name)

    async def _commit(self, transition: Transition) -> int:
        """The revision, or 0 when nothing was written."""
        entry, after = transition.stored.entry, transition.after
        value = await convert.JOBS.encode_aside(after, transition.stored)
        writes: list[Write] = [Put(entry.key, value)]
        if after.epoch != transition.stored.value.epoch:
            writes.append(Put(keys.of_name(keys.JOB_FENCES, after.name), b"%d" % after.epoch))
        if (placed := placement_of(transition.stored.value, after)) is not None:
            writes.append(placed)
        try:
            return await commit_once(self._store, *writes, when=[Unchanged(entry), self._held], key=entry.key)
        except Fenced:
            raise
        except ConditionFailed:  # a user was faster
            telemetry.counter(Metric.CAS_CONFLICTS).labels("job").inc()
            newest = await self._store.list(keys.JOBS, limit=1)
            await self._cache.at_least(newest.revision)
            self.later(after.name)
            return 0
        except InvalidArgument as too_large:
            _log.error(Event.JOB_FAILED, job=after.name, reason=str(too_large))
            self._callbacks.refused(transition, str(too_large))
            return 0
