"""What a job's budget allows, in words: what it is expected to cost, what is left, and what would be over. Pure."""

from __future__ import annotations

from datetime import datetime

from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import cost, elastic
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.api import Placement

_LONGEST_S = 3.2e9


def left_usd(job: Job, now: datetime) -> float:
    return max(0.0, job.spec.budget_usd - cost.job_cost_usd(job, now))


def of_placement(job: Job, placement: Placement, now: datetime) -> str:
    """Whether its budget lasts there; "" of a job without one."""
    if job.spec.budget_usd <= 0:
        return ""
    usd, per_hour = placement.cost.total_usd, placement.cost.usd_per_hour
    if per_hour <= 0:
        return "its nodes have no price, so nothing of its budget is spent there"
    if usd is None:
        return (
            f"{_left(job, now)}: enough for {_lasts(job, per_hour, now)} at ${per_hour:.2f}/h, then it ends as FAILED"
        )
    if usd > left_usd(job, now):
        return f"needs ${usd:.2f}, and {_left(job, now)}: it ends as FAILED after {_lasts(job, per_hour, now)}, before it is done"
    return f"expected to cost ${usd:.2f} from now on, and {_left(job, now)}"


def of_cheapest(job: Job, cheapest: Placement | None, now: datetime, *, over: bool = False) -> str:
    """The same by the cheapest GPUs that suit it, were they free; "" where there is nothing to be said. `over`: its place costs too much."""
    if job.spec.budget_usd <= 0 or cheapest is None or cheapest.cost.usd_per_hour <= 0:
        return ""
    usd, per_hour, model = cheapest.cost.total_usd, cheapest.cost.usd_per_hour, cheapest.option.model
    on = f" on {model}" if model else ""
    if usd is None:
        return f"{_left(job, now)}: enough for {_lasts(job, per_hour, now)} at the least price, ${per_hour:.2f}/h{on}"
    if usd > left_usd(job, now):
        return f"the cheapest choice{on} needs ${usd:.2f}, and {_left(job, now)}: raise `budget`, or ask for less"
    cheaper = "; `goal: cheapest` takes such ones where they are free" if over else ""
    return f"expected to cost ${usd:.2f} at least{on}, and {_left(job, now)}{cheaper}"


def is_over(job: Job, placement: Placement, now: datetime) -> bool:
    """Whether it is known to need more than is left."""
    return job.spec.budget_usd > 0 and (placement.cost.total_usd or 0.0) > left_usd(job, now)


def of_sizes(job: Job, placement: Placement) -> str:
    """What an elastic job costs with its fewest and its most GPUs, at the price of this place; "" of any other."""
    spec, per_hour = job.spec, placement.cost.usd_per_hour
    if not spec.is_elastic or not placement.gpus:
        return ""
    least, most = elastic.least(spec), elastic.most(spec)
    each = per_hour / placement.gpus
    return f"elastic: {least} GPU{'s' * (least != 1)} at least, ${each * least:.2f}/h, and {most} at most, ${each * most:.2f}/h at the same price"


def _left(job: Job, now: datetime) -> str:
    return f"${left_usd(job, now):.2f} of its budget of ${job.spec.budget_usd:.2f} are left"


def _lasts(job: Job, usd_per_hour: float, now: datetime) -> str:
    return shown_duration(min(left_usd(job, now) / usd_per_hour * 3600, _LONGEST_S))
