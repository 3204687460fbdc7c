"""Checkpoints for PyTorch training: restore the newest by itself, save beside the training, lose no step.

    with Checkpointer(model=model, optimizer=optimizer) as saved:
        for step, batch in saved.steps(batches, total=10_000):
            loss = train(batch)
            saved.report(loss)

Files are in torch.distributed.checkpoint's own format, so anything that reads DCP reads them. What makes a folder a
checkpoint is not its files but the commit: every rank's sizes and checksums, under the epoch of the attempt, taken by
the checkpoint service in one transaction. Without an agent (a script started by hand) a plain folder is used.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter

from whaleflux.sdk.rank import Keeper, SavedPiece, Target, keeper_of_environment
from whaleflux.sdk.state import Stateful, TrainingState

log = logging.getLogger(__name__)

B = TypeVar("B")
_DEFAULT_EVERY_STEPS = 100
_HASH_BLOCK_BYTES = 1 << 22


class Checkpointer:
    """Saves and restores one training loop; every rank makes one, with the same arguments.

    `every` is in steps; unset, the job file's `checkpoint.every_steps` rules, else 100. `location` is the folder used
    when no agent runs this process. Use it as a context manager: entering restores, leaving waits for what is
    being written. Not safe for use from several threads.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Stateful | None = None,
        every: int | None = None,
        location: str | os.PathLike[str] | None = None,
        layout: str = "replicated",
        keeper: Keeper | None = None,
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        # Collectives of a save run in a thread beside those of the training: they need a group of their own.
        self._group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._state = TrainingState(model, optimizer, data, self.rank)
        self._layout, self._every = layout, every
        self._keeper = keeper or keeper_of_environment(location, self.world_size)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whaleflux-save")
        self._pending: Future[None] | None = None
        self.step = 0
        self.restored_from = ""

    def __enter__(self) -> Checkpointer:
        self.step = self.restore()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown(wait=kind is None, cancel_futures=True)
            self._keeper.close()

    def steps(self, batches: Iterable[B] | Callable[[int], B], total: int) -> Iterator[tuple[int, B]]:
        """Yields (step, batch) from the restored step to `total`, saving when due and at the end.

        `batches` is a function of the step (then the step is the exact data position) or an iterable that is itself
        restored through `data`.
        """
        source = None if callable(batches) else iter(batches)
        every = self._every or self._keeper.every_steps or _DEFAULT_EVERY_STEPS
        while self.step < total:
            batch = batches(self.step) if callable(batches) else next(source)  # type: ignore[arg-type]
            yield self.step, batch
            self.step += 1
            if self.step % every == 0 or self.step == total:
                self.save_async()
        self.wait()

    def report(self, loss: float | torch.Tensor = math.nan) -> None:
        """Tells the platform that the current step is done; costs microseconds and never blocks."""
        self._keeper.progress(self.rank, self.step + 1, float(loss))

    def save(self) -> None:
        """Saves the state after `step` complete steps and returns when this rank's files are durable and reported."""
        self.save_async()
        self.wait()

    def save_async(self) -> None:
        """Copies the state now, writes it in the background. Waits for the save before it, so one is under way at most."""
        self.wait()
        state, step = self._state.capture(self.step), self.step
        self._pending = self._writer.submit(self._write, state, step)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong with the last save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self) -> int:
        """Loads the newest checkpoint that passes its checksums; returns its step, 0 when there is none."""
        corrupt = why = ""
        while True:
            target = self._agree(lambda: self._keeper.newest(corrupt, why))  # noqa: B023 - called at once
            if target is None:
                return 0
            why = self._first_fault(target)
            if not why:
                step = self._load(target)
                self.restored_from = target.name
                return step
            log.error("checkpoint %s is damaged (%s); trying the one before it", target.name, why)
            corrupt = target.name

    def _agree(self, ask: Callable[[], Target | None]) -> Target | None:
        """Rank 0 asks, all ranks hear the same answer, or the same failure."""
        if self._group is None:
            return ask()
        box: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                box[0] = ask()
            except Exception as error:
                box[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1]:
            raise RuntimeError(f"cannot learn which checkpoint to restore: {box[1]}")
        self._keeper.every_steps = self._shared_every()
        answer: Target | None = box[0]
        return answer

    def _shared_every(self) -> int:
        box = [self._keeper.every_steps]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _first_fault(self, target: Target) -> str:
        """Each rank checks its share of the pieces; the first fault that any rank found, "" when all are intact."""
        mine = target.pieces[self.rank :: self.world_size]
        fault = next((f for f in (_fault(target.folder, piece) for piece in mine) if f), "")
        if self._group is None:
            return fault
        faults: list[Any] = [None] * self.world_size
        dist.all_gather_object(faults, fault, group=self._group)
        return next((f for f in faults if f), "")

    def _load(self, target: Target) -> int:
        reader = FileSystemReader(target.folder)
        saved_keys = reader.read_metadata().state_dict_metadata
        with_own = any(key.startswith(f"rank/{self.rank}") for key in saved_keys)
        state = self._state.targets(with_own=with_own)
        dcp.load(state, storage_reader=reader, planner=DefaultLoadPlanner(), process_group=self._group)
        return self._state.apply(state)

    def _write(self, state: dict[str, Any], step: int) -> None:
        position = json.dumps({"step": step}).encode()
        target = self._keeper.start(step, self._layout, position)
        writer = FileSystemWriter(target.folder, single_file_per_rank=True, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._keeper.finish(target, self.rank, self._pieces(target.folder))

    def _pieces(self, folder: Path) -> list[SavedPiece]:
        own = sorted(folder.glob(f"__{self.rank}_*.distcp"))
        metadata = [folder / ".metadata"] if self.rank == 0 else []
        return [_piece(folder, file) for file in (*own, *metadata)]


def stabilise_buckets(model: nn.Module, loss: Callable[[], torch.Tensor], passes: int = 2) -> None:
    """Runs throw-away passes so that DDP rebuilds its buckets before any state is loaded.

    DDP reduces in one bucket in its first iteration and in several from the second on; gloo and NCCL add in an order
    that depends on the position in the bucket. Without this, the first step after a restart differs in its last bits
    from the same step of an unbroken run. Gradients and the random generator are left as they were.
    """
    random_state = torch.get_rng_state()
    for _ in range(passes):
        loss().backward()
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state)


def _piece(folder: Path, file: Path) -> SavedPiece:
    return SavedPiece(str(file.relative_to(folder)), file.stat().st_size, _checksum(file))


def _fault(folder: Path, piece: SavedPiece) -> str:
    """What is wrong with a piece on disk; "" when it is what was saved."""
    file = folder / piece.path
    try:
        size = file.stat().st_size
        if size != piece.size_bytes:
            return f"{piece.path} has {size} bytes, saved were {piece.size_bytes}"
        return "" if _checksum(file) == piece.checksum else f"{piece.path} has another checksum than when it was saved"
    except OSError as error:
        return f"{piece.path}: {error.strerror}"


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return f"xxh3-128:{digest.hexdigest()}"
