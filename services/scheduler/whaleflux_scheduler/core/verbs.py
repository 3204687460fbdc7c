"""What people do to a job that is there: cancel, hold, release, put back into its queue, change its priority. Pure.

Each returns the job as it is to be stored, the same object when it is so already, and raises FailedPrecondition where its state
does not allow it. What follows from the new record is the leader's: none of them needs to be repeated.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from whaleflux.errors import FailedPrecondition, InvalidArgument
from whaleflux.manifests.job_fields import ATTRIBUTES
from whaleflux.reasons import ErrorReason
from whaleflux_scheduler.core import cost, lifecycle
from whaleflux_scheduler.core.model import ACTIVE, Cause, Hold, Job, JobState
from whaleflux_scheduler.core.observed import AttemptFailure, EndReason
from whaleflux_scheduler.core.state_machine import transition


def cancel(job: Job, cause: Cause, now: datetime) -> Job:
    """Ends it."""
    if job.state is JobState.CANCELLED:
        return job
    _check_unfinished(job)
    return lifecycle.cancel(job, cause, now)


def hold(job: Job, hold: Hold, cause: Cause) -> Job:
    """Not placed until it is released; one that waits for others to make room gives that up."""
    _check_unfinished(job)
    if job.state in ACTIVE:
        raise FailedPrecondition(
            f"{job.name} is {job.state.name}, and only what waits can be held; stop it through its grace and hold it with: "
            f"whaleflux requeue --hold {job.name}",
            metadata={"name": job.name, "state": job.state.name},
        )
    return job if job.hold is not None else replace(job, hold=hold, claim=None, cause=cause)


def release(job: Job, cause: Cause) -> Job:
    """Held no more."""
    _check_unfinished(job)
    return job if job.hold is None else replace(job, hold=None, cause=cause)


def requeue(job: Job, cause: Cause, now: datetime, hold: Hold | None = None) -> Job:
    """Back into its queue, in its old place there; what waits or is on its way there stays as it is, but for the hold."""
    _check_unfinished(job, "; to run it again: whaleflux submit FILE --replace")
    held = job if hold is None or job.hold is not None else replace(job, hold=hold, claim=None, cause=cause)
    if job.state is JobState.RUNNING:
        ended = cost.end_attempt(held, now, f"{EndReason.REQUEUED}: {cause.message}")
        return transition(ended, JobState.SUSPENDING, state_message=cause.message, cause=cause)
    if job.state is JobState.STARTING:  # nothing to save yet
        return replace(lifecycle.fence(held, AttemptFailure(EndReason.REQUEUED, cause.message), now), cause=cause)
    return held


def set_priority(job: Job, priority: int, cause: Cause) -> Job:
    """Another priority from now on. Raises InvalidArgument for one out of range."""
    _check_unfinished(job)
    if wrong := list(ATTRIBUTES["priority"].value.violations("priority", priority)):
        raise InvalidArgument(wrong)
    if job.spec.priority == priority:
        return job
    return replace(job, priority=priority, spec=replace(job.spec, priority=priority), cause=cause)


def _check_unfinished(job: Job, again: str = "") -> None:
    """`again` is what to do about one that has ended."""
    if not job.readable:
        raise FailedPrecondition(
            f"the record of {job.name} was written by a newer version; update the scheduler",
            reason=ErrorReason.RECORD_UNREADABLE,
        )
    if job.ended:
        raise FailedPrecondition(
            f"{job.name} has ended ({job.state.name}){again}",
            reason=ErrorReason.JOB_ENDED,
            metadata={"name": job.name, "state": job.state.name},
        )
