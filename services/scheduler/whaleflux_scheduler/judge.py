"""What others know about the end of an attempt: health_monitor whose fault it was, checkpoint what can be restored.

Both are asked after the fence is written, with deadlines, and both may be absent: the job goes on without them.
"""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.errors import NotFound, Refusal
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, health_pb2
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux_scheduler.core.lifecycle import ended_by
from whaleflux_scheduler.core.model import Attempt, Job, Task
from whaleflux_scheduler.core.observed import PLANNED, STARTLESS, Break, End, Verdict

HEALTH_S = 0.5
CHECKPOINT_S = 2.0
_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A job whose attempt was fenced. `launches`: traceparent of each task's launch, as far as known."""

    job: Job
    broken: Break
    launch: str
    disconnected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict, and the context of the recovery's span (child of the failure's, emitted when the job is placed again)."""

    verdict: Verdict
    failure: str
    recovery: str


def reconstruct(job: Job) -> Break:
    """The break of a job that an earlier leader fenced, as far as its record tells."""
    attempt = job.attempt
    assert attempt is not None
    end = ended_by(attempt) or End.VANISHED
    task = next((t for t in attempt.tasks if t.failed), next((t for t in attempt.tasks if t.lost), attempt.tasks[0]))
    return Break(end, job.state_message, task.id, task.node, task.exit_code)


class Judge:
    """Asks; a service that is not configured is not asked."""

    def __init__(self, health: HealthServiceStub | None, checkpoint: CheckpointServiceStub | None) -> None:
        self._health, self._checkpoint = health, checkpoint

    async def judge(self, inquiry: Inquiry) -> Finding:
        """The verdict; takes at most the deadlines of both services."""
        incident = await self._incident(inquiry)
        attempt = inquiry.job.attempt
        assert attempt is not None
        failure = incident.traceparents.get(inquiry.job.name, "") if incident is not None else ""
        failure = failure or inquiry.launch or attempt.traceparent
        recovery = telemetry.new_traceparent(failure)
        with telemetry.attach(recovery):
            restore = await self._restorable(inquiry.job)
        verdict = self._verdict(inquiry, incident, failure, restore)
        return Finding(verdict, failure, recovery)

    def _verdict(self, inquiry: Inquiry, incident: health_pb2.Incident | None, failure: str, restore: str) -> Verdict:
        job, broken = inquiry.job, inquiry.broken
        if incident is None:
            fault = broken.end in (End.EXIT, End.VANISHED) and not inquiry.disconnected
            culprits = tuple(dict.fromkeys((*broken.nodes, *inquiry.disconnected)))
            return Verdict(job.epoch, fault, broken.message, "", failure, culprits, restore)
        fault = incident.application_fault
        message = broken.message if fault else (incident.message or broken.message)  # ours quotes the program
        culprits = tuple(dict.fromkeys((*incident.nodes, *broken.nodes)))
        return Verdict(job.epoch, fault, message, incident.name, failure, culprits, restore)

    async def _incident(self, inquiry: Inquiry) -> health_pb2.Incident | None:
        job, broken = inquiry.job, inquiry.broken
        attempt = job.attempt
        if self._health is None or attempt is None or broken.end in STARTLESS | PLANNED:
            return None
        request = health_pb2.ReportFailureRequest(
            job=job.name,
            epoch=attempt.epoch,
            task=broken.task,
            node=broken.node,
            exit_code=broken.exit_code,
            message=_said(attempt, broken),
            nodes=attempt.nodes,
            traceparent=inquiry.launch or attempt.traceparent,
            disconnected_nodes=inquiry.disconnected,
        )
        try:
            incident: health_pb2.Incident = await self._health.ReportFailure(request, timeout=HEALTH_S)
            return incident
        except Refusal as refusal:
            _log.warning(Event.FEED_BROKEN, feed="health_monitor", job=job.name, reason=refusal.reason)
            return None

    async def _restorable(self, job: Job) -> str:
        """Advisory: agents ask again when they start."""
        if self._checkpoint is None:
            return ""
        try:
            request = checkpoint_pb2.FindRestorableRequest(job=job.name)
            found: checkpoint_pb2.Checkpoint = await self._checkpoint.FindRestorable(request, timeout=CHECKPOINT_S)
            return found.name
        except NotFound:
            return ""
        except Refusal as refusal:
            _log.warning(Event.FEED_BROKEN, feed="checkpoint", job=job.name, reason=refusal.reason)
            return ""


def _said(attempt: Attempt, broken: Break) -> str:
    task: Task | None = next((task for task in attempt.tasks if task.id == broken.task), None)
    return (task.message if task and task.message else broken.message)[:2000]
