"""How long a job has run, seconds, over all its attempts: what its time limit counts.

An attempt runs from when all its ranks ran to its end; waiting, starting and stopping are not counted. All instants are those of the
job's record, so that a new leader goes on counting where the old one was.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from whaleflux_scheduler.core.model import Job


def run_s(job: Job, now: datetime) -> float:
    """Up to `now`, the running attempt included."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None or attempt.end_time is not None:
        return job.run_s
    return job.run_s + max(0.0, (now - attempt.run_time).total_seconds())


def time_is_up(job: Job, now: datetime) -> bool:
    """Whether it has run for as long as it may."""
    at = latest_end(job)
    return at is not None and now >= at


def latest_end(job: Job) -> datetime | None:
    """When the running attempt will have used up the job's time limit; None: never, or it does not run."""
    attempt, limit_s = job.attempt, job.spec.time_limit_s
    if limit_s is None or attempt is None or attempt.run_time is None or attempt.end_time is not None:
        return None
    return attempt.run_time + timedelta(seconds=max(0.0, limit_s - job.run_s))
