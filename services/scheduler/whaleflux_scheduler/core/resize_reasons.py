"""Why running elastic jobs are resized, in the words that users read."""

from __future__ import annotations

from datetime import datetime

from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core.elastic import model_of
from whaleflux_scheduler.core.model import Claim, Job, SchedulingDecision
from whaleflux_scheduler.core.resize import Growth


def grows(growth: Growth, now: datetime) -> SchedulingDecision:
    """Into idle GPUs."""
    before = growth.job.attempt.gpus if growth.job.attempt else 0
    earlier, on = shown_duration(float(round(growth.saves_s))), model_of(growth.job)
    what = f"grows from {before} to {growth.gpus} GPUs that are idle"
    if growth.model != on:
        what = f"goes on with {growth.gpus} x {growth.model} instead of {before} x {on}"
    why = f"{what}, which should end it {earlier} earlier"
    return SchedulingDecision(now, True, why)


def shrinks(job: Job, claim: Claim, by: str, now: datetime) -> SchedulingDecision:
    """For one who waits."""
    before = job.attempt.gpus if job.attempt else 0
    after = sum(len(uuids) for _, uuids in claim.nodes)
    return SchedulingDecision(now, True, f"shrinks from {before} to {after} GPUs for {by}")
