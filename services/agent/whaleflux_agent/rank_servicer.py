"""What ranks ask of their agent: where to restore from, where to save, that a step is done."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    StatusError,
)
from whaleflux.reasons import ErrorReason, What
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Attribute, Event
from whaleflux.v1 import agent_pb2, checkpoint_pb2, checkpoint_pb2_grpc
from whaleflux_agent.checkpoint_outbox import CheckpointOutbox
from whaleflux_agent.core.work import Work
from whaleflux_agent.launch_plans import checkpoint_folder
from whaleflux_agent.ray_readings import RayReadings
from whaleflux_agent.supervisor import Supervisor
from whaleflux_agent.task_runner import Task
from whaleflux_agent.usage import steps as usage_steps
from whaleflux_agent.usage.steps import StepLog

RETRY = Backoff()

_BEGIN_S = 1.0  # then the announcement is queued: training does not wait for the control plane
_CALL_S = 5.0
_LONGEST_SOCKET_CHARS = 98  # of 107 that a Unix socket's path may have; a task's own is 9 longer
_RESTORABLE = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)
_log = telemetry.get_logger("whaleflux.agent")


class RankServicer:
    """See `RankRequest` in the contract; each call is of the task whose token it carries."""

    def __init__(
        self,
        supervisor: Supervisor,
        outbox: CheckpointOutbox,
        checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub,
        checkpoint_root: str,
        clock: Clock,
        observe: Callable[[str, Task | None, int, str], None],
        ray: RayReadings,
        steps: StepLog,
    ) -> None:
        self._supervisor, self._outbox, self._checkpoints = supervisor, outbox, checkpoints
        self._root, self._clock, self._observe, self._ray = checkpoint_root, clock, observe, ray
        self._steps = steps

    async def get_restore(self, task: Task, request: agent_pb2.GetRestoreRequest) -> agent_pb2.GetRestoreResponse:
        """The newest checkpoint but the refused ones. Raises FailedPrecondition when all there are were refused."""
        answer = agent_pb2.GetRestoreResponse(
            location=checkpoint_folder(task.work, self._root), every_steps=task.work.spec.checkpoint_every_steps
        )
        began = self._clock.now()
        for one in request.refused:
            _check_own("refused", one.checkpoint, task.work)
        for one in request.refused:
            if one.HasField("read"):
                await self._until_answered(functools.partial(self._mark_lost, task.work, one))
        found = await self._until_answered(lambda: self._restorable(task.work, request.refused))
        if found is not None:
            answer.checkpoint.CopyFrom(found)
            self._trace_restore(task, found, began)
        return answer

    def _trace_restore(self, task: Task, found: checkpoint_pb2.Checkpoint, began: datetime) -> None:
        """One span for all ranks of the task that restore the same checkpoint."""
        if task.restored == found.name:
            return
        task.restored = found.name
        known: dict[Attribute, str | int] = {
            Attribute.JOB: task.work.job,
            Attribute.EPOCH: task.work.epoch,
            Attribute.CHECKPOINT: found.name,
            Attribute.STEP: found.step,
        }
        now = self._clock.now()
        telemetry.emit_span("checkpoint.restore", began, now, parent=task.meta.traceparent, attributes=known)

    async def _restorable(
        self, work: Work, refused: Collection[agent_pb2.RefusedCheckpoint]
    ) -> checkpoint_pb2.Checkpoint | None:
        """The one that the scheduler picked for this attempt; else the newest there is."""
        tried = [one.checkpoint for one in refused]
        picked = work.restore_checkpoint
        try:
            if picked and picked not in tried:
                found: checkpoint_pb2.Checkpoint = await self._checkpoints.GetCheckpoint(
                    checkpoint_pb2.GetCheckpointRequest(name=picked), timeout=_CALL_S
                )
                if found.state in _RESTORABLE and found.job_uid == work.job_uid:
                    return found
        except NotFound:
            pass  # replaced meanwhile
        request = checkpoint_pb2.FindRestorableRequest(job=work.job, job_uid=work.job_uid, exclude=tried)
        try:
            newest: checkpoint_pb2.Checkpoint = await self._checkpoints.FindRestorable(request, timeout=_CALL_S)
            return newest
        except NotFound:
            return None
        except FailedPrecondition as error:
            why = "; ".join(f"{names.last(one.checkpoint)}: {one.message}" for one in refused)
            raise FailedPrecondition(f"{error.message}: {why}"[:2000], reason=error.reason) from None

    async def _mark_lost(self, work: Work, one: agent_pb2.RefusedCheckpoint) -> None:
        lost = checkpoint_pb2.MarkLostRequest(name=one.checkpoint, message=one.message, epoch=work.epoch, read=one.read)
        try:
            await self._checkpoints.MarkLost(lost, timeout=_CALL_S)
        except NotFound:
            pass  # deleted meanwhile: not offered again either

    async def _until_answered(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Repeats until the checkpoint service answers; the caller's deadline ends it."""
        failures = 0
        while True:
            try:
                return await ask()
            except StatusError as error:
                if not worth_repeating(error):
                    raise
                failures += 1
            await self._clock.sleep(RETRY.pause_s(failures))

    async def confirm_intact(
        self, task: Task, request: agent_pb2.ConfirmIntactRequest
    ) -> agent_pb2.ConfirmIntactResponse:
        """Every byte of a lost checkpoint was read and is right."""
        _check_own("checkpoint", request.checkpoint, task.work)
        intact = checkpoint_pb2.MarkIntactRequest(name=request.checkpoint, epoch=task.work.epoch)
        await self._until_answered(lambda: self._checkpoints.MarkIntact(intact, timeout=_CALL_S))
        return agent_pb2.ConfirmIntactResponse()

    async def start_save(self, task: Task, request: agent_pb2.StartSaveRequest) -> agent_pb2.StartSaveResponse:
        """Announces a checkpoint to the service, or to the outbox when the service is away."""
        work = task.work
        if request.step < 0:
            raise InvalidArgument(FieldViolation("step", "counts complete steps and cannot be negative"))
        id_ = names.checkpoint_id(request.step, work.epoch, request.serial)
        begin = checkpoint_pb2.BeginCheckpointRequest(
            job=work.job,
            epoch=work.epoch,
            step=request.step,
            world_size=work.world_size,
            layout=request.layout,
            location=os.path.join(checkpoint_folder(work, self._root), id_),
            data_position=request.data_position,
            keep=work.spec.checkpoint_keep,
            job_uid=work.job_uid,
            serial=request.serial,
            storage=request.storage,
            resharding=request.resharding,
        )
        try:
            begun = await self._checkpoints.BeginCheckpoint(begin, timeout=_BEGIN_S)
        except StatusError as error:
            if not worth_repeating(error):
                raise
            await self._outbox.put(begin)
            name = names.checkpoint(work.job, request.step, work.epoch, request.serial)
            return agent_pb2.StartSaveResponse(checkpoint=name, location=begin.location)
        return agent_pb2.StartSaveResponse(checkpoint=begun.name, location=begun.location)

    async def finish_save(self, task: Task, request: agent_pb2.FinishSaveRequest) -> agent_pb2.FinishSaveResponse:
        """A rank's pieces are durable; they are told of when the service can take them."""
        _check_rank(request.rank, task.work)
        _check_own("checkpoint", request.checkpoint, task.work)
        await self._outbox.put(
            checkpoint_pb2.ReportPiecesRequest(
                checkpoint=request.checkpoint,
                epoch=task.work.epoch,
                complete_ranks=[request.rank],
                pieces=request.pieces,
            )
        )
        return agent_pb2.FinishSaveResponse()

    async def fail_save(self, task: Task, request: agent_pb2.FailSaveRequest) -> agent_pb2.FailSaveResponse:
        """A save failed on all ranks: said to people, and its checkpoint is given up."""
        work = task.work
        said = f"the save of step {request.step} failed, training goes on: {request.message}"
        _log.warning(
            Event.SAVE_FAILED, job=work.job, epoch=work.epoch, step=request.step, reason=request.message[:2000]
        )
        self._observe(What.SAVE_FAILED, task, 0, said)
        if request.checkpoint:
            _check_own("checkpoint", request.checkpoint, work)
            await self._outbox.put(
                checkpoint_pb2.AbandonCheckpointRequest(
                    name=request.checkpoint, epoch=work.epoch, message=request.message[:1000]
                )
            )
        return agent_pb2.FailSaveResponse()

    async def report_progress(
        self, task: Task, request: agent_pb2.ReportProgressRequest
    ) -> agent_pb2.ReportProgressResponse:
        """A step is done."""
        _check_rank(request.rank, task.work)
        loss = request.loss if request.HasField("loss") else None
        self._supervisor.note_progress(task, request.rank, request.step, loss)
        return agent_pb2.ReportProgressResponse()

    async def report_steps(self, task: Task, request: agent_pb2.ReportStepsRequest) -> agent_pb2.ReportStepsResponse:
        """What steps were made of, for the ledger of costs."""
        _check_rank(request.rank, task.work)
        if wrong := usage_steps.wrong(request):
            raise InvalidArgument(FieldViolation("times", wrong))
        self._steps.add(task.work, request)
        return agent_pb2.ReportStepsResponse()

    async def report_ray(self, task: Task, request: agent_pb2.ReportRayRequest) -> agent_pb2.ReportRayResponse:
        """What waits in the Ray cluster of the task's job: whether it is the part of one, the scheduler knows."""
        return self._ray.report(task.work, request)


def _check_rank(rank: int, work: Work) -> None:
    if work.spec.launch_once and 0 <= rank < work.world_size:
        return  # its launcher may have given the ranks to the nodes in another order
    if rank not in work.ranks:
        raise InvalidArgument(FieldViolation("rank", f"{rank} does not run here; this task has {work.ranks}"))


def _check_own(field: str, checkpoint: str, work: Work) -> None:
    """A rank speaks for its own job."""
    if not checkpoint.startswith(f"{work.job}/checkpoints/"):
        raise PermissionDenied(
            f"{field}: {checkpoint[:200]!r} is not one of {work.job}",
            reason=ErrorReason.NOT_OWNER,
            metadata={"job": work.job},
        )


def socket_path(state: Path) -> Path:
    """Where ranks find the agent: in a folder of its own, which containers mount, and which holds nothing else.

    In a private folder under the system's temporary one when `state` is too long.
    """
    path = state.resolve() / "ranks" / "rank.sock"
    if len(str(path)) > _LONGEST_SOCKET_CHARS:
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"whaleflux-{os.getuid()}-{digest}" / "rank.sock"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        error = f"is too long for a socket, and {path.parent} belongs to somebody else"
        raise InvalidArgument(FieldViolation("state_dir", error))
    return path
