"""What the leader does beside deciding: the queue that exists from the start, ended jobs that are kept no longer, gauges."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import ResourceExhausted, Unavailable
from whaleflux.retry import Backoff
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Fenced, Held, Put, Store, Unchanged
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import scheduler_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.jobs import deletion, key_of
from whaleflux_scheduler.leader_state import LeaderState
from whaleflux_scheduler.planner_thread import PlannerThread

RETRY = Backoff(longest_s=10.0)
DELETE_AT_ONCE = 50
MOST_UNTOLD = 10_000  # ended jobs beyond those kept that wait for the bus; more would fill the store
_log = telemetry.get_logger("whaleflux.scheduler")


class Housekeeping:
    """Lives as long as its leadership. `keep_ended`: so many ended jobs are kept.

    `told`: the revision up to which events and accounting are published. A job is deleted when its end is, so that its history is kept;
    of a bus that is away for long the store is not filled all the same.
    """

    def __init__(
        self,
        store: Store,
        leader: Leader,
        jobs: Cache[StoredJob],
        state: LeaderState,
        planner: PlannerThread,
        clock: Clock,
        keep_ended: int,
        told: Callable[[], float],
    ) -> None:
        self._told = told
        self._store, self._held, self._jobs = store, Held(leader), jobs
        self._state, self._planner, self._clock, self._keep_ended = state, planner, clock, keep_ended
        self._too_many = asyncio.Event()
        self._models: set[str] = set()  # of which gauges exist

    async def found_default_queue(self) -> None:
        """Makes it unless it is there."""
        key = keys.of_name(keys.QUEUES, names.DEFAULT_QUEUE)
        queue = scheduler_pb2.Queue(
            name=names.DEFAULT_QUEUE, weight=1.0, create_time=convert.timestamp(self._clock.now())
        )
        try:
            put = Put(key, queue.SerializeToString(deterministic=True))
            await self._store.commit(put, when=[Absent(key), self._held])
        except Fenced:
            raise
        except ConditionFailed:
            return

    def jobs_changed(self) -> None:
        """Jobs ended or were deleted: looks whether there are too many."""
        if self._state.ended >= self._keep_ended + DELETE_AT_ONCE:
            self._too_many.set()

    async def prune(self) -> None:
        """Deletes the oldest ended jobs beyond what is kept, for ever, beside the rounds.

        Jobs whose GPUs are still taken stay until their agents say how they ended; others go before them.
        """
        failures = 0
        while True:
            await self._too_many.wait()
            self._too_many.clear()  # each deletion is a change, which looks again
            untold = 0
            try:
                async with asyncio.TaskGroup() as deletions:
                    for name in self._state.oldest_ended(DELETE_AT_ONCE):
                        stored = self._jobs.get(key_of(name))
                        if stored is None:
                            continue
                        if self._may_go(stored):
                            deletions.create_task(self._delete(stored))
                        else:
                            untold += 1
                failures = failures + 1 if untold else 0
            except* Unavailable:  # tidying up is no reason to give up the leadership
                failures += 1
            if failures:
                await self._clock.sleep(RETRY.pause_s(failures))
                self._too_many.set()

    def _may_go(self, stored: StoredJob) -> bool:
        """Whether its end is told, or so many wait for that that the store comes first."""
        if stored.entry.revision <= self._told():
            return True
        if self._state.ended < self._keep_ended + MOST_UNTOLD:
            return False
        reason = f"{self._state.ended} ended jobs wait for the event bus; this one is deleted, and may be missing from the history"
        _log.error(Event.EVENT_SKIPPED, key=stored.entry.key, revision=stored.entry.revision, reason=reason)
        return True

    async def _delete(self, stored: StoredJob) -> None:
        try:
            await self._store.commit(*deletion(stored), when=[Unchanged(stored.entry), self._held])
        except Fenced:
            raise
        except ConditionFailed:
            return

    async def show_gauges(self) -> None:
        """Jobs by state, jobs that wait, GPUs offered and held by model."""
        for state in JobState:
            if state:
                telemetry.gauge(Metric.JOBS).labels(state.name).set(self._state.count(state))
        telemetry.gauge(Metric.QUEUE_DEPTH).labels("jobs").set(self._planner.waiting)
        try:
            offered, held = await self._planner.ask(lambda planner: planner.gpus())
        except (ResourceExhausted, Unavailable):  # it has no time: they stay as they are for a second more
            return
        self._models |= offered.keys() | held.keys()
        for metric, gpus in ((Metric.GPUS, offered), (Metric.GPUS_ALLOCATED, held)):
            for model in self._models:
                telemetry.gauge(metric).labels(model).set(gpus[model])

    def clear_gauges(self) -> None:
        """The leadership is over: another replica shows them now."""
        for metric in (Metric.JOBS, Metric.QUEUE_DEPTH, Metric.GPUS, Metric.GPUS_ALLOCATED):
            telemetry.gauge(metric).clear()
