"""Which task a session with a job goes to, or why there is none. Pure."""

from __future__ import annotations

from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.reasons import ErrorReason
from whaleflux_scheduler.core.model import ACTIVE, Attempt, Job, Task, TaskPhase


def running_task(job: Job, rank: int) -> tuple[Attempt, Task]:
    """Where the rank runs now. Raises InvalidArgument for no such rank, FailedPrecondition while it does not run."""
    if job.ended:
        raise FailedPrecondition(
            f"{job.name} has ended ({job.state.name}); while its node keeps them, its files come with: "
            f"whaleflux cp {job.name}:. {job.id}-files",
            reason=ErrorReason.JOB_ENDED,
            metadata={"name": job.name, "state": job.state.name},
        )
    attempt, task = last_task(job, rank)
    if job.state not in ACTIVE or task.phase is not TaskPhase.RUNNING:
        doing = task.phase.name if job.state in ACTIVE else job.state.name
        raise FailedPrecondition(
            f"rank {rank} of {job.name} does not run now ({doing}); see why with: whaleflux explain {job.name}",
            reason=ErrorReason.JOB_NOT_RUNNING,
            metadata={"name": job.name, "state": job.state.name},
        )
    return attempt, task


def last_task(job: Job, rank: int) -> tuple[Attempt, Task]:
    """Where the rank runs, or ran last. Raises as `running_task`, but for ends."""
    attempt = job.attempt
    if attempt is None or all(task.phase is TaskPhase.UNSPECIFIED for task in attempt.tasks):
        raise FailedPrecondition(
            f"{job.name} has not run yet; see why with: whaleflux explain {job.name}",
            reason=ErrorReason.JOB_NOT_RUNNING,
            metadata={"name": job.name, "state": job.state.name},
        )
    found = next((task for task in attempt.tasks if rank in task.all_ranks), None)
    if found is None:
        last = max(max(task.all_ranks) for task in attempt.tasks)
        raise InvalidArgument(FieldViolation("--rank", f"{rank} is no rank of {job.name}, which has 0 to {last}"))
    return attempt, found
