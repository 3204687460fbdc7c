"""What becomes of a job whose attempt has ended: placed again at once, after a pause, or never. Pure.

Faults of the work count as restarts, up to a limit, with growing pauses; lost nodes count as recoveries; what was our own doing
(drains, preemptions) and starts that never happened count as neither.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux.manifests.job_fields import DEFAULT_BACKOFF_S, LONGEST_BACKOFF_S
from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.model import Attempt, Cause, Job, JobState
from whaleflux_scheduler.core.observed import NEVER_STARTED, PLANNED, Diagnosis, EndReason, Timeouts
from whaleflux_scheduler.core.state_machine import rule, transition

SERVICE_BACKOFF_S, LONGEST_SERVICE_BACKOFF_S = 1.0, 60.0
SETTLED_S = 600.0  # a service that ran for so long starts counting its restarts anew
LONGEST_START_BACKOFF_S = 60.0
_MOST_NAMES = 4


def advance(job: Job, diagnosis: Diagnosis, now: datetime, timeouts: Timeouts) -> Job:
    """The RECOVERING job with what was said about the end of its attempt; ready to be placed, paused, or FAILED."""
    attempt = job.attempt
    assert attempt is not None
    end = ended_by(attempt)
    message = diagnosis.message or job.state_message
    changes = {
        "attempt": replace(attempt, incident=diagnosis.incident or attempt.incident),
        "cause": Cause(
            diagnosis.incident or job.cause.resource,
            diagnosis.traceparent or job.cause.traceparent,
            message,
            job.cause.actor,
        ),
        "state_message": message,
    }
    if end in NEVER_STARTED:
        return _start_failed(job, timeouts, now, changes)
    if end in PLANNED:
        return replace(job, **changes)  # type: ignore[arg-type]  # typed one by one above
    if not diagnosis.application_fault:
        return replace(job, recoveries=job.recoveries + 1, **changes)  # type: ignore[arg-type]
    restarts = 1 + (0 if job.spec.is_service and _settled(attempt) else job.restarts)
    allowed = job.spec.allowed_restarts
    if not job.spec.is_service and restarts > allowed:
        failed = replace(job, **changes)  # type: ignore[arg-type]
        why = f"{message}; it was restarted {_times(job.restarts)}, retry.max_restarts is {allowed}"
        return transition(failed, JobState.FAILED, end_time=now, state_message=why)
    changes["restarts"] = restarts
    return _paused(replace(job, **changes), _backoff_s(job, restarts), now)  # type: ignore[arg-type]


def _start_failed(job: Job, timeouts: Timeouts, now: datetime, changes: dict[str, object]) -> Job:
    job = replace(job, **changes)  # type: ignore[arg-type]
    if nodes := _unfit_again(job):
        why = f"{job.state_message}; no later try mends that on {', '.join(nodes[:_MOST_NAMES])}, and no other node was free"
        return transition(job, JobState.FAILED, end_time=now, state_message=why)
    in_a_row = 0
    refused = 0
    for attempt in reversed(tuple(job.attempts())):
        if ended_by(attempt) not in NEVER_STARTED:
            break
        in_a_row += 1
        refused += ended_by(attempt) in (EndReason.REFUSED, EndReason.UNFIT)
    if refused >= timeouts.max_refusals and refused == in_a_row and not job.spec.is_service:
        why = f"refused {_times(refused)} in a row: {job.state_message}{_unfit_nodes(job)}"
        return transition(job, JobState.FAILED, end_time=now, state_message=why)
    pause_s = min(LONGEST_START_BACKOFF_S, 2.0 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
    if ended_by(job.attempt) is EndReason.UNFIT and not job.spec.is_service:  # type: ignore[arg-type]
        pause_s = 0.0
    return _paused(job, pause_s, now)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _unfit_nodes(job: Job) -> str:
    """Of a job that ends by the number of refusals: on which nodes no later try mends it, and what to do."""
    said = [
        task.node
        for attempt in reversed(tuple(job.attempts()))
        if ended_by(attempt) is EndReason.UNFIT
        for task in attempt.tasks
        if task.unfit
    ]
    nodes = list(dict.fromkeys(said))
    if not nodes:
        return ""
    more = f" and {len(nodes) - _MOST_NAMES} more" if len(nodes) > _MOST_NAMES else ""
    named = ", ".join(nodes[:_MOST_NAMES]) + more
    return f"; no later try mends that on {named}, and further nodes are not tried: mend it, and submit the job again"


def _unfit_again(job: Job) -> list[str]:
    """The nodes that said in the newest attempts that no later try there can go better; none before one says so again.

    A node that said so is avoided for moments, in which all others that are free are tried.
    """
    seen: list[str] = []
    for attempt in () if job.spec.is_service else reversed(tuple(job.attempts())):
        if ended_by(attempt) is not EndReason.UNFIT:
            break
        nodes = [task.node for task in attempt.tasks if task.unfit]
        if set(nodes) & set(seen):
            return seen
        seen += nodes
    return []


def paused_until(job: Job, now: datetime) -> datetime | None:
    """Until when it is not to be tried again; None: it may be.

    No pause is longer than the longest: the clock of who wrote one that is was ahead.
    """
    until, longest = job.not_before, timedelta(seconds=max(LONGEST_BACKOFF_S, LONGEST_SERVICE_BACKOFF_S))
    return until if until is not None and now < until <= now + longest else None


def _settled(attempt: Attempt) -> bool:
    ran = attempt.run_time is not None and attempt.end_time is not None
    return ran and (attempt.end_time - attempt.run_time).total_seconds() >= SETTLED_S  # type: ignore[operator]


def _backoff_s(job: Job, restarts: int) -> float:
    given = job.spec.backoff_s
    if job.spec.is_service:
        base = SERVICE_BACKOFF_S if given is None else given
        return min(LONGEST_SERVICE_BACKOFF_S, base * 2.0 ** min(restarts - 2, 20)) if restarts > 1 else 0.0
    return min(LONGEST_BACKOFF_S, (DEFAULT_BACKOFF_S if given is None else given) * 2.0 ** min(restarts - 1, 20))


def _paused(job: Job, pause_s: float, now: datetime) -> Job:
    if pause_s <= 0:
        return job
    until = now + timedelta(seconds=pause_s)
    message = f"{job.state_message}; tried again in {pause_s:g} s"
    cause = replace(job.cause, actor=rule("retry"))
    return transition(job, JobState.QUEUED, not_before=until, state_message=message, cause=cause)
