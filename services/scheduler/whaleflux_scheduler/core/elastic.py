"""The sizes of an elastic job, in GPUs, and how fast it is with each, of each type. Pure functions of its spec; other jobs have one size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache

from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.model import Job

USUAL_RESTART_S, SAVE_S = 60.0, 30.0
SINCE_OWN_SAVE_S = 300.0  # that programs lose which resume by themselves: when they saved last is not known
USUAL_EXPONENT = 0.8  # of the speed by GPUs where nothing is known: each doubling brings 87 % of twice the speed


def least(spec: Spec) -> int:
    """Fewest GPUs that it can run with."""
    return spec.elastic_min or spec.gpus


def most(spec: Spec) -> int:
    return spec.elastic_max or spec.gpus


def step(spec: Spec) -> int:
    """Every size is a multiple of it."""
    return spec.elastic_step or 1


def floor(spec: Spec, gpus: int) -> int:
    """The largest size of at most so many GPUs, 0 for none."""
    size = min(gpus - gpus % step(spec), most(spec))
    return size if size >= least(spec) else 0


@lru_cache(maxsize=4096)
def sized(spec: Spec, gpus: int) -> Spec:
    """What it asks for with that many GPUs; its range stays."""
    return replace(spec, gpus=gpus, elastic_max=most(spec))


def at_least(spec: Spec) -> Spec:
    """What has to be free before it can start at all: its smallest size."""
    return sized(spec, spec.elastic_min) if spec.is_elastic and spec.elastic_min < spec.gpus else spec


def lost_by_restart_s(job: Job) -> float:
    """What a restart costs, seconds: a save, and until its first step after that; and work, where its program saves when it likes to.

    Measured at its last restart, else at its start; where it reports no steps, until its ranks ran.
    """
    lost_s = SINCE_OWN_SAVE_S if job.spec.elastic_resumes and not job.spec.checkpoint_every_steps else 0.0
    return lost_s + max(USUAL_RESTART_S, SAVE_S + _last_start_s(job))


def _last_start_s(job: Job) -> float:
    stepped = next((one for one in reversed(tuple(job.attempts())) if one.first_step_time is not None), None)
    if stepped is not None and stepped.first_step_time is not None:
        return (stepped.first_step_time - stepped.allocate_time).total_seconds()
    attempt = job.attempt
    return (attempt.run_time - attempt.allocate_time).total_seconds() if attempt and attempt.run_time else 0.0


def worked_s(job: Job, now: datetime) -> float:
    """For how long it has worked since it started last: since its first step, where it reports steps."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return 0.0
    since = attempt.first_step_time
    if since is None and any(past.first_step_time is not None for past in job.past_attempts):
        return 0.0  # it still loads its checkpoint
    return max(0.0, (now - (since or attempt.run_time)).total_seconds())


def ran_s(job: Job, now: datetime) -> float:
    """How long it has run, all attempts together."""
    attempt = job.attempt
    current = 0.0
    if attempt is not None and attempt.run_time is not None and attempt.end_time is None:
        current = max(0.0, (now - attempt.run_time).total_seconds())
    return job.run_s + current


def left_s(job: Job, now: datetime) -> float:
    """How long it probably still runs as it is: what its user says, else as long as it ran already, as is usual for such work."""
    ran, limit = ran_s(job, now), job.spec.time_limit_s
    expected = getattr(job.spec, "expected_s", None)
    left = max(expected - ran, ran / 10) if expected is not None else ran
    return min(left, max(0.0, limit - ran)) if limit is not None else left


@lru_cache(maxsize=4096)
def _throughputs(any_of: tuple[str, ...], options: tuple[GpuChoice, ...]) -> dict[str, float]:
    told = {choice.model: choice.throughput for choice in options}
    return {model: told.get(model, 1.0) for model in any_of}


def throughputs(spec: Spec) -> Mapping[str, float]:
    """How fast it is on each GPU type that it names, in units of its reference GPU; none: any type will do."""
    return _throughputs(spec.any_of, spec.gpu_options)


def model_of(job: Job) -> str:
    """The GPU type that it runs on."""
    return next((model for model, _ in job.attempt.gpus_by_model), "") if job.attempt is not None else ""


def pace(spec: Spec, gpus: int, model: str) -> float:
    """Its `speed` with that many GPUs of the type."""
    return speed(spec, gpus) * throughputs(spec).get(model, 1.0)


def speed(spec: Spec, gpus: int) -> float:
    """Work per second with that many GPUs, in a unit of the spec's own.

    Between known sizes it is on the line between them, below them in proportion to the GPUs, and above them it grows no more.
    """
    known = spec.elastic_speeds
    if not known:
        return float(gpus**USUAL_EXPONENT)
    at = bisect_left(known, (gpus, 0.0))
    if at == len(known):
        return known[-1][1]
    above, fast = known[at]
    if above == gpus or at == 0:
        return fast * gpus / above
    below, slow = known[at - 1]
    return slow + (fast - slow) * (gpus - below) / (above - below)
