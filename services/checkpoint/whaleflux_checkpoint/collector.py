"""Checkpoints end with their job: one collector looks who is gone, waits out a grace, and gives the bytes free.

What it knows is in the records, so that any leader goes on where the one before it stopped. Deleting the bytes is the agents'
work: they see the storage.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import NotFound, StatusError, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Entry, Held, Put, Store, Unchanged
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_checkpoint import convert
from whaleflux_checkpoint.core import state_machine
from whaleflux_checkpoint.core.state_machine import State
from whaleflux_checkpoint.moves import move

EVERY_S = 60.0
_CALL_S = 5.0
_log = telemetry.get_logger("whaleflux.checkpoint")


class Collector:
    """Runs under leadership. `grace_s`: how long checkpoints outlive a deleted job."""

    def __init__(
        self, store: Store, scheduler: SchedulerServiceStub, clock: Clock, grace_s: float, leader: Leader
    ) -> None:
        self._store, self._scheduler, self._clock, self._leader = store, scheduler, clock, leader
        self._grace = timedelta(seconds=grace_s)

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.round()
            except Unavailable as outage:  # the store is away: the next round looks at everything again
                _log.info(Event.FEED_BROKEN, feed="store", reason=outage.reason)
            await self._clock.sleep(EVERY_S)

    async def round(self) -> None:
        """One look at every job that has checkpoints."""
        by_job: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry, known in read_all((await self._store.list(keys.CHECKPOINTS)).entries, convert.decode).values:
            if convert.state_of(known) not in state_machine.DELETABLE | {State.UNKNOWN}:
                by_job[convert.job_of(known.name), known.job_uid].append(entry)
        for (job, uid), entries in by_job.items():
            exists = await self._exists(job, uid)
            if exists is None:
                continue  # nobody answers: nothing is known
            for entry in entries:
                await self._settle(entry, gone=not exists)

    async def _exists(self, job: str, uid: str) -> bool | None:
        try:
            found = await self._scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job), timeout=_CALL_S)
        except NotFound:
            return False
        except StatusError as error:
            _log.info(Event.FEED_BROKEN, feed="scheduler", reason=error.reason)
            return None
        if not found.uid:
            return None  # its record cannot be read
        return uid in ("", found.uid)  # without a uid nothing tells it from its job's

    async def _settle(self, entry: Entry, *, gone: bool) -> None:
        known, now = convert.decode(entry), self._clock.now()
        try:
            if gone != known.HasField("job_gone_time"):
                known.ClearField("job_gone_time")
                if gone:
                    known.job_gone_time.FromDatetime(now)
                await self._store.commit(
                    Put(entry.key, convert.encode(known)), when=[Unchanged(entry), Held(self._leader)]
                )
            elif gone and now - known.job_gone_time.ToDatetime(now.tzinfo) >= self._grace:
                await self._end(entry, known)
        except ConditionFailed:
            return  # it was changed meanwhile: the next round looks again

    async def _end(self, entry: Entry, known: pb.Checkpoint) -> None:
        state = state_machine.end_with_job(convert.state_of(known))
        await move(self._store, entry, state, "its job is deleted", when=[Held(self._leader)])
