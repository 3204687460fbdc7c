"""How many GPUs each running elastic job should have: who grows into idle GPUs, and what each gives first to those who wait. Pure.

GPUs go where the next ones bring most: the greatest rise of the logarithm of a job's speed for each GPU (proportional fairness: a job of
four GPUs that becomes twice as fast counts as much as one of forty), which counts less the more GPU time the job had in its ended attempts
(least attained service first: of jobs whose length nobody knows, those that had little are likely to end first). Nobody is resized for nothing: the time that a job is expected to
save must be worth its restart, and a job is left alone for a while after each restart.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from whaleflux_scheduler.core import elastic
from whaleflux_scheduler.core.model import Job

SETTLED_S = 120.0  # a job is not resized again before, except for others of higher priority
GIVES_AFTER_S = 30.0
ATTAINED_GPU_S = 4 * 3600.0  # GPU-seconds after which a rise counts half
WORTH = 1.5  # times the restart: what a job must be expected to save by growing


@dataclass(frozen=True, slots=True)
class Growth:
    """A job that should have `gpus` instead of what it has; `saves_s` of the time that it still takes, its restart counted."""

    job: Job
    gpus: int
    saves_s: float


def settled(job: Job, now: datetime) -> bool:
    """Whether it may be resized for the good of all: its attempt has run for a while, or is its first."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None or job.claim is not None:
        return False
    return not job.past_attempts or (now - attempt.run_time).total_seconds() >= SETTLED_S


def unsettled_s(job: Job, now: datetime) -> float:
    """For how long it is still left alone after its restart."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None or not job.past_attempts:
        return 0.0
    return SETTLED_S - (now - attempt.run_time).total_seconds()


def may_give(job: Job, now: datetime) -> bool:
    """Whether it may have to give others of its priority what it has beyond its part: not right after a restart."""
    attempt = job.attempt
    return (
        attempt is not None
        and attempt.run_time is not None
        and (now - attempt.run_time).total_seconds() >= GIVES_AFTER_S
    )


def marginal(job: Job, gpus: int) -> float:
    """The rise of the logarithm of its speed for each GPU of the next step up from so many; 0: there is none."""
    more = gpus + elastic.step(job.spec)
    if more > elastic.most(job.spec):
        return 0.0
    return _rise(job, gpus, more)


def loss(job: Job, gpus: int, fewer: int) -> float:
    """The fall of the logarithm of its speed for each GPU that it gives, down from `gpus`."""
    return _rise(job, fewer, gpus)


def _rise(job: Job, gpus: int, more: int) -> float:
    before, after = elastic.speed(job.spec, gpus), elastic.speed(job.spec, more)
    rise = math.log(after / before) / (more - gpus) if after > before else 0.0
    return rise / (1.0 + job.gpu_s / ATTAINED_GPU_S)


def saves_s(job: Job, gpus: int, now: datetime) -> float:
    """By how much earlier it is expected to end with so many GPUs, its restart counted; negative: later."""
    assert job.attempt is not None
    left = elastic.left_s(job, now)
    faster = elastic.speed(job.spec, gpus) / elastic.speed(job.spec, job.attempt.gpus)
    return left - left / faster - elastic.lost_by_restart_s(job)


def growths(jobs: Iterable[Job], idle: int, now: datetime) -> list[Growth]:
    """Who grows into `idle` GPUs that nobody who waits could use, and how far; the greatest rise goes first.

    A job whose growth would not be worth its restart leaves its part to the others.
    """
    able = [job for job in jobs if settled(job, now)]
    while able:
        sizes = _share_out(able, idle)
        found = [_growth(job, gpus, now) for job, gpus in zip(able, sizes, strict=True)]
        poor = {growth.job.name for growth in found if not _is_worth_it(growth)}
        good = [growth for growth in found if growth.job.name not in poor]
        if not poor or not good:
            return sorted(good, key=lambda growth: (-growth.job.spec.priority, -growth.saves_s, growth.job.name))
        able = [growth.job for growth in good]
    return []


def _growth(job: Job, gpus: int, now: datetime) -> Growth:
    assert job.attempt is not None
    return Growth(job, gpus, saves_s(job, gpus, now) if gpus > job.attempt.gpus else 0.0)


def _is_worth_it(growth: Growth) -> bool:
    return growth.saves_s >= (WORTH - 1) * elastic.lost_by_restart_s(growth.job) > 0


def _share_out(jobs: Sequence[Job], idle: int) -> list[int]:
    """Sizes of the jobs when idle GPUs go one step at a time to the highest priority, there to the greatest rise."""
    sizes = [job.attempt.gpus if job.attempt else 0 for job in jobs]
    heap = [(-job.spec.priority, -rise, at) for at, job in enumerate(jobs) if (rise := marginal(job, sizes[at])) > 0]
    heapq.heapify(heap)
    while heap and idle > 0:
        priority, _, at = heapq.heappop(heap)
        step = elastic.step(jobs[at].spec)
        if step > idle:
            continue
        sizes[at] += step
        idle -= step
        if (rise := marginal(jobs[at], sizes[at])) > 0:
            heapq.heappush(heap, (priority, -rise, at))
    return sizes


def first_share(wished: int, idle: int, waiting: int) -> int:
    """How many GPUs a job takes that starts: what it wishes for, or its equal part of what is idle where others wait, too."""
    return min(wished, max(1, idle // max(1, waiting)))
