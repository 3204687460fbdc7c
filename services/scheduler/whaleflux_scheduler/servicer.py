"""SchedulerService: thin. Any replica reads and takes jobs; what only the leader knows is refused elsewhere with NOT_LEADER."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
from google.protobuf import empty_pb2

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, Conflict, FieldViolation, Invalid, NotFound, WrongState
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import list_page, page_size, page_token, parse_token
from whaleflux.rpc.watching import Kind, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import scheduler_pb2_grpc as rpc
from whaleflux_scheduler import convert, logs
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Cause, JobState
from whaleflux_scheduler.core.validate import check_queue
from whaleflux_scheduler.jobs import Jobs, deletion, job_key
from whaleflux_scheduler.submit import Submissions
from whaleflux_scheduler.term import Term

_RACES = 16
_Context = grpc.aio.ServicerContext[object, object]


class Scheduler(rpc.SchedulerServiceServicer):
    """See the module."""

    def __init__(
        self, store: Store, jobs: Jobs, submissions: Submissions, term: Term, desk: logs.LogDesk, clock: Clock
    ) -> None:
        self._store, self._jobs, self._submissions = store, jobs, submissions
        self._term, self._desk, self._clock = term, desk, clock

    # queues

    async def CreateQueue(self, request: pb.CreateQueueRequest, context: _Context | None) -> pb.Queue:
        name = f"queues/{names.check_id('queue_id', request.queue_id)}"
        queue = pb.Queue(name=name, weight=request.queue.weight, max_gpus=request.queue.max_gpus)
        check_queue(convert.queue_of(queue))
        queue.create_time.FromDatetime(self._clock.now())
        key = keys.of_name(keys.QUEUES, name)
        try:
            revision = await self._store.commit(
                Put(key, queue.SerializeToString(deterministic=True)), when=[Absent(key)]
            )
        except ConditionFailed:
            existing = await self._store.get(key)
            if existing is None or not (request.request_id and _same_queue(existing, queue)):
                raise AlreadyExists("queue", name, "choose another name") from None
            return _queue(existing)
        queue.etag = f'"{revision}"'
        return queue

    async def GetQueue(self, request: pb.GetQueueRequest, context: _Context | None) -> pb.Queue:
        return _queue(await self._queue_entry(request.name))

    async def ListQueues(self, request: pb.ListQueuesRequest, context: _Context | None) -> pb.ListQueuesResponse:
        size = page_size(request.page_size)
        page = await list_page(self._store, keys.QUEUES, _queue, size=size, token=request.page_token)
        return pb.ListQueuesResponse(queues=page.items, next_page_token=page.next_page_token)

    async def DeleteQueue(self, request: pb.DeleteQueueRequest, context: _Context | None) -> empty_pb2.Empty:
        entry = await self._queue_entry(request.name)
        check_etag(request.etag, entry)
        if request.name == "queues/default":
            raise WrongState("queues/default exists always", reason="QUEUE_PERMANENT", metadata={"name": request.name})
        await self._jobs.current()
        queue = request.name.split("/")[1]
        left = sum(j.value.queue == queue and not j.value.ended for j in self._jobs.cache.values.values())
        if left:
            raise WrongState(
                f"{request.name} has {left} unfinished jobs; cancel them or wait for their end",
                reason="QUEUE_NOT_EMPTY",
                metadata={"name": request.name, "jobs": str(left)},
            )
        try:
            await self._store.commit(Delete(entry.key), when=[Unchanged(entry)])
        except ConditionFailed:
            raise _contended(request.name) from None
        return empty_pb2.Empty()

    async def _queue_entry(self, name: str) -> Entry:
        names.split(name, "queues")
        entry = await self._store.get(keys.of_name(keys.QUEUES, name))
        if entry is None:
            raise NotFound("queue", name, "list what exists with: whaleflux queues")
        return entry

    # jobs

    async def CreateJob(self, request: pb.CreateJobRequest, context: _Context | None) -> pb.Job:
        job = await self._submissions.draft(request)
        if request.validate_only:
            await self._queue_entry(request.parent)
            brain = await self._term.leading()
            decision = await brain.dry_run(convert.job_of(job))
            job.decision.CopyFrom(convert.decision_message(decision))
            return job
        stored, revision = await self._submissions.store(job, named=bool(request.job_id))
        self._jobs.wrote(revision)
        return stored

    async def GetJob(self, request: pb.GetJobRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._jobs.get(request.name))

    async def ListJobs(self, request: pb.ListJobsRequest, context: _Context | None) -> pb.ListJobsResponse:
        page, token = await self._jobs.page(request)
        revision = self._jobs.cache.revision
        return pb.ListJobsResponse(jobs=map(self._present, page), next_page_token=token, resource_version=revision)

    async def WatchJobs(
        self, request: pb.WatchJobsRequest, context: _Context | None
    ) -> AsyncIterator[pb.WatchJobsResponse]:
        only = job_key(request.name) if request.name else ""
        changes = watch_resources(
            self._store, only or keys.JOBS, request.resource_version, self._jobs.decode, clock=self._clock
        )
        async with contextlib.aclosing(changes):
            async for change in changes:
                response = pb.WatchJobsResponse(resource_version=change.resource_version)
                if change.kind is Kind.BOOKMARK:
                    response.bookmark.SetInParent()
                elif only and change.key != only:  # another job whose name begins with this one's
                    continue
                elif change.value is None:
                    queue, job = change.key.removeprefix(keys.JOBS).split("/")
                    response.deleted = f"queues/{queue}/jobs/{job}"
                else:
                    shown = response.added if change.kind is Kind.ADDED else response.modified
                    shown.CopyFrom(self._present(change.value))
                yield response

    async def CancelJob(self, request: pb.CancelJobRequest, context: _Context | None) -> pb.Job:
        reason = request.reason[:1000] or "cancelled"
        for _ in range(_RACES):
            stored = await self._jobs.newest(request.name)
            check_etag(request.etag, stored.entry)
            job = stored.value
            if job.state is JobState.CANCELLED:
                return self._present(stored)
            if job.ended:
                raise WrongState(
                    f"{job.name} has ended ({job.state.name})",
                    reason="JOB_ENDED",
                    metadata={"name": job.name, "state": job.state.name},
                )
            after = lifecycle.cancel(job, Cause("request", job.traceparent, reason), self._clock.now())
            if (changed := await self._change(stored, convert.JOBS.put(stored.entry.key, after, stored))) is not None:
                return self._present(convert.JOBS.decode(changed))
        raise _contended(request.name)

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: _Context | None) -> empty_pb2.Empty:
        for _ in range(_RACES):
            stored = await self._jobs.newest(request.name)
            check_etag(request.etag, stored.entry)
            _check_deletable(stored)
            try:
                self._jobs.wrote(await self._store.commit(*deletion(stored), when=[Unchanged(stored.entry)]))
            except ConditionFailed:
                continue
            return empty_pb2.Empty()
        raise _contended(request.name)

    async def ExplainJob(self, request: pb.ExplainJobRequest, context: _Context | None) -> pb.ExplainJobResponse:
        stored = await self._jobs.get(request.name)
        job = self._present(stored)
        if stored.value.state in (JobState.QUEUED, JobState.RECOVERING):
            brain = await self._term.leading()
            decision = convert.decision_message(await brain.explain(stored.value))
            return pb.ExplainJobResponse(job=job, decision=decision)
        return pb.ExplainJobResponse(job=job, decision=job.decision)

    async def StreamLogs(
        self, request: pb.StreamLogsRequest, context: _Context | None
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        if request.tail_lines < 0:
            raise Invalid(FieldViolation("tail_lines", f"{request.tail_lines} is negative; use 0 for all"))
        await self._term.leading()
        async with self._desk.reading() as reader, contextlib.aclosing(self._jobs.follow(request.name)) as states:
            async with contextlib.aclosing(logs.merged(self._desk, reader, states, request)) as lines:
                async for line in lines:
                    yield line

    async def ListAllocations(
        self, request: pb.ListAllocationsRequest, context: _Context | None
    ) -> pb.ListAllocationsResponse:
        size = page_size(request.page_size, default=500, most=5000)
        after, _ = parse_token(request.page_token, "tasks:")
        await self._jobs.current()
        found = []
        for stored in self._jobs.cache.values.values():
            for attempt, task in stored.value.holding():
                key = f"tasks:{task.id}"
                if key > after:
                    price = attempt.usd_per_hour / attempt.gpus if attempt.gpus else 0.0
                    found.append((key, stored.value.name, attempt, task, price))
        found.sort(key=lambda row: row[0])
        revision = self._jobs.cache.revision
        return pb.ListAllocationsResponse(
            allocations=[
                pb.Allocation(
                    job=name,
                    epoch=attempt.epoch,
                    task=convert.task_message(task),
                    allocate_time=convert.timestamp(attempt.allocate_time),
                    usd_per_gpu_hour=price,
                )
                for _, name, attempt, task, price in found[:size]
            ],
            next_page_token=page_token(found[size - 1][0], revision) if len(found) > size else "",
            resource_version=revision,
        )

    async def _change(self, stored: StoredJob, put: Put) -> Entry | None:
        """The new entry, or None when someone else was faster."""
        try:
            revision = await self._store.commit(put, when=[Unchanged(stored.entry)])
        except ConditionFailed:
            return None
        self._jobs.wrote(revision)
        return replace(stored.entry, value=put.value, revision=revision)

    def _present(self, stored: StoredJob) -> pb.Job:
        if self._term.brain is not None:
            shown = self._term.brain.present(stored)
        else:
            shown = pb.Job()
            shown.CopyFrom(stored.message)
            shown.cost_usd = stored.value.cost_at(self._clock.now())
        shown.etag = etag_of(stored.entry)
        return shown


def _check_deletable(stored: StoredJob) -> None:
    job = stored.value
    if not job.ended:
        raise WrongState(
            f"{job.name} is {job.state.name}; cancel it first", reason="JOB_NOT_ENDED", metadata={"name": job.name}
        )
    if held := next((task for _, task in job.holding()), None):
        raise WrongState(
            f"{job.name} still holds GPUs on {held.node}; wait for its agent, or retire the node",
            reason="GPUS_HELD",
            metadata={"name": job.name, "node": held.node},
        )


def _queue(entry: Entry) -> pb.Queue:
    queue = pb.Queue.FromString(entry.value)
    queue.etag = etag_of(entry)
    return queue


def _same_queue(existing: Entry, wanted: pb.Queue) -> bool:
    known = pb.Queue.FromString(existing.value)
    return (known.weight, known.max_gpus) == (wanted.weight, wanted.max_gpus)


def _contended(name: str) -> Conflict:
    return Conflict(f"{name} keeps changing; try again", metadata={"name": name}, retry_after_s=0.5)
