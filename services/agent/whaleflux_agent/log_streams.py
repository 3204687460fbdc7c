"""Logs on demand: each request is one small reader; what they read leaves through one bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Stage
from whaleflux_agent.runtime import logs
from whaleflux_agent.tasks import Task

_CHUNKS_WAITING = 32  # of at most 64 KiB: a slow reader stops the readers of files, nobody else
_REQUESTS = 64


class LogStreams:
    """Serves the log requests of one stream to the scheduler."""

    def __init__(self, newest_of: Callable[[str], Task | None], on_news: Callable[[], None]) -> None:
        self._newest_of, self._on_news = newest_of, on_news
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
        task, error = self._newest_of(request.job), ""
        try:
            if task is None:
                error = f"{request.job} has no logs on this node"
            else:
                await self._ranks(request, task)
        except OSError as failure:
            error = f"the log cannot be read: {failure.strerror}"
        epoch = task.work.epoch if task else 0
        await self._put(
            agent_pb2.LogChunk(request=request.request, rank=request.rank, end=True, error=error, epoch=epoch)
        )

    async def _ranks(self, request: agent_pb2.LogRequest, task: Task) -> None:
        wanted = [rank for rank in task.work.ranks if request.rank in (-1, rank)]
        async with asyncio.TaskGroup() as reading:
            for rank in wanted:
                reading.create_task(self._rank(request, task, rank, task.log(rank)))

    async def _rank(self, request: agent_pb2.LogRequest, task: Task, rank: int, path: Path) -> None:
        def more() -> bool:
            return request.follow and task.stage not in (Stage.ENDED, Stage.REFUSED)

        async with contextlib.aclosing(logs.follow(path, tail_lines=request.tail_lines, more=more)) as chunks:
            async for data in chunks:
                await self._put(
                    agent_pb2.LogChunk(request=request.request, rank=rank, data=data, epoch=task.work.epoch)
                )

    async def _put(self, chunk: agent_pb2.LogChunk) -> None:
        await self._chunks.put(chunk)
        self._on_news()
