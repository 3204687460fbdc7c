"""Verbs on a job, into the store: read, change by a pure function, write under the revision that was read; again when it changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from whaleflux.clock import Clock
from whaleflux.errors import Aborted
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.etags import check_etag
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Put, Store, Unchanged, Write
from whaleflux.trust import audit
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import lifecycle, verbs
from whaleflux_scheduler.core.model import Cause, Hold, Job
from whaleflux_scheduler.jobs import Jobs

RACES = 16
REASON_CHARS = 1000


class JobVerbs:
    """Any replica does them: what follows is the leader's."""

    def __init__(self, store: Store, jobs: Jobs, clock: Clock) -> None:
        self._store, self._jobs, self._clock = store, jobs, clock

    async def cancel(self, request: pb.CancelJobRequest) -> StoredJob:
        cause = partial(_cause, message=request.reason or "cancelled")
        return await self._change(request, lambda job: verbs.cancel(job, cause(job), self._clock.now()), "")

    async def hold(self, request: pb.HoldJobRequest) -> StoredJob:
        hold, cause = self._hold(request.reason), partial(_cause, message=_said("held", request.reason))
        return await self._change(request, lambda job: verbs.hold(job, hold, cause(job)), What.HELD)

    async def release(self, request: pb.ReleaseJobRequest) -> StoredJob:
        cause = partial(_cause, message=_said("released"))
        return await self._change(request, lambda job: verbs.release(job, cause(job)), What.RELEASED)

    async def requeue(self, request: pb.RequeueJobRequest) -> StoredJob:
        hold = self._hold(request.reason) if request.hold else None
        cause = partial(_cause, message=_said("requeued", request.reason))
        return await self._change(
            request, lambda job: verbs.requeue(job, cause(job), self._clock.now(), hold), What.HELD
        )

    async def set_priority(self, request: pb.SetJobPriorityRequest) -> StoredJob:
        cause = partial(_cause, message=_said(f"priority set to {request.priority}"))

        def change(job: Job) -> Job:
            audit.note(before=f"priority {job.priority}", after=f"priority {request.priority}")
            after = verbs.set_priority(job, request.priority, cause(job))
            if after is not job:
                self._jobs.access.check_priority(job.queue, request.priority)
            return after

        return await self._change(request, change, What.PRIORITY_SET)

    async def _change(self, request: _Request, change: Callable[[Job], Job], what: str) -> StoredJob:
        """The job after the change, which its event calls `what` where the state stays. Raises Aborted when others keep being faster."""
        sight = self._jobs.access.sight()
        for _ in range(RACES):
            stored = await self._jobs.newest(request.name, sight)
            self._jobs.access.check_change(stored, sight)
            check_etag(request.etag, stored.entry)
            after = change(stored.value)
            if after is stored.value:
                return stored
            if (written := await self._write(stored, after, what)) is not None:
                return written
        raise contended(request.name)

    async def _write(self, stored: StoredJob, after: Job, what: str) -> StoredJob | None:
        """The job as it is stored now, or None when someone else was faster. A new epoch moves with its fence."""
        now = self._clock.now()
        after = lifecycle.written_down(stored.value, after, now)
        put = convert.JOBS.put(stored.entry.key, after, _asked(stored, changes.asked(what, now, after.cause.message)))
        writes: list[Write] = [put]
        if after.epoch != stored.value.epoch:
            writes.append(Put(keys.of_name(keys.JOB_FENCES, after.name), b"%d" % after.epoch))
        try:
            revision = await self._store.commit(*writes, when=[Unchanged(stored.entry)])
        except ConditionFailed:
            return None
        self._jobs.wrote(revision)
        return convert.read_job(replace(stored.entry, value=put.value, revision=revision))

    def _hold(self, reason: str) -> Hold:
        return Hold(_caller(), reason[:REASON_CHARS], self._clock.now())


_Request = (
    pb.CancelJobRequest | pb.HoldJobRequest | pb.ReleaseJobRequest | pb.RequeueJobRequest | pb.SetJobPriorityRequest
)


def _asked(stored: StoredJob, change: types_pb2.Change) -> StoredJob:
    """What is written over, with the change that somebody asks for."""
    message = pb.Job()
    message.CopyFrom(stored.message)
    message.last_change.CopyFrom(change)
    return replace(stored, message=message)


def contended(name: str) -> Aborted:
    """Of a record that others change all the time."""
    return Aborted(f"{name} keeps changing; try again", metadata={"name": name}, retry_after_s=0.5)


def _cause(job: Job, message: str) -> Cause:
    return Cause("request", job.traceparent, message[:REASON_CHARS], changes.actor())


def _said(what: str, reason: str = "") -> str:
    return f"{what} by {_caller()}" + (f": {reason}" if reason else "")


def _caller() -> str:
    who = auth.caller()
    return f"{who.role}/{who.name}"
