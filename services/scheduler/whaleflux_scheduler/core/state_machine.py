"""The job state machine as a table, and the one function that takes a job along it."""

from __future__ import annotations

from typing import Any

from whaleflux_scheduler.core.changed import changed
from whaleflux_scheduler.core.model import ENDED, GOES_ON, Cause, Job, JobState

NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.SUCCEEDED, JobState.CANCELLED}),
    JobState.STARTING: frozenset(
        {
            JobState.RUNNING,
            JobState.RECOVERING,
            JobState.SUSPENDING,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.RECOVERING, JobState.SUSPENDING}
    ),
    JobState.RECOVERING: frozenset(
        {JobState.STARTING, JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.SUSPENDING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


BY = {
    JobState.QUEUED: "queue",
    JobState.STARTING: "placement",
    JobState.RUNNING: "start",
    JobState.RECOVERING: "failure",
    JobState.SUSPENDING: "preemption",
    JobState.SUCCEEDED: "end",
    JobState.FAILED: "end",
}
"""By which rule of the scheduler a state is entered, where neither a user asked for it nor a finer one is named."""


def rule(name: str) -> str:
    """A rule of the scheduler as an actor: who decided what nobody asked for."""
    return f"scheduler/{name}"


class ImpossibleTransition(AssertionError):
    """A bug in the core: the table does not allow this transition."""


def transition(job: Job, to: JobState, **changes: Any) -> Job:
    """`job` in state `to` with further fields changed; staying is always allowed. A claim outlives it only on the way to its place.

    A cause among the changes that names an actor says who took it there; else it was a rule of ours, but for cancelled jobs, whose
    cause says who asked for it.
    """
    if to is not job.state and to not in NEXT[job.state]:
        raise ImpossibleTransition(f"{job.name}: {job.state.name} -> {to.name}")
    cause: Cause = changes.get("cause", job.cause)
    if to in BY and not ("cause" in changes and cause.actor):
        changes["cause"] = Cause(cause.resource, cause.traceparent, cause.message, rule(BY[to]))
    kept = to is JobState.QUEUED or (to is JobState.SUSPENDING and goes_on(job))
    changes.setdefault("claim", job.claim if kept else None)
    return changed(job, state=to, **changes)


def goes_on(job: Job) -> bool:
    """Whether what it claims is the place where it goes on, with as many GPUs as now or another number."""
    return job.claim is not None and job.claim.purpose in GOES_ON


def dead_ends() -> frozenset[JobState]:
    """States from which no end can be reached; there must be none."""
    good = set(ENDED)
    while more := {state for state, after in NEXT.items() if state not in good and after & good}:
        good |= more
    return frozenset(NEXT) - good
