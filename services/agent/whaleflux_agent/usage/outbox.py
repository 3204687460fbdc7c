"""Batches on their way to the console: on the node's disk, so that neither a cut nor a new agent loses them; bounded in bytes.

What finds no room goes, the oldest first, and the next batch says how many went: what is not known is told as that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from google.protobuf.message import DecodeError

from whaleflux import telemetry
from whaleflux.telemetry import Event
from whaleflux.v1 import usage_pb2
from whaleflux_agent.state import write

_BLOCK_BYTES = 4096  # that a file takes at least
_log = telemetry.get_logger("whaleflux.agent")


class UsageOutbox:
    """One event loop. `folder` is the outbox's alone; `start` is new at each start of the agent."""

    def __init__(self, folder: Path, most_bytes: int, start: str) -> None:
        self._folder, self._most_bytes, self._start = folder, most_bytes, start
        self._waiting: deque[tuple[Path, int]] = deque()  # with the bytes that each takes on the disk
        self._bytes = self._sequence = self._dropped = 0
        self.filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def dropped(self) -> int:
        """Batches that were dropped and that no batch has told of."""
        return self._dropped

    async def open(self) -> None:
        """Finds what earlier starts could not deliver."""
        self._waiting.extend(await asyncio.to_thread(self._found))
        self._bytes = sum(size for _, size in self._waiting)
        self._signal()

    def _found(self) -> list[tuple[Path, int]]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return [(path, _on_disk(path.stat().st_size)) for path in sorted(self._folder.glob("*.pb"))]

    async def put(self, batch: usage_pb2.UsageBatch) -> None:
        """Numbers a batch and keeps it. One that the disk has no room for is dropped as the oldest are, and counted."""
        self._sequence += 1
        batch.start, batch.sequence, batch.dropped_batches = self._start, self._sequence, self._dropped
        content = batch.SerializeToString()
        path, size = self._folder / f"{self._start}-{self._sequence:012d}.pb", _on_disk(len(content))
        await self._make_room(size)
        try:
            await asyncio.to_thread(write, path, content)
        except OSError as error:
            if not self._dropped:
                _log.error(Event.USAGE_DROPPED, folder=str(self._folder), reason=error.strerror)
            self._dropped += 1
            return
        self._dropped -= batch.dropped_batches
        self._waiting.append((path, size))
        self._bytes += size
        self._signal()

    async def _make_room(self, size: int) -> None:
        while self._waiting and self._bytes + size > self._most_bytes:
            if not self._dropped:
                _log.warning(Event.USAGE_DROPPED, folder=str(self._folder), reason="the outbox is full (usage_bytes)")
            oldest = self._waiting[0][0]
            self._dropped += 1 + (await asyncio.to_thread(_read, oldest)).dropped_batches
            await self.remove([oldest])

    async def first(self, most: int, most_bytes: int) -> list[tuple[Path, usage_pb2.UsageBatch]]:
        """The oldest ones that fit into a message, of one node's one start or more; they stay until `remove`."""
        found: list[tuple[Path, usage_pb2.UsageBatch]] = []
        size = 0
        for path, _ in list(self._waiting)[:most]:
            batch = await asyncio.to_thread(_read, path)
            size += batch.ByteSize()
            if found and size > most_bytes:
                break
            found.append((path, batch))
        return found

    async def remove(self, paths: list[Path]) -> None:
        """They are delivered, or never will be."""
        gone = set(paths)
        self._bytes -= sum(size for path, size in self._waiting if path in gone)
        self._waiting = deque(one for one in self._waiting if one[0] not in gone)
        for path in paths:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        self._signal()

    def _signal(self) -> None:
        if self._waiting:
            self.filled.set()
        else:
            self.filled.clear()


def _read(path: Path) -> usage_pb2.UsageBatch:
    """A batch; an empty one of a file that cannot be read."""
    try:
        return usage_pb2.UsageBatch.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        _log.error(Event.RECORD_UNREADABLE, key=str(path), reason=str(error))
        return usage_pb2.UsageBatch()


def _on_disk(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // _BLOCK_BYTES) * _BLOCK_BYTES
