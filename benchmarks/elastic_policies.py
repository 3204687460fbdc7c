"""Pollux, Sia and Gavel as they allocate GPUs of one kind in rounds, on jobs of `elastic_jobs`. Re-implementations from the papers.

Pollux (OSDI 2021) maximises the power mean (p = -1) of each job's speed against that with an equal share of the cluster, discounted for
restarts ((T - R * 30 s) / (T + 30 s) for a job of age T that was restarted R times); a job at most doubles what it had at most so far.
Sia (SOSP 2023) minimises the sum of (r * G)^p, p = -0.5, of goodputs in units of the least configuration's, 1.1 for a job without GPUs, with
r = (T - R * S) / (T + S) for its own restart cost S; configurations are 1, 2, 4 GPUs and whole nodes, and at most double. Both are sums
over jobs of a function of its number of GPUs, so a dynamic program finds their optimum: no search does better, neither Pollux' genetic
algorithm nor an ILP. Gavel (OSDI 2020) gives equal GPU-time to jobs of fixed size (max-min fairness), in rounds of 360 s, by priority.

Placement inside of the cluster is left out, for all policies alike: a job's GPUs are as close as they were when they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.elastic_jobs import TracedJob

POLLUX_RESTART_S = 30.0
FOREVER = 1e9


@dataclass(eq=False)
class Active:
    """A job that was submitted and has not ended."""

    job: TracedJob
    left: float
    gpus: int = 0
    ran: bool = False
    restarts: int = 0
    most_so_far: int = 0
    pauses_s: float = 0.0  # restart time that is still to pass
    gpu_s: float = 0.0
    received_s: float = 0.0  # time with GPUs
    fixed: bool = False

    def age_s(self, now_s: float) -> float:
        return now_s - self.job.at_s

    def speed(self, gpus: int) -> float:
        if self.fixed:
            return self.job.tuned_speed if gpus else 0.0
        return self.job.app.speeds[gpus]


Allocate = Callable[[Sequence[Active], int, float], list[int]]


@dataclass
class Outcome:
    """Completion times, hours by job; the rest in all."""

    jct_h: list[float] = field(default_factory=list)
    makespan_h: float = 0.0
    gpu_h: float = 0.0
    restarts: int = 0


def simulate(
    jobs: Sequence[TracedJob], gpus: int, allocate: Allocate, round_s: float, *, fixed: bool = False
) -> Outcome:
    """Every `round_s` the policy says how many GPUs each job has; one that is changed after it ran pays its restart first."""
    outcome, active, coming, now_s = Outcome(), list[Active](), list(jobs), 0.0
    while active or coming:
        while coming and coming[0].at_s <= now_s:
            job = coming.pop(0)
            active.append(Active(job, job.app.work, fixed=fixed))
        if not active:
            now_s = math.ceil(coming[0].at_s / round_s) * round_s
            continue
        for one, size in zip(active, allocate(active, gpus, now_s), strict=True):
            _resize(one, size)
        for one in list(active):
            _run(one, now_s, round_s, outcome)
            if one.left <= 0:
                active.remove(one)
        now_s += round_s
    return outcome


def _resize(one: Active, gpus: int) -> None:
    if gpus == one.gpus:
        return
    one.gpus, one.most_so_far = gpus, max(one.most_so_far, gpus)
    if gpus:
        one.pauses_s = one.job.app.restart_s if one.ran else 0.0
        one.restarts += one.ran
        one.ran = True


def _run(one: Active, now_s: float, round_s: float, outcome: Outcome) -> None:
    if not one.gpus:
        return
    pause_s, speed = min(one.pauses_s, round_s), one.speed(one.gpus)
    one.pauses_s -= pause_s
    works_s = min(round_s - pause_s, one.left / speed)
    one.left -= works_s * speed
    used_s = pause_s + works_s if one.left <= 1e-9 * one.job.app.work else round_s
    one.gpu_s += used_s * one.gpus
    one.received_s += used_s
    if one.left <= 1e-9 * one.job.app.work:
        one.left, end_s = 0.0, now_s + used_s
        outcome.jct_h.append((end_s - one.job.at_s) / 3600)
        outcome.makespan_h = max(outcome.makespan_h, end_s / 3600)
        outcome.gpu_h += one.gpu_s / 3600
        outcome.restarts += one.restarts


def cheapest(costs: Sequence[np.ndarray], gpus: int) -> list[int]:
    """Sizes of at most `gpus` together with the least sum of costs; costs[j][n] is that of n GPUs for job j."""
    best, chosen = np.zeros(gpus + 1), []
    for cost in costs:
        table = np.full((len(cost), gpus + 1), np.inf)
        for size in np.flatnonzero(np.isfinite(cost)):
            table[size, size:] = cost[size] + best[: gpus + 1 - size]
        chosen.append(np.argmin(table, axis=0))
        best = np.min(table, axis=0)
    left, sizes = int(np.argmin(best)), []
    for choice in reversed(chosen):
        sizes.append(int(choice[left]))
        left -= sizes[-1]
    return sizes[::-1]


def pollux(active: Sequence[Active], gpus: int, now_s: float) -> list[int]:
    """See the module."""
    fair = max(1, gpus // len(active))
    served = list(active)[:gpus] if len(active) > gpus else list(active)  # each that is served has at least one
    costs = [_pollux_cost(one, fair, gpus, now_s) if one in served else _none(gpus) for one in active]
    return cheapest(costs, gpus)


def _pollux_cost(one: Active, fair: int, gpus: int, now_s: float) -> np.ndarray:
    cost = np.full(gpus + 1, np.inf)
    cost[0] = 1e6
    age_s = one.age_s(now_s)
    moved = max(1e-3, (age_s - one.restarts * POLLUX_RESTART_S) / (age_s + POLLUX_RESTART_S)) if one.ran else 1.0
    for size in range(1, min(gpus, max(1, 2 * one.most_so_far)) + 1):
        speedup = one.speed(size) / one.speed(fair)
        cost[size] = 1 / (speedup * (1.0 if size == one.gpus else moved))
    return cost


def _none(gpus: int) -> np.ndarray:
    cost = np.full(gpus + 1, np.inf)
    cost[0] = 0.0
    return cost


def sia(active: Sequence[Active], gpus: int, now_s: float) -> list[int]:
    """See the module."""
    return cheapest([_sia_cost(one, gpus, now_s) for one in active], gpus)


def _sia_cost(one: Active, gpus: int, now_s: float, power: float = -0.5, without: float = 1.1) -> np.ndarray:
    cost = np.full(gpus + 1, np.inf)
    cost[0] = without
    age_s, restart_s = one.age_s(now_s), one.job.app.restart_s
    moved = max(1e-3, (age_s - one.restarts * restart_s) / (age_s + restart_s)) if one.ran else 1.0
    for size in (1, 2, *range(4, min(gpus, max(1, 2 * one.most_so_far)) + 1, 4)):
        if size <= max(1, 2 * one.most_so_far):
            goodput = one.speed(size) / one.speed(1)
            cost[size] = (goodput * (1.0 if size == one.gpus else moved)) ** power
    return cost


def gavel(active: Sequence[Active], gpus: int, now_s: float) -> list[int]:
    """See the module: those who received least of what they are due go first, in the size that their user tuned."""
    due = _equal_gpu_time([one.job.gpus for one in active], gpus)
    priority = [
        share * max(one.age_s(now_s), 1.0) / max(one.received_s, 1.0) for one, share in zip(active, due, strict=True)
    ]
    sizes, left = [0] * len(active), gpus
    for at in sorted(range(len(active)), key=lambda at: (-priority[at], active[at].job.at_s)):
        if active[at].job.gpus <= left:
            sizes[at] = active[at].job.gpus
            left -= sizes[at]
    return sizes


def _equal_gpu_time(sizes: Sequence[int], gpus: int) -> list[float]:
    """Fractions of time for which jobs run so that each has the same GPU-time, or runs always."""
    low, high = 0.0, float(max(sizes))
    if sum(sizes) <= gpus:
        return [1.0] * len(sizes)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= gpus else (low, middle)
    return [min(1.0, low / size) for size in sizes]
