"""What ranks ask of their agent, over a Unix socket: where to restore from, where to save, that a step is done."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import DeadlineExceeded, FieldViolation, Invalid, NotFound, Unauthenticated, Unavailable
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Authority, Identity
from whaleflux.rpc.boundary import Boundary
from whaleflux.rpc.status import ServerFailure
from whaleflux.telemetry import Attribute
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, checkpoint_pb2, checkpoint_pb2_grpc
from whaleflux_agent.core.backoff import pause_s
from whaleflux_agent.saves import Saves, checkpoint_id
from whaleflux_agent.supervisor import Supervisor
from whaleflux_agent.tasks import Task, checkpoint_folder

TOKEN_HEADER = "x-wf-task-token"
_BEGIN_S = 1.0  # then the announcement is queued: training does not wait for the control plane
_CALL_S = 5.0
_LONGEST_SOCKET_CHARS = 100  # of 107 that a Unix socket's path may have
_RESTORABLE = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)


class RankServicer(agent_pb2_grpc.RankServiceServicer):
    """See the contract; each call is of the task whose token it carries."""

    def __init__(
        self,
        supervisor: Supervisor,
        saves: Saves,
        checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub,
        checkpoint_root: str,
        clock: Clock,
    ) -> None:
        self._supervisor, self._saves, self._checkpoints = supervisor, saves, checkpoints
        self._root, self._clock = checkpoint_root, clock

    async def GetRestore(self, request: agent_pb2.GetRestoreRequest, context: Any) -> agent_pb2.GetRestoreResponse:
        task = self._task(context)
        answer = agent_pb2.GetRestoreResponse(
            location=checkpoint_folder(task.work, self._root), every_steps=task.work.every_steps
        )
        began = self._clock.now()
        with telemetry.attach(task.meta.traceparent):
            if request.corrupt_checkpoint:
                await self._until_answered(self._mark_lost, request)
            found = await self._until_answered(self._restorable, task, request.corrupt_checkpoint)
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

    async def _restorable(self, task: Task, corrupt: str) -> checkpoint_pb2.Checkpoint | None:
        """The one that the scheduler picked for this attempt, so that all ranks agree; else the newest there is."""
        picked = task.work.restore_checkpoint
        try:
            if picked and picked != corrupt:
                found: checkpoint_pb2.Checkpoint = await self._checkpoints.GetCheckpoint(
                    checkpoint_pb2.GetCheckpointRequest(name=picked), timeout=_CALL_S
                )
                if found.state in _RESTORABLE:
                    return found
            request = checkpoint_pb2.FindRestorableRequest(job=task.work.job, world_size=task.work.world_size)
            newest: checkpoint_pb2.Checkpoint = await self._checkpoints.FindRestorable(request, timeout=_CALL_S)
            return newest
        except NotFound:
            return None

    async def _mark_lost(self, request: agent_pb2.GetRestoreRequest) -> None:
        lost = checkpoint_pb2.MarkLostRequest(name=request.corrupt_checkpoint, message=request.corrupt_message)
        try:
            await self._checkpoints.MarkLost(lost, timeout=_CALL_S)
        except NotFound:
            pass  # deleted meanwhile: not offered again either

    async def _until_answered(self, ask: Any, *arguments: Any) -> Any:
        """Repeats until the checkpoint service answers; the caller's deadline ends it."""
        failures = 0
        while True:
            try:
                return await ask(*arguments)
            except (Unavailable, DeadlineExceeded, ServerFailure):
                failures += 1
            await self._clock.sleep(pause_s(failures, random.random()))

    async def StartSave(self, request: agent_pb2.StartSaveRequest, context: Any) -> agent_pb2.StartSaveResponse:
        work = self._task(context).work
        if request.step < 0:
            raise Invalid(FieldViolation("step", "counts complete steps and cannot be negative"))
        id_ = checkpoint_id(request.step, work.epoch)
        begin = checkpoint_pb2.BeginCheckpointRequest(
            job=work.job,
            epoch=work.epoch,
            step=request.step,
            world_size=work.world_size,
            layout=request.layout,
            location=os.path.join(checkpoint_folder(work, self._root), id_),
            data_position=request.data_position,
            keep=work.keep_checkpoints,
        )
        try:
            begun = await self._checkpoints.BeginCheckpoint(begin, timeout=_BEGIN_S)
        except (Unavailable, DeadlineExceeded, ServerFailure):
            await self._saves.put(begin)
            name = f"{work.job}/checkpoints/{id_}"
            return agent_pb2.StartSaveResponse(checkpoint=name, location=begin.location)
        return agent_pb2.StartSaveResponse(checkpoint=begun.name, location=begun.location)

    async def FinishSave(self, request: agent_pb2.FinishSaveRequest, context: Any) -> agent_pb2.FinishSaveResponse:
        work = self._task(context).work
        if request.rank not in work.ranks:
            raise Invalid(FieldViolation("rank", f"{request.rank} does not run here; this task has {work.ranks}"))
        if not request.checkpoint.startswith(f"{work.job}/checkpoints/"):
            raise Invalid(FieldViolation("checkpoint", f"is not one of {work.job}"))
        await self._saves.put(
            checkpoint_pb2.ReportPiecesRequest(
                checkpoint=request.checkpoint,
                epoch=work.epoch,
                complete_ranks=[request.rank],
                pieces=request.pieces,
            )
        )
        return agent_pb2.FinishSaveResponse()

    async def ReportProgress(
        self, request: agent_pb2.ReportProgressRequest, context: Any
    ) -> agent_pb2.ReportProgressResponse:
        task = self._task(context)
        if request.rank not in task.work.ranks:
            raise Invalid(FieldViolation("rank", f"{request.rank} does not run here; this task has {task.work.ranks}"))
        self._supervisor.note_progress(task, request.rank, request.step, request.loss)
        return agent_pb2.ReportProgressResponse()

    def _task(self, context: Any) -> Task:
        token = _token(tuple(context.invocation_metadata() or ()))
        task = self._supervisor.by_token(token)
        if task is None:  # ended between the check and now
            raise Unauthenticated("this task is over")
        return task


class TaskAuthority(Authority):
    """On the ranks' socket the task's token is who you are; there are no certificates."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__()
        self._supervisor = supervisor

    def check(
        self,
        method: str,
        peer_certificate: Mapping[str, Iterable[bytes]],
        metadata: Sequence[tuple[str, str | bytes]],
    ) -> Identity:
        task = self._supervisor.by_token(_token(metadata))
        if task is None:
            raise Unauthenticated(f"{TOKEN_HEADER} is not the token of a task that runs here", reason="TOKEN_UNKNOWN")
        return Identity(roles.APP, task.work.task)


def _token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    return next((str(value) for key, value in metadata if key == TOKEN_HEADER), "")


def socket_path(state: Path) -> Path:
    """Where ranks find the agent; in a private folder under the system's temporary one when `state` is too long."""
    path = state.resolve() / "rank.sock"
    if len(str(path)) <= _LONGEST_SOCKET_CHARS:
        return path
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"whaleflux-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Invalid(FieldViolation("state_dir", f"is too long for a socket, and {folder} belongs to somebody else"))
    return folder / "rank.sock"


class RankServer:
    """Listens on the socket; a new agent takes it over from the one before."""

    def __init__(self, path: Path, servicer: RankServicer, supervisor: Supervisor) -> None:
        self._path = path
        self._server = grpc.aio.server(interceptors=[Boundary(TaskAuthority(supervisor))])
        agent_pb2_grpc.add_RankServiceServicer_to_server(servicer, self._server)

    async def start(self) -> None:
        """Binds and serves; only the agent's own user may connect."""
        self._path.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()
        self._path.chmod(0o600)

    async def run(self) -> None:
        """Serves until cancelled."""
        try:
            await self._server.wait_for_termination()
        finally:
            await self._server.stop(0.5)
