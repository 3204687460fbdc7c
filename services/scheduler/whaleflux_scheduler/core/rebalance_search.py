"""The search for moves that are worth it, in one transaction of the placement engine: each proposal is looked for as if those before it were done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime

from whaleflux_scheduler.core.decisions import assignment_of
from whaleflux_scheduler.core.going_on import Place, positions
from whaleflux_scheduler.core.holdings import Holdings, claim_id
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.movers import Movers
from whaleflux_scheduler.core.placement.api import Cost, Goal, Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.relocate import Movable, Relocation, Relocator, no_worse, set_aside
from whaleflux_scheduler.core.rebalance import (
    Gang,
    JobMove,
    Proposal,
    RebalanceRules,
    gain_gpu_s,
    held_place,
    move_cost_gpu_s,
)
from whaleflux_scheduler.core.request import place_request
from whaleflux_scheduler.core.running_time import run_s

COMM_FRACTION = 0.1  # the share of a step that communication takes at the better place
_PASSED_OVER = 64  # jobs that could not gain by it, for each one that is looked at
LEAST_RAN_S = 900.0  # of a job before it is looked at whether it could run closer or cheaper


@dataclass(frozen=True, slots=True)
class Bounds:
    """What moves may cost still, of how many GPUs they may be at once, and of how many they are already.

    For a gang they may be of as many GPUs as it has itself: storage has to take its saves, too.
    """

    cost_gpu_s: float
    gpus: int
    moving: int = 0

    def allow(self, proposal: Proposal) -> bool:
        """Whether its moves may be made beside those that are made already."""
        most = max(self.gpus, proposal.gang.spec.gpus if proposal.gang is not None else 0)
        return proposal.cost_gpu_s <= self.cost_gpu_s and self.moving + proposal.gpus <= most

    def after(self, proposal: Proposal) -> Bounds:
        """What is left when they are made."""
        return Bounds(self.cost_gpu_s - proposal.cost_gpu_s, self.gpus, self.moving + proposal.gpus)


class Search:
    """Within a transaction of its caller, which ends without a commit."""

    def __init__(
        self,
        engine: Engine,
        holdings: Holdings,
        movers: Movers,
        rules: RebalanceRules,
        now: datetime,
        bounds: Bounds,
    ) -> None:
        self._engine, self._holdings, self._rules, self._now = engine, holdings, rules, now
        self._left, self._moves = bounds, rules.most_moves
        self._movers = movers
        self._able = movers.able(engine.columns, now.timestamp(), rules.rest_s)
        self._moving: set[str] = set()  # by what was found before

    def for_gang(self, gang: Gang) -> Proposal | None:
        """The moves that let the gang start, if they are worth it."""
        with self._engine.transaction() as trial:
            if (own := claim_id(gang.job.name)) in self._engine.placements:  # what it was promised
                self._engine.release(own)
            found = self._relocator(gang.job).find(gang.request)
            proposal = self._making_room(gang, found) if found is not None else None
            if proposal is None or not self._accepts(proposal, proposal.gain_gpu_s):
                return None
            trial.commit()
        self._take(proposal)
        return proposal

    def _making_room(self, gang: Gang, found: Relocation) -> Proposal:
        moves = tuple(self._move(self._holdings.jobs[place.id], place) for place in found.moved)
        gain = gain_gpu_s(gang.job, [move.job for move in moves], self._now, self._rules)
        return Proposal(moves, gain, gang.job, self._place_of(found.placement), request=gang.request)

    def closer(self, job: Job, left_s: float) -> Proposal | None:
        """A closer or cheaper place for the job, if that is worth it for the time that it still runs."""
        request = place_request(job.name, job.spec)
        before = self._engine.placements[job.name]
        with self._engine.transaction() as trial:
            self._engine.release(job.name)
            stays = self._engine.place_on(request, positions(held_place(job), self._holdings) or ())
            found = [self._goes(stays, place, left_s) for place in self._better(request)] if stays else []
            worth, goes = max(
                ((gain, place) for gain, place in found), key=lambda one: one[0].gpu_s, default=(None, None)
            )
            if stays is None or worth is None or goes is None:
                return None
            proposal = Proposal((self._move(job, goes),), worth.link_gpu_s, gain_usd=worth.usd)
            if not self._accepts(proposal, worth.gpu_s):
                return None
            self._engine.apply(goes)
            set_aside(self._engine, before, goes)
            trial.commit()
        self._take(proposal)
        return proposal

    def _better(self, request: PlaceRequest) -> Iterator[Placement]:
        """The closest place and the cheapest one."""
        for goal in (Goal.CLOSEST, Goal.CHEAPEST):
            place = self._engine.fits(replace(request, preference=replace(request.preference, goal=goal)))
            if place is not None:
                yield place

    def _goes(self, stays: Placement, goes: Placement, left_s: float) -> tuple[Gain, Placement]:
        limits = Movable(PlaceRequest(goes.id), stays.cost.step_communication_s, stays.cost.usd_per_hour)
        same = _gpus(goes) == _gpus(stays) or goes.option != stays.option
        nothing = same or not no_worse(goes, limits)
        return Gain() if nothing else closer_gain(stays.cost, goes.cost, stays.gpus, left_s), goes

    def look_closer_at(self, most: int) -> Iterator[Job]:
        """Running jobs that might run closer or cheaper, in turn, at most so many."""
        busy, left = self._busy(), most
        for name in self._movers.in_turn(_PASSED_OVER * most):
            if not left:
                return
            if self._able.includes(name) and name not in busy and _may_be_closer(self._holdings.jobs[name], self._now):
                left -= 1
                yield self._holdings.jobs[name]

    def _accepts(self, proposal: Proposal, gain_gpu_s: float) -> bool:
        worth = self._rules.worth * proposal.cost_gpu_s <= gain_gpu_s
        return worth and len(proposal.moves) <= self._moves and self._left.allow(proposal)

    def _take(self, proposal: Proposal) -> None:
        self._moves -= len(proposal.moves)
        self._left = self._left.after(proposal)
        self._moving.update(move.job.name for move in proposal.moves)

    @property
    def exhausted(self) -> bool:
        return self._moves <= 0 or self._left.cost_gpu_s <= 0

    def _relocator(self, gang: Job) -> Relocator:
        """Nobody moves for a job of lower priority."""
        count = self._engine.columns.count
        movables = self._able.movables(self._busy(gang.name), gang.spec.priority, count)
        return Relocator(self._engine, movables, self._as_movable, most_moves=self._moves)

    def _busy(self, gang: str = "") -> set[str]:
        return self._moving | not_free(self._holdings, gang)

    def _as_movable(self, name: str) -> Movable:
        job = self._holdings.jobs[name]
        assert job.attempt is not None
        request = place_request(name, job.spec, near_nodes=job.attempt.nodes)
        return Movable(request, job.attempt.communication_s, job.attempt.usd_per_hour)

    def _move(self, job: Job, place: Placement) -> JobMove:
        return JobMove(job, self._place_of(place), self._cost(job))

    def _cost(self, job: Job) -> float:
        return move_cost_gpu_s(job, self._now, self._holdings.saved.get(job.name))

    def _place_of(self, placement: Placement) -> Place:
        return assignment_of(placement, self._holdings.devices).nodes


def not_free(holdings: Holdings, gang: str = "") -> set[str]:
    """Jobs that hold GPUs which others than the gang claim, that somebody has asked to make room, or of which it is not clear what they hold."""
    others = [claim for name, claim in holdings.claims.items() if name != gang]
    asked = {victim for claim in holdings.claims.values() for victim in claim.victims}
    return asked | set(holdings.all_disputed) | {name for claim in others for name in holdings.holders_of(claim)}


@dataclass(frozen=True, slots=True)
class Gain:
    """What a better place saves: GPU-seconds over its links, dollars, and both in GPU-seconds at the present price."""

    link_gpu_s: float = 0.0
    usd: float = 0.0
    gpu_s: float = 0.0


def closer_gain(stays: Cost, goes: Cost, gpus: int, left_s: float) -> Gain:
    """What the other place saves over the time that is left at the present one."""
    slower = stays.step_communication_s / goes.step_communication_s - 1 if goes.step_communication_s else 0.0
    goes_s = left_s / (1 + COMM_FRACTION * slower)
    links, usd = gpus * (left_s - goes_s), (stays.usd_per_hour - goes.usd_per_hour) * goes_s / 3600
    per_gpu_s = stays.usd_per_hour / gpus / 3600
    return Gain(links, usd, links + (usd / per_gpu_s if per_gpu_s else 0.0))


def _may_be_closer(job: Job, now: datetime) -> bool:
    attempt = job.attempt
    assert attempt is not None
    far = len(attempt.tasks) > 1 or attempt.usd_per_hour > 0
    return far and run_s(job, now) - job.run_s >= LEAST_RAN_S


def _gpus(place: Placement) -> set[tuple[str, int]]:
    return {(part.node, gpu) for part in place.nodes for gpu in part.gpus}
