"""Frees the bytes of checkpoints that nobody needs any more, wherever this node sees their storage.

Any agent may do it, and several may try. What decides is what is proven: a folder is deleted only where the storage shows the
name that the checkpoint's record has, and only there is a folder that is missing known to be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from whaleflux import names, telemetry
from whaleflux.checkpoint_storage import storage_id
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, checkpoint_pb2_grpc

_EVERY_S = 60.0
_CALL_S = 10.0
_MOST_KNOWN = 1000
_log = telemetry.get_logger("whaleflux.agent")


class CheckpointCollector:
    """One loop. What is found while a checkpoint is reported is deleted at once, the rest is asked for now and then."""

    def __init__(self, stub: checkpoint_pb2_grpc.CheckpointServiceStub, roots: Sequence[Path], clock: Clock) -> None:
        self._stub, self._roots, self._clock = stub, [root.resolve() for root in roots], clock
        self._known: dict[str, checkpoint_pb2.Checkpoint] = {}
        self._changed = asyncio.Event()

    def learn(self, deletable: Iterable[checkpoint_pb2.Checkpoint]) -> None:
        """These may go."""
        for checkpoint in deletable:
            if len(self._known) < _MOST_KNOWN:
                self._known[checkpoint.name] = checkpoint
                self._changed.set()

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_now_and_then())
            while True:
                await self._changed.wait()
                await self._delete_known()

    async def _ask_now_and_then(self) -> None:
        while True:
            await self._ask()
            await self._clock.sleep(_EVERY_S * random.uniform(0.8, 1.2))

    async def _ask(self) -> None:
        try:
            answer = await self._stub.ListDeletable(checkpoint_pb2.ListDeletableRequest(), timeout=_CALL_S)
        except StatusError as error:
            _log.debug(Event.FEED_BROKEN, feed="checkpoint", reason=error.reason)
            return
        self.learn(answer.checkpoints)

    async def _delete_known(self) -> None:
        self._changed.clear()
        known, self._known = self._known, {}
        gone = [c.name for c in known.values() if await asyncio.to_thread(delete_checkpoint, c, self._roots)]
        if not gone:
            return
        try:
            await self._stub.ConfirmDeleted(checkpoint_pb2.ConfirmDeletedRequest(names=gone), timeout=_CALL_S)
        except StatusError as error:  # listed again, and found to be gone then
            _log.info(Event.FEED_BROKEN, feed="checkpoint", reason=error.reason)


def delete_checkpoint(checkpoint: checkpoint_pb2.Checkpoint, roots: Sequence[Path]) -> bool:
    """Deletes a checkpoint's folder; True when it is proven to be gone. Blocks; never raises.

    A name from the network decides what is deleted, so it must look like a checkpoint, and lie in a folder that shows the
    storage of the record, or below one of `roots` when the record has none. The job writes in its folder, and where the storage lets it
    beside that: neither of the last two names may be a link, which could lead to another job's.
    """
    folder = Path(checkpoint.location)
    try:
        job = folder.parents[1].resolve() / folder.parent.name if len(folder.parents) > 1 else folder.parent
        if not names.CHECKPOINT_ID.fullmatch(folder.name) or not _ours(job / folder.name, checkpoint.storage, roots):
            return False
        opened = os.open(job, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder.name, ignore_errors=True, dir_fd=opened)
                os.lstat(folder.name, dir_fd=opened)
                return False  # what is there is a link, or did not go
        finally:
            os.close(opened)
        return True
    except OSError as error:
        _log.debug(Event.SAVE_REFUSED, checkpoint=checkpoint.name, reason=str(error))
        return False


def _ours(folder: Path, storage: str, roots: Sequence[Path]) -> bool:
    if storage:
        return storage_id(folder.parent) == storage
    below = any(folder.parent != root and folder.is_relative_to(root) for root in roots)
    return below and folder.parent.exists()
