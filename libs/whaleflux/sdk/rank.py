"""What a rank says to the agent that runs it: a Unix socket, a task token, never a wait that training would feel."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from whaleflux.v1 import agent_pb2, agent_pb2_grpc, checkpoint_pb2

log = logging.getLogger(__name__)

_TOKEN_HEADER = "x-wf-task-token"
_CALL_S = 10.0
_PATIENCE_S, _PAUSE_S = 600.0, 0.5
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class SavedPiece:
    """One durable file of a checkpoint: path below its folder, size in bytes, "xxh3-128:<hex>"."""

    path: str
    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint by name and the folder of its files."""

    name: str
    folder: Path
    pieces: tuple[SavedPiece, ...] = ()


class Keeper(Protocol):
    """Who knows what was saved: the agent, or a plain folder when a script runs by itself."""

    every_steps: int

    def newest(self, corrupt: str = "", why: str = "") -> Target | None:
        """The newest checkpoint to restore; `corrupt` names one that failed its check, not to be offered again."""
        ...

    def start(self, step: int, layout: str, data_position: bytes) -> Target:
        """Where to write the state after `step` complete steps."""
        ...

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        """This rank's files are durable."""
        ...

    def progress(self, rank: int, step: int, loss: float) -> None:
        """`step` is complete; never blocks."""
        ...

    def close(self) -> None:
        """Delivers what is under way."""
        ...


def keeper_of_environment(location: str | os.PathLike[str] | None, world_size: int) -> Keeper:
    """The agent's, when a rank was started by one; else a folder (`location`, or ./checkpoints)."""
    socket = os.environ.get("WHALEFLUX_AGENT_SOCKET")
    if socket:
        return AgentKeeper(socket, os.environ["WHALEFLUX_TASK_TOKEN"])
    return FolderKeeper(Path(location or "checkpoints"), world_size)


class AgentKeeper:
    """Asks the agent. Every call has a deadline; progress goes from a thread that keeps only the newest value."""

    def __init__(self, socket: str, token: str, restore_timeout_s: float = 60.0) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._stub = agent_pb2_grpc.RankServiceStub(self._channel)
        self._metadata = ((_TOKEN_HEADER, token),)
        self._restore_timeout_s = restore_timeout_s
        self.every_steps = 0
        self._news: agent_pb2.ReportProgressRequest | None = None
        self._wake, self._closing = threading.Condition(), False
        self._sender = threading.Thread(target=self._send_progress, name="whaleflux-progress", daemon=True)
        self._sender.start()

    def newest(self, corrupt: str = "", why: str = "") -> Target | None:
        request = agent_pb2.GetRestoreRequest(corrupt_checkpoint=corrupt, corrupt_message=why)
        answer = self._stub.GetRestore(
            request, timeout=self._restore_timeout_s, metadata=self._metadata, wait_for_ready=True
        )
        self.every_steps = answer.every_steps
        if not answer.HasField("checkpoint"):
            return None
        found = answer.checkpoint
        pieces = tuple(SavedPiece(p.path, p.size_bytes, p.checksum) for p in found.pieces)
        return Target(found.name, Path(found.location), pieces)

    def start(self, step: int, layout: str, data_position: bytes) -> Target:
        request = agent_pb2.StartSaveRequest(step=step, layout=layout, data_position=data_position)
        answer = self._patiently(self._stub.StartSave, request)
        return Target(answer.checkpoint, Path(answer.location))

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        listed = [
            checkpoint_pb2.Piece(rank=rank, path=p.path, size_bytes=p.size_bytes, checksum=p.checksum, tier="shared")
            for p in pieces
        ]
        request = agent_pb2.FinishSaveRequest(checkpoint=target.name, rank=rank, pieces=listed)
        self._patiently(self._stub.FinishSave, request)

    def _patiently(self, call: Any, request: Any) -> Any:
        """Repeats while the agent restarts or waits for room on its disk: a save runs beside the training."""
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return call(request, timeout=_CALL_S, metadata=self._metadata, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() not in _PASSING or time.monotonic() > end_s:
                    raise
                log.warning("the agent does not take a save yet: %s", error.details())
            time.sleep(_PAUSE_S)

    def progress(self, rank: int, step: int, loss: float) -> None:
        with self._wake:
            self._news = agent_pb2.ReportProgressRequest(rank=rank, step=step, loss=loss)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._sender.join(timeout=2 * _CALL_S)
        self._channel.close()

    def _send_progress(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._news is not None or self._closing)
                news, self._news = self._news, None
            if news is None:
                return
            try:
                self._stub.ReportProgress(news, timeout=1.0, metadata=self._metadata)
            except grpc.RpcError as error:  # the agent restarts: the next report says the same and more
                log.debug("progress not delivered: %s", error)


class FolderKeeper:
    """Checkpoints in one folder that all ranks can reach; complete ones have torch's `.metadata`, written last."""

    every_steps = 0

    def __init__(self, root: Path, world_size: int, keep: int = 3) -> None:
        self._root, self._world_size, self._keep = root, world_size, keep
        self._refused: set[str] = set()

    def newest(self, corrupt: str = "", why: str = "") -> Target | None:
        self._refused.add(corrupt)
        complete = [path for path in self._complete() if path.name not in self._refused]
        return Target(complete[-1].name, complete[-1]) if complete else None

    def start(self, step: int, layout: str, data_position: bytes) -> Target:
        folder = self._root / f"s{step:012d}"
        folder.mkdir(parents=True, exist_ok=True)
        return Target(folder.name, folder)

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        if rank != 0:
            return
        for old in self._complete()[: -self._keep]:
            (old / ".metadata").unlink()  # first: what is left is not a checkpoint any more
            for file in old.iterdir():
                file.unlink()
            old.rmdir()

    def progress(self, rank: int, step: int, loss: float) -> None:
        if rank == 0 and not math.isnan(loss):
            log.info("step %d loss %.4f", step, loss)

    def close(self) -> None:
        """Nothing is under way."""

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._root.glob("s*/.metadata"))
