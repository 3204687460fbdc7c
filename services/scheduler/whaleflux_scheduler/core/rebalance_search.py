"""The search for moves that are worth it, in one transaction of the placement engine: each proposal is looked for as if those before it were done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime

from whaleflux_scheduler.core.decisions import assignment_of
from whaleflux_scheduler.core.going_on import Place, positions
from whaleflux_scheduler.core.holdings import Holdings, claim_id
from whaleflux_scheduler.core.model import Job
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
    may_move,
    move_cost_gpu_s,
)
from whaleflux_scheduler.core.request import place_request
from whaleflux_scheduler.core.running_time import run_s

COMM_FRACTION = 0.1  # the share of a step that communication takes at the better place
LEAST_RAN_S = 900.0  # of a job before it is looked at whether it could run closer or cheaper


class Search:
    """Within a transaction of its caller, which ends without a commit."""

    def __init__(
        self, engine: Engine, holdings: Holdings, rules: RebalanceRules, now: datetime, budget_gpu_s: float
    ) -> None:
        self._engine, self._holdings, self._rules, self._now = engine, holdings, rules, now
        self._budget_gpu_s, self._moves = budget_gpu_s, rules.most_moves
        self._able = {job.name: job for job in holdings.jobs.values() if may_move(job, now, rules)}

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
        moves = tuple(self._move(self._able[place.id], place) for place in found.moved)
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
        limits = Movable(PlaceRequest(goes.id), 0.0, stays.cost.step_communication_s, stays.cost.usd_per_hour)
        same = _gpus(goes) == _gpus(stays) or goes.option != stays.option
        nothing = same or not no_worse(goes, limits)
        return Gain() if nothing else closer_gain(stays.cost, goes.cost, stays.gpus, left_s), goes

    def look_closer_at(self, from_name: str) -> Iterator[Job]:
        """Running jobs that might run closer or cheaper, in turn: the first one after `from_name` first."""
        free = (job for job in free_to_move(self._holdings) if job.name in self._able)
        jobs = {job.name: job for job in free if _may_be_closer(job, self._now)}
        names = sorted(jobs)
        at = next((at for at, name in enumerate(names) if name > from_name), 0)
        yield from (jobs[name] for name in (*names[at:], *names[:at]) if name in self._able)

    def _accepts(self, proposal: Proposal, gain_gpu_s: float) -> bool:
        cost = proposal.cost_gpu_s
        return (
            len(proposal.moves) <= self._moves and self._rules.worth * cost <= gain_gpu_s and cost <= self._budget_gpu_s
        )

    def _take(self, proposal: Proposal) -> None:
        self._moves -= len(proposal.moves)
        self._budget_gpu_s -= proposal.cost_gpu_s
        for move in proposal.moves:
            del self._able[move.job.name]

    @property
    def exhausted(self) -> bool:
        return self._moves <= 0 or self._budget_gpu_s <= 0

    def _relocator(self, gang: Job) -> Relocator:
        """Nobody moves for a job of lower priority."""
        free = (job for job in free_to_move(self._holdings, gang.name) if job.name in self._able)
        movable = (self._as_movable(job) for job in free if job.spec.priority <= gang.spec.priority)
        return Relocator(self._engine, movable, most_moves=self._moves)

    def _as_movable(self, job: Job) -> Movable:
        attempt = job.attempt
        assert attempt is not None
        request = place_request(job.name, job.spec, near_nodes=attempt.nodes)
        return Movable(request, move_cost_gpu_s(job, self._now), attempt.communication_s, attempt.usd_per_hour)

    def _move(self, job: Job, place: Placement) -> JobMove:
        return JobMove(job, self._place_of(place), move_cost_gpu_s(job, self._now))

    def _place_of(self, placement: Placement) -> Place:
        return assignment_of(placement, self._holdings.devices).nodes


def free_to_move(holdings: Holdings, gang: str = "") -> Iterator[Job]:
    """Jobs that hold GPUs which nobody but the gang claims, and that nobody has asked to make room."""
    asked = {victim for claim in holdings.claims.values() for victim in claim.victims}
    others = (claim for name, claim in holdings.claims.items() if name != gang)
    claimed = {uuid for claim in others for _, uuids in claim.nodes for uuid in uuids}
    for name, job in holdings.jobs.items():
        if name in asked or holdings.disputed(name) or not (held := holdings.held(name)):
            continue
        if not claimed or all(claimed.isdisjoint(uuids) for uuids in held.values()):
            yield job


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
