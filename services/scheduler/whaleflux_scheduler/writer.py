"""Moves into the store: each under its job's revision and this leadership, with the fence in the same transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.errors import Invalid
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Fenced, Held, Leadership, Put, Store, Unchanged, Write
from whaleflux.store.cache import Cache
from whaleflux.store.once import commit_once
from whaleflux.telemetry import Event, Metric
from whaleflux_scheduler import convert
from whaleflux_scheduler.book import Heard
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.planner import Choice

MOVES_AT_ONCE = 1_000  # being written
_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class Move:
    """A job's next state, and the reports that it accounts for."""

    stored: StoredJob
    after: Job
    heard: tuple[Heard, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What the writer tells: a move is in the store, a job has to be looked at again, a record is too large to be stored."""

    written: Callable[[Move], None]
    look_again: Callable[[str], None]
    refused: Callable[[Move, str], None]


class Writer:
    """A job that is being written is `busy` and left alone; the others go on."""

    def __init__(self, store: Store, leader: Leadership, cache: Cache[StoredJob], answers: Answers) -> None:
        self._store, self._held, self._cache, self._answers = store, Held(leader), cache, answers
        self._tasks: asyncio.TaskGroup | None = None
        self._again: set[str] = set()
        self._room = asyncio.Event()
        self.busy: set[str] = set()

    def runs_in(self, tasks: asyncio.TaskGroup) -> None:
        """The group whose end is the end of all writing."""
        self._tasks = tasks

    def later(self, name: str) -> None:
        """A busy job has news: it is looked at again when it is written."""
        self._again.add(name)

    async def room(self) -> None:
        """Returns when not too many moves are under way."""
        while len(self.busy) >= MOVES_AT_ONCE:
            self._room.clear()
            await self._room.wait()

    def write(self, moves: Mapping[str, Move]) -> None:
        """Starts writing all of them."""
        assert self._tasks is not None
        for name, move in moves.items():
            self.busy.add(name)
            self._tasks.create_task(self._carry_out(move))

    async def _carry_out(self, move: Move) -> None:
        name = move.after.name
        try:
            if revision := await self._commit(move):
                await self._cache.at_least(revision)
                self._answers.written(move)
        finally:
            self.busy.discard(name)
            self._room.set()
        if name in self._again:
            self._again.discard(name)
            self._answers.look_again(name)

    async def _commit(self, move: Move) -> int:
        """The revision, or 0 when nothing was written."""
        entry, after = move.stored.entry, move.after
        writes: list[Write] = [convert.JOBS.put(entry.key, after, move.stored)]
        if after.epoch != move.stored.value.epoch:
            writes.append(Put(keys.of_name(keys.JOB_FENCES, after.name), b"%d" % after.epoch))
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
        except Invalid as too_large:
            _log.error(Event.JOB_FAILED, job=after.name, reason=str(too_large))
            self._answers.refused(move, str(too_large))
            return 0
