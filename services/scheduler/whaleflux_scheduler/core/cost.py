"""What a job costs, US dollars: its attempts, each from the allocation of its GPUs to its end. What a GPU costs per hour is a fact of its node.

`Job.cost_usd` counts ended attempts only; everything about the running one is worked out here.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux_scheduler.core import running_time
from whaleflux_scheduler.core.model import Attempt, Job

_LONGEST_H = 1e6  # of a budget that nothing will spend; datetime holds it


def attempt_cost_usd(attempt: Attempt, end: datetime) -> float:
    """From its allocation to `end`."""
    return max(0.0, (end - attempt.allocate_time).total_seconds()) / 3600 * attempt.usd_per_hour


def attempt_gpu_s(attempt: Attempt, end: datetime) -> float:
    """GPU-seconds from its allocation to `end`; a part of a GPU counts as the part that its memory is."""
    worth = sum(task.gpus_worth for task in attempt.tasks)
    return max(0.0, (end - attempt.allocate_time).total_seconds()) * worth


def job_gpu_s(job: Job, now: datetime) -> float:
    """GPU-seconds up to `now`, the running attempt included."""
    running = job.attempt
    if running is None or running.end_time is not None:
        return job.gpu_s
    return job.gpu_s + attempt_gpu_s(running, now)


def job_cost_usd(job: Job, now: datetime) -> float:
    """Up to `now`, the running attempt included."""
    running = job.attempt
    if running is None or running.end_time is not None:
        return job.cost_usd
    return job.cost_usd + attempt_cost_usd(running, now)


def end_attempt(job: Job, now: datetime, reason: str) -> Job:
    """The job with its running attempt ended at `now`, its time and its cost counted; the same job when none runs."""
    attempt = job.attempt
    if attempt is None or attempt.end_time is not None:
        return job
    ended = replace(attempt, end_time=now, end_reason=reason[:2000])
    return replace(
        job,
        attempt=ended,
        cost_usd=job_cost_usd(job, now),
        run_s=running_time.run_s(job, now),
        gpu_s=job_gpu_s(job, now),
    )


def budget_is_spent(job: Job, now: datetime) -> bool:
    return 0 < job.spec.budget_usd <= job_cost_usd(job, now)


def budget_ends_at(job: Job) -> datetime | None:
    """When the running attempt will have spent the job's budget; None: never."""
    attempt = job.attempt
    if attempt is None or job.spec.budget_usd <= 0 or attempt.usd_per_hour <= 0:
        return None
    left_h = (job.spec.budget_usd - job.cost_usd) / attempt.usd_per_hour
    return attempt.allocate_time + timedelta(hours=min(left_h, _LONGEST_H))


def usd_per_gpu_hour(attempt: Attempt) -> float:
    return attempt.usd_per_hour / attempt.gpus if attempt.gpus else 0.0


def micros_of(usd: float) -> int:
    """Whole micro-dollars."""
    return round(usd * 1e6)
