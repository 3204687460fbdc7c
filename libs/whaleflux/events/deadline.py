"""A deadline for what may swallow its cancellation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
AGAIN_S = 0.1  # between two cancellations


async def within(timeout_s: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; TimeoutError after `timeout_s`, when it has ended.

    `asyncio.timeout` cancels once. Until Python 3.12 `asyncio.wait_for` returns instead of passing that on when its own result is
    there in the same moment, and a loop around it (nats-py's, at a server that refuses at once) goes on for ever. So here it is
    cancelled until it has ended.
    """
    task = asyncio.ensure_future(work)
    try:
        ended, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not ended:
            raise TimeoutError
        return task.result()
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=AGAIN_S)
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # an error on its way out is nobody's news
