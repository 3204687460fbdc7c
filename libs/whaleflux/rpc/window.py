"""How much input may be under way to who takes it: the input of sessions with jobs (AttachJob).

The transport's own flow control would stop the whole stream when a command does not read its input: signals, and the news
that the caller has left, would wait behind it.
"""

from __future__ import annotations

import asyncio

WINDOW_BYTES = 1 << 20  # sent and not said to be taken
CHUNK_BYTES = 64 << 10  # of one message


class Window:
    """The sender's side."""

    def __init__(self, size_bytes: int = WINDOW_BYTES) -> None:
        self._left_bytes = size_bytes
        self._more = asyncio.Event()
        self._closed = False

    async def spend(self, size_bytes: int) -> bool:
        """Waits until as many may be sent; False when nobody takes any more. `size_bytes` is at most a chunk."""
        while self._left_bytes < size_bytes and not self._closed:
            self._more.clear()
            await self._more.wait()
        self._left_bytes -= size_bytes
        return not self._closed

    def taken(self, size_bytes: int) -> None:
        """The other side has taken as many."""
        self._left_bytes += size_bytes
        self._more.set()

    def close(self) -> None:
        """Nobody takes any more."""
        self._closed = True
        self._more.set()
