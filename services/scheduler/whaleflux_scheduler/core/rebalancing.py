"""Rebalancing in the plan: proposes moves that are worth it (`rebalance`), checks a plan against what changed since, and makes claims of it.

A move is a claim of a running job on its new place (`ClaimPurpose.MOVE`). The gang for which others move claims its room and names no victims:
who does not leave for its new place stays. Nothing is stopped before these claims are stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux import names
from whaleflux.errors import Aborted
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.going_on import Place, positions
from whaleflux_scheduler.core.holdings import Holdings, claim_id
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job
from whaleflux_scheduler.core.movers import Movers
from whaleflux_scheduler.core.placement.api import PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import CLAIM_S
from whaleflux_scheduler.core.rebalance import (
    LEAST_MOVING,
    Budget,
    Gang,
    JobMove,
    Proposal,
    RebalancePlan,
    RebalanceRules,
    identity,
    left_s,
    may_move,
    moving_gpus,
    restart_s,
    waits_since,
)
from whaleflux_scheduler.core.rebalance_search import Bounds, Search, not_free
from whaleflux_scheduler.core.request import place_request

KEPT_PLANS = 16  # that can still be applied
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class NewClaim:
    """A claim that a job is to store, and why."""

    job: Job
    claim: Claim
    why: str


class Rebalancer:
    """See the module."""

    def __init__(
        self, engine: Engine, holdings: Holdings, estimates: Estimates, rules: RebalanceRules | None = None
    ) -> None:
        self._engine, self._holdings, self._estimates = engine, holdings, estimates
        self.rules = rules or RebalanceRules()
        self._budget = Budget(self.rules.budget)
        self._looked: dict[str, datetime] = {}  # gangs, and when they were looked at in vain
        self._movers = Movers()
        self._plans: OrderedDict[str, RebalancePlan] = OrderedDict()

    # what is the case

    def learn(self, job: Job) -> None:
        """The job as it is stored."""
        self._movers.learn(job)
        self._budget.learn(job)

    def forget(self, name: str) -> None:
        """Its record is gone."""
        self._movers.forget(name)

    def saved(self, newest: Mapping[str, datetime]) -> None:
        """When the newest checkpoint of each job was committed."""
        self._movers.saved(newest)

    # looking

    def plan(self, gangs: Iterable[Gang], now: datetime, *, thorough: bool = False) -> RebalancePlan:
        """What to move now. `thorough`: also for gangs that came just now, or were looked at lately in vain. Changes nothing that a decision could see."""
        gpus = sum(usable.bit_count() for usable in self._engine.columns.usable)
        budget = self._budget.left_gpu_s(gpus, now)
        bounds = Bounds(
            budget, max(LEAST_MOVING, int(self.rules.moving * gpus)), moving_gpus(self._holdings.claims.values())
        )
        with self._engine.transaction():  # never committed
            search = Search(self._engine, self._holdings, self._movers, self.rules, now, bounds)
            proposals = [*self._for_gangs(search, self._to_look_at(gangs, now, thorough=thorough), now)]
            proposals += self._closer(search, now)
        made = RebalancePlan(now, tuple(proposals), budget)
        self._plans[made.etag] = made
        while len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return made

    def _to_look_at(self, gangs: Iterable[Gang], now: datetime, *, thorough: bool) -> list[Gang]:
        rules, waiting = self.rules, list(gangs)
        again = now - timedelta(seconds=rules.again_s)
        names_ = {gang.job.name for gang in waiting}
        self._looked = {name: at for name, at in self._looked.items() if name in names_ and at > again}
        if thorough:
            return waiting
        patient = (gang for gang in waiting if (now - waits_since(gang.job)).total_seconds() >= rules.patience_s)
        return [gang for gang in patient if gang.job.name not in self._looked]

    def _for_gangs(self, search: Search, gangs: list[Gang], now: datetime) -> Iterator[Proposal]:
        for gang in gangs[: self.rules.most_gangs]:
            if search.exhausted:
                return
            if (found := search.for_gang(gang)) is not None:
                yield found
            else:
                self._looked[gang.job.name] = now

    def _closer(self, search: Search, now: datetime) -> Iterator[Proposal]:
        for job in search.look_closer_at(self.rules.most_closer):
            if search.exhausted:
                return
            if (found := search.closer(job, left_s(self._estimates, job, now))) is not None:
                yield found

    # carrying out

    def unchanged(self, etag: str, waiting: Mapping[str, Job], now: datetime) -> RebalancePlan:
        """The plan of that etag. Raises Aborted when it was not made here, or naming what is not as it found it."""
        plan = self._plans.get(etag)
        changes = ["this leader did not make it, or long ago"] if plan is None else self._changes(plan, waiting, now)
        if plan is None or changes:
            more = f" and {len(changes) - _MOST_NAMED} more" if len(changes) > _MOST_NAMED else ""
            raise Aborted(
                f"plan {etag[:40]!r} does not hold any more: {'; '.join(changes[:_MOST_NAMED])}{more}; "
                "make another: whaleflux rebalance plan",
                metadata={"etag": etag[:40]},
            )
        return plan

    def _changes(self, plan: RebalancePlan, waiting: Mapping[str, Job], now: datetime) -> list[str]:
        """What is not as the plan found it."""
        found: list[str] = []
        with self._engine.transaction():  # never committed
            for proposal in plan.proposals:
                found += self._changed(proposal, waiting, now)
        return found

    def _changed(self, proposal: Proposal, waiting: Mapping[str, Job], now: datetime) -> Iterator[str]:
        gang = proposal.gang
        busy = not_free(self._holdings, gang.name if gang is not None else "")
        if gang is not None and ((known := waiting.get(gang.name)) is None or identity(known) != identity(gang)):
            yield f"{gang.name} does not wait any more as it did"
            return
        for move in proposal.moves:
            known = self._holdings.jobs.get(move.job.name)
            if (
                known is None
                or known.name in busy
                or identity(known) != identity(move.job)
                or not may_move(known, now, self.rules)
            ):
                yield f"{move.job.name} does not run any more as it did, or must not be moved now"
                return
        yield from self._places_gone(proposal)

    def _places_gone(self, proposal: Proposal) -> Iterator[str]:
        engine, gang = self._engine, proposal.gang
        for move in proposal.moves:
            engine.release(move.job.name)
        if gang is not None and proposal.request is not None:
            if (own := claim_id(gang.name)) in engine.placements:
                engine.release(own)
            yield from self._take(proposal.request, proposal.room)
        for move in proposal.moves:
            yield from self._take(place_request(move.job.name, move.job.spec), move.to)

    def _take(self, request: PlaceRequest, place: Place) -> Iterator[str]:
        where = positions(place, self._holdings)
        found = self._engine.place_on(request, where) if where is not None else None
        if found is None:
            yield f"not all GPUs are free where {request.id} was to go: {_nodes(place)}"
        else:
            self._engine.apply(found)

    def claims(self, plan: RebalancePlan, now: datetime) -> Iterator[NewClaim]:
        """What to store so that it happens: the claims of those who move, then those of the gangs. Their cost counts from now on."""
        for proposal in plan.proposals:
            for move in proposal.moves:
                self._budget.spend(move.job, move.cost_gpu_s, now)
                yield NewClaim(
                    move.job, _claim(move.to, ClaimPurpose.MOVE, move.job.grace_s, now), _moves(move, proposal)
                )
        for proposal in plan.proposals:
            if proposal.gang is not None:
                again_s = max(move.job.grace_s + restart_s(move.job) for move in proposal.moves)  # until all run again
                claim = _claim(proposal.room, ClaimPurpose.PREEMPTION, again_s, now)
                yield NewClaim(proposal.gang, claim, _starts(proposal))


def _claim(place: Place, purpose: ClaimPurpose, grace_s: float, now: datetime) -> Claim:
    return Claim(place, (), now + timedelta(seconds=CLAIM_S + grace_s), purpose)


def _moves(move: JobMove, proposal: Proposal) -> str:
    return f"moves to {_nodes(move.to)}; {proposal.why}"


def _starts(proposal: Proposal) -> str:
    movers = [move.job.name for move in proposal.moves]
    more = f" and {len(movers) - _MOST_NAMED} more" if len(movers) > _MOST_NAMED else ""
    return f"waits for room on {_nodes(proposal.room)}: {', '.join(movers[:_MOST_NAMED])}{more} move{'s' * (len(movers) == 1)} elsewhere"


def _nodes(place: Place) -> str:
    more = f" and {len(place) - _MOST_NAMED} more" if len(place) > _MOST_NAMED else ""
    return ", ".join(names.last(node) for node, _ in place[:_MOST_NAMED]) + more
