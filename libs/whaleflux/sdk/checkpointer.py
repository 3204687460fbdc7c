"""Checkpoints for PyTorch training: restore the newest by itself, save beside the training, lose no step.

    with Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler) as saved:
        for step, batch in saved.steps(batches, total=10_000):
            loss = train(batch)
            saved.report(loss)

Files are in torch.distributed.checkpoint's own format, so anything that reads DCP reads them. What makes a folder a
checkpoint is not its files but the commit: every rank's sizes and checksums, under the epoch of the attempt, taken by
the checkpoint service in one transaction. Without an agent (a script started by hand) a plain folder is used.

A save that fails (a full disk, a mount that vanished, a control plane that refuses) fails on all ranks alike and is told
of; training goes on and saves again when it is due. A training whose checkpoints cannot be read ends with RestoreFailed: it
never starts over by itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter

from whaleflux.checkpoint_storage import make_folder, storage_id, sync
from whaleflux.sdk import generators
from whaleflux.sdk.agreement import Agreement
from whaleflux.sdk.background import Background
from whaleflux.sdk.errors import RankSilent, RestoreFailed, SaveFailed, WorldChanged
from whaleflux.sdk.files import Fault, FaultKind, SavedPiece, describe, find_fault
from whaleflux.sdk.gpu_share import keep_to_share
from whaleflux.sdk.keeper import Keeper, Refused, Target, keeper_of_environment
from whaleflux.sdk.losses import Losses
from whaleflux.sdk.passes import Passes, beginning, moved_to_world
from whaleflux.sdk.resharding import Resharding, resharding, structure
from whaleflux.sdk.state import Parts, Stateful, TrainingState, own_key, state_digest, unpacked
from whaleflux.sdk.step_times import StepTimes

log = logging.getLogger(__name__)

B = TypeVar("B")
_DEFAULT_EVERY_STEPS = 100
_LAST_SAVE_TRIES = 3
LAST_SAVE_PAUSE_S = 2.0
_FOLDER_TRIES = 100  # names that killed attempts may have left behind at one step
_serials = itertools.count()  # of this process: two saves never share a folder, whatever the step


class Checkpointer:
    """Saves and restores one training loop; every rank makes one, with the same arguments.

    `every` is in steps; unset, the job file's `checkpoint.every_steps` rules, else 100. `location` is the folder used
    when no agent runs this process. `scheduler` (learning rate), `scaler` (gradients) and `others` are anything with
    state_dict and load_state_dict; every rank saves its own. `data` is a loader that keeps its own position.

    `on_world_change`: what becomes of single ranks' positions in the data when another number of ranks restores.
    "refuse" raises WorldChanged unless they can be shared out without repeating or leaving out a sample; "restart_pass" begins
    the pass over the data again. `if_unreadable`: "fail" raises RestoreFailed when there are checkpoints and none can be
    restored; "start_over" begins at step 0 and says so. A rank that is silent for `save_timeout_s` fails the save.

    Use it as a context manager: entering restores, leaving waits for what is being written. A program that ends by an error
    waits for that too, for ten seconds at most. Not safe for use from several threads.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        data: Stateful | None = None,
        others: Mapping[str, Stateful] | None = None,
        every: int | None = None,
        location: str | os.PathLike[str] | None = None,
        layout: str = "replicated",
        on_world_change: Literal["refuse", "restart_pass"] = "refuse",
        if_unreadable: Literal["fail", "start_over"] = "fail",
        save_timeout_s: float = 1800.0,
        keeper: Keeper | None = None,
    ) -> None:
        keep_to_share()
        self._agreement = Agreement(save_timeout_s)
        self.rank, self.world_size = self._agreement.rank, self._agreement.world_size
        named = {"scheduler": scheduler, "scaler": scaler, **(others or {})}
        self._parts = Parts(model, optimizer, data, {name: part for name, part in named.items() if part is not None})
        self._state = TrainingState(self._parts, self.rank, self.world_size)
        self._fresh_data = data.state_dict() if data is not None else None
        self._position, self._passes = beginning(), None
        self._written_by = self.world_size
        self._layout, self._every, self._timeout_s = layout, every, save_timeout_s
        self._on_world_change, self._if_unreadable = on_world_change, if_unreadable
        self._keeper = keeper or keeper_of_environment(location, self.world_size)
        self._pending: Background | None = None
        self._silent, self._began_s = False, 0.0
        self._losses = Losses()
        self._times = StepTimes(model, self.world_size, functools.partial(self._keeper.steps, self.rank))
        self._end_error: SaveFailed | None = None
        self.step = 0
        self.restored_from = ""
        self.last_error: SaveFailed | None = None
        """Why the newest save failed; None once one has succeeded."""

    _passes: Passes[Any] | None

    def __enter__(self) -> Checkpointer:
        self.step = self.restore()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending is not None:
                self.wait()
            if kind is None and self._end_error is not None:
                raise self._end_error
        finally:
            self._keeper.close()

    def steps(self, batches: Iterable[B] | Callable[[int], B], total: int) -> Iterator[tuple[int, B]]:
        """Yields (step, batch) from the restored step to `total`, saving when due and at the end.

        `batches` is a function of the step (then the step is the exact data position) or a loader. A loader that ends before
        `total` is read again, pass after pass; its `set_epoch`, or its sampler's, is called with the number of the pass. A
        restored training goes on behind the last batch that it used: by `data`, if the loader keeps its own position, else by
        reading over what was used in the pass. Raises CheckpointError for a loader that gives nothing.
        """
        every = self._every or self._keeper.every_steps or _DEFAULT_EVERY_STEPS
        at = batches if callable(batches) else self._batch_of(batches)
        began = self.step
        with self._times.running(began):
            while self.step < total:
                arrived = self._times.waited_for_data()
                batch = at(self.step)
                arrived()
                yield self.step, batch
                self.step += 1
                if self.step % every == 0 and self.step < total:
                    goes_on = self._times.saved()
                    self.save_async()
                    goes_on()
                self._times.stepped(self.step)
        if self.step > began:
            self._save_last()

    def _batch_of(self, loader: Iterable[B]) -> Callable[[int], B]:
        start = self._position
        if self._parts.data is None:
            start = self._moved(start, loader)
        passes = self._passes = Passes(loader, self._parts.data, start, self._fresh_data)
        return lambda _step: next(passes)

    def _moved(self, start: dict[str, Any], loader: Iterable[Any]) -> dict[str, Any]:
        try:
            return moved_to_world(start, loader, self._written_by, self.world_size)
        except WorldChanged:
            if self._on_world_change == "refuse":
                raise
        log.warning("pass %d over the data begins again: its samples may be seen twice", start["pass"] + 1)
        return {**start, "batches": 0}

    def report(
        self, loss: float | torch.Tensor | None = None, *, tokens: int | None = None, flops: float | None = None
    ) -> None:
        """Tells the platform that the current step is done; costs microseconds and never waits, not even for a GPU.

        Any number is a loss, also NaN and infinity; None: this step has none. `tokens` are those that this rank trained on in the step, `flops` the
        floating-point operations of the model on them (about 6 for each parameter and token), without what is computed again to save memory.
        """
        value = None if loss is None else self._losses.later(loss)
        self._times.trained_on(tokens, flops, value)
        self._keeper.progress(self.rank, self.step + 1, value)

    def save(self) -> None:
        """Saves the state after `step` complete steps; returns when it is durable and reported. Raises SaveFailed."""
        self.save_async()
        self.wait()

    def save_async(self) -> None:
        """Copies the state now, writes it in the background. Waits for the save before it, so one is under way at most.

        Never raises: a save that failed is told of, and kept in `last_error`.
        """
        self._settle()
        if self._silent and not self._met_again():
            return
        state: dict[str, Any] | Exception
        try:
            state = self._state.capture(self.step, self._position_now())
        except Exception as error:  # the other ranks are about to save: they must hear of it
            state = error
        self._began_s = time.monotonic()
        self._pending = Background(functools.partial(self._write, state, self.step), "whaleflux-save")

    def _met_again(self) -> bool:
        """After a rank fell silent: whether all are here for this save."""
        try:
            self._agreement.renew()
        except RankSilent as error:
            self.last_error = error
            return False
        self._silent = False
        return True

    def wait(self) -> None:
        """Returns when nothing is being written. Raises SaveFailed when the last save failed."""
        if self._pending is not None:
            self._settle()
            if self.last_error is not None:
                raise self.last_error

    def digest(self) -> str:
        """SHA-256 of model and optimizer: equal digests mean bitwise equal training states."""
        return state_digest(self._state.targets())

    def _position_now(self) -> dict[str, Any]:
        return self._passes.position if self._passes is not None else self._position

    def _settle(self) -> None:
        """Returns when nothing is being written; says when the last save failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            # Longer than the others wait for this rank, and shorter than they wait for it at the next save.
            pending.result(self._began_s + 1.5 * self._timeout_s - time.monotonic())
            self.last_error = None
        except SaveFailed as error:
            self._silent = isinstance(error, RankSilent)
            self.last_error = error
        except TimeoutError:  # this rank itself hangs, in a write to a dead mount for instance
            self._silent = True
            self.last_error = SaveFailed(f"not finished within {1.5 * self._timeout_s:g} s; the storage hangs")
        if self.last_error is not None and self.rank == 0:
            log.error("the save before step %d failed, training goes on: %s", self.step, self.last_error)

    def _save_last(self) -> None:
        """The final state gets some tries more; leaving the context raises when it is still not saved."""
        for attempt in range(_LAST_SAVE_TRIES):
            self.save_async()
            self._settle()
            self._end_error = self.last_error
            if self.last_error is None:
                return
            time.sleep(LAST_SAVE_PAUSE_S if attempt + 1 < _LAST_SAVE_TRIES else 0.0)

    # restore

    def restore(self) -> int:
        """Loads the newest checkpoint whose bytes are what was saved; returns its step, 0 when nothing was ever saved.

        Raises RestoreFailed when there are checkpoints and none can be restored from here, WorldChanged as `on_world_change`
        says.
        """
        refused: list[Refused] = []
        try:
            while (target := self._agreement.ask(lambda: self._keeper.newest(refused), RestoreFailed)) is not None:
                self._keeper.every_steps = self._agreement.ask(lambda: self._keeper.every_steps, RestoreFailed)
                fault = self._first_fault(target)
                if fault is None:
                    return self._load(target)
                log.error(
                    "checkpoint %s is %s (%s); trying the one before it", target.name, fault.kind.value, fault.message
                )
                refused.append(Refused(target.name, fault))
        except WorldChanged:
            raise
        except RestoreFailed as error:
            if self._if_unreadable == "fail":
                raise RestoreFailed(
                    f"{error}. Nothing was started over. Make the storage reachable, run where it is, or accept the loss with "
                    'Checkpointer(if_unreadable="start_over")'
                ) from error
            log.error("training starts over at step 0, as asked for: %s", error)
        self._keeper.every_steps = self._agreement.ask(lambda: self._keeper.every_steps, RestoreFailed)
        log.info("nothing was saved before: training starts at step 0")
        return 0

    def _first_fault(self, target: Target) -> Fault | None:
        """Each rank checks its share of the pieces; what is proven counts before what is only out of reach."""
        faults = [fault for fault in self._agreement.gather(self._own_fault(target)) if fault is not None]
        return min(faults, key=lambda fault: fault.kind is not FaultKind.CORRUPT, default=None)

    def _own_fault(self, target: Target) -> Fault | None:
        try:
            here = storage_id(target.job_folder)
        except OSError as error:
            return Fault(FaultKind.UNREACHABLE, f"{target.job_folder}: {error.strerror}")
        if target.storage and here != target.storage:
            return Fault(
                FaultKind.UNREACHABLE, f"{target.job_folder} is not the storage that it was saved on: not mounted?"
            )
        mine = target.pieces[self.rank :: self.world_size]
        return next((fault for piece in mine if (fault := find_fault(target.folder, piece)) is not None), None)

    def _load(self, target: Target) -> int:
        if target.lost:
            self._agreement.ask(lambda: self._keeper.intact(target), RestoreFailed)
        world = self._world_of(target)
        others = range(world) if world != self.world_size else range(self.rank, self.rank + 1)
        state = self._state.targets(others)
        dcp.load(
            state,
            storage_reader=FileSystemReader(target.folder),
            planner=DefaultLoadPlanner(),
            process_group=self._agreement.group,
            no_dist=self._agreement.group is None,
        )
        self._written_by = world
        own = {rank: unpacked(state[own_key(rank)]) for rank in others}
        self._check_world(own)
        step = self._state.apply_shared(state)
        self._apply_own(own)
        self.restored_from = target.name
        log.info("restored %s: step %d, written by %d ranks, read by %d", target.name, step, world, self.world_size)
        return step

    def _world_of(self, target: Target) -> int:
        keys = FileSystemReader(target.folder).read_metadata().state_dict_metadata
        return sum(key.startswith(own_key(0)[:-1]) for key in keys)

    def _check_world(self, own: Mapping[int, Mapping[str, Any]]) -> None:
        """Refuses before anything is changed."""
        if self._written_by == self.world_size or self._parts.data is None:
            return  # how other loaders share out is seen when they are given to `steps`
        if hasattr(self._parts.data, "load_world_state") or self._on_world_change == "restart_pass":
            return
        raise WorldChanged(
            f"{len(own)} ranks wrote this checkpoint and {self.world_size} ranks read it: model, optimizer, step and schedulers "
            f"carry over, but each rank's position in the data is known to its loader ({type(self._parts.data).__name__}) alone. "
            "Give the loader load_world_state(states, rank, world_size) to share the positions out; or accept that samples are "
            'seen again or left out, with Checkpointer(on_world_change="restart_pass"); or run on as many ranks as before'
        )

    def _apply_own(self, own: Mapping[int, Mapping[str, Any]]) -> None:
        mine = own.get(self.rank, own[min(own)])  # a rank that was not there takes what is alike on all
        self._state.apply_others(dict(mine))
        self._position = dict(mine["position"])
        data = self._parts.data
        if self._written_by == self.world_size:
            if data is not None and mine["data"] is not None:
                data.load_state_dict(mine["data"])
        elif data is not None and hasattr(data, "load_world_state"):
            data.load_world_state([own[rank]["data"] for rank in sorted(own)], self.rank, self.world_size)
        elif data is not None:
            log.warning("the pass over the data begins again: its samples may be seen twice")
        if self.rank in own:
            generators.apply(mine["generators"])
        if self._written_by != self.world_size:
            log.warning(
                "written by %d ranks, read by %d: model, optimizer, step, schedulers carry over; random generators go with their "
                "ranks, new ranks keep those that the program seeded",
                self._written_by,
                self.world_size,
            )

    # save, in a thread of its own

    def _write(self, state: dict[str, Any] | Exception, step: int) -> None:
        """Saves on all ranks or on none. Raises SaveFailed, the same on all of them."""
        target: Target | None = None
        reported = False
        try:
            others = self._resharding(state)
            target = begun = self._agreement.ask(lambda: self._begin(step, others), SaveFailed)
            ready = self._agreement.each(lambda: self._ready(state, begun), SaveFailed)
            pieces = self._agreement.each(lambda: self._store(ready, begun), SaveFailed)
            reported = True
            self._agreement.each(lambda: self._keeper.finish(begun, self.rank, pieces), SaveFailed)
        except SaveFailed as error:
            if self.rank == 0:
                unused = not reported and not isinstance(
                    error, RankSilent
                )  # else somebody may write or commit it still
                self._discard(target, step, str(error), with_files=unused)
            raise

    def _resharding(self, state: dict[str, Any] | Exception) -> Resharding:
        """Who can read this save: all ranks tell what they hold."""
        mine = "" if isinstance(state, Exception) else structure(state["model"])
        return resharding(self._agreement.gather(mine), positions_move=self._positions_move())

    def _positions_move(self) -> bool:
        if self._on_world_change == "restart_pass":
            return True
        if self._parts.data is not None:
            return hasattr(self._parts.data, "load_world_state")
        return self._passes is None or self._passes.shares_out

    def _begin(self, step: int, others: Resharding) -> Target:
        """A folder that was not there before: what is committed is never written again."""
        position = json.dumps({"step": step}).encode()
        for _ in range(_FOLDER_TRIES):
            target = self._keeper.start(step, next(_serials), self._layout, position, others)
            try:
                make_folder(target.folder)
            except FileExistsError:
                continue
            return target
        raise SaveFailed(f"{target.folder} and {_FOLDER_TRIES - 1} names before it are taken")

    def _ready(self, state: dict[str, Any] | Exception, target: Target) -> dict[str, Any]:
        """The state, when this rank has one and sees the folder that rank 0 has made."""
        if isinstance(state, Exception):
            raise SaveFailed(f"cannot copy the state: {state}") from state
        if storage_id(target.job_folder) != target.storage:
            raise SaveFailed(
                f"{target.job_folder} is not the folder that rank 0 sees. All nodes of a job need one shared folder: mount it, "
                "and name it as checkpoint.location in the job file"
            )
        return state

    def _store(self, state: dict[str, Any], target: Target) -> list[SavedPiece]:
        writer = FileSystemWriter(target.folder, single_file_per_rank=True, sync_files=False)
        try:
            dcp.save(
                state,
                storage_writer=writer,
                planner=DefaultSavePlanner(),
                process_group=self._agreement.group,
                no_dist=self._agreement.group is None,
            )
        except dcp.CheckpointException as error:
            raise SaveFailed("; ".join(f"{failed}" for failed, _ in error.failures.values())) from error
        own = sorted(target.folder.glob(f"__{self.rank}_*.distcp"))
        files = [*own, target.folder / ".metadata"] if self.rank == 0 else own
        for path in (*files, target.folder):
            sync(path)
        return [describe(target.folder, file) for file in files]

    def _discard(self, target: Target | None, step: int, why: str, *, with_files: bool) -> None:
        """Tells of a failed save, and gives back the room of what is surely not a checkpoint."""
        if target is not None and with_files:
            shutil.rmtree(target.folder, ignore_errors=True)
        try:
            self._keeper.give_up(target, step, why)
        except Exception as error:
            log.warning("the failed save was not told of: %s", error)
