"""Typed clients of the control plane, for asyncio (`AsyncClient`) and without (`Client`).

    with Client.from_context() as fleet:
        job = fleet.scheduler.CreateJob(scheduler_pb2.CreateJobRequest(parent="queues/default", job=...))
        fleet.wait(job.name)

Each attribute is the generated stub of one service, on a channel with deadlines, safe repeats and trace context. What
the server refuses is raised as a class of `whaleflux.errors` with its reason and fields, never as text to parse.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

from whaleflux.context import Context, find
from whaleflux.errors import NotFound, Unavailable
from whaleflux.rpc import channel as aio
from whaleflux.rpc import sync
from whaleflux.rpc.pki import TlsFiles
from whaleflux.v1 import (
    checkpoint_pb2_grpc,
    health_pb2_grpc,
    inventory_pb2_grpc,
    router_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)

ENDED = frozenset(
    {scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED, scheduler_pb2.JOB_STATE_CANCELLED}
)
_AGAIN_S = 0.2  # between two attempts to follow a job while the control plane is away


class _Stubs:
    """One stub per service, all on one channel."""

    def __init__(self, channel: Any) -> None:
        self.inventory = inventory_pb2_grpc.InventoryServiceStub(channel)
        self.scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self.health = health_pb2_grpc.HealthServiceStub(channel)
        self.checkpoint = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        self.router = router_pb2_grpc.RouterServiceStub(channel)


def _dial(context: Context) -> tuple[str, TlsFiles, str]:
    files = TlsFiles(key=Path(context.key), chain=Path(context.cert), roots=Path(context.ca))
    return context.server, files, context.server_name


class AsyncClient(_Stubs):
    """For asyncio. Close it, or use `async with`."""

    def __init__(self, channel: aio.Channel, context: Context | None = None) -> None:
        super().__init__(channel)
        self.channel, self.context = channel, context

    @classmethod
    def from_context(cls, path: str | Path = "") -> Self:
        """A client of the fleet that the context file names; see `whaleflux.context.find` for which file."""
        context = Context.load(find(str(path)))
        target, files, server = _dial(context)
        return cls(aio.connect(target, files, server=server), context)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def follow_job(self, name: str) -> AsyncIterator[scheduler_pb2.Job]:
        """The job at each change until it has ended; resumes by itself when the control plane restarts."""
        last = ""
        while True:
            try:
                async with self.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(name=name)) as changes:
                    async for change in changes:
                        job = _job_of(change, name)
                        if job is not None and job.etag != last:
                            last = job.etag
                            yield job
                            if job.state in ENDED:
                                return
            except Unavailable:
                pass
            await asyncio.sleep(_AGAIN_S)

    async def wait(self, name: str) -> scheduler_pb2.Job:
        """The job once it has ended."""
        job = scheduler_pb2.Job()
        async for latest in self.follow_job(name):
            job = latest
        return job


class Client(_Stubs):
    """Without asyncio, for scripts. Close it, or use `with`."""

    def __init__(self, channel: sync.SyncChannel, context: Context | None = None) -> None:
        super().__init__(channel)
        self.channel, self.context = channel, context

    @classmethod
    def from_context(cls, path: str | Path = "") -> Self:
        """As `AsyncClient.from_context`."""
        context = Context.load(find(str(path)))
        target, files, server = _dial(context)
        return cls(sync.connect(target, files, server=server), context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def follow_job(self, name: str) -> Iterator[scheduler_pb2.Job]:
        """As `AsyncClient.follow_job`."""
        last = ""
        while True:
            try:
                for change in self.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(name=name)):
                    job = _job_of(change, name)
                    if job is not None and job.etag != last:
                        last = job.etag
                        yield job
                        if job.state in ENDED:
                            return
            except Unavailable:
                pass
            time.sleep(_AGAIN_S)

    def wait(self, name: str) -> scheduler_pb2.Job:
        """As `AsyncClient.wait`."""
        job = scheduler_pb2.Job()
        for latest in self.follow_job(name):
            job = latest
        return job


def _job_of(change: scheduler_pb2.WatchJobsResponse, name: str) -> scheduler_pb2.Job | None:
    which = change.WhichOneof("event")
    if which == "deleted" and change.deleted == name:
        raise NotFound("job", name, "its record was deleted")
    return getattr(change, which) if which in {"added", "modified"} else None
