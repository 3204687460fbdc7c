"""Gavel and Sia as they allocate GPUs of several types in rounds, on jobs of `elastic_types`. Re-implementations from the papers.

Gavel (OSDI 2020, section 4.1), max-min fairness: fractions of time X of each job on each type, which maximise the least ratio of a job's
throughput to that with an equal share of each type, times its number of GPUs; at equal minima the sum of the ratios, so that nothing is left
idle. Rounds of 360 s go to the jobs that received least of their fractions, in the sizes that their users tuned (section 5). Solved anew when
a job comes or ends.

Sia (SOSP 2023, section 3.4): each round of 60 s minimises the sum of (r * G)^p, p = -0.5, over one configuration for each job: 1, 2, 4 or 8 GPUs of
one type, at most twice of what it had; G is its goodput in units of its least one, 1.1 stands for none, and r = (T - R * S) / (T + S) discounts what
is not as it was, by age T, restarts R and restart cost S. The sum is minimised exactly, by a dynamic program over what is left of each type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from benchmarks.elastic_policies import Outcome
from benchmarks.elastic_types import MOST, SIZES, TypedJob

Choice = tuple[str, int]
"""A GPU type and a number; ("", 0) for none."""
NOTHING: Choice = ("", 0)


@dataclass(eq=False)
class TypedActive:
    """A job that was submitted and has not ended."""

    job: TypedJob
    left: float
    has: Choice = NOTHING
    most_so_far: int = 0
    ran: bool = False
    restarts: int = 0
    pauses_s: float = 0.0
    gpu_s: float = 0.0
    received_s: dict[str, float] = field(default_factory=dict)  # by type

    def age_s(self, now_s: float) -> float:
        return now_s - self.job.at_s

    @property
    def moved(self) -> Callable[[float], float]:
        """Sia's discount for a change, by the job's age."""
        restart_s = self.job.app.restart_s
        return lambda age_s: max(1e-3, (age_s - self.restarts * restart_s) / (age_s + restart_s)) if self.ran else 1.0


Policy = Callable[[Sequence[TypedActive], Mapping[str, int], float], list[Choice]]


def simulate(jobs: Sequence[TypedJob], gpus: Mapping[str, int], policy: Policy, round_s: float) -> Outcome:
    """Every `round_s` the policy says what each job has; one that is changed after it ran pays its restart first."""
    outcome, active, coming, now_s = Outcome(), list[TypedActive](), list(jobs), 0.0
    while active or coming:
        while coming and coming[0].at_s <= now_s:
            job = coming.pop(0)
            active.append(TypedActive(job, job.work))
        if not active:
            now_s = math.ceil(coming[0].at_s / round_s) * round_s
            continue
        for one, choice in zip(active, policy(active, gpus, now_s), strict=True):
            _change(one, choice)
        for one in list(active):
            if _is_done(one, now_s, round_s, outcome):
                active.remove(one)
        now_s += round_s
    return outcome


def _change(one: TypedActive, choice: Choice) -> None:
    if choice == one.has:
        return
    one.has, one.most_so_far = choice, max(one.most_so_far, choice[1])
    if choice[1]:
        one.pauses_s = one.job.app.restart_s if one.ran else 0.0
        one.restarts += one.ran
        one.ran = True


def _is_done(one: TypedActive, now_s: float, round_s: float, outcome: Outcome) -> bool:
    model, gpus = one.has
    if not gpus:
        return False
    pause_s, speed = min(one.pauses_s, round_s), one.job.app.speed(model, gpus)
    one.pauses_s -= pause_s
    works_s = min(round_s - pause_s, one.left / speed)
    one.left -= works_s * speed
    done = one.left <= 1e-9 * one.job.work
    used_s = pause_s + works_s if done else round_s
    one.gpu_s += used_s * gpus
    one.received_s[model] = one.received_s.get(model, 0.0) + used_s
    if done:
        end_s = now_s + used_s
        outcome.jct_h.append((end_s - one.job.at_s) / 3600)
        outcome.makespan_h = max(outcome.makespan_h, end_s / 3600)
        outcome.gpu_h += one.gpu_s / 3600
        outcome.restarts += one.restarts
    return done


class Gavel:
    """See the module; one for each simulation."""

    def __init__(self) -> None:
        self._solved: tuple[tuple[str, ...], np.ndarray] = ((), np.zeros((0, 0)))

    def __call__(self, active: Sequence[TypedActive], gpus: Mapping[str, int], now_s: float) -> list[Choice]:
        names = tuple(one.job.name for one in active)
        if self._solved[0] != names:
            self._solved = names, fractions([one.job for one in active], gpus)
        wanted = self._solved[1]
        models, left, found = list(gpus), dict(gpus), [NOTHING] * len(active)
        order = sorted(
            (
                -wanted[at, m] / max(one.received_s.get(model, 0.0) / max(one.age_s(now_s), 1.0), 1e-6),
                one.job.at_s,
                at,
                m,
            )
            for at, one in enumerate(active)
            for m, model in enumerate(models)
            if wanted[at, m] > 1e-6
        )
        for _, _, at, m in order:
            size = active[at].job.gpus
            if found[at] == NOTHING and left[models[m]] >= size:
                found[at] = models[m], size
                left[models[m]] -= size
        return found


def fractions(jobs: Sequence[TypedJob], gpus: Mapping[str, int]) -> np.ndarray:
    """Gavel's X by job and type."""
    models, count = list(gpus), len(jobs)
    all_gpus = sum(gpus.values())
    speeds = np.array([[job.app.speed(model, job.gpus) for model in models] for job in jobs])
    equal = speeds @ np.array([gpus[model] / all_gpus for model in models])
    ratio = speeds / equal[:, None] * np.array([job.gpus for job in jobs])[:, None]
    width = count * len(models)
    value = np.zeros(width + 1)
    value[:width], value[-1] = -1e-4 / count * ratio.ravel() / ratio.max(), -1.0
    rows, bounds = [], []
    for at in range(count):  # its ratio is at least the minimum; it runs in one place at a time
        row = np.zeros(width + 1)
        row[at * len(models) : (at + 1) * len(models)], row[-1] = -ratio[at], 1.0
        rows.append(row)
        bounds.append(0.0)
        row = np.zeros(width + 1)
        row[at * len(models) : (at + 1) * len(models)] = 1.0
        rows.append(row)
        bounds.append(1.0)
    for m, model in enumerate(models):
        row = np.zeros(width + 1)
        row[m : width : len(models)] = [job.gpus for job in jobs]
        rows.append(row)
        bounds.append(float(gpus[model]))
    solved = linprog(
        value, A_ub=np.array(rows), b_ub=bounds, bounds=[(0.0, 1.0)] * width + [(0.0, None)], method="highs"
    )
    assert solved.success, solved.message
    found: np.ndarray = solved.x[:width].reshape(count, len(models))
    found[speeds == 0.0] = 0.0
    return found


def sia(active: Sequence[TypedActive], gpus: Mapping[str, int], now_s: float) -> list[Choice]:
    """See the module."""
    return cheapest([sia_costs(one, now_s) for one in active], gpus)


def sia_costs(one: TypedActive, now_s: float, power: float = -0.5, without: float = 1.1) -> dict[Choice, float]:
    """What each configuration adds to the sum."""
    app, costs, discount = one.job.app, {NOTHING: without}, one.moved(one.age_s(now_s))
    least = min(app.speed(model, 1) for model in app.speeds)
    for model in app.speeds:
        for size in SIZES:
            if size <= min(app.most, max(1, 2 * one.most_so_far)):
                goodput = app.speed(model, size) / least
                costs[model, size] = (goodput * (1.0 if (model, size) == one.has else discount)) ** power
    return costs


def cheapest(costs: Sequence[Mapping[Choice, float]], gpus: Mapping[str, int]) -> list[Choice]:
    """The choices with the least sum within what there is of each type. Exact, over all states of what is left."""
    models = list(gpus)
    best, chosen = np.zeros([gpus[model] + 1 for model in models]), []
    for options in costs:
        table, choice = np.full(best.shape, np.inf), np.zeros(best.shape, dtype=np.int8)
        for at, ((model, size), cost) in enumerate(options.items()):
            axis = models.index(model) if model else 0
            if size > gpus.get(model, MOST if not model else 0):
                continue
            to, of = [slice(None)] * best.ndim, [slice(None)] * best.ndim
            to[axis], of[axis] = slice(size, None), slice(0, best.shape[axis] - size)
            with_it = best[tuple(of)] + cost
            better = with_it < table[tuple(to)]
            table[tuple(to)][better], choice[tuple(to)][better] = with_it[better], at
        best = table
        chosen.append((list(options), choice))
    left, found = [gpus[model] for model in models], []
    for options_, choice in reversed(chosen):
        model, size = options_[int(choice[tuple(left)])]
        found.append((model, size))
        if model:
            left[models.index(model)] -= size
    return found[::-1]
