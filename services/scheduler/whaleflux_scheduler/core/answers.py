"""Why those who wait do so, told once and again when the reason is another; short where there is no time for better words."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

from whaleflux_scheduler.core import planned_sizes, wait_reasons
from whaleflux_scheduler.core.going_on import awaited_nodes
from whaleflux_scheduler.core.model import SchedulingDecision
from whaleflux_scheduler.core.moves import Move
from whaleflux_scheduler.core.pending import Candidate, Line
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.refusals import Refusals
from whaleflux_scheduler.core.stopwatch import Stopwatch
from whaleflux_scheduler.core.waiting import Waiting

ANSWER_S = 0.01  # of a step that is bounded in time, at most, for reasons to wait
AGAIN_EVERY_S, AGAIN_AFTER_S, AGAIN_AT_ONCE = (
    5.0,
    0.1,
    50,
)  # reasons of a fleet that was another: sweeps, their steps, jobs in each


class Answers(Waiting):
    """See the module."""

    def __init__(
        self, half_life_s: float, rules: RebalanceRules | None, promises: PromiseRules | None, *, reasons: bool
    ) -> None:
        super().__init__(half_life_s, rules, promises, reasons=reasons)
        self._refusals = Refusals(self._fleet)
        self._again: list[str] = []  # jobs that were told something of another fleet, in the sweep that is under way
        self._swept, self._swept_s = 0, 0.0  # the fleet of the last sweep, and when that began

    def _awaited_nodes(self, candidate: Candidate) -> tuple[str, ...]:
        """Where it goes on as soon as these nodes take work again."""
        return awaited_nodes(candidate.job, candidate.exclude, self._fleet.holdings, self._fleet.may_open)

    def _tell(self, name: str, why: str) -> None:
        """A job that waits for something else than it was told is told again at the end of the step."""
        waiting, why = self._pending.jobs[name], "others end" if self._soon_over.of(name, self._now) else why
        before, waiting.told = waiting.told, why
        if self._reasons and before not in ("", why):
            self._unanswered[name] = None

    def _answer(self, watch: Stopwatch) -> list[Move]:
        """Reasons for those who have none yet; they are short when there is no time for better ones."""
        moves = []
        if not self._reasons:
            return []
        if not self._unanswered:
            self._say_again()
        self._refusals.begin(watch)
        end_s = watch.passed_s + ANSWER_S
        for name in list(self._unanswered):
            waiting = self._pending.jobs[name]
            if waiting.line.kind in self._turns.active and not waiting.line.parked:
                continue
            if watch.over or (watch.bounded and watch.passed_s > end_s):
                break  # those who start are not to wait for those who do not
            del self._unanswered[name]
            waiting.told_of = self._fleet.facts_version
            moves.append(Move(name, self._why(waiting.line, waiting.candidate, watch)))
        return moves

    @property
    def _next_again(self) -> float:
        """When reasons are to be said again, seconds since the epoch; infinite: all are of the fleet as it is."""
        if not self._reasons:
            return math.inf
        if self._again:
            return self._now.timestamp() + AGAIN_AFTER_S
        known = not self._pending.jobs or self._swept == self._fleet.facts_version
        return math.inf if known else self._swept_s + AGAIN_EVERY_S

    def _say_again(self) -> None:
        """Has some of those told again who were told of a fleet that is another by now: a few at once, however many wait."""
        now_s, at_s = self._now.timestamp(), self._next_again
        if not self._again and at_s != math.inf and (at_s <= now_s or now_s < self._swept_s):
            self._swept, self._swept_s = self._fleet.facts_version, now_s
            known = self._pending.jobs.items()
            self._again = [name for name, waiting in known if 0 <= waiting.told_of < self._swept]
        some, self._again = self._again[-AGAIN_AT_ONCE:], self._again[:-AGAIN_AT_ONCE]
        self._unanswered |= {name: None for name in some if name in self._pending.jobs}

    def _why(self, line: Line, candidate: Candidate, watch: Stopwatch) -> SchedulingDecision:
        waits = self._in_time(self._why_now(line, candidate, watch.began), candidate.job, watch.began)
        sizes = tuple(planned_sizes.why_sizes(candidate.job.spec))
        return replace(waits, reasons=(*sizes, *waits.reasons)) if sizes else waits

    def _why_now(self, line: Line, candidate: Candidate, now: datetime) -> SchedulingDecision:
        job = candidate.job
        if limit := self._over_limit(job):
            return self._full(limit, job, now)
        if full := self._over_array_limit(job):
            return wait_reasons.array_is_full(full, now)
        if short := self._data_short.get(job.name):
            return wait_reasons.data_is_full(short, now)
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
        decision = self._with_those_who_leave(decision, job, now)
        return wait_reasons.with_promise(decision, self._fleet.holdings.claim(job.name))
