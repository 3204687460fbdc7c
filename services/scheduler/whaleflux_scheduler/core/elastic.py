"""The sizes of an elastic job, in GPUs, and how fast it is with each, of each type. Pure functions of its spec; other jobs have one size."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.model import AttemptSplit, Job

USUAL_RESTART_S, SAVE_S = 60.0, 30.0
SINCE_OWN_SAVE_S = 300.0  # that programs lose which resume by themselves: when they saved last is not known
USUAL_EXPONENT = 0.8  # of the speed by GPUs where nothing is known: each doubling brings 87 % of twice the speed


@dataclass(frozen=True, slots=True)
class SizePlan:
    """How a model is split over that many GPUs of a type; tokens per second, 0: not known."""

    gpus: int
    model: str
    split: AttemptSplit
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SizedSpec(Spec):
    """Of a job that is planned anew for each of its sizes: it has those alone for which there is a plan (`planned_sizes`).

    `why` says what its checkpoint allows, `first` how it was split when it was submitted; `not_on`: types that would do, and have no plan.
    """

    only_sizes: tuple[int, ...] = ()
    plans: tuple[SizePlan, ...] = ()
    first: AttemptSplit | None = None
    why: str = ""
    not_on: tuple[str, ...] = ()

    def plan_of(self, gpus: int, model: str) -> SizePlan | None:
        """None: it is not planned for these."""
        return next((one for one in self.plans if (one.gpus, one.model) == (gpus, model)), None)


def sizes(spec: Spec) -> Sequence[int]:
    """All of them, rising."""
    if isinstance(spec, SizedSpec):
        return spec.only_sizes
    return range(spec.elastic_min or spec.gpus, (spec.elastic_max or spec.gpus) + 1, spec.elastic_step or 1)


def tensor_parallel(spec: Spec) -> int:
    """Ranks that share each layer with as many GPUs as it asks for, as far as that is planned; 0 or 1: none do."""
    plans = spec.plans if isinstance(spec, SizedSpec) else ()
    planned = next((one.split.tensor for one in plans if one.gpus == spec.gpus), 0)
    return planned or (spec.tensor_parallel if spec.gpus % max(1, spec.tensor_parallel) == 0 else 0)


def least(spec: Spec) -> int:
    """Fewest GPUs that it can run with."""
    return sizes(spec)[0]


def most(spec: Spec) -> int:
    return sizes(spec)[-1]


def step(spec: Spec) -> int:
    """Every size is a multiple of it."""
    return math.gcd(*spec.only_sizes) if isinstance(spec, SizedSpec) else spec.elastic_step or 1


def floor(spec: Spec, gpus: int) -> int:
    """The largest size of at most so many GPUs, 0 for none."""
    at = bisect_right(sizes(spec), gpus)
    return sizes(spec)[at - 1] if at else 0


def above(spec: Spec, gpus: int) -> int:
    """The next size of more GPUs, 0 for none."""
    at = bisect_right(sizes(spec), gpus)
    return sizes(spec)[at] if at < len(sizes(spec)) else 0


def below(spec: Spec, gpus: int) -> int:
    """The next size of fewer GPUs, its least where there is none."""
    return floor(spec, gpus - 1) or least(spec)


@lru_cache(maxsize=4096)
def sized(spec: Spec, gpus: int) -> Spec:
    """What it asks for with that many GPUs; its range stays."""
    return replace(spec, gpus=gpus, elastic_max=spec.elastic_max or spec.gpus)


def at_least(spec: Spec) -> Spec:
    """What has to be free before it can start at all: its smallest size."""
    return sized(spec, least(spec)) if spec.is_elastic and least(spec) != spec.gpus else spec


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
    known = spec.elastic_speeds or _planned_speeds(spec)
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


def _planned_speeds(spec: Spec) -> Sequence[tuple[int, float]]:
    """Of the plans of the first type: the cost model's tokens per second."""
    if not isinstance(spec, SizedSpec) or not spec.plans:
        return ()
    return [(one.gpus, one.tokens_per_s) for one in spec.plans if one.model == spec.plans[0].model and one.tokens_per_s]
