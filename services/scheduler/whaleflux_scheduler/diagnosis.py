"""Failure diagnosis: whose fault the end of an attempt was (health_monitor), and what can be restored (checkpoint).

Both are asked after the fence is written, with deadlines, and both may be absent: the job goes on without them. health_monitor is asked
again for as long as a new leader of it may need: without its word an exit counts as the work's own fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import NotFound, StatusError
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2, health_pb2
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.model import Attempt, Job, Task
from whaleflux_scheduler.core.observed import NEVER_STARTED, PLANNED, AttemptFailure, Diagnosis, EndReason

HEALTH_S, HEALTH_PATIENCE_S = 0.5, 5.0  # of one question, and of all together
CHECKPOINT_S = 2.0
RETRY = Backoff()
_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class DiagnosisQuery:
    """A job whose attempt was fenced. `launch`: the traceparent of the failed task's launch, as far as known."""

    job: Job
    failure: AttemptFailure
    launch: str
    disconnected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DiagnosisResult:
    """The diagnosis, and the W3C context of the recovery's span (child of the failure's, emitted when the job is placed again)."""

    diagnosis: Diagnosis
    failure_traceparent: str
    recovery_traceparent: str


def reconstruct(job: Job) -> AttemptFailure:
    """The failure of a job that an earlier leader fenced, as far as its record tells."""
    attempt = job.attempt
    assert attempt is not None
    end = ended_by(attempt) or EndReason.VANISHED
    task = next((t for t in attempt.tasks if t.failed), next((t for t in attempt.tasks if t.lost), attempt.tasks[0]))
    return AttemptFailure(end, job.state_message, task.id, task.node, task.exit_code)


class FailureDiagnosis:
    """Asks; a service that is not configured is not asked."""

    def __init__(
        self, health: HealthServiceStub | None, checkpoint: CheckpointServiceStub | None, clock: Clock
    ) -> None:
        self._health, self._checkpoint, self._clock = health, checkpoint, clock

    async def ask(self, query: DiagnosisQuery) -> DiagnosisResult:
        """The diagnosis; takes at most the deadlines of both services."""
        incident = await self._incident(query)
        attempt = query.job.attempt
        assert attempt is not None
        parent = incident.traceparents.get(query.job.name, "") if incident is not None else ""
        parent = parent or query.launch or attempt.traceparent
        recovery = telemetry.new_traceparent(parent)
        with telemetry.attach(recovery):
            restore = await self._restorable(query.job)
        diagnosis = _conclude(query, incident, parent, restore)
        return DiagnosisResult(diagnosis, parent, recovery)

    async def _incident(self, query: DiagnosisQuery) -> health_pb2.Incident | None:
        job, failure = query.job, query.failure
        attempt = job.attempt
        if self._health is None or attempt is None or failure.reason in NEVER_STARTED | PLANNED:
            return None
        request = health_pb2.ReportFailureRequest(
            job=job.name,
            epoch=attempt.epoch,
            task=failure.task,
            node=failure.node,
            exit_code=failure.exit_code,
            message=_last_words(attempt, failure),
            nodes=attempt.nodes,
            traceparent=query.launch or attempt.traceparent,
            disconnected_nodes=query.disconnected,
        )
        return await self._asked(self._health, request)

    async def _asked(
        self, health: HealthServiceStub, request: health_pb2.ReportFailureRequest
    ) -> health_pb2.Incident | None:
        """None: no answer in time. One attempt has one incident, however often it is reported."""
        end_s, failures = self._clock.monotonic() + HEALTH_PATIENCE_S, 0
        while True:
            try:
                incident: health_pb2.Incident = await health.ReportFailure(request, timeout=HEALTH_S)
                return incident
            except StatusError as error:
                failures += 1
                if not worth_repeating(error) or self._clock.monotonic() >= end_s:
                    _log.warning(Event.FEED_BROKEN, feed="health_monitor", job=request.job, reason=error.reason)
                    return None
            await self._clock.sleep(RETRY.pause_s(failures))

    async def _restorable(self, job: Job) -> str:
        """Advisory: agents ask again when they start."""
        if self._checkpoint is None:
            return ""
        try:
            request = checkpoint_pb2.FindRestorableRequest(job=job.name, job_uid=job.uid)
            found: checkpoint_pb2.Checkpoint = await self._checkpoint.FindRestorable(request, timeout=CHECKPOINT_S)
            return found.name
        except NotFound:
            return ""
        except StatusError as error:
            _log.warning(Event.FEED_BROKEN, feed="checkpoint", job=job.name, reason=error.reason)
            return ""


def _conclude(query: DiagnosisQuery, incident: health_pb2.Incident | None, parent: str, restore: str) -> Diagnosis:
    job, failure = query.job, query.failure
    if incident is None:
        fault = failure.reason in (EndReason.EXIT, EndReason.VANISHED) and not query.disconnected
        culprits = tuple(dict.fromkeys((*failure.nodes, *query.disconnected)))
        return Diagnosis(job.epoch, fault, failure.message, "", parent, culprits, restore)
    fault = incident.application_fault
    message = failure.message if fault else (incident.message or failure.message)  # ours quotes the program
    culprits = tuple(dict.fromkeys((*incident.nodes, *failure.nodes)))
    return Diagnosis(job.epoch, fault, message, incident.name, parent, culprits, restore)


def _last_words(attempt: Attempt, failure: AttemptFailure) -> str:
    task: Task | None = next((task for task in attempt.tasks if task.id == failure.task), None)
    return (task.message if task and task.message else failure.message)[:2000]
