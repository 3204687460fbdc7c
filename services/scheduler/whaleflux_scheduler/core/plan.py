"""One decision, `step(news, now) -> moves`: what came free or arrived, whose turn it is, and who starts where.

It is entered by one caller at a time: the service's planner thread, a simulator, a replay. `now` is the caller's time, and the only one:
without a bound of time no clock is read, and equal news give equal moves. What is chosen is held in the engine at once; when the store
refuses the write, news of the job as it is stored takes it back.

Jobs wait in classes of like requests (`pending`). A class is tried when somebody joins it, when nodes gained room that could be enough
for it (`needs`), or when others may be stopped for it that could not before; then in turn (`queue_order`) until it is refused. News adds
to what is to be tried and takes nothing back, so a step that runs out of time goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from whaleflux_scheduler.core import decisions
from whaleflux_scheduler.core.data_quota import DataLimit
from whaleflux_scheduler.core.goals import goal_of
from whaleflux_scheduler.core.going_on import claimed_place, way_back
from whaleflux_scheduler.core.holdings import Holdings, places_of
from whaleflux_scheduler.core.model import ACTIVE, Job, JobState
from whaleflux_scheduler.core.moves import Move, News
from whaleflux_scheduler.core.patience import may_wait
from whaleflux_scheduler.core.pending import Line, RequestClass
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.least import kind_of
from whaleflux_scheduler.core.planned_sizes import may_have
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.promising import Promising
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.soon_over import MOST_S
from whaleflux_scheduler.core.stopwatch import Stopwatch

__all__ = ("Move", "News", "Plan")
_FEW = 8  # GPUs; for more it pays to ask first whether there is any place


class Plan(Promising):
    """See the module. `monotonic` is read by steps that are bounded in time, and by no others.

    `reasons` False: those who wait are not told why, for who simulates and nobody asks. `let_end_s`: for how long a job lets others end before they
    are stopped for it (`soon_over`).
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = lambda: 0.0,
        half_life_s: float = HALF_LIFE_S,
        *,
        reasons: bool = True,
        rules: RebalanceRules | None = None,
        promises: PromiseRules | None = None,
        let_end_s: float = MOST_S,
    ) -> None:
        super().__init__(half_life_s, rules, promises, reasons=reasons)
        self._monotonic = monotonic
        self._soon_over.most_s = let_end_s

    @property
    def next_look(self) -> datetime | None:
        """When something is due without news: somebody has to leave promised GPUs, a reservation begins or is over."""
        waits_s = min(self._patience.next_look, self._soon_over.next_look, self._resizing.next_look)
        at_s = min(self._promises.next_look, self._reserved.next_look, waits_s, self._next_again)
        return _not_before(at_s) if at_s != math.inf else None

    def prepare(self) -> None:
        """Works out what the first decision would have to, which for thousands of nodes takes a while."""
        self._fleet.engine.prepare()

    def step(self, news: News, now: datetime, budget_s: float = math.inf) -> list[Move]:
        """Takes in what changed, and decides; `budget_s` bounds the time that deciding takes."""
        self.take_in(news, now)
        return self.decide(now, budget_s)

    # news

    def take_in(self, news: News, now: datetime) -> None:
        """Takes in what changed until `now`, and decides nothing."""
        if self._shares.goes_to(now.timestamp()):
            self._turns.regroup(self._pending.classes)
        self.apply(news)

    def apply(self, news: News) -> None:
        """Takes in what changed; cheap, decides nothing."""
        fleet = self._fleet
        if news.queues is not None:
            self._set_queues(news.queues)
        if news.past_uses:
            self._shares.recall(news.past_uses)
        if news.saved is not None:
            self._fleet.holdings.saved = news.saved
            self._rebalancer.saved(news.saved)
        self._know_datasets(news)
        for node in news.nodes:
            fleet.upsert(node)
            self._promises.knows_node(len(node.gpus))
        for name in news.removed:
            fleet.remove(name)
            self._reserved.forget_node(name)
        for name, why in news.closed.items():
            fleet.close(name, self._reserved.closes(name, why))
        for job in news.jobs:
            self._learn(job)
        for name in news.gone:
            self._leave(name)
            self._resizing.forget(name)
            fleet.forget(name)
            self._promises.forget(name)
            self._rebalancer.forget(name)
            self.data_ahead.forget(name)
            self._under_way.pop(name, None)
        for name, candidate in news.candidates.items():
            self._wait(name, candidate)
        if news.reservations is not None:
            self._reserved.know(news.reservations)
        if news.look_over:
            self._look_over()

    def _learn(self, job: Job) -> None:
        """The job as it is stored. One that has begun may be stopped for those of higher priority."""
        holdings = self._fleet.holdings
        known, held = holdings.jobs.get(job.name), holdings.holds(job.name)
        self._fleet.learn(job)
        self._estimates.learn(job)
        self._promises.learn(job)
        self._rebalancer.learn(job)
        self._follow(job)
        if self._resizing.learn(job):
            self._make_room_for(self._pending.above(job.spec.priority - 1))
        if _may_stop_sooner(known, job):
            self._make_room_for(filter(self._lower_hold_enough, self._pending.above(job.spec.priority)))
            self._swap_beside((job,))
            self._borrows(job)
        if job.state is JobState.SUSPENDING and (known is None or known.state is not JobState.SUSPENDING):
            self._swap_with((job.name,))
        if (waiting := self._pending.jobs.get(job.name)) is not None and held != holdings.holds(job.name):
            self._join(waiting.candidate)

    # decisions

    def decide(self, now: datetime, budget_s: float = math.inf) -> list[Move]:
        """Tries the first in turn, the next when it fits, until none does or `budget_s` is over; then says why others wait."""
        watch = Stopwatch(now, budget_s, self._monotonic)
        if not self._hopeful:
            self._fleet.give_up()
        self._now = now
        moves = self._keep_reservations(now)
        for name in self._patience.due(now):
            self._try_again(self._pending.jobs[name].line.kind)
        self._look_again(now)
        self._take_in_gains()
        if self._kept_from:
            self._slack_rose()
        while (self._turns.active or self._may_be_swaps or self._others_give_more()) and not watch.over:
            line = self._next_line()
            if line is None:
                continue
            begun = watch.now
            move = self._try(line, now)
            moves += self._take_also()
            if move is not None:
                moves.append(replace(move, begun=begun, ended=watch.now) if watch.bounded else move)
            if self._fleet.gained or self._fleet.holdings.eased:
                self._take_in_gains()
            elif move is not None:
                self._take_in_lost_cover()
            if move is not None and self._kept_from:
                self._slack_rose()
        if not self._turns.active:
            moves += self._promise({move.job for move in moves}, watch)
            moves += self._grow(now)
        return moves + self._answer(watch)

    def _try(self, line: Line, now: datetime) -> Move | None:
        """The first of the line; None: it waits as before."""
        kind, first = line.kind, line.first()
        assert first is not None
        job = self._pending.jobs[first[1]].candidate.job
        self._data_short.pop(job.name, None)
        limit, full = self._over_limit(job), self._over_array_limit(job)
        if limit and not full and (claim := self._swap(line, job, limit, now)) is not None:
            if line.parked:  # the next of it may find others
                self._swaps[line] = None
            return self._keep(job, claim, now, limit)
        if limit or full:
            self._park(line, limit)
            self._tell(job.name, "limit")
            return None
        if self._reserved.find(job.spec) is not None:
            return self._try_reserved(kind, job, now)
        if kind.own and (place := self._on(claimed_place, kind, job)) is not None and may_have(job, place.gpus):
            return self._give(job, place, now)
        if kind.own and self._awaited_nodes(self._pending.jobs[job.name].candidate):
            self._tell(job.name, "its place")
            self._refuse(kind)
            return None
        request = self._within_quota(kind.request, job)
        if kind.own and self._others_may_come_back(job):
            self._tell(job.name, "room")
            self._refuse(kind)
            return None
        if not kind.refused and (placement := self._place(kind, self._wished(request, job, now), job, now)) is not None:
            if self._waits_for_cheaper(line, job, placement, now):
                return None
            return self._give(job, self._enlarged(kind, job, placement), now)
        if self._patience.forget(job.name):
            self._promises.waits(job, kind.request)
        if kind.own and (place := self._on(way_back, kind, job)) is not None and may_have(job, place.gpus):
            return self._give(job, place, now)
        if request is not kind.request:
            return self._keep_to_few(line, job, now)
        kind.refused = True
        self._tell(job.name, "room")
        if not self._may_make_room(kind):
            self._refuse(kind)
        elif (claim := self._make_room(line, job, now)) is not None:
            return self._keep(job, claim, now)
        elif self._shares.quota.guarantees:  # others may have to make room for another queue
            self._turns.pass_over(line)
        else:
            self._refuse(kind)
        return None

    def _waits_for_cheaper(self, line: Line, job: Job, placement: Placement, now: datetime) -> bool:
        """Whether it starts later, on GPUs that cost it less and come free in time. It is promised nothing: it could start."""
        if not may_wait(job.spec):
            return False
        request = self._wished(self._within_quota(line.kind.request, job), job, now)
        if self._patience.waits(job, request, placement, now) is None:
            return False
        self._promises.leaves(job.name)
        self._tell(job.name, "cheaper")
        self._refuse(line.kind)
        return True

    def _try_reserved(self, kind: RequestClass, job: Job, now: datetime) -> Move | None:
        """On GPUs of its reservation, and nowhere else."""
        if (placement := self._reserved.place(job, kind.request)) is not None:
            return self._give(job, placement, now)
        self._tell(job.name, "reservation")
        self._refuse(kind)
        return None

    def _keep_to_few(self, line: Line, job: Job, now: datetime) -> Move | None:
        """Of some GPU types its queue may not take as many as it would need, and there are too few of the others: it is no answer for its class."""
        if self._may_make_room(line.kind) and (claim := self._make_room(line, job, now)) is not None:
            return self._keep(job, claim, now)
        self._park(line, None)
        self._kept_from[self._shares.family(line.queue)] = None
        self._tell(job.name, "few")
        return None

    def _on(
        self,
        where: Callable[[Job, PlaceRequest, Engine, Holdings], Placement | None],
        kind: RequestClass,
        job: Job,
    ) -> Placement | None:
        """On GPUs that are the job's own more than anybody's."""
        return where(job, replace(kind.request, id=job.name), self._fleet.engine, self._fleet.holdings)

    def _place(self, kind: RequestClass, request: PlaceRequest, job: Job, now: datetime) -> Placement | None:
        if kind.impossible:
            return None
        if kind.hopeful and not kind.own and not self._fleet.could_place(kind.need, request, self._lent(kind)):
            return None
        if kind.own:
            with self._fleet.holdings.without(job.name):
                return self._fits(kind, request, job, now)
        return self._fits(kind, request, job, now)

    def _fits(self, kind: RequestClass, request: PlaceRequest, job: Job, now: datetime) -> Placement | None:
        """Where it goes: on GPUs that are promised to others only when no others do, and it has left before their time comes."""
        engine, request = self._fleet.engine, self._reserved.away(request, job, now)
        if kind.need.gpus <= _FEW or engine.feasible(request):  # small ones are sought as soon as asked
            placement = engine.seek(request)
            if placement is not None or kind.need.gpus > _FEW:
                return placement
        claimants = self._lending.behind(job, now)
        if not claimants or self._lending.covered(claimants) + engine.free_gpus() < kind.need.gpus:
            return None
        with self._fleet.holdings.without_claims(claimants):
            return engine.seek(request) if engine.feasible(request) else None

    def _give(self, job: Job, placement: Placement, now: datetime) -> Move | None:
        """It starts there; None: its data may not be held there, and it may not do without."""
        holdings = self._fleet.holdings
        assignment = self._assigned(job, placement)
        remote, limit = self.data_ahead.beyond_quota(job, assignment.rank_counts)
        if limit is not None and self.data_ahead.insists(job, remote):
            self._wait_for_data(job, limit)
            return None
        best_s, free_s = self._least_communication(job, placement)
        assignment = replace(
            assignment, remote_datasets=remote, best_communication_s=best_s, best_free_communication_s=free_s
        )
        said = self._placed if self._reasons else decisions.unexplained
        decision = said(job, placement, assignment, now)
        if limit is not None:
            decision = replace(
                decision, reasons=(f"reads {', '.join(remote)} where it is: {limit.words}", *decision.reasons)
            )
        held = dict(holdings.held(job.name))
        for task in decision.tasks:
            held[task.node] = held.get(task.node, frozenset()) | places_of(task)
        self._leave(job.name)
        self._promises.leaves(job.name)
        self._patience.forget(job.name)
        self._soon_over.forget(job.name)
        self.data_ahead.forget(job.name)
        self._fleet.hold(job, held, remote=assignment.remote_datasets)  # what it claimed and did not take is free again
        self._promises.starts(job, now)
        self._reserved.starts(job)
        if self._hopeful and not self._fleet.any_hope:
            self._give_up_hope()
        return Move(job.name, decision, assignment)

    def _least_communication(self, job: Job, placement: Placement) -> tuple[float, float]:
        """Of an empty fleet, and of what is free: against these its place is compared. On one node, or without GPUs, there is nothing to compare with."""
        placed_s = placement.cost.step_communication_s
        if not placement.gpus or len({part.node for part in placement.nodes}) < 2:
            return placed_s, placed_s
        engine, request = self._fleet.engine, kind_of(self._pending.jobs[job.name].line.kind.request, placement)
        free_s = engine.least_free_communication_s(request, placement, sought=goal_of(job.spec))
        least_s = engine.least_communication_s(request)
        return (free_s if least_s is None else min(least_s, free_s)), free_s

    def _wait_for_data(self, job: Job, limit: DataLimit) -> None:
        """Until its queue holds less data, or may hold more."""
        self._data_short[job.name] = limit
        self._tell(job.name, "data")
        self._park(self._pending.jobs[job.name].line, None)


def _not_before(at_s: float) -> datetime:
    """The first microsecond that is not before: who looks then finds it due, and does not look again and again at the one before it."""
    at = datetime.fromtimestamp(at_s, UTC)
    return at if at.timestamp() >= at_s else at + timedelta(microseconds=1)


def _may_stop_sooner(before: Job | None, now: Job) -> bool:
    """Whether a job that has begun may be stopped for others that could not have it stopped before, or a waiting one may lose its claim to them."""
    fell = before is not None and now.spec.priority < before.spec.priority
    if now.state in ACTIVE:
        return before is None or before.state not in ACTIVE or fell
    return fell and now.claim is not None
