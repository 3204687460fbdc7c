"""What a transition looks like from outside: spans in the job's trace, log lines, metrics."""

from __future__ import annotations

import contextlib
from datetime import datetime

from whaleflux import telemetry
from whaleflux.telemetry import Attribute, Event, Metric
from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.core.plan import Move
from whaleflux_scheduler.diagnosis import DiagnosisResult

_log = telemetry.get_logger("whaleflux.scheduler")


def parent_of(job: Job, diagnosed: DiagnosisResult | None) -> str:
    """What a decision about the job is a child of: its recovery, what last happened to it, or its submission."""
    if diagnosed is not None:
        return diagnosed.recovery_traceparent
    return (job.cause.traceparent if job.attempt is not None else "") or job.traceparent


def placed(before: Job, after: Job, diagnosed: DiagnosisResult | None, move: Move | None, now: datetime) -> None:
    """scheduler.recover -> scheduler.decide -> scheduler.allocate, whose context went into the attempt."""
    attempt = after.attempt
    assert attempt is not None
    known: dict[Attribute, str | int] = {
        Attribute.JOB: after.name,
        Attribute.EPOCH: attempt.epoch,
        Attribute.GPUS: attempt.gpus,
        Attribute.NODES: ",".join(attempt.nodes[:16]),
    }
    parent = parent_of(before, diagnosed)
    if diagnosed is not None:
        ended = before.attempt.end_time if before.attempt is not None else None
        telemetry.emit_span(
            "scheduler.recover",
            ended or now,
            now,
            traceparent=diagnosed.recovery_traceparent,
            parent=diagnosed.failure_traceparent,
            attributes=known,
        )
    begun = move.begun if move is not None and move.begun else now
    decided = move.ended if move is not None and move.ended else now
    deciding = telemetry.emit_span("scheduler.decide", begun, decided, parent=parent, attributes=known)
    telemetry.emit_span(
        "scheduler.allocate", decided, now, traceparent=attempt.traceparent, parent=deciding, attributes=known
    )
    seen = telemetry.exemplar(after.traceparent)
    telemetry.histogram(Metric.PLAN_DURATION).labels("place").observe((decided - begun).total_seconds(), seen)
    if before.attempt is None and not before.past_attempts:
        telemetry.histogram(Metric.JOB_WAIT).observe(max(0.0, (now - before.create_time).total_seconds()), seen)
    _log.info(Event.JOB_PLACED, job=after.name, epoch=attempt.epoch, decision=after.state_message)


def transitioned(before: Job, after: Job, now: datetime) -> None:
    """A job's state changed."""
    if after.state is JobState.RUNNING:
        _log.info(Event.JOB_STARTED, job=after.name, epoch=after.epoch)
        past = after.past_attempts[-1] if after.past_attempts else None
        if past is not None and past.end_time is not None:
            telemetry.histogram(Metric.RECOVERY_DURATION).observe(
                (now - past.end_time).total_seconds(), telemetry.exemplar(after.traceparent)
            )
    elif after.state is JobState.RECOVERING:
        end = ended_by(after.attempt) if after.attempt is not None else None
        telemetry.counter(Metric.RECOVERIES).labels(end.value if end else "unknown").inc()
        _log.warning(Event.JOB_RECOVERING, job=after.name, epoch=after.epoch, reason=after.state_message)
    elif after.ended:
        event = Event.JOB_FAILED if after.state is JobState.FAILED else Event.JOB_FINISHED
        _log.info(event, job=after.name, state=after.state.name, reason=after.state_message)
        _emit_job(after, now)
        forget(after.name)


def _emit_job(job: Job, now: datetime) -> None:
    known: dict[Attribute, str | int] = {Attribute.JOB: job.name, Attribute.EPOCH: job.epoch}
    telemetry.emit_span(
        "scheduler.job",
        job.create_time,
        job.end_time or now,
        parent=job.traceparent,
        error=job.state_message if job.state is JobState.FAILED else "",
        attributes=known,
    )


def show_progress(job: str, step: int, loss: float | None) -> None:
    telemetry.gauge(Metric.TRAINING_STEP).labels(job).set(step)
    if loss is not None:
        telemetry.gauge(Metric.TRAINING_LOSS).labels(job).set(loss)


def forget(job: str) -> None:
    """Metrics of a job that has ended."""
    for metric in (Metric.TRAINING_STEP, Metric.TRAINING_LOSS):
        with contextlib.suppress(KeyError):
            telemetry.gauge(metric).remove(job)
