"""Checkpoint pieces on their way to the checkpoint service: durable first, delivered when it can take them.

Training never waits for the control plane: a rank is answered as soon as its report is on the node's disk.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import DeadlineExceeded, NotFound, OverLimit, Refusal, Unavailable
from whaleflux.rpc.status import ServerFailure
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from whaleflux_agent.core.backoff import pause_s
from whaleflux_agent.state import StateDir, write

_MOST_WAITING = 10_000
_CALL_S = 10.0
_UNKNOWN_FOR_S = 600.0  # another node may still hold the announcement of a checkpoint that is not known yet
_FOLDER = re.compile(r"s\d{12}-e\d+")
_log = telemetry.get_logger("whaleflux.agent")

Message = checkpoint_pb2.BeginCheckpointRequest | checkpoint_pb2.ReportPiecesRequest
_KINDS: dict[str, type[Message]] = {
    "begin": checkpoint_pb2.BeginCheckpointRequest,
    "pieces": checkpoint_pb2.ReportPiecesRequest,
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """One message that is not delivered."""

    path: Path
    checkpoint: str  # its name: messages of one checkpoint keep their order
    message: Message
    since_s: float  # clock.now(), for giving up


def checkpoint_id(step: int, epoch: int) -> str:
    """The id that the checkpoint service gives: known without asking."""
    return f"s{step:012d}-e{epoch}"


class Saves:
    """The queue. One event loop; any number of ranks put in, one loop delivers."""

    def __init__(
        self, state: StateDir, stub: checkpoint_pb2_grpc.CheckpointServiceStub, roots: Sequence[Path], clock: Clock
    ) -> None:
        self._state, self._stub, self._clock = state, stub, clock
        self._roots = [root.resolve() for root in roots]
        self._waiting: list[Waiting] = []
        self._number = 0
        self._news = asyncio.Event()
        self._deletable: dict[str, str] = {}  # name, location

    def __len__(self) -> int:
        return len(self._waiting)

    async def open(self) -> None:
        """Reads what an earlier agent could not deliver."""
        self._waiting = await self._state.run(self._load)
        self._number = max((int(entry.path.name.split(".")[0]) for entry in self._waiting), default=0)

    def _load(self) -> list[Waiting]:
        found = []
        for path in sorted((self._state.root / "saves").glob("*.pb")):
            try:
                message = _KINDS[path.name.split(".")[1]].FromString(path.read_bytes())
            except (OSError, DecodeError, KeyError, IndexError):
                continue
            found.append(Waiting(path, _checkpoint_of(message), message, path.stat().st_mtime))
        return found

    async def put(self, message: Message) -> None:
        """Makes `message` durable and delivers it later. Raises OverLimit when too much waits."""
        if len(self._waiting) >= _MOST_WAITING:
            raise OverLimit(f"{_MOST_WAITING} reports wait for the checkpoint service", reason="SAVES_FULL")
        self._number += 1
        kind = "begin" if isinstance(message, checkpoint_pb2.BeginCheckpointRequest) else "pieces"
        path = self._state.root / "saves" / f"{self._number:012d}.{kind}.pb"
        await self._state.run(write, path, message.SerializeToString())
        self._waiting.append(Waiting(path, _checkpoint_of(message), message, self._clock.now().timestamp()))
        self._news.set()

    async def run(self) -> None:
        """Delivers for ever."""
        failures = 0
        while True:
            self._news.clear()
            failed = not await self._deliver_all()
            failed |= not await self._delete_all()
            failures = failures + 1 if failed else 0
            if failed:
                await self._clock.sleep(pause_s(failures, random.random(), longest_s=2.0))
            else:
                await self._news.wait()

    async def _deliver_all(self) -> bool:
        """One try for each checkpoint; False when something is left to be tried again."""
        done = True
        for checkpoint in dict.fromkeys(entry.checkpoint for entry in self._waiting):
            while batch := _batch([entry for entry in self._waiting if entry.checkpoint == checkpoint]):
                if not await self._deliver(batch):
                    done = False
                    break
        return done

    async def _deliver(self, batch: list[Waiting]) -> bool:
        try:
            await self._send(batch)
        except Refusal as refusal:
            if self._worth_repeating(refusal, batch):
                return False
            _log.warning(Event.SAVE_REFUSED, checkpoint=batch[0].checkpoint, reason=refusal.message)
        for entry in batch:
            await self._state.run(entry.path.unlink, missing_ok=True)
            self._waiting.remove(entry)
        return True

    async def _send(self, batch: list[Waiting]) -> None:
        first = batch[0].message
        if isinstance(first, checkpoint_pb2.BeginCheckpointRequest):
            await self._stub.BeginCheckpoint(first, timeout=_CALL_S)
            return
        merged = checkpoint_pb2.ReportPiecesRequest(checkpoint=first.checkpoint, epoch=first.epoch)
        for entry in batch:
            assert isinstance(entry.message, checkpoint_pb2.ReportPiecesRequest)
            merged.complete_ranks.extend(entry.message.complete_ranks)
            merged.pieces.extend(entry.message.pieces)
        answer = await self._stub.ReportPieces(merged, timeout=_CALL_S)
        self._deletable |= {old.name: old.location for old in answer.deletable}

    def _worth_repeating(self, refusal: Refusal, batch: list[Waiting]) -> bool:
        """Whether the same message may be taken later. A fenced epoch never is; an unknown checkpoint for a while."""
        if isinstance(refusal, NotFound):
            return self._clock.now().timestamp() - batch[0].since_s < _UNKNOWN_FOR_S
        return isinstance(refusal, Unavailable | DeadlineExceeded | ServerFailure | OverLimit)

    async def _delete_all(self) -> bool:
        """Frees the bytes of replaced checkpoints and says so; False when that has to be said again."""
        gone = []
        for name, location in self._deletable.items():
            if await asyncio.to_thread(delete_folder, Path(location), self._roots):
                gone.append(name)
            else:
                _log.warning(Event.SAVE_REFUSED, checkpoint=name, reason=f"{location} is not ours to delete")
        self._deletable = {name: self._deletable[name] for name in gone}
        if not gone:
            return True
        try:
            await self._stub.ConfirmDeleted(checkpoint_pb2.ConfirmDeletedRequest(names=gone), timeout=_CALL_S)
        except (Unavailable, DeadlineExceeded, ServerFailure):
            return False
        except Refusal as refusal:
            _log.warning(Event.SAVE_REFUSED, checkpoint=", ".join(gone[:3]), reason=refusal.message)
        self._deletable = {}
        return True


def _batch(waiting: list[Waiting]) -> list[Waiting]:
    """The first message and those behind it that can go with it."""
    batch: list[Waiting] = []
    for entry in waiting:
        if isinstance(entry.message, checkpoint_pb2.BeginCheckpointRequest):
            return batch or [entry]
        batch.append(entry)
    return batch


def _checkpoint_of(message: Message) -> str:
    if isinstance(message, checkpoint_pb2.BeginCheckpointRequest):
        return f"{message.job}/checkpoints/{checkpoint_id(message.step, message.epoch)}"
    return message.checkpoint


def delete_folder(folder: Path, roots: Sequence[Path]) -> bool:
    """Deletes a checkpoint's folder below one of `roots`; True when it is gone, False when it is not ours.

    A name from the network decides what is deleted, so it must look like a checkpoint and really lie there.
    """
    real = folder.resolve()
    if not _FOLDER.fullmatch(real.name) or not any(real != root and real.is_relative_to(root) for root in roots):
        return False
    shutil.rmtree(real, ignore_errors=True)
    return not real.exists()
