"""The job state machine as a table, and the one function that moves a job along it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from whaleflux_scheduler.core.model import ENDED, Job, JobState

NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.STARTING: frozenset({JobState.RUNNING, JobState.RECOVERING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.RECOVERING, JobState.SUSPENDING}
    ),
    JobState.RECOVERING: frozenset({JobState.STARTING, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUSPENDING: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class ImpossibleMove(AssertionError):
    """A bug in the core: the table does not allow this move."""


def move(job: Job, to: JobState, **changes: Any) -> Job:
    """`job` in state `to` with further fields changed; staying is always allowed."""
    if to is not job.state and to not in NEXT[job.state]:
        raise ImpossibleMove(f"{job.name}: {job.state.name} -> {to.name}")
    return replace(job, state=to, **changes)


def dead_ends() -> frozenset[JobState]:
    """States from which no end can be reached; there must be none."""
    good = set(ENDED)
    while more := {state for state, after in NEXT.items() if state not in good and after & good}:
        good |= more
    return frozenset(NEXT) - good
