"""Ends tasks that were started through a runtime, as the agent does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from whaleflux_agent.runtime.api import Running
from whaleflux_agent.termination import GpuCheck, terminate


async def _nobody(gpu_uuids: Any) -> frozenset[int]:
    return frozenset()


NO_GPUS = GpuCheck(_nobody, (), frozenset())


async def end(running: Running, *, grace_s: float = 0.0) -> None:
    """Ends a task of which everything can be ended."""

    async def stuck(evidence: str) -> None:
        raise AssertionError(evidence)

    async with asyncio.timeout(60):
        await terminate(running, NO_GPUS, grace_s=grace_s, on_stuck=stuck)


async def until(condition: Callable[[], Any]) -> None:
    """Returns when `condition` holds; fails the test when it does not in time."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
