"""What the agent asks of a runtime: start a task, take one over after a restart, hear of its ends, make it end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

UNKNOWN_EXIT = -9  # reported for a rank whose end nobody saw; `RankExit.known` is False then


class LaunchFailed(Exception):  # named for what happened
    """The task could not be started; the text says why, for people. `left` is what must be ended before it is over.

    `unfit`: no later try on this node can go better.
    """

    def __init__(self, text: str, *, left: Running | None = None, unfit: bool = False) -> None:
        super().__init__(text)
        self.left, self.unfit = left, unfit


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
    secrets: str = (
        ""  # folder with what its processes find in their environment (env/{VARIABLE}) and as files; "": nothing
    )
    secret_variables: tuple[str, ...] = ()  # names of those in env/
    wall: Mapping[str, Any] = field(default_factory=dict)  # what its processes give up (`walls.py`)
    processes_per_rank: int = 0  # most processes and threads; 0: no limit

    def process_of(self, rank: int) -> int:
        """Position of the process that a rank runs in: its own, or that of the whole node."""
        return next((at for at, plan in enumerate(self.ranks) if plan.rank == rank), 0)


@dataclass(frozen=True, slots=True)
class RankExit:
    """How one rank ended. `code` is its exit code, or -signal."""

    rank: int
    code: int
    out_of_memory: bool = False
    known: bool = True  # False: nobody saw it end
    why: str = ""  # what its agent did to it, and why


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

    async def end(self, rank: int, why: str) -> None:
        """Kills the process of a rank with all that it started; its exit says `why`."""
        ...

    async def gone(self) -> bool:
        """True when no process of the task has a living thread on the node, whatever it did to hide."""
        ...

    async def remains(self) -> tuple[str, ...]:
        """What is left of it, one sentence for each process: pid, states of its threads, where they wait."""
        ...

    async def release(self) -> None:
        """Frees what the runtime holds for the task, once it is gone."""
        ...


class Runtime(Protocol):
    """One way to run tasks."""

    name: str

    @property
    def memory_limits(self) -> str:
        """Who sees to limits of memory: the "kernel" at once, or the agent, which has it "watched"."""
        ...

    @property
    def limited_by(self) -> frozenset[str]:
        """What the kernel limits of a rank: "cpu", "memory", "pids"."""
        ...

    async def prepare(self, image: str) -> None:
        """Gets what the start needs and may take long (an image). Raises LaunchFailed."""
        ...

    async def start(self, plan: LaunchPlan) -> Running:
        """Starts every rank; returns when all exist. Raises LaunchFailed, with what is left of the try."""
        ...

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        """Takes over what an earlier agent began to start by this plan, also when it has ended since; None: never begun.

        A start that came to nothing is given as a task whose ranks ended unseen: it is never begun a second time.
        """
        ...
