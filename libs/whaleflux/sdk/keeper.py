"""Who knows what was saved: the agent of the node, or a plain folder when a script runs by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from whaleflux.sdk.files import Fault, SavedPiece
from whaleflux.sdk.resharding import Resharding

Loss = Callable[[], float]
"""A loss that is read when it is needed: it may still be on its way from a GPU."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What some whole steps of a rank were made of: seconds, sums over them; None: not known. Times are UTC, seconds since 1970."""

    start_s: float
    end_s: float
    first_step: int  # from 1 on
    last_step: int
    data_s: float | None = None
    host_s: float | None = None  # the GPU had nothing to do otherwise
    save_s: float | None = None
    comm_in_node_s: float | None = None
    comm_cross_s: float | None = None
    tokens: int | None = None
    flops: float | None = None  # of the model, without what is computed again
    losses: tuple[Loss, ...] = ()  # of those of the steps that had one; read by whoever sends the report


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint by name, the folder of its files, and the storage that the folder must lie on ("": not known)."""

    name: str
    folder: Path
    pieces: tuple[SavedPiece, ...] = ()
    storage: str = ""
    lost: bool = False  # was found corrupt before, and is offered since there is nothing else

    @property
    def job_folder(self) -> Path:
        """Where the job's checkpoints are, and the name of their storage."""
        return self.folder.parent


@dataclass(frozen=True, slots=True)
class Refused:
    """A checkpoint that was offered and cannot be restored here."""

    name: str
    fault: Fault


class Keeper(Protocol):
    """What rank 0 asks for all ranks, and what each rank tells of itself."""

    every_steps: int

    def newest(self, refused: Sequence[Refused] = ()) -> Target | None:
        """The newest checkpoint to restore but the refused ones; None when nothing was ever saved.

        Raises RestoreFailed when there are checkpoints and all of them are refused.
        """
        ...

    def intact(self, target: Target) -> None:
        """A checkpoint that was taken for lost was read, and every byte is what was saved."""
        ...

    def start(
        self, step: int, serial: int, layout: str, data_position: bytes, resharding: Resharding | None = None
    ) -> Target:
        """Where to write the state after `step` complete steps; one folder for each `serial`. `resharding` None: not known."""
        ...

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        """This rank's files are durable."""
        ...

    def give_up(self, target: Target | None, step: int, why: str) -> None:
        """A save failed, and nothing of it is left. `target` None: it did not get as far as a folder."""
        ...

    def progress(self, rank: int, step: int, loss: Loss | None) -> None:
        """`step` is complete; never blocks."""
        ...

    def steps(self, rank: int, report: StepReport) -> None:
        """What steps were made of; never blocks."""
        ...

    def close(self) -> None:
        """Delivers what is under way."""
        ...


def keeper_of_environment(location: str | os.PathLike[str] | None, world_size: int) -> Keeper:
    """The agent's, when a rank was started by one; else a folder (`location`, or ./checkpoints)."""
    socket = os.environ.get("WHALEFLUX_AGENT_SOCKET")
    if socket:
        from whaleflux.sdk.agent_keeper import AgentKeeper

        return AgentKeeper(socket, os.environ["WHALEFLUX_TASK_TOKEN"])
    from whaleflux.sdk.folder_keeper import FolderKeeper

    return FolderKeeper(Path(location or "checkpoints"), world_size)
