"""Who may be stopped for whom, and what is claimed for the one who waits.

Why a claim: between the stop of the first victim and that of the last, the GPUs that came free are nobody else's, and a new leader
goes on with what the old one began.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux_scheduler.core.holdings import Holdings, claim_id, is_reservation, job_of
from whaleflux_scheduler.core.model import Claim, Job
from whaleflux_scheduler.core.placement.api import PlaceRequest, PreemptionPlan, Victim
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.quota import Claimant
from whaleflux_scheduler.core.request import by_count, gpus_of

CLAIM_S = 120.0  # how long a claim lasts beyond the grace of those who make room


def room_for(
    engine: Engine,
    holdings: Holdings,
    request: PlaceRequest,
    job: Job,
    parts: Callable[[Collection[str]], Iterable[Victim]] | None = None,
) -> PreemptionPlan | None:
    """The cheapest to stop for the job; None: nothing that is running may be stopped so that it fits.

    `parts` takes jobs apart in the engine, but those that may be stopped, and says what of them may be taken.
    """
    for alike in by_count(request):
        victims = may_stop(holdings, job, gpus_of(alike))
        with engine.transaction():  # never committed
            lent = list(parts({job_of(victim.id) for victim in victims})) if parts is not None else []
            plan = engine.preempt(alike, [*lent, *victims]) if lent or victims else None
        if isinstance(plan, PreemptionPlan):
            return plan
    return None


def may_stop(holdings: Holdings, job: Job, gpus: int, among: Collection[str] | None = None) -> list[Victim]:
    """Training that starts or runs, and claims, that may have to make room: what is borrowed of the queue's guarantee, and what is of lower priority.

    Those that make room for an equal already, and services, are left out. `among`: only of these jobs.
    """
    claimant = claimant_of(holdings, job, gpus)
    asked = asked_to_leave(holdings, claimant)
    return [
        Victim(id_, held.spec.priority, _lost_gpu_s(holdings, held), reclaimed=claimant.reclaims(held.name, held.queue))
        for id_, held in _movable(holdings, asked, among)
        if held.name != job.name
        and _yields(claimant, holdings, held.name)
        and not _promised(claimant, holdings, job, id_)
    ]


def asked_to_leave(holdings: Holdings, claimant: Claimant) -> set[str]:
    """Victims of claims that do not yield to the claimant."""
    theirs = (claim for name, claim in holdings.claims.items() if not _yields(claimant, holdings, name))
    return {victim for claim in theirs for victim in claim.victims}


def claimant_of(holdings: Holdings, job: Job, gpus: int) -> Claimant:
    """The job as one who asks for room for so many GPUs."""
    spec = job.spec
    return Claimant(holdings.shares.quota, job.name, job.queue, gpus if spec.gpus else 0, spec.priority)


def _promised(claimant: Claimant, holdings: Holdings, job: Job, name: str) -> bool:
    """Whether some of its GPUs are kept for somebody who does not make room: to stop it would gain nothing."""
    if not holdings.claims:
        return False
    others = holdings.claimants_on(name) - {job.name}
    return any(not _yields(claimant, holdings, other) for other in others)


def _yields(claimant: Claimant, holdings: Holdings, name: str) -> bool:
    if is_reservation(name):
        return False
    held = holdings.jobs[name]
    return claimant.reclaims(name, held.queue) or claimant.preempts(name, held.spec.priority)


def _movable(holdings: Holdings, asked: Collection[str], among: Collection[str] | None) -> Iterator[tuple[str, Job]]:
    """What the engine knows of it, and the job."""
    for name in holdings.claims:
        if among is None or name in among:
            yield claim_id(name), holdings.jobs[name]
    for name in holdings.jobs if among is None else among:
        held = holdings.jobs[name]
        if held.may_be_suspended and name not in asked and not holdings.disputed(name):
            yield name, held


def claim_for(plan: PreemptionPlan, holdings: Holdings, now: datetime, limited_queue: str = "") -> Claim:
    """The place of the plan, by GPU, until its victims must have stopped long since. It replaces what its job was promised before.

    `limited_queue`: victims leave under its limit.
    """
    gpus: dict[str, tuple[str, ...]] = {}
    for part in plan.placement.nodes:
        gpus[part.node] = (*gpus.get(part.node, ()), *holdings.devices.uuids(part.node, part.gpus))
    shares = all(part.share for part in plan.placement.nodes)  # two claims of parts of one GPU may stand side by side
    overlapping = [
        name
        for name, claim in holdings.claims.items()
        if name != plan.placement.id
        and not is_reservation(name)
        and claim.concerns(gpus)
        and not (shares and holdings.jobs[name].spec.share_memory_bytes)
    ]
    victims = tuple(dict.fromkeys((*stopped(plan), *overlapping)))
    grace_s = max((holdings.jobs[name].grace_s for name in victims), default=0.0)
    until = now + timedelta(seconds=CLAIM_S + grace_s)
    return Claim(tuple(gpus.items()), victims, until, make_time=now, limited_queue=limited_queue)


def stopped(plan: PreemptionPlan) -> tuple[str, ...]:
    """The jobs that are stopped or lose their claim."""
    return tuple(map(job_of, plan.victims))


def still_stopping(holdings: Holdings, job: str) -> list[str]:
    """Victims of the job's claim that still hold what it claims, or what its queue's limit counts."""
    claim = holdings.claim(job)
    return [] if claim is None else [victim for victim in claim.victims if _holds_for(claim, holdings, victim)]


def _holds_for(claim: Claim, holdings: Holdings, victim: str) -> bool:
    known, held = holdings.jobs.get(victim), holdings.held(victim)
    return known is not None and bool(held) and claim.asks(replace(known, claim=None), held)


def _lost_gpu_s(holdings: Holdings, job: Job) -> float:
    """Work since its newest checkpoint, or since it began to run: what it loses if it saves nothing more before it stops."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return 0.0
    kept = max(attempt.run_time, holdings.saved.get(job.name, attempt.run_time))
    return max(0.0, holdings.shares.now_s - kept.timestamp()) * attempt.gpus
