"""What is kept for later: promised starts (`promises`), reservations (`reserving`), and the places of moves that were ordered (`rebalancing`)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from whaleflux_scheduler.core import wait_reasons
from whaleflux_scheduler.core.making_room import MakingRoom
from whaleflux_scheduler.core.model import Claim, SchedulingDecision
from whaleflux_scheduler.core.moves import Move
from whaleflux_scheduler.core.rebalance import RebalancePlan
from whaleflux_scheduler.core.rebalancing import NewClaim
from whaleflux_scheduler.core.stopwatch import Stopwatch


class Promising(MakingRoom):
    """See the module."""

    def _promise(self, moved: set[str], watch: Stopwatch) -> list[Move]:
        """Keeps and gives promises, of those who wait and were not moved in this step already."""
        now, jobs = watch.began, self._pending.jobs
        if not jobs and not self._promises.starts_s:
            return []
        due = [(name, claim) for name, claim in self._promises.due(now) if name in jobs and name not in moved]
        lose = {victim for claim in self._fleet.holdings.claims.values() for victim in claim.victims} if due else ()
        due = [(name, claim) for name, claim in due if name not in lose]  # its place is somebody else's already
        may = [(name, claim) for name, claim in due if not self._kept_back(jobs[name].candidate.job)]
        moves = [self._promised(name, claim, now) for name, claim in may]
        moves += self._given_up(now)
        moved = moved | {move.job for move in moves}
        for name in self._promises.to_promise(now):
            waiting = jobs[name]
            job = waiting.candidate.job
            if name in moved or self._kept_back(job):
                self._promises.put_off(name, now)
                continue
            if watch.over:
                self._promises.not_yet(name)
                continue
            request = replace(self._within_quota(waiting.line.kind.request, job), id=name)
            if (claim := self._promises.promise(job, request, now)) is not None:
                moves.append(self._promised(name, claim, now))
        return moves

    def _given_up(self, now: datetime) -> list[Move]:
        """Promises of those whom a limit keeps from ever starting: they would keep GPUs from others for nothing."""
        moves = []
        for name in sorted(name for name in self._promises.starts_s if name in self._pending.jobs):
            job, claim = self._pending.jobs[name].candidate.job, self._fleet.holdings.claim(name)
            limit = self._over_queue(job.queue, job.spec.gpus)
            if (
                limit is not None
                and claim is not None
                and claim.expire_time > now
                and not self._reserved.find(job.spec)
            ):
                over = replace(claim, expire_time=now)
                self._fleet.hold(job, self._fleet.holdings.held(name), over)
                moves.append(Move(name, self._is_full(limit, job, now), claim=over))
        return moves

    def _promised(self, name: str, claim: Claim, now: datetime) -> Move:
        candidate = self._pending.jobs[name].candidate
        claim = self.data_ahead.with_data(candidate.job, claim)
        self._fleet.hold(candidate.job, self._fleet.holdings.held(name), claim)
        self._promises.claims(name)
        self._join(candidate)
        self._refuse(self._pending.jobs[name].line.kind)  # as it was before it stood alone
        self._unanswered.pop(name, None)
        self._swap_beside_claim(claim)
        return Move(name, wait_reasons.promised(claim, now), claim=claim)

    def apply_rebalance(self, etag: str, now: datetime) -> tuple[RebalancePlan, list[Move]]:
        """A plan of `plan_rebalance`, and what is to be stored for it. Raises as `check_rebalance`."""
        plan = self.check_rebalance(etag, now)
        return plan, [self._claim(new, now) for new in self._rebalancer.claims(plan, now)]

    def check_rebalance(self, etag: str, now: datetime) -> RebalancePlan:
        """A plan of `plan_rebalance` that still holds. Raises Aborted naming what is not as it found it."""
        waiting = {name: waiting.candidate.job for name, waiting in self._pending.jobs.items()}
        return self._rebalancer.unchanged(etag, waiting, now)

    def _claim(self, new: NewClaim, now: datetime) -> Move:
        name, waiting = new.job.name, self._pending.jobs.get(new.job.name)
        job = waiting.candidate.job if waiting is not None else self._fleet.holdings.jobs[name]
        claim = self.data_ahead.with_data(job, new.claim)
        self._fleet.hold(job, self._fleet.holdings.held(name), claim)
        self._promises.claims(name)
        if waiting is not None:
            self._join(waiting.candidate)
            self._unanswered.pop(name, None)
        return Move(name, SchedulingDecision(now, False, new.why), claim=claim)

    def _keep_reservations(self, now: datetime) -> list[Move]:
        """What is to be stored of reservations; those who wait for one that has begun, has more room or is over are tried again."""
        changed = self._reserved.step(now)
        for name in self._reserved.take_gained() if len(self._pending) else ():
            for kind in [kind for kind in self._pending.classes if kind.request.reservation == name]:
                for waiting in [self._pending.jobs[job] for line in kind.lines.values() for job in line.names]:
                    self._join(waiting.candidate)
                self._try_again(kind)
        return [Move(one.name, SchedulingDecision(now, False, ""), reservation=one) for one in changed]
