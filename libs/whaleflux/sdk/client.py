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
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from whaleflux.context import Context
from whaleflux.errors import StatusError
from whaleflux.login.current import Renewer, current
from whaleflux.rpc import sync
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, OUTAGE_S, JobFollowing, LogReading, Patience
from whaleflux.sdk.stubs import Stubs
from whaleflux.v1 import scheduler_pb2

if TYPE_CHECKING:
    from whaleflux.rpc import channel as aio

ENDED = frozenset(
    {scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED, scheduler_pb2.JOB_STATE_CANCELLED}
)
_WATCH = "/whaleflux.v1.SchedulerService/WatchJobs"
_AGAIN_S = 0.2  # after a stream that the server ended in order


def _dial(context: Context) -> tuple[str, TlsFiles, str]:
    files = TlsFiles(key=Path(context.key), chain=Path(context.cert), roots=Path(context.ca))
    return context.server, files, context.server_name


class AsyncClient(Stubs):
    """For asyncio. Close it, or use `async with`."""

    def __init__(self, channel: aio.Channel, context: Context | None = None) -> None:
        super().__init__(channel)
        self.channel, self.context = channel, context
        self.renewer: Renewer | None = None

    @classmethod
    def from_context(cls, path: str | Path = "") -> Self:
        """A client of the fleet that the context file names; see `whaleflux.login.current` for which, and as whom."""
        from whaleflux.rpc import channel as aio  # 20 ms that a client without asyncio does not need

        context = current(str(path))
        target, files, server = _dial(context)
        made = cls(aio.connect(target, files, server=server), context)
        made.renewer = Renewer.of(context, path)
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.renewer is not None:
            self.renewer.stop()
        await self.channel.close()

    async def follow_job(self, name: str) -> AsyncIterator[scheduler_pb2.Job]:
        """The job at each change until it has ended; resumes by itself when the control plane restarts.

        Raises NotFound when there is no such job, or none any more, and Unavailable after ten minutes without an answer.
        """
        following, patience = JobFollowing(name), Patience(FOLLOW_OUTAGE_S)
        while True:
            following.opened()
            pause_s = _AGAIN_S
            try:
                async with self.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(name=name)) as changes:
                    async for change in changes:
                        patience.received()
                        if (job := following.received(change)) is not None:
                            yield job
                            if job.state in ENDED:
                                return
            except StatusError as error:
                if (longer_s := patience.pause_s(error, asyncio.get_running_loop().time())) is None:
                    raise
                pause_s = longer_s
            await asyncio.sleep(pause_s)

    async def read_logs(
        self, request: scheduler_pb2.StreamLogsRequest, *, outage_s: float = OUTAGE_S
    ) -> AsyncGenerator[scheduler_pb2.StreamLogsResponse, None]:
        """What a job's ranks print, each byte once; resumes by itself when the scheduler's leader changes.

        Raises Unavailable after `outage_s` without an answer, InvalidArgument when there is no such rank or attempt, NotFound when
        there is no such job, or its output is kept no more.
        """
        reading, patience = LogReading(request), Patience(outage_s)
        while True:
            try:
                async with self.scheduler.StreamLogs(reading.request()) as chunks:
                    async for chunk in chunks:
                        patience.received()
                        reading.received(chunk)
                        yield chunk
                    return
            except StatusError as error:
                if (pause_s := patience.pause_s(error, asyncio.get_running_loop().time())) is None:
                    raise
            await asyncio.sleep(pause_s)

    async def wait(self, name: str) -> scheduler_pb2.Job:
        """The job once it has ended."""
        job = scheduler_pb2.Job()
        async for latest in self.follow_job(name):
            job = latest
        return job


class Client(Stubs):
    """Without asyncio, for scripts. Close it, or use `with`."""

    def __init__(self, channel: sync.SyncChannel, context: Context | None = None) -> None:
        super().__init__(channel)
        self.channel, self.context = channel, context
        self.renewer: Renewer | None = None

    @classmethod
    def from_context(cls, path: str | Path = "") -> Self:
        """As `AsyncClient.from_context`."""
        context = current(str(path))
        target, files, server = _dial(context)
        made = cls(sync.connect(target, files, server=server), context)
        made.renewer = Renewer.of(context, path)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.renewer is not None:
            self.renewer.stop()
        self.channel.close()

    def follow_job(self, name: str) -> Iterator[scheduler_pb2.Job]:
        """As `AsyncClient.follow_job`."""
        following, patience = JobFollowing(name), Patience(FOLLOW_OUTAGE_S)
        with self.channel.awaiting(_WATCH) as first:
            while True:
                following.opened()
                pause_s = _AGAIN_S
                try:
                    for change in self.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(name=name)):
                        patience.received()
                        first.came()
                        if (job := following.received(change)) is not None:
                            yield job
                            if job.state in ENDED:
                                return
                except StatusError as error:
                    if (longer_s := patience.pause_s(error, time.monotonic())) is None:
                        raise
                    pause_s = longer_s
                    first.begins(error)
                time.sleep(pause_s)

    def read_logs(
        self, request: scheduler_pb2.StreamLogsRequest, *, outage_s: float = OUTAGE_S
    ) -> Iterator[scheduler_pb2.StreamLogsResponse]:
        """As `AsyncClient.read_logs`."""
        reading, patience = LogReading(request), Patience(outage_s)
        while True:
            try:
                for chunk in self.scheduler.StreamLogs(reading.request()):
                    patience.received()
                    reading.received(chunk)
                    yield chunk
                return
            except StatusError as error:
                if (pause_s := patience.pause_s(error, time.monotonic())) is None:
                    raise
            time.sleep(pause_s)

    def wait(self, name: str) -> scheduler_pb2.Job:
        """As `AsyncClient.wait`."""
        job = scheduler_pb2.Job()
        for latest in self.follow_job(name):
            job = latest
        return job
