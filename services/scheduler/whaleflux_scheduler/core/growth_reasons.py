"""Why a running elastic job does not grow, in the words that users read: the first thing that stands in its way, in the order of the rules. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import elastic, resize
from whaleflux_scheduler.core.model import ClaimPurpose, Job
from whaleflux_scheduler.core.quota import QueueLimit


def why_it_stays(
    job: Job,
    now: datetime,
    idle: Mapping[str, int],
    limit_of: Callable[[int], QueueLimit | None],
    waiting: int,
    kept: int,
) -> str:
    """`idle` GPUs by type; `limit_of` a size: what keeps its queue from it. So many jobs wait, and so many idle GPUs are `kept` for later."""
    if job.attempt is None:
        return ""
    has = job.attempt.gpus
    more = elastic.above(job.spec, has)
    if job.claim is not None and job.claim.purpose is ClaimPurpose.RESIZE:
        gpus = sum(len(uuids) for _, uuids in job.claim.nodes)
        return f"it is about to go on with {gpus} GPUs instead of {has}"
    if (best := resize.best_rise(job)) <= 0 and not more:
        return _stays(_has_its_most(job, has))
    if best <= 0:
        return _stays(f"its elastic.speeds say that it is no faster with more than {has} GPUs")
    if (rests_s := resize.unsettled_s(job, now)) > 0:
        return _stays(f"it was restarted lately, and is left alone for {_rounded(rests_s)} more")
    if limit := limit_of(more or has):
        most = f"queue {limit.queue} holds {limit.held + has} of at most {limit.most} GPUs"
        return _stays(f"{limit.kept} idle GPUs are kept for queues that do not lend them" if limit.kept else most)
    return _for_gpus(job, now, idle, waiting, kept)


def _has_its_most(job: Job, has: int) -> str:
    if isinstance(job.spec, elastic.SizedSpec) and elastic.most(job.spec) < (job.spec.elastic_max or job.spec.gpus):
        return f"it has {has} GPUs, and no plan of more is faster, or may be used: {job.spec.why}"
    return f"it has {has} GPUs, and elastic.max is {elastic.most(job.spec)}"


def _for_gpus(job: Job, now: datetime, idle: Mapping[str, int], waiting: int, kept: int) -> str:
    own, has = elastic.model_of(job), job.attempt.gpus if job.attempt else 0
    step = (elastic.above(job.spec, has) or has + 1) - has
    there = sum(idle.get(model, 0) for model in {own, *elastic.throughputs(job.spec)})
    if there < step:
        first = f"; {kept} more are kept for jobs and reservations that come first" if kept else ""
        wait = f", and {waiting} jobs that wait take what comes free first" if waiting else ""
        return _stays(f"{there} GPUs that it could use are idle, and its step is {step}{first}{wait}")
    growth = next(iter(resize.growths([job], idle, now)), None)
    if growth is None:
        size = elastic.floor(job.spec, has + idle.get(own, 0))
        saves_s = max(0.0, resize.saves_s(job, size, own, now)) if size else 0.0
        lost = _rounded(elastic.lost_by_restart_s(job))
        return _stays(
            f"{there} GPUs are idle; to go on with them is expected to save {_rounded(saves_s)}, and a restart costs {lost}"
        )
    return f"it grows to {growth.gpus} GPUs as soon as those are close enough together: it has {has}, and {there} more are idle"


def _stays(why: str) -> str:
    return f"does not grow: {why}"


def _rounded(seconds: float) -> str:
    return shown_duration(float(round(seconds)))
