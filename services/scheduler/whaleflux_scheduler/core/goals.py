"""What a job is to cost and when it has to end: the wish that the engine is asked with, and the outlook in words. Pure.

A job says how long it runs on its reference GPU (`expected`), or that is learned from jobs like it. What it has done is taken off: each
attempt counts as long as it ran, as fast as its GPUs are. So the work left, the time to the deadline and what is left of the budget are
those of the moment, whenever a job is placed (again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Goal as Wanted
from whaleflux.manifests.job_fields import Spec
from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import budgets, cost
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.model import Attempt, Job
from whaleflux_scheduler.core.placement.api import Goal, Placement, PlaceRequest, Preference

_GOALS = {Wanted.CHEAPEST: Goal.CHEAPEST, Wanted.FASTEST: Goal.FASTEST}
_GUESSES = frozenset({"its time limit", "no run like it is known"})
_LONGEST_S = 10 * 365 * 86_400.0
_MOST_NAMED = 3


def goal_of(spec: Spec) -> Goal:
    return _GOALS.get(spec.goal, Goal.CLOSEST)


def looks_ahead(spec: Spec) -> bool:
    """Whether its work, its time and its money say where it goes, or something about it."""
    return spec.goal in _GOALS or spec.deadline is not None or spec.budget_usd > 0


def work_left_s(job: Job, estimates: Estimates, now: datetime) -> float:
    """Seconds on as many reference GPUs as it asks for; 0: nobody knows."""
    done_s = _done_s(job, now)
    estimate = estimates.of(job, done_s)
    return 0.0 if estimate.source in _GUESSES else max(0.0, estimate.likely_s - done_s)


def wish(job: Job, work_s: float, now: datetime) -> Preference:
    """What the engine is to prefer now; `work_s` as `work_left_s` says."""
    late, budget = job.spec.deadline, job.spec.budget_usd
    return Preference(
        goal_of(job.spec),
        work_s * job.spec.gpus,
        None if late is None else max(0.0, (late - now).total_seconds()),
        max(0.0, budget - cost.job_cost_usd(job, now)) if budget > 0 else None,
    )


def asked(request: PlaceRequest, job: Job, work_s: float, now: datetime) -> PlaceRequest:
    """The request with the wish of the moment; the same when the job has none."""
    return replace(request, preference=wish(job, work_s, now)) if looks_ahead(job.spec) else request


def _done_s(job: Job, now: datetime) -> float:
    """Work that was done, in seconds on as many reference GPUs as it asks for. Attempts that are not kept count as those."""
    done_s, kept_s = 0.0, 0.0
    for attempt in job.attempts():
        if attempt.run_time is None:
            continue
        ran_s = max(0.0, ((attempt.end_time or now) - attempt.run_time).total_seconds())
        kept_s += ran_s if attempt.end_time is not None else 0.0
        done_s += ran_s * _speed(job.spec, attempt)
    return done_s + max(0.0, job.run_s - kept_s)


def _speed(spec: Spec, attempt: Attempt) -> float:
    """Of all GPUs of the attempt together; 1.0: as many reference GPUs as the job asks for."""
    told = {choice.model: choice for choice in spec.gpu_choices}
    units = (
        count * (choice := told.get(model, GpuChoice(model))).throughput / choice.per_unit
        for model, count in attempt.gpus_by_model
    )
    return sum(units) / spec.gpus if spec.gpus and attempt.gpus_by_model else 1.0


# in words


@dataclass(frozen=True, slots=True)
class Outlook:
    """When the job would end on GPUs of one type, if it started now."""

    model: str
    end: datetime


def outlooks(spec: Spec, work_s: float, now: datetime, holds: Callable[[str], bool]) -> list[Outlook]:
    """By GPU type, the earliest end first; of those of which the fleet `holds` enough. Without types only the reference GPU is known."""
    choices = spec.gpu_choices or (GpuChoice(),)
    found = [Outlook(one.model, _after(now, work_s / one.throughput)) for one in choices if holds(one.model)]
    return sorted(found, key=lambda one: one.end)


def end_of(placement: Placement, now: datetime) -> datetime | None:
    """When the job will have ended there; None: its work is not known."""
    run_s = placement.cost.run_s
    return None if run_s is None else _after(now, run_s + placement.cost.fetch_s)


def of_placement(job: Job, placement: Placement, others: Sequence[Outlook], now: datetime) -> tuple[str, ...]:
    """When it will end, what it costs until then, and what of the deadline or the budget is not kept."""
    if not looks_ahead(job.spec):
        return ()
    end, money = end_of(placement, now), budgets.of_placement(job, placement, now)
    if end is None:
        unknown = "how long it runs is not known, so nothing is said of its end; say so with `expected`"
        return tuple(filter(None, (money, unknown)))
    usd = placement.cost.total_usd or 0.0
    price = f", for ${usd:.2f} from now on" if usd and not money else ""
    late = job.spec.deadline
    is_late = late is not None and end > late
    lines = [_is_late(end, late, others)] if late is not None and is_late else []
    if price or not is_late:
        lines.append(f"would end {_shown(end)}{price}")
    lines.insert(0 if budgets.is_over(job, placement, now) else len(lines), money)
    return tuple(filter(None, lines))


def of_waiting(job: Job, others: Sequence[Outlook], now: datetime) -> tuple[str, ...]:
    """Of one that has no place: until when it has to start, or that it is too late."""
    late = job.spec.deadline
    if late is None or not others:
        return ()
    if (best := others[0]).end > late:
        return (_is_late(best.end, late, ()),)
    in_time = [one for one in others if one.end <= late]
    starts = [f"{_shown(now + (late - one.end))}" + (f" on {one.model}" if one.model else "") for one in in_time]
    return (f"to end by its deadline {_shown(late)} it has to start by {' or '.join(starts[:_MOST_NAMED])}",)


def _is_late(end: datetime, late: datetime, others: Sequence[Outlook]) -> str:
    text = f"would end {_shown(end)}, {shown_duration((end - late).total_seconds())} after its deadline {_shown(late)}"
    in_time = [one.model for one in others if one.end <= late and one.model][:_MOST_NAMED]
    if in_time:
        return f"{text}; {' or '.join(in_time)} would make it, but not enough are free"
    return f"{text}; no GPU type that it names would make it"


def _after(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=min(seconds, _LONGEST_S))


def _shown(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")
