"""How many GPUs each running elastic job should have: who grows into idle GPUs, and what each gives first to those who wait. Pure.

GPUs go where the next ones bring most: the greatest rise of the logarithm of a job's speed for each GPU (proportional fairness: a job of
four GPUs that becomes twice as fast counts as much as one of forty), which counts less the more GPU time the job had in its ended attempts
(least attained service first: of jobs whose length nobody knows, those that had little are likely to end first). A job that names several
GPU types may go on with another one, where that brings more than what it has. Nobody is resized for nothing: the time that a job is expected to
save must be worth its restart, and a job is left alone for a while after each restart.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import elastic
from whaleflux_scheduler.core.model import Job

SETTLED_S = 120.0  # a job is not resized again before, except for others of higher priority
GIVES_AFTER_S = 30.0
WORKS = 2.0  # times what its restart cost: before others of its priority may have it restarted again
ATTAINED_GPU_S = 4 * 3600.0  # GPU-seconds after which a rise counts half
FASTER = 1.05  # times: what another GPU type must bring at least
WORTH = 1.5  # times the restart: what a job must be expected to save by growing


@dataclass(frozen=True, slots=True)
class Growth:
    """A job that should have `gpus` of a type instead of what it has; `saves_s` of the time that it still takes, its restart counted."""

    job: Job
    gpus: int
    saves_s: float
    model: str = ""


def settled(job: Job, now: datetime) -> bool:
    """Whether it may be resized for the good of all: its attempt is its first, or has worked for a while."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None or job.claim is not None:
        return False
    return unsettled_s(job, now) <= 0


def unsettled_s(job: Job, now: datetime) -> float:
    """For how long it is still left alone after its restart."""
    if job.attempt is None or not job.past_attempts:
        return 0.0
    return max(SETTLED_S, WORKS * elastic.lost_by_restart_s(job)) - elastic.worked_s(job, now)


def may_give(job: Job, now: datetime) -> bool:
    """Whether it may have to give others of its priority what it has beyond its part: not before it worked for what its restart cost."""
    return gives_in_s(job, now) <= 0.0


def gives_in_s(job: Job, now: datetime) -> float:
    """In how many seconds of its work that will be the case, 0 or less: it is; infinite: it does not run."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return math.inf
    paid_s = WORKS * elastic.lost_by_restart_s(job) if job.past_attempts else 0.0
    return max(GIVES_AFTER_S, paid_s) - elastic.worked_s(job, now)


def marginal(job: Job, gpus: int) -> float:
    """The rise of the logarithm of its speed for each GPU of the next step up from so many; 0: there is none."""
    more = elastic.above(job.spec, gpus)
    return _rise(job, gpus, more) if more else 0.0


def loss(job: Job, gpus: int, fewer: int) -> float:
    """The fall of the logarithm of its speed for each GPU that it gives, down from `gpus`."""
    return _rise(job, fewer, gpus)


def _rise(job: Job, gpus: int, more: int) -> float:
    before, after = elastic.speed(job.spec, gpus), elastic.speed(job.spec, more)
    rise = math.log(after / before) / (more - gpus) if after > before else 0.0
    return rise / (1.0 + job.gpu_s / ATTAINED_GPU_S)


def saves_s(job: Job, gpus: int, model: str, now: datetime) -> float:
    """By how much earlier it is expected to end with so many GPUs of the type, its restart counted; negative: later."""
    assert job.attempt is not None
    left = elastic.left_s(job, now)
    faster = elastic.pace(job.spec, gpus, model) / elastic.pace(job.spec, job.attempt.gpus, elastic.model_of(job))
    return left - left / faster - elastic.lost_by_restart_s(job)


def growths(jobs: Iterable[Job], idle: Mapping[str, int], now: datetime) -> list[Growth]:
    """Who grows into GPUs, idle by type, that nobody who waits could use, and how far; the greatest rise goes first.

    A job whose growth would not be worth its restart leaves its part to the others.
    """
    able = [job for job in jobs if settled(job, now)]
    while able:
        sizes = _share_out(able, idle)
        found = [_growth(job, gpus, model, now) for job, (model, gpus) in zip(able, sizes, strict=True)]
        poor = {growth.job.name for growth in found if not _is_worth_it(growth)}
        good = [growth for growth in found if growth.job.name not in poor]
        if not poor or not good:
            return sorted(good, key=lambda growth: (-growth.job.spec.priority, -growth.saves_s, growth.job.name))
        able = [growth.job for growth in good]
    return []


def _growth(job: Job, gpus: int, model: str, now: datetime) -> Growth:
    assert job.attempt is not None
    stays = (model, gpus) == (elastic.model_of(job), job.attempt.gpus)
    return Growth(job, gpus, 0.0 if stays else saves_s(job, gpus, model, now), model)


def _is_worth_it(growth: Growth) -> bool:
    return growth.saves_s >= (WORTH - 1) * elastic.lost_by_restart_s(growth.job) > 0


@dataclass(frozen=True, slots=True)
class _Step:
    """From what a job has to what it could have: `takes` more GPUs of the type."""

    rise: float  # for each of them
    model: str
    gpus: int
    takes: int


def _steps(job: Job, model: str, gpus: int) -> Iterator[_Step]:
    """One more step of its own type, or the fewest GPUs of another one that are faster than all that it has."""
    if (rise := marginal(job, gpus)) > 0:
        more = elastic.above(job.spec, gpus)
        yield _Step(rise, model, more, more - gpus)
    if (model, gpus) != (elastic.model_of(job), job.attempt.gpus if job.attempt else 0):
        return  # it is on its way to another size already
    here = elastic.pace(job.spec, gpus, model)
    for other, throughput in elastic.throughputs(job.spec).items():
        if other != model and (few := _fewest(job.spec, here * FASTER / throughput)):
            rise = math.log(elastic.pace(job.spec, few, other) / here) / few
            if rise > 0:  # speeds need not grow with numbers
                yield _Step(rise / (1.0 + job.gpu_s / ATTAINED_GPU_S), other, few, few)


def _fewest(spec: Spec, speed: float) -> int:
    """Its least size that is so fast; 0 for none."""
    sizes = elastic.sizes(spec)
    at = bisect_left(sizes, speed, key=lambda gpus: elastic.speed(spec, gpus))
    return sizes[at] if at < len(sizes) else 0


def best_rise(job: Job) -> float:
    """The greatest that any step of it would bring; 0: it has all that it can use."""
    assert job.attempt is not None
    return max((step.rise for step in _steps(job, elastic.model_of(job), job.attempt.gpus)), default=0.0)


def _share_out(jobs: Sequence[Job], idle: Mapping[str, int]) -> list[tuple[str, int]]:
    """Types and sizes of the jobs when idle GPUs go one step at a time to the highest priority, there to the greatest rise."""
    left = dict(idle)
    has = [(elastic.model_of(job), job.attempt.gpus if job.attempt else 0) for job in jobs]
    heap: list[tuple[int, float, int, int, _Step, tuple[str, int]]] = []
    numbers = itertools.count()

    def offer(at: int) -> None:
        for step in _steps(jobs[at], *has[at]):
            if step.takes <= left.get(step.model, 0):
                heapq.heappush(heap, (-jobs[at].spec.priority, -step.rise, at, next(numbers), step, has[at]))

    for at in range(len(jobs)):
        offer(at)
    while heap:
        _, _, at, _, step, before = heapq.heappop(heap)
        if has[at] != before or step.takes > left[step.model]:
            continue
        left[step.model] -= step.takes
        has[at] = step.model, step.gpus
        offer(at)
    return has


def first_share(wished: int, idle: int, waiting: int) -> int:
    """How many GPUs a job takes that starts: what it wishes for, or its equal part of what is idle where others wait, too."""
    return min(wished, max(1, idle // max(1, waiting)))
