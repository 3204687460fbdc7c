"""A TCP relay that a test can close: what a site's uplink is to the agents behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Relays connections to `target` while it is open; closing it breaks those that stand and refuses new ones."""

    def __init__(self, host: str, port: int) -> None:
        self._target, self._open = (host, port), True
        self._relays: set[asyncio.Task[None]] = set()
        self.address = ""

    def cut(self) -> None:
        self._open = False
        for relay in self._relays:
            relay.cancel()

    def heal(self) -> None:
        self._open = True

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Gate]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.cut()
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            if self._open:
                await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end is gone, or the gate was closed
        finally:
            self._relays.discard(task)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        try:
            both = {asyncio.ensure_future(_pump(reader, far_writer)), asyncio.ensure_future(_pump(far_reader, writer))}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in both:
                    each.cancel()
        finally:
            far_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
