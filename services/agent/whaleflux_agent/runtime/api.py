"""What the agent asks of a runtime: start a task, take one over after a restart, hear of its ends, make it end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

UNKNOWN_EXIT = -9  # reported for a rank whose end nobody saw; `RankExit.known` is False then


class LaunchFailed(Exception):  # named for what happened
    """The task could not be started; the text says why, for people."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank: what to execute, and where its output goes."""

    rank: int  # global
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    log: Path


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All ranks of a task on this node."""

    task: str
    token: str  # in the environment of every process of the task: how they are found again
    folder: Path  # the task's own, for the runtime's records
    ranks: tuple[RankPlan, ...]
    working_directory: str
    image: str = ""
    cpu_millicores_per_rank: int = 0  # 0: no limit
    memory_bytes_per_rank: int = 0  # 0: no limit
    gpu_uuids: tuple[str, ...] = ()  # for containers


@dataclass(frozen=True, slots=True)
class RankExit:
    """How one rank ended. `code` is its exit code, or -signal."""

    rank: int
    code: int
    out_of_memory: bool = False
    known: bool = True  # False: nobody saw it end


class Running(Protocol):
    """A started task."""

    def exits(self) -> AsyncGenerator[RankExit, None]:
        """Each rank's end, once, in the order in which they happen; ends with the last. One reader."""
        ...

    def alive(self) -> bool:
        """True while all of its ranks live."""
        ...

    async def signal(self, number: int) -> None:
        """Sends a signal to every rank that lives, with all that it started."""
        ...

    async def gone(self) -> bool:
        """True when no process of the task is left on the node, whatever it did to hide."""
        ...

    async def release(self) -> None:
        """Frees what the runtime holds for the task, once it is gone."""
        ...


class Runtime(Protocol):
    """One way to run tasks."""

    name: str

    async def prepare(self, plan: LaunchPlan) -> None:
        """Gets what the start needs and may take long (an image). Raises LaunchFailed."""
        ...

    async def start(self, plan: LaunchPlan) -> Running:
        """Starts every rank; returns when all exist. Raises LaunchFailed, and then nothing of it is left."""
        ...

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        """Takes over what an earlier agent started by this plan, also when it has ended since; None: never started."""
        ...


async def end(running: Running, *, grace_s: float, sigterm: int = 15, sigkill: int = 9) -> None:
    """SIGTERM, up to `grace_s` to comply, then SIGKILL until nothing is left. Returns when all are reaped."""
    await running.signal(sigterm)
    try:
        async with asyncio.timeout(grace_s):
            while not await running.gone():
                await asyncio.sleep(0.05)  # the kernel sends no event for the end of a group
    except TimeoutError:
        pass
    while not await running.gone():
        await running.signal(sigkill)
        await asyncio.sleep(0.05)
