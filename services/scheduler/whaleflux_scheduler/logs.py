"""Logs on demand: a request goes down the streams of the agents that have the job's output, and their chunks are merged.

A reader that does not keep up slows the agents' streams down for a moment and is then cut off: reports travel on the same streams.
An agent that comes back while a reader follows is asked again, for what comes behind what the reader has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from whaleflux import names
from whaleflux.errors import NotFound, ResourceExhausted, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.agent_sessions import AgentSessions
from whaleflux_scheduler.core import log_requests
from whaleflux_scheduler.core.model import Attempt, Job, Task, TaskPhase

CHUNKS = 64  # of at most 64 KiB each, waiting for one reader
PATIENCE_S = 1.0
READERS = 256

Where = tuple[str, int]  # a node, and the epoch of the attempt that it is asked about


class Reader:
    """One caller of StreamLogs."""

    def __init__(self, asked: pb.StreamLogsRequest) -> None:
        self.asked = asked
        self.chunks: asyncio.Queue[agent_pb2.LogChunk] = asyncio.Queue(CHUNKS)
        self.requests: dict[str, Where] = {}  # by id, while they are open
        self.complete: set[Where] = set()  # all was read
        self.lost: set[Where] = set()  # the agent went away in the middle
        self.refused: list[str] = []  # what agents said that they cannot give
        self.error: StatusError | None = None
        self.woken = asyncio.Event()  # agents came or went
        self._offsets = {(known.rank, known.epoch): known.offset for known in asked.after}

    @property
    def rank(self) -> int:
        """The one that is wanted; -1: all."""
        return -1 if self.asked.all_ranks or self.asked.rank < 0 else self.asked.rank

    @property
    def idle(self) -> bool:
        """Nothing is under way to it."""
        return not self.requests and self.chunks.empty()

    def wanted(self, job: Job) -> Attempt | None:
        """The attempt whose output is wanted now: the one that was asked for, else the newest that has any."""
        if self.asked.attempt:
            return next((attempt for number, attempt in job.numbered() if number == self.asked.attempt), None)
        return next((one for one in reversed(tuple(job.attempts())) if any(self.with_output(one))), None)

    def with_output(self, attempt: Attempt) -> Iterator[Task]:
        """Tasks of its ranks, once their agents have any output to follow."""
        for task in attempt.tasks:
            mine = self.rank < 0 or self.rank in task.all_ranks
            if mine and task.phase.reached(TaskPhase.SETTING_UP):
                yield task

    def over(self, job: Job) -> bool:
        """Whether nothing that it has not asked for will come."""
        wanted = self.wanted(job) if self.asked.attempt else None
        return job.ended or (wanted is not None and wanted.end_time is not None)

    def took(self, chunk: agent_pb2.LogChunk) -> None:
        """Its caller has the chunk."""
        self._offsets[chunk.rank, chunk.epoch] = chunk.next_offset

    def behind(self, epoch: int) -> list[pb.LogPosition]:
        """What its caller has of an attempt."""
        return [
            pb.LogPosition(rank=r, epoch=e, offset=offset) for (r, e), offset in self._offsets.items() if e == epoch
        ]

    def fail(self, error: StatusError) -> None:
        """Ends it."""
        self.error = error
        self.woken.set()


class LogBroker:
    """Open requests by id, and who reads their answers."""

    def __init__(self, sessions: AgentSessions) -> None:
        self._sessions = sessions
        self._requests: dict[str, Reader] = {}
        self._open: set[Reader] = set()

    async def take(self, node: str, chunk: agent_pb2.LogChunk) -> None:
        """A chunk from the agent of `node`; waits up to a second for its reader. What that agent was not asked for is dropped."""
        reader = self._requests.get(chunk.request)
        if reader is None or reader.requests[chunk.request][0] != node:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                await reader.chunks.put(chunk)
        except TimeoutError:
            too_slow = "the reader was too slow; read again"
            reader.fail(ResourceExhausted(too_slow, reason=ErrorReason.READER_TOO_SLOW, retry_after_s=1.0))
            self._close(chunk.request, reader)

    def node_connected(self, node: str) -> None:
        """Readers that miss its output ask for it."""
        for reader in self._open:
            reader.woken.set()

    def node_gone(self, node: str) -> None:
        """The stream of a node ended: what was asked of it will not be answered."""
        for request, reader in list(self._requests.items()):
            if reader.requests[request][0] == node:
                reader.lost.add(reader.requests[request])
                self._forget(request, reader)
                reader.woken.set()

    def end(self, error: StatusError) -> None:
        """Ends all readers: agents are served elsewhere from now on."""
        for reader in self._open:
            reader.fail(error)

    def ask(self, reader: Reader, job: Job) -> bool:
        """Asks every connected node for its output of the wanted attempt, unless it was asked; False: none has any."""
        wanted = reader.wanted(job)
        found = [] if wanted is None else [(task.node, wanted.epoch) for task in reader.with_output(wanted)]
        asked = {*reader.complete, *reader.requests.values()}
        for where in found:
            if where not in asked and where[0] in self._sessions.connected:
                self._ask(reader, job, where)
        return bool(found)

    def missing(self, reader: Reader, job: Job) -> set[str]:
        """Nodes whose output was not read, since they are not connected or went away."""
        attempt = reader.wanted(job) if reader.asked.attempt else job.attempt
        found = set() if attempt is None else {(task.node, attempt.epoch) for task in reader.with_output(attempt)}
        away = {where for where in found - reader.complete if where[0] not in self._sessions.connected}
        return {node for node, _ in away | reader.lost}

    def _ask(self, reader: Reader, job: Job, where: Where) -> None:
        node, epoch = where
        request = agent_pb2.LogRequest(
            request=names.ulid(),
            job=job.name,
            rank=reader.rank,
            follow=reader.asked.follow,
            tail_lines=reader.asked.tail_lines,
            epoch=epoch,
            after=reader.behind(epoch),
            times=reader.asked.times,
        )
        if reader.asked.HasField("since_time"):
            request.since_time.CopyFrom(reader.asked.since_time)
        self._sessions.connected[node].send(agent_pb2.SyncResponse(logs=request))
        reader.lost.discard(where)
        reader.requests[request.request] = where
        self._requests[request.request] = reader

    @contextlib.asynccontextmanager
    async def reading(self, asked: pb.StreamLogsRequest) -> AsyncIterator[Reader]:
        """A reader whose requests are cancelled at the end."""
        if len(self._open) >= READERS:
            raise ResourceExhausted(f"{READERS} log readers are open; close some", reason=ErrorReason.TOO_MANY_READERS)
        reader = Reader(asked)
        self._open.add(reader)
        try:
            yield reader
        finally:
            self._open.discard(reader)
            for request in list(reader.requests):
                self._close(request, reader)

    def finished(self, chunk: agent_pb2.LogChunk, reader: Reader) -> None:
        """The agent said that nothing more comes."""
        if (where := reader.requests.get(chunk.request)) is not None:
            reader.complete.add(where)
            self._forget(chunk.request, reader)
            if chunk.error:
                reader.refused.append(f"{where[0]}: {chunk.error[:300]}")

    def _forget(self, request: str, reader: Reader) -> None:
        reader.requests.pop(request, None)
        self._requests.pop(request, None)

    def _close(self, request: str, reader: Reader) -> None:
        if (where := reader.requests.get(request)) is None:  # its reader left, or the node did
            return
        self._forget(request, reader)
        session = self._sessions.connected.get(where[0])
        if session is not None and session.open:
            with contextlib.suppress(ResourceExhausted):
                session.send(agent_pb2.SyncResponse(cancel_logs=request))


async def merged(
    broker: LogBroker, reader: Reader, jobs: AsyncIterator[Job]
) -> AsyncGenerator[pb.StreamLogsResponse, None]:
    """Chunks of all nodes as they come; with `follow` also of later attempts, until the job has ended and all is read.

    Of one attempt when it was asked for, until that is over.
    """
    follow, state = reader.asked.follow, await anext(jobs)
    log_requests.check(reader.asked, state)
    ran = broker.ask(reader, state)
    if ran and reader.idle and (reader.over(state) or not follow):
        raise _unreachable(f"no agent that ran {state.name} is connected")
    changes = asyncio.create_task(_next(jobs)) if follow and not reader.over(state) else None
    try:
        while changes is not None or not reader.idle:
            got = await _first(reader, changes)
            if reader.error is not None:
                raise reader.error
            if changes is not None and changes.done():
                state = changes.result() or state
                over = changes.result() is None or reader.over(state)
                changes = None if over else asyncio.create_task(_next(jobs))
            if got is not None:
                if got.data:
                    yield _shown(got, state)
                    reader.took(got)
                if got.end:
                    broker.finished(got, reader)
            if follow:
                broker.ask(reader, state)
        if missing := broker.missing(reader, state):
            raise _unreachable(f"the output of {state.name} is not complete without {', '.join(sorted(missing))}")
        if reader.refused:
            raise NotFound("output", state.name, "; ".join(reader.refused))
    finally:
        if changes is not None:
            changes.cancel()
            await asyncio.gather(changes, return_exceptions=True)


def _shown(chunk: agent_pb2.LogChunk, job: Job) -> pb.StreamLogsResponse:
    response = pb.StreamLogsResponse(
        rank=chunk.rank,
        epoch=chunk.epoch,
        data=chunk.data,
        next_offset=chunk.next_offset,
        progress=chunk.progress,
        attempt=next((number for number, attempt in job.numbered() if attempt.epoch == chunk.epoch), 0),
    )
    if chunk.HasField("time"):
        response.time.CopyFrom(chunk.time)
    return response


async def _first(reader: Reader, changes: asyncio.Task[Job | None] | None) -> agent_pb2.LogChunk | None:
    """Returns when there is something to do, with the next chunk if there is one."""
    chunk, woken = asyncio.create_task(reader.chunks.get()), asyncio.create_task(reader.woken.wait())
    waiting: set[asyncio.Task[Any]] = {chunk, woken} if changes is None else {chunk, woken, changes}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        chunk.cancel()  # of no effect when it is done
        woken.cancel()
    reader.woken.clear()
    return chunk.result() if chunk.done() and not chunk.cancelled() else None


def _unreachable(what: str) -> Unavailable:
    return Unavailable(
        f"{what}; its output stays on its nodes", reason=ErrorReason.NODES_UNREACHABLE, retry_after_s=1.0
    )


async def _next(jobs: AsyncIterator[Job]) -> Job | None:
    """The next state; None: the job was deleted."""
    try:
        return await anext(jobs)
    except StopAsyncIteration:
        return None
