"""Why those who wait do so, told once and again when the reason is another; short where there is no time for better words."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from whaleflux_scheduler.core import wait_reasons
from whaleflux_scheduler.core.going_on import awaited_nodes
from whaleflux_scheduler.core.model import SchedulingDecision
from whaleflux_scheduler.core.moves import Move
from whaleflux_scheduler.core.pending import Candidate, Line
from whaleflux_scheduler.core.preemption import still_stopping
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.refusals import Refusals
from whaleflux_scheduler.core.stopwatch import Stopwatch
from whaleflux_scheduler.core.waiting import Waiting

ANSWER_S = 0.01  # of a step that is bounded in time, at most, for reasons to wait


class Answers(Waiting):
    """See the module."""

    def __init__(
        self, half_life_s: float, rules: RebalanceRules | None, promises: PromiseRules | None, *, reasons: bool
    ) -> None:
        super().__init__(half_life_s, rules, promises, reasons=reasons)
        self._refusals = Refusals(self._fleet)

    def _awaited_nodes(self, candidate: Candidate) -> tuple[str, ...]:
        """Where it goes on as soon as these nodes take work again."""
        return awaited_nodes(candidate.job, candidate.exclude, self._fleet.holdings, self._fleet.may_open)

    def _tell(self, name: str, why: str) -> None:
        """A job that waits for something else than it was told is told again at the end of the step."""
        waiting = self._pending.jobs[name]
        before, waiting.told = waiting.told, why
        if self._reasons and before not in ("", why):
            self._unanswered[name] = None

    def _answer(self, watch: Stopwatch) -> list[Move]:
        """Reasons for those who have none yet; they are short when there is no time for better ones."""
        moves = []
        self._refusals.begin(watch)
        end_s = watch.passed_s + ANSWER_S
        for name in list(self._unanswered):
            waiting = self._pending.jobs[name]
            if waiting.line.kind in self._turns.active and not waiting.line.parked:
                continue
            if watch.over or (watch.bounded and watch.passed_s > end_s):
                break  # those who start are not to wait for those who do not
            del self._unanswered[name]
            moves.append(Move(name, self._why(waiting.line, waiting.candidate, watch)))
        return moves

    def _why(self, line: Line, candidate: Candidate, watch: Stopwatch) -> SchedulingDecision:
        return self._in_time(self._why_now(line, candidate, watch.began), candidate.job, watch.began)

    def _why_now(self, line: Line, candidate: Candidate, now: datetime) -> SchedulingDecision:
        job = candidate.job
        if limit := self._over_limit(job):
            return self._full(limit, job, now)
        if full := self._over_array_limit(job):
            return wait_reasons.array_is_full(full, now)
        if line.kind.impossible:
            return wait_reasons.cannot_be_asked(line.kind.impossible, now)
        if line.parked and (request := self._within_quota(line.kind.request, job)) is not line.kind.request:
            few = wait_reasons.does_not_fit(
                self._fleet.engine.explain(replace(request, id=job.name)), now, candidate.exclude
            )
            return self._kept_few(few, request, job)
        if reserved := self._reserved.why(job, now):
            return reserved
        if nodes := self._awaited_nodes(candidate):
            return wait_reasons.for_its_place(nodes, now)
        if not line.kind.refused:
            return wait_reasons.others_alike_go_first(now)
        if (waits := self._patience.of(job.name)) is not None:
            return wait_reasons.for_cheaper(waits, now)
        decision = wait_reasons.does_not_fit(self._refusals.of(line.kind, job), now, candidate.exclude)
        decision = wait_reasons.with_reservations(decision, self._reserved.in_the_way_of(job, now))
        decision = self._with_victims(decision, job, still_stopping(self._fleet.holdings, job.name))
        return wait_reasons.with_promise(decision, self._fleet.holdings.claim(job.name))
