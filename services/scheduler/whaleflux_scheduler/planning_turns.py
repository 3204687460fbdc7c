"""Work that takes up to seconds of a processor, one at a time and beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from whaleflux.errors import ResourceExhausted
from whaleflux.reasons import ErrorReason

PATIENCE_S = 10.0  # until somebody has their turn
_Answer = TypeVar("_Answer")


class Turns:
    """`busy`: what is going on, for who waited in vain."""

    def __init__(self, busy: str) -> None:
        self._busy, self._one = busy, asyncio.Lock()

    async def run(self, work: Callable[[], _Answer], patience_s: float | None = PATIENCE_S) -> _Answer:
        """In a thread, in its turn. Who gives up leaves the turn taken until the thread has ended.

        Raises ResourceExhausted after `patience_s`; None: it waits for its turn, however long.
        """
        try:
            async with asyncio.timeout(patience_s):
                await self._one.acquire()
        except TimeoutError:
            raise ResourceExhausted(
                f"{self._busy}; ask again later", reason=ErrorReason.PLANNER_BUSY, retry_after_s=1.0
            ) from None
        working = asyncio.ensure_future(asyncio.to_thread(work))
        working.add_done_callback(self._next)
        return await asyncio.shield(working)

    def _next(self, done: asyncio.Future[Any]) -> None:
        self._one.release()
        if not done.cancelled():
            done.exception()  # told to who waits, if anybody does
