"""Whether this node can read what an attempt has to restore, looked at before its processes start."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from whaleflux import telemetry
from whaleflux.checkpoint_storage import storage_id
from whaleflux.errors import NotFound, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.api import LaunchFailed

_CALL_S = 2.0
LOOK_S = 10.0  # a dead network mount answers never
_RESTORABLE = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)
_log = telemetry.get_logger("whaleflux.agent")


class CheckpointAccess:
    """Asks the checkpoint service what there is, and the file system whether it is within reach."""

    def __init__(self, stub: checkpoint_pb2_grpc.CheckpointServiceStub) -> None:
        self._stub = stub
        self._looking: asyncio.Future[list[str]] | None = (
            None  # one at a time: a mount that hangs holds one thread, not all
        )

    async def check(self, work: Work) -> None:
        """Raises LaunchFailed when the job has checkpoints and this node reaches none of them: another node may.

        When the service does not answer nothing is known, and the ranks ask again themselves.
        """
        if work.epoch == 1 or work.spec.is_service:
            return
        try:
            request = checkpoint_pb2.ListCheckpointsRequest(parent=work.job, page_size=1000)
            listed = (await self._stub.ListCheckpoints(request, timeout=_CALL_S)).checkpoints
        except NotFound:
            return
        except StatusError as error:
            _log.info(Event.FEED_BROKEN, feed="checkpoint", job=work.job, reason=error.reason)
            return
        known = [c for c in listed if c.job_uid == work.job_uid and c.state in _RESTORABLE]
        faults = await self._faults(known) if known else []
        if faults and all(faults):
            raise LaunchFailed(
                f"{ErrorReason.CHECKPOINT_UNREACHABLE}: {len(known)} checkpoints were committed, and this node reaches none of them: {faults[0]}"
            )

    async def _faults(self, known: Sequence[checkpoint_pb2.Checkpoint]) -> list[str]:
        late = [f"{known[0].location} does not answer within {LOOK_S:g} s"]
        if self._looking is not None and not self._looking.done():
            return late  # still at the look before this one
        self._looking = asyncio.ensure_future(asyncio.to_thread(lambda: [unreachable(one) for one in known]))
        done, _ = await asyncio.wait({self._looking}, timeout=LOOK_S)
        return self._looking.result() if done else late


def unreachable(checkpoint: checkpoint_pb2.Checkpoint) -> str:
    """Why the folder of a checkpoint cannot be read from here, "" when it can. Blocks."""
    folder = Path(checkpoint.location)
    try:
        if checkpoint.storage and storage_id(folder.parent) != checkpoint.storage:
            return f"{folder.parent} is not the storage that it was saved on: not mounted?"
        next(folder.iterdir(), None)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""
