"""A simulation's records as the figures that people compare: waits by size and queue, use of the fleet, promises, dollars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.simulation.records import Outcome
from whaleflux_scheduler.simulation.state import Result

SIZES = ((0, 0), (1, 1), (2, 4), (5, 8), (9, 16), (17, 63), (64, 100_000))
PROMISE_TOLERANCE_S = 1.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of sorted values: an observed one, never an interpolation; NaN of nothing."""
    return values[max(0, math.ceil(percent / 100 * len(values)) - 1)] if values else math.nan


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs that were counted together; times in seconds. Waits are of jobs that started, completion times of those that succeeded."""

    name: str
    jobs: int
    started: int
    wait_mean_s: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    wait_most_s: float
    completion_mean_s: float
    completion_p99_s: float
    gpu_hours: float  # of work that was done

    @classmethod
    def of(cls, name: str, outcomes: Iterable[Outcome]) -> Group:
        jobs = list(outcomes)
        waits = sorted(job.wait_s for job in jobs if not math.isnan(job.start_s))
        done = sorted(job.completion_s for job in jobs if job.state is JobState.SUCCEEDED)
        work_s = sum(job.gpus * job.run_s for job in jobs if job.state is JobState.SUCCEEDED)
        return cls(
            name,
            len(jobs),
            len(waits),
            _mean(waits),
            percentile(waits, 50),
            percentile(waits, 95),
            percentile(waits, 99),
            waits[-1] if waits else math.nan,
            _mean(done),
            percentile(done, 99),
            work_s / 3600,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def groups_of(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> list[Group]:
    """By what `key` says, in its order."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(key(outcome), []).append(outcome)
    return [Group.of(name, jobs) for name, jobs in sorted(found.items(), key=lambda pair: _rank(pair[0]))]


def size_class(outcome: Outcome) -> str:
    """Its size in words: "9-16 GPUs"."""
    low, high = next((low, high) for low, high in SIZES if outcome.gpus <= high)
    if high >= SIZES[-1][1]:
        return f">= {low} GPUs"
    return f"{low} GPU{'s' * (low != 1)}" if low == high else f"{low}-{high} GPUs"


def _rank(name: str) -> tuple[int, str]:
    digits = "".join(c for c in name.removeprefix(">= ").partition(" ")[0].partition("-")[0] if c.isdigit())
    return (int(digits) if name.endswith(("GPU", "GPUs")) and digits else 0, name)


@dataclass(frozen=True, slots=True)
class Summary:
    """All in figures; see the names. `utilisation` is of the GPUs of nodes that took work, up to the last end."""

    jobs: int
    succeeded: int
    failed: int
    unfinished: int
    never_started: int
    makespan_s: float
    utilisation: float
    busy_gpu_hours: float
    idle_gpu_hours: float
    wasted_gpu_hours: float  # held, but no work came of it: starts, restarts, work lost and done again
    suspensions: int
    recoveries: int
    promised: int
    promises_violated: int
    fleet_usd: float
    idle_usd: float
    job_usd: float
    moves: int
    moves_digest: str
    overall: Group
    by_size: tuple[Group, ...]
    by_queue: tuple[Group, ...]


def summary_of(result: Result) -> Summary:
    """Of a simulation that was run."""
    outcomes = list(result.outcomes)
    states = [outcome.state for outcome in outcomes]
    succeeded, failed = states.count(JobState.SUCCEEDED), states.count(JobState.FAILED)
    open_gpu_s = result.gpus * result.end_s - result.closed.total
    held_s = result.held.total
    work_s = sum(o.gpus * o.run_s for o in outcomes if o.state is JobState.SUCCEEDED)
    usd_per_gpu_s = result.fleet_usd_per_hour / 3600 / result.gpus if result.gpus else 0.0
    promised = [o for o in outcomes if not math.isnan(o.promised_s)]
    overall = Group.of("all", outcomes)
    return Summary(
        jobs=len(outcomes),
        succeeded=succeeded,
        failed=failed,
        unfinished=len(outcomes) - succeeded - failed - states.count(JobState.CANCELLED),
        never_started=len(outcomes) - overall.started,
        makespan_s=result.end_s,
        utilisation=held_s / open_gpu_s if open_gpu_s > 0 else math.nan,
        busy_gpu_hours=held_s / 3600,
        idle_gpu_hours=max(0.0, open_gpu_s - held_s) / 3600,
        wasted_gpu_hours=max(0.0, held_s - work_s) / 3600 if succeeded == len(outcomes) else math.nan,
        suspensions=sum(result.outcomes.suspensions),
        recoveries=sum(result.outcomes.recoveries),
        promised=len(promised),
        promises_violated=sum(_violated(o, result.end_s) for o in promised),
        fleet_usd=result.fleet_usd_per_hour * result.end_s / 3600,
        idle_usd=max(0.0, result.gpus * result.end_s - held_s) * usd_per_gpu_s,
        job_usd=result.job_usd,
        moves=result.moves.moves,
        moves_digest=result.moves.digest,
        overall=overall,
        by_size=tuple(groups_of(outcomes, size_class)),
        by_queue=tuple(groups_of(outcomes, lambda outcome: outcome.queue)),
    )


def _violated(outcome: Outcome, end_s: float) -> bool:
    """Whether it started later than it was promised. Promises move earlier; later only when their nodes are lost."""
    started_s = end_s if math.isnan(outcome.start_s) else outcome.start_s
    return started_s > outcome.promised_s + PROMISE_TOLERANCE_S


def finite(value: Any) -> Any:
    """For JSON, which has no NaN: null says that there is nothing to say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
