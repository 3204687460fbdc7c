"""Traffic against a running suite, and how its history is recorded."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from tests.robustness.history import (
    Change,
    CheckpointRecord,
    FenceRecord,
    History,
    Holding,
    JobRecord,
    Listing,
    NodeRecord,
    Seen,
    Step,
    Submission,
    Value,
)
from tests.support.suite import until
from whaleflux.errors import StatusError
from whaleflux.sdk.client import AsyncClient
from whaleflux.store import keys
from whaleflux.store.etcd import EtcdStore
from whaleflux.v1 import checkpoint_pb2, inventory_pb2, scheduler_pb2
from whaleflux_scheduler import convert

ANSWER_S = 4.0  # a submission that is not answered by then counts as unanswered
_OVER = (
    scheduler_pb2.TASK_PHASE_EXITED,
    scheduler_pb2.TASK_PHASE_KILLED,
    scheduler_pb2.TASK_PHASE_REFUSED,
    scheduler_pb2.TASK_PHASE_GONE,
)


class Traffic:
    """Submits small jobs, watches all jobs and lists allocations, through every outage."""

    def __init__(self, client: AsyncClient, history: History, prefix: str) -> None:
        self._client, self._history, self._prefix = client, history, prefix
        self._numbers, self._submitting, self._under_way = itertools.count(1), True, 0

    async def stop_submitting(self) -> None:
        """From now on only reads flow; returns when what was under way has its answer, so that the store can be asked for it."""
        self._submitting = False
        await until(lambda: not self._under_way, "every submission is answered", 2 * ANSWER_S)

    async def submit(self, command: tuple[str, ...] = ("/bin/true",)) -> str:
        """One job of one GPU; recorded, whatever comes of it. Returns its name, "" when it was not acknowledged."""
        id_ = f"{self._prefix}-{next(self._numbers)}"
        name, at_s = f"queues/default/jobs/{id_}", time.monotonic()
        spec = scheduler_pb2.JobSpec(command=command, gpus=1)
        request = scheduler_pb2.CreateJobRequest(
            parent="queues/default", job_id=id_, request_id=f"r-{id_}", job=scheduler_pb2.Job(spec=spec)
        )
        self._under_way += 1
        try:
            await self._client.scheduler.CreateJob(request, timeout=ANSWER_S)
        except StatusError:
            self._history.submissions.append(Submission(name, at_s, acknowledged=False))
            return ""
        finally:
            self._under_way -= 1
        self._history.submissions.append(Submission(name, at_s, acknowledged=True))
        return name

    async def keep_submitting(self, every_s: float) -> None:
        while self._submitting:
            await self.submit()
            await asyncio.sleep(every_s)

    async def keep_listing(self, every_s: float) -> None:
        while True:
            try:
                answer = await self._client.scheduler.ListAllocations(
                    scheduler_pb2.ListAllocationsRequest(page_size=5000), timeout=2
                )
                held = tuple(
                    Holding(uuid, a.job, a.epoch, a.task.lost, a.task.share_memory_bytes)
                    for a in answer.allocations
                    for uuid in a.task.gpu_uuids
                )
                self._history.listings.append(Listing(time.monotonic(), held))
            except StatusError:
                pass
            await asyncio.sleep(every_s)

    async def keep_watching(self) -> None:
        """One watch from the beginning; each break is resumed after the last message, as its contract says."""
        since = 0
        while True:
            try:
                request = scheduler_pb2.WatchJobsRequest(resource_version=since)
                async with self._client.scheduler.WatchJobs(request) as stream:
                    async for message in stream:
                        self._saw(message)
                        since = max(since, message.resource_version)
            except StatusError:
                await asyncio.sleep(0.1)

    def _saw(self, message: scheduler_pb2.WatchJobsResponse) -> None:
        kind = message.WhichOneof("event")
        if kind in ("added", "modified"):
            job = getattr(message, kind)
            self._history.watched.append(Seen(job.name, int(job.etag.strip('"'))))
        elif kind == "deleted":
            self._history.watched.append(Seen(message.deleted, 0))

    @asynccontextmanager
    async def flowing(self, submit_every_s: float = 1.0, list_every_s: float = 0.25) -> AsyncIterator[None]:
        """All of it at once, for the length of the block."""
        loops = [
            asyncio.create_task(self.keep_submitting(submit_every_s)),
            asyncio.create_task(self.keep_listing(list_every_s)),
            asyncio.create_task(self.keep_watching()),
        ]
        try:
            yield
            for loop in loops:
                if loop.done() and not loop.cancelled():
                    loop.result()  # a loop that died has recorded nothing: its error is the result
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)


async def truth_of(store: EtcdStore, after: int) -> list[Change]:
    """The store's own history after a revision, read from etcd itself; closes it."""
    found = list[Change]()
    try:
        end = (await store.list(keys.ROOT, limit=1)).revision
        async with asyncio.timeout(30), aclosing(store.watch(keys.ROOT, after=after)) as batches:
            async for batch in batches:
                for event in batch.events:
                    found += change_of(batch.revision, event.key, event.entry.value if event.entry else None)
                if batch.revision >= end:
                    return found
    finally:
        await store.close()
    return found


async def state_of(store: EtcdStore) -> tuple[int, list[Change]]:
    """The store's revision now, and what it holds then: what later changes are changes of; closes it."""
    try:
        held = await store.list(keys.ROOT)
    finally:
        await store.close()
    return held.revision, [
        change for entry in held.entries for change in change_of(held.revision, entry.key, entry.value)
    ]


def change_of(revision: int, key: str, value: bytes | None) -> list[Change]:
    """What an event of the store means to the model; nothing for keys that it does not know."""
    for prefix, read in _READ.items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix).split("/")
            name = "/".join(
                part for pair in zip(("queues", "jobs", "checkpoints"), rest, strict=False) for part in pair
            )
            try:
                return [Change(revision, _NAME[prefix] + name, None if value is None else read(name, value))]
            except ValueError:  # a state that no enum has: an unreadable record says nothing
                return []
    return []


def _job(name: str, value: bytes) -> Value:
    job = convert.JOBS.read(value)
    held = tuple(
        Holding(uuid, name, attempt.epoch, task.lost, task.share_memory_bytes)
        for attempt in (*job.past_attempts, *([job.attempt] if job.HasField("attempt") else []))
        for task in attempt.tasks
        if task.phase not in _OVER
        for uuid in task.gpu_uuids
    )
    state = scheduler_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
    return JobRecord(name, state, job.epoch, held)


def _checkpoint(name: str, value: bytes) -> Value:
    found = checkpoint_pb2.Checkpoint.FromString(value)
    state = checkpoint_pb2.CheckpointState.Name(found.state).removeprefix("CHECKPOINT_STATE_")
    return CheckpointRecord(name, state, found.epoch, found.step)


def _node(name: str, value: bytes) -> Value:
    return NodeRecord({gpu.uuid: gpu.memory_bytes for gpu in inventory_pb2.Node.FromString(value).facts.gpus})


def _fence(name: str, value: bytes) -> Value:
    return FenceRecord(name, int(value))


_READ = {keys.JOBS: _job, keys.CHECKPOINTS: _checkpoint, keys.JOB_FENCES: _fence, keys.NODES: _node}
_NAME = {keys.JOBS: "", keys.CHECKPOINTS: "", keys.JOB_FENCES: "fences/", keys.NODES: "nodes/"}


def steps_of(folder: Path) -> list[Step]:
    """What the ranks of `slow_steps` wrote down."""
    found = []
    for file in sorted(folder.glob("rank-*.record")):
        rank = int(file.stem.partition("-")[2])
        for line in file.read_text().splitlines():
            at, step, epoch = line.split()[:3]
            if at != "restored":
                found.append(Step(rank, float(at), int(step), int(epoch)))
    return found


def restores_of(folder: Path, rank: int = 0) -> list[tuple[int, int, str]]:
    """(step, epoch, checkpoint) of each start of a rank; checkpoint "-": from the beginning."""
    lines = (folder / f"rank-{rank}.record").read_text().splitlines()
    parts = [line.split() for line in lines if line.startswith("restored")]
    return [(int(step), int(epoch), name) for _, step, epoch, name in parts]
