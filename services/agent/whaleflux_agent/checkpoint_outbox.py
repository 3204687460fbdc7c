"""Checkpoint pieces on their way to the checkpoint service: durable first, delivered when it can take them.

Training never waits for the control plane: a rank is answered as soon as its report is on the node's disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import NotFound, ResourceExhausted, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from whaleflux_agent.state import StateDir, write

RETRY = Backoff(longest_s=2.0)

MOST_WAITING = 10_000
_CALL_S = 10.0
_UNKNOWN_FOR_S = 600.0  # another node may still hold the announcement of a checkpoint that is not known yet
_log = telemetry.get_logger("whaleflux.agent")

Message = (
    checkpoint_pb2.BeginCheckpointRequest | checkpoint_pb2.ReportPiecesRequest | checkpoint_pb2.AbandonCheckpointRequest
)
_KINDS: dict[str, type[Message]] = {
    "begin": checkpoint_pb2.BeginCheckpointRequest,
    "pieces": checkpoint_pb2.ReportPiecesRequest,
    "abandon": checkpoint_pb2.AbandonCheckpointRequest,
}


@dataclass(frozen=True, slots=True)
class PendingMessage:
    """One message that is not delivered."""

    path: Path
    checkpoint: str  # its name: messages of one checkpoint keep their order
    message: Message
    since_s: float  # clock.now(), for giving up


class CheckpointOutbox:
    """The queue. One event loop; any number of ranks put in, one loop delivers."""

    def __init__(
        self,
        state: StateDir,
        stub: checkpoint_pb2_grpc.CheckpointServiceStub,
        clock: Clock,
        on_deletable: Callable[[Iterable[checkpoint_pb2.Checkpoint]], None] = lambda _: None,
    ) -> None:
        self._state, self._stub, self._clock, self._on_deletable = state, stub, clock, on_deletable
        self._waiting: list[PendingMessage] = []
        self._number = 0
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def open(self) -> None:
        """Reads what an earlier agent could not deliver."""
        self._waiting = await self._state.run(self._load)
        self._number = max((int(entry.path.name.split(".")[0]) for entry in self._waiting), default=0)

    def _load(self) -> list[PendingMessage]:
        found = []
        for path in sorted((self._state.root / "checkpoint-outbox").glob("*.pb")):
            try:
                message = _KINDS[path.name.split(".")[1]].FromString(path.read_bytes())
            except (OSError, DecodeError, KeyError, IndexError):
                continue
            found.append(PendingMessage(path, _checkpoint_of(message), message, path.stat().st_mtime))
        return found

    async def put(self, message: Message) -> None:
        """Makes `message` durable and delivers it later. Raises ResourceExhausted when too much waits."""
        if len(self._waiting) >= MOST_WAITING:
            raise ResourceExhausted(
                f"{MOST_WAITING} reports wait for the checkpoint service", reason=ErrorReason.SAVES_FULL
            )
        self._number += 1
        kind = next(kind for kind, type_ in _KINDS.items() if isinstance(message, type_))
        path = self._state.root / "checkpoint-outbox" / f"{self._number:012d}.{kind}.pb"
        await self._state.run(write, path, message.SerializeToString())
        self._waiting.append(PendingMessage(path, _checkpoint_of(message), message, self._clock.now().timestamp()))
        self._changed.set()

    async def run(self) -> None:
        """Delivers for ever."""
        failures = 0
        while True:
            self._changed.clear()
            failed = not await self._deliver_all()
            failures = failures + 1 if failed else 0
            if failed:
                await self._clock.sleep(RETRY.pause_s(failures))
            else:
                await self._changed.wait()

    async def _deliver_all(self) -> bool:
        """One try for each checkpoint; False when something is left to be tried again."""
        done = True
        for checkpoint in dict.fromkeys(entry.checkpoint for entry in self._waiting):
            while batch := _batch([entry for entry in self._waiting if entry.checkpoint == checkpoint]):
                if not await self._deliver(batch):
                    done = False
                    break
        return done

    async def _deliver(self, batch: list[PendingMessage]) -> bool:
        try:
            await self._send(batch)
        except StatusError as error:
            if error.reason == ErrorReason.REQUEST_TOO_LARGE and len(batch) > 1:
                half = len(batch) // 2
                return await self._deliver(batch[:half]) and await self._deliver(batch[half:])
            if self._worth_repeating(error, batch):
                return False
            _log.warning(Event.SAVE_REFUSED, checkpoint=batch[0].checkpoint, reason=error.message)
        for entry in batch:
            await self._state.run(entry.path.unlink, missing_ok=True)
            self._waiting.remove(entry)
        return True

    async def _send(self, batch: list[PendingMessage]) -> None:
        first = batch[0].message
        if isinstance(first, checkpoint_pb2.BeginCheckpointRequest):
            await self._stub.BeginCheckpoint(first, timeout=_CALL_S)
            return
        if isinstance(first, checkpoint_pb2.AbandonCheckpointRequest):
            await self._stub.AbandonCheckpoint(first, timeout=_CALL_S)
            return
        merged = checkpoint_pb2.ReportPiecesRequest(checkpoint=first.checkpoint, epoch=first.epoch)
        for entry in batch:
            assert isinstance(entry.message, checkpoint_pb2.ReportPiecesRequest)
            merged.complete_ranks.extend(entry.message.complete_ranks)
            merged.pieces.extend(entry.message.pieces)
        answer = await self._stub.ReportPieces(merged, timeout=_CALL_S)
        self._on_deletable(answer.deletable)

    def _worth_repeating(self, error: StatusError, batch: list[PendingMessage]) -> bool:
        """Whether the same message may be taken later. A fenced epoch never is; an unknown checkpoint for a while."""
        if isinstance(error, NotFound):
            return self._clock.now().timestamp() - batch[0].since_s < _UNKNOWN_FOR_S
        return worth_repeating(error)


def _batch(waiting: list[PendingMessage]) -> list[PendingMessage]:
    """The first message and those behind it that can go with it."""
    batch: list[PendingMessage] = []
    for entry in waiting:
        if not isinstance(entry.message, checkpoint_pb2.ReportPiecesRequest):
            return batch or [entry]
        batch.append(entry)
    return batch


def _checkpoint_of(message: Message) -> str:
    if isinstance(message, checkpoint_pb2.BeginCheckpointRequest):
        return names.checkpoint(message.job, message.step, message.epoch, message.serial)
    return message.name if isinstance(message, checkpoint_pb2.AbandonCheckpointRequest) else message.checkpoint
