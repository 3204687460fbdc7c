"""Logs on demand: a request goes down the streams of the agents that have the job's output, and their chunks are merged.

A reader that does not keep up slows the agents' streams down for a moment and is then cut off: reports travel on the same streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from whaleflux import names
from whaleflux.errors import OverLimit, Unavailable
from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_scheduler.core.model import Job, TaskPhase
from whaleflux_scheduler.hub import Hub

CHUNKS = 64  # of at most 64 KiB each, waiting for one reader
PATIENCE_S = 1.0
READERS = 256


class Reader:
    """One caller of StreamLogs."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[agent_pb2.LogChunk] = asyncio.Queue(CHUNKS)
        self.requests: dict[str, tuple[str, int]] = {}  # request -> node and epoch, while it is open
        self.slow = False

    def end(self, request: str) -> None:
        """Nothing more comes for this request."""
        self.requests.pop(request, None)


class LogDesk:
    """Open requests by id."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._readers: dict[str, Reader] = {}

    async def take(self, chunk: agent_pb2.LogChunk) -> None:
        """A chunk from an agent; waits up to a second for its reader."""
        reader = self._readers.get(chunk.request)
        if reader is None:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                await reader.chunks.put(chunk)
        except TimeoutError:
            reader.slow = True
            self._close(chunk.request, reader)

    def node_gone(self, node: str) -> None:
        """The stream of a node ended: what was asked of it will not be answered."""
        for request, reader in list(self._readers.items()):
            if reader.requests.get(request, ("", 0))[0] == node:
                ended = agent_pb2.LogChunk(request=request, end=True, error=f"{node} is not connected any more")
                with contextlib.suppress(asyncio.QueueFull):
                    reader.chunks.put_nowait(ended)

    def ask(self, reader: Reader, job: Job, asked: scheduler_pb2.StreamLogsRequest, told: set[tuple[str, int]]) -> None:
        """Asks every connected node for its newest output of the job, where it was not `told` yet."""
        rank = -1 if asked.all_ranks or asked.rank < 0 else asked.rank
        newest: dict[str, int] = {}
        for attempt in job.attempts():
            for task in attempt.tasks:
                has_it = rank < 0 or task.first_rank <= rank < task.first_rank + len(task.gpus)
                if has_it and task.phase >= TaskPhase.STARTING:  # before, its agent has no output to follow
                    newest[task.node] = attempt.epoch
        for where in newest.items():
            connection = self._hub.connected.get(where[0])
            if where in told or connection is None:
                continue
            told.add(where)
            request = agent_pb2.LogRequest(
                request=names.ulid(),
                job=job.name,
                rank=rank,
                follow=asked.follow,
                tail_lines=asked.tail_lines,
                epoch=where[1],
            )
            connection.send(agent_pb2.SyncResponse(logs=request))
            reader.requests[request.request] = where
            self._readers[request.request] = reader

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Reader]:
        """A reader whose requests are cancelled at the end."""
        if len({id(reader) for reader in self._readers.values()}) >= READERS:
            raise OverLimit(f"{READERS} log readers are open; close some", reason="TOO_MANY_READERS")
        reader = Reader()
        try:
            yield reader
        finally:
            for request in list(reader.requests):
                self._close(request, reader)

    def finished(self, request: str, reader: Reader) -> None:
        """The agent said that nothing more comes."""
        reader.end(request)
        self._readers.pop(request, None)

    def _close(self, request: str, reader: Reader) -> None:
        node = reader.requests.get(request, ("", 0))[0]
        self.finished(request, reader)
        connection = self._hub.connected.get(node)
        if connection is not None and connection.open:
            with contextlib.suppress(OverLimit):
                connection.send(agent_pb2.SyncResponse(cancel_logs=request))


async def merged(
    desk: LogDesk, reader: Reader, jobs: AsyncIterator[Job], asked: scheduler_pb2.StreamLogsRequest
) -> AsyncGenerator[scheduler_pb2.StreamLogsResponse, None]:
    """Chunks of all nodes as they come; with `follow` also of later attempts, until the job has ended and all is read."""
    told: set[tuple[str, int]] = set()
    state = await anext(jobs)
    desk.ask(reader, state, asked, told)
    if not told and not (asked.follow and not state.ended):
        if state.attempt is None:
            return  # it never ran: there is nothing to read
        raise Unavailable(
            f"no agent that ran {state.name} is connected; its output stays on its nodes", reason="NODES_UNREACHABLE"
        )
    news = asyncio.create_task(_next(jobs)) if asked.follow else None
    try:
        while reader.requests or (news is not None and not state.ended):
            chunk = asyncio.create_task(reader.chunks.get())
            waiting: set[asyncio.Task[Any]] = {chunk} if news is None else {chunk, news}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                chunk.cancel()  # of no effect when it is done
            if reader.slow:
                raise OverLimit("the reader was too slow; read again", reason="READER_TOO_SLOW", retry_after_s=1.0)
            if news is not None and news.done():
                changed = news.result()
                news = None
                if changed is not None:
                    state = changed
                    desk.ask(reader, state, asked, told)
                    news = None if state.ended else asyncio.create_task(_next(jobs))
            if chunk.done() and not chunk.cancelled():
                got = chunk.result()
                if got.data:
                    yield scheduler_pb2.StreamLogsResponse(rank=got.rank, epoch=got.epoch, data=got.data)
                if got.end:
                    desk.finished(got.request, reader)
    finally:
        if news is not None:
            news.cancel()
            await asyncio.gather(news, return_exceptions=True)


async def _next(jobs: AsyncIterator[Job]) -> Job | None:
    """The next state; None: the job was deleted."""
    try:
        return await anext(jobs)
    except StopAsyncIteration:
        return None
