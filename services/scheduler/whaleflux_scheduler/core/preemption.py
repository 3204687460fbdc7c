"""Who may be stopped for whom, and what is claimed for the one who waits.

Why a claim: between the stop of the first victim and that of the last, the GPUs that came free are nobody else's, and a new leader
goes on with what the old one began.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from whaleflux_scheduler.core.holdings import Holdings, claim_id, job_of
from whaleflux_scheduler.core.model import Claim, Job, JobState
from whaleflux_scheduler.core.placement.api import PreemptionPlan, Victim

CLAIM_S = 120.0  # how long a claim lasts beyond the grace of those who make room


def may_stop(holdings: Holdings, job: Job) -> list[Victim]:
    """Running training of lower priority that does not make room for an equal already, and claims of lower priority."""
    claims, priority = holdings.claims, job.spec.priority
    asked = {v for name, claim in claims.items() if _priority(holdings, name) >= priority for v in claim.victims}
    lower = [name for name in claims if _priority(holdings, name) < priority]
    return [*(Victim(claim_id(name), _priority(holdings, name)) for name in lower), *_running(holdings, job, asked)]


def _priority(holdings: Holdings, name: str) -> int:
    return holdings.jobs[name].spec.priority


def _running(holdings: Holdings, job: Job, asked: Collection[str]) -> list[Victim]:
    return [
        Victim(name, held.spec.priority, _lost_gpu_s(held))
        for name, held in holdings.jobs.items()
        if held.spec.priority < job.spec.priority
        and held.state is JobState.RUNNING
        and not held.spec.is_service
        and name not in asked
        and not holdings.disputed(name)
    ]


def claim_for(plan: PreemptionPlan, holdings: Holdings, now: datetime) -> Claim:
    """The place of the plan, by GPU, until its victims must have stopped long since."""
    gpus: dict[str, tuple[str, ...]] = {}
    for part in plan.placement.nodes:
        gpus[part.node] = (*gpus.get(part.node, ()), *holdings.devices.uuids(part.node, part.gpus))
    shares = all(part.share for part in plan.placement.nodes)  # two claims of parts of one GPU may stand side by side
    overlapping = [
        name
        for name, claim in holdings.claims.items()
        if claim.concerns(gpus) and not (shares and holdings.jobs[name].spec.share_memory_bytes)
    ]
    victims = tuple(dict.fromkeys((*stopped(plan), *overlapping)))
    grace_s = max((holdings.jobs[name].grace_s for name in victims), default=0.0)
    return Claim(tuple(gpus.items()), victims, now + timedelta(seconds=CLAIM_S + grace_s))


def stopped(plan: PreemptionPlan) -> tuple[str, ...]:
    """The jobs that are stopped or lose their claim."""
    return tuple(map(job_of, plan.victims))


def still_stopping(holdings: Holdings, job: str) -> list[str]:
    """Victims of the job's claim that still hold what it claims."""
    claim = holdings.claim(job)
    return [] if claim is None else [victim for victim in claim.victims if claim.concerns(holdings.held(victim))]


def _lost_gpu_s(job: Job) -> float:
    """Work since it began to run, an upper bound of what a preemption loses."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return 0.0
    return -attempt.run_time.timestamp() * attempt.gpus  # only compared: the later it began, the less is lost
