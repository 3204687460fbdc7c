"""Room for those who wait: who stops, shrinks or moves for whom, and what those who can use more take of what nobody waits for.

What makes room is a claim in the record of the job that it is made for (`preemption`, `resizing`, `going_on`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime

from whaleflux_scheduler.core import growth_reasons, resize, resize_reasons, wait_reasons
from whaleflux_scheduler.core.answers import Answers
from whaleflux_scheduler.core.going_on import Place, left_place, under_way
from whaleflux_scheduler.core.holdings import count
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState
from whaleflux_scheduler.core.moves import Move
from whaleflux_scheduler.core.pending import Line, RequestClass
from whaleflux_scheduler.core.placement.api import Placement, PreemptionPlan
from whaleflux_scheduler.core.preemption import claim_for, room_for, stopped
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.resizing import Resizing, enlarged, shrinking
from whaleflux_scheduler.core.under_limit import room_under_limit


class MakingRoom(Answers):
    """See the module."""

    def __init__(
        self, half_life_s: float, rules: RebalanceRules | None, promises: PromiseRules | None, *, reasons: bool
    ) -> None:
        super().__init__(half_life_s, rules, promises, reasons=reasons)
        self._resizing = Resizing(self._fleet.engine, self._fleet.holdings)
        self._under_way: dict[str, Place] = {}  # jobs that go on elsewhere and do not run there yet: what they left
        self._also: list[Move] = []  # of running jobs that make room by shrinking

    def _make_room(self, line: Line, job: Job, now: datetime) -> Claim | None:
        """What is kept for the job while others stop; None: nothing that is running may be stopped for it."""
        holdings, kind = self._fleet.holdings, line.kind
        self._resizing.is_asked(job.spec.priority)
        wished = self._pending.jobs[job.name].candidate.wished
        with holdings.without(job.name):
            asked = self._reserved.away(replace(kind.request, id=job.name), job, now)
            room = self._resizing.room_for(asked, job, wished, now)
        if room is not None:
            self._shrink(room.shrinking, job, now)
            return room.claim
        if not (self._lower_hold_enough(kind) or self._may_reclaim(line)):
            return None
        if self._soon_over.of(job.name, now):
            return None
        request = self._reserved.away(replace(self._within_quota(kind.request, job), id=job.name), job, now)
        with holdings.without(job.name):
            parts = self._resizing.parts_for(job, kind.need.gpus, now)
            plan = room_for(self._fleet.engine, holdings, request, job, parts)
        if plan is None or self._lets_end(job, plan, now):
            return None
        claim = claim_for(plan, holdings, now)
        self._shrink(shrinking(claim, [holdings.jobs[name] for name in claim.victims], holdings, now), job, now)
        return claim

    def _others_give_more(self) -> bool:
        """Tries those again to whom others may have to give more by what was decided: whether there are any.

        A guarantee covers others than before; idle GPUs were taken that counted for the parts of elastic jobs, or a claim on theirs is gone.
        """
        self._take_in_lost_cover()
        for own in self._resizing.take_fallen():
            self._have_given(self._pending.above(own - 1, own))
        if (lowest := self._resizing.may_give_again()) is not None:
            self._have_given(self._pending.above(lowest - 1))
        return bool(self._turns.active or self._may_be_swaps)

    def _have_given(self, kinds: Iterator[RequestClass]) -> None:
        gives = self._resizing.may_give
        self._make_room_for(kind for kind in kinds if gives(kind.priority, kind.need.gpus))

    def _swap(self, line: Line, job: Job, limit: QueueLimit, now: datetime) -> Claim | None:
        """What is kept for the job while others leave under the limit that keeps it back; None: nobody may be stopped for it."""
        line.vain, kind = False, line.kind
        if self._has_claim(kind) or kind.impossible or not self._may_swap(line) or self._soon_over.of(job.name, now):
            return None
        holdings, request = self._fleet.holdings, self._reserved.away(replace(kind.request, id=job.name), job, now)
        plan = room_under_limit(self._fleet.engine, holdings, request, job)
        if isinstance(plan, PreemptionPlan):
            return None if self._lets_end(job, plan, now) else claim_for(plan, holdings, now, limit.queue)
        if plan is not None:
            line.vain = True
            self._vain[line] = None
        return None

    def _lets_end(self, job: Job, plan: PreemptionPlan, now: datetime) -> bool:
        """Whether it waits for those to end whom the plan would stop; it is decided again when they should have."""
        waits = self._soon_over.lets_end(job, dict.fromkeys(stopped(plan)), now)
        if waits:
            self._tell(job.name, "others end")
        return waits

    def _look_again(self, now: datetime) -> None:
        """Those whom others were let end for have their next chance, and those whom elastic jobs gave nothing before they had worked for a while."""
        self._resizing.wake(now)
        for own in self._resizing.take_settled(now):
            self._have_given(self._pending.above(own - 1, own))
        for name in self._soon_over.due(now):
            if (waiting := self._pending.jobs.get(name)) is None:
                self._soon_over.forget(name)
            elif waiting.line.parked:
                self._swaps[waiting.line] = None
            else:
                self._make_room_for((waiting.line.kind,))

    def _has_claim(self, kind: RequestClass) -> bool:
        """Whether GPUs are kept for it already, other than for a promised start."""
        claim = self._fleet.holdings.claim(kind.own) if kind.own else None
        return claim is not None and claim.purpose is not ClaimPurpose.RESERVATION

    def _may_make_room(self, kind: RequestClass) -> bool:
        """Whether others could be stopped for any of its lines, as far as numbers tell."""
        if kind.no_room_made or kind.impossible or self._has_claim(kind):
            return False
        below = self._shares.quota.guarantees and any(map(self._may_reclaim, kind.lines.values()))
        return below or self._lower_hold_enough(kind) or self._resizing.may_give(kind.priority, kind.need.gpus)

    def _keep(self, job: Job, claim: Claim, now: datetime, limit: QueueLimit | None = None) -> Move:
        """The next of its class may find other victims; the job itself is alone from now on."""
        candidate = self._pending.jobs[job.name].candidate
        if limit is not None:
            decision = wait_reasons.queue_is_full(limit, now)
        else:
            short = self._refusals.short(self._pending.jobs[job.name].line.kind, job)
            decision = wait_reasons.does_not_fit(short, now, candidate.exclude)
        claim = self.data_ahead.with_data(job, claim)
        self._fleet.hold(job, self._fleet.holdings.held(job.name), claim)
        self._promises.claims(job.name)
        self._join(candidate)
        self._refuse(self._pending.jobs[job.name].line.kind)  # until its claim is stored
        self._unanswered.pop(job.name, None)
        self._soon_over.forget(job.name)
        self._borrows(job)
        self._swap_beside_claim(claim)
        return Move(job.name, self._with_victims(decision, job, claim.victims), claim=claim)

    def _swap_beside_claim(self, claim: Claim) -> None:
        """Where more is to leave for it than it takes, the rest may be had by others."""
        if sum(map(self._fleet.holdings.count_of, claim.victims)) > count(claim.gpus):
            self._swap_with(claim.victims)

    def _shrink(self, sizes: Mapping[str, Claim], by: Job, now: datetime) -> None:
        """Elastic jobs go on with what is left to them instead of being stopped."""
        for name, claim in sizes.items():
            known, held = self._fleet.holdings.jobs[name], self._fleet.holdings.held(name)
            claim = self.data_ahead.with_data(known, claim)
            self._fleet.hold(known, held, claim)
            self._also.append(Move(name, resize_reasons.shrinks(known, claim, by.name, now), claim=claim))

    def _take_also(self) -> list[Move]:
        """They are written before the claims that they make room for: so a job that is asked to leave has its smaller place already."""
        taken, self._also = self._also, []
        return taken

    def _enlarged(self, kind: RequestClass, job: Job, least: Placement) -> Placement:
        """A place for more than the least that an elastic job asks for; where others wait, it takes its equal part of what is idle."""
        wished = self._pending.jobs[job.name].candidate.wished
        if not wished:
            return least
        wished = resize.first_share(wished, self._fleet.engine.free_gpus(), len(self._pending))
        request = replace(kind.request, id=job.name)
        with self._fleet.holdings.without(job.name):
            return enlarged(
                self._fleet.engine, request, job, wished, lambda gpus: not self._over_limit(job, gpus), least
            )

    def _grow(self, now: datetime) -> Iterator[Move]:
        """Into what nobody who waits could use."""
        for growth, claim in self._resizing.grown(self._fleet.version, now, self._over_limit):
            claim = self.data_ahead.with_data(growth.job, claim)
            self._fleet.hold(growth.job, self._fleet.holdings.held(growth.job.name), claim)
            yield Move(growth.job.name, resize_reasons.grows(growth, now), claim=claim)

    def why_it_stays(self, job: Job, now: datetime) -> str:
        """Why a running elastic job does not grow; "" for any other."""
        if not job.spec.is_elastic or job.state is not JobState.RUNNING:
            return ""
        kept = self._lending.covered()
        idle, waiting = self._fleet.engine.free_by_model(), len(self._pending)
        return growth_reasons.why_it_stays(job, now, idle, lambda gpus: self._over_limit(job, gpus), waiting, kept)

    def _follow(self, job: Job) -> None:
        """Who left for another place and runs again: those who claim what it left need not wait for it any more."""
        left = self._under_way.pop(job.name, ())
        if under_way(job):
            self._under_way[job.name] = left_place(job)
            return
        for name in self._fleet.holdings.claimants_of(uuid for _, uuids in left for uuid in uuids) if left else ():
            if (waiting := self._pending.jobs.get(name)) is not None:
                self._try_again(waiting.line.kind)

    def _others_may_come_back(self, job: Job) -> bool:
        """Whether somebody who made room for the job by a move does not run again yet: if need be it gets its old place back."""
        claim = self._fleet.holdings.claim(job.name)
        if claim is None or claim.victims or claim.purpose is not ClaimPurpose.PREEMPTION:
            return False
        return any(claim.concerns(dict(place)) for place in self._under_way.values())
