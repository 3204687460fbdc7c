"""Logs on demand: each request is one small reader; what they read leaves through one bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Stage
from whaleflux_agent.runtime import logs
from whaleflux_agent.runtime.log_times import LineTimes
from whaleflux_agent.task_runner import Task

_CHUNKS_WAITING = 32  # of at most 64 KiB: a slow reader stops the readers of files, nobody else
_REQUESTS = 64


class LogStreams:
    """Serves the log requests of one stream to the scheduler."""

    def __init__(self, find: Callable[[str, int], Task | None], on_change: Callable[[], None]) -> None:
        self._find, self._on_change = find, on_change
        self._chunks: asyncio.Queue[agent_pb2.LogChunk] = asyncio.Queue(_CHUNKS_WAITING)
        self._readers: dict[str, asyncio.Task[None]] = {}

    def start(self, request: agent_pb2.LogRequest) -> None:
        """Begins to serve `request`; the answer is chunks, the last of which says `end`."""
        if len(self._readers) >= _REQUESTS or request.request in self._readers:
            return
        reader = asyncio.create_task(self._serve(request))
        self._readers[request.request] = reader
        reader.add_done_callback(lambda _: self._readers.pop(request.request, None))

    def cancel(self, request: str) -> None:
        """Nobody reads the answer any more."""
        if reader := self._readers.get(request):
            reader.cancel()

    def take(self) -> agent_pb2.LogChunk | None:
        """The next chunk to send, if there is one."""
        with contextlib.suppress(asyncio.QueueEmpty):
            return self._chunks.get_nowait()
        return None

    async def close(self) -> None:
        """Ends all readers."""
        readers = list(self._readers.values())
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    async def _serve(self, request: agent_pb2.LogRequest) -> None:
        task, error = self._find(request.job, request.epoch), ""
        try:
            if task is None:
                error = "its output is not kept any more: a node keeps that of the tasks that ended last"
            else:
                await self._ranks(request, task)
        except* OSError as failures:  # of all readers together
            error = f"the log cannot be read: {_first(failures)}"
        epoch = task.work.epoch if task else request.epoch
        await self._put(
            agent_pb2.LogChunk(request=request.request, rank=request.rank, end=True, error=error, epoch=epoch)
        )

    async def _ranks(self, request: agent_pb2.LogRequest, task: Task) -> None:
        wanted = [rank for rank in task.work.processes if request.rank in (-1, rank)]
        if not wanted and request.rank in task.work.ranks:  # its output is in that of the node's one process
            wanted = list(task.work.processes)
        async with asyncio.TaskGroup() as reading:
            for rank in wanted:
                reading.create_task(self._rank(request, task, rank, task.log(rank)))

    async def _rank(self, request: agent_pb2.LogRequest, task: Task, rank: int, path: Path) -> None:
        def more() -> bool:
            return request.follow and task.stage not in (Stage.ENDED, Stage.REFUSED)

        epoch = task.work.epoch
        after = next((known.offset for known in request.after if (known.rank, known.epoch) == (rank, epoch)), None)
        since_ns = request.since_time.ToNanoseconds() if request.HasField("since_time") else 0
        times = LineTimes(path).marks if request.times or since_ns else None
        lines = logs.follow(path, tail_lines=request.tail_lines, after=after, since_ns=since_ns, times=times, more=more)
        async with contextlib.aclosing(lines):
            async for found in lines:
                chunk = agent_pb2.LogChunk(
                    request=request.request,
                    rank=rank,
                    data=found.data,
                    epoch=epoch,
                    next_offset=found.behind,
                    progress=found.progress,
                )
                if request.times and found.at_ns:
                    chunk.time.FromNanoseconds(found.at_ns)
                await self._put(chunk)

    async def _put(self, chunk: agent_pb2.LogChunk) -> None:
        await self._chunks.put(chunk)
        self._on_change()


def _first(failures: BaseException) -> BaseException:
    return _first(failures.exceptions[0]) if isinstance(failures, BaseExceptionGroup) else failures
