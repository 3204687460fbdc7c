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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core import decisions, elastic, resize, resize_reasons, wait_reasons
from whaleflux_scheduler.core.asked_mix import AskedMix
from whaleflux_scheduler.core.going_on import Place, claimed_place, left_for_a_move, left_place, under_way, way_back
from whaleflux_scheduler.core.holdings import Holdings, count, places_of
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState, Queue, SchedulingDecision
from whaleflux_scheduler.core.needs import NeedIndex, need_of
from whaleflux_scheduler.core.pending import Candidate, Line, RequestClass
from whaleflux_scheduler.core.placement.api import DatasetFact, Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import claim_for, room_for, still_stopping
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.questions import Questions
from whaleflux_scheduler.core.queue_order import Turns
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S, PastUse
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.rebalance import RebalancePlan, RebalanceRules
from whaleflux_scheduler.core.rebalancing import NewClaim
from whaleflux_scheduler.core.refusals import Refusals
from whaleflux_scheduler.core.request import shape
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.core.resizing import Resizing, enlarged, shrinking
from whaleflux_scheduler.core.stopwatch import Stopwatch

ANSWER_S = 0.01  # of a step that is bounded in time, at most, for reasons to wait
_FEW = 8  # GPUs; for more it pays to ask first whether there is any place


@dataclass(frozen=True, slots=True)
class News:
    """What changed since the last step."""

    nodes: tuple[Node, ...] = ()
    removed: tuple[str, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)  # node -> why it takes no work; "": it does
    jobs: tuple[Job, ...] = ()
    gone: tuple[str, ...] = ()  # jobs deleted
    candidates: Mapping[str, Candidate | None] = field(default_factory=dict)  # None: waits no more
    queues: Mapping[str, Queue] | None = None
    past_uses: tuple[PastUse, ...] = ()  # of queues, before this plan began
    reservations: Mapping[str, Reservation] | None = None  # all that are stored, by name; None: as before
    ahead_s: float = 0.0  # by how much `now` is ahead of the time by which reservations begin and end
    saved: Mapping[str, datetime] | None = None  # job -> when its newest checkpoint was committed; None: as before
    datasets: tuple[DatasetFact, ...] = ()
    datasets_gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """What to do with one waiting job: give it a place, keep a place for it that others are to leave, or let it wait."""

    job: str
    decision: SchedulingDecision
    assignment: GpuAssignment | None = None
    claim: Claim | None = None
    begun: datetime | None = None
    ended: datetime | None = None
    reservation: Reservation | None = None  # to be stored like this; `job` is its name


class Plan(Questions):
    """See the module. `monotonic` is read by steps that are bounded in time, and by no others.

    `reasons` False: those who wait are not told why, for who simulates and nobody asks.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = lambda: 0.0,
        half_life_s: float = HALF_LIFE_S,
        *,
        reasons: bool = True,
        rules: RebalanceRules | None = None,
        promises: PromiseRules | None = None,
        packs_by_mix: bool = False,
    ) -> None:
        super().__init__(half_life_s, rules, promises)
        self._monotonic, self._reasons = monotonic, reasons
        self._mix, self._packs_by_mix = AskedMix(), packs_by_mix
        self._needs: NeedIndex[RequestClass] = NeedIndex()
        self._turns = Turns(self._shares.turn, self._shares.family)
        self._hopeful: dict[RequestClass, None] = {}  # that were refused, and are tried because nodes gained
        self._parked: dict[str, dict[Line, None]] = {}  # by the top of their queue's part of the tree
        self._kept_from: dict[str, None] = {}  # tops where lines are parked because idle GPUs are kept for others
        self._unanswered: dict[str, None] = {}  # jobs that wait and were not given a reason yet
        self._refusals = Refusals(self._fleet)
        self._resizing = Resizing(self._fleet.engine, self._fleet.holdings)
        self._now = datetime.min.replace(tzinfo=UTC)  # of the last decision
        self._under_way: dict[str, Place] = {}  # jobs that go on elsewhere and do not run there yet: what they left
        self._also: list[Move] = []  # of running jobs that make room by shrinking

    @property
    def next_look(self) -> datetime | None:
        """When something is due without news: somebody has to leave promised GPUs, a reservation begins or is over."""
        at_s = min(self._promises.next_look, self._reserved.next_look)
        return datetime.fromtimestamp(at_s, UTC) if at_s != math.inf else None

    @property
    def unfinished(self) -> bool:
        """True when the last step ran out of time before it had answered every job."""
        return bool(self._turns.active or self._unanswered)

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
            self._under_way.pop(name, None)
        for name, candidate in news.candidates.items():
            self._wait(name, candidate)
        self._reserved.ahead_s = news.ahead_s
        if news.reservations is not None:
            self._reserved.know(news.reservations)

    def _set_queues(self, queues: Mapping[str, Queue]) -> None:
        parked = [line for lines in self._parked.values() for line in lines]
        self._shares.set_queues(queues)
        self._turns.regroup(self._pending.classes)
        self._parked.clear()
        for line in parked:
            self._parked.setdefault(self._shares.family(line.queue), {})[line] = None
        self._kept_from = dict.fromkeys(self._parked)  # whoever of them was kept back: their tops may be others now
        for top in tuple(self._parked):
            self._unpark(top)
        if self._shares.quota.guarantees:
            self._make_room_for(self._pending.classes)

    def _learn(self, job: Job) -> None:
        """The job as it is stored. One that has begun to run may be stopped for those of higher priority."""
        holdings = self._fleet.holdings
        known, held = holdings.jobs.get(job.name), holdings.holds(job.name)
        self._fleet.learn(job)
        self._estimates.learn(job)
        self._promises.learn(job)
        self._rebalancer.learn(job)
        self._follow(job)
        if self._resizing.learn(job):
            self._make_room_for(self._pending.above(job.spec.priority - 1))
        if self._packs_by_mix and self._mix.learn(job):
            self._fleet.engine.expect(self._mix.mix())
        if job.state is JobState.RUNNING and (known is None or _may_stop_sooner(known, job)):
            self._make_room_for(filter(self._lower_hold_enough, self._pending.above(job.spec.priority)))
            quota = self._shares.quota
            if quota.guarantees and quota.covering(job.name).id != job.queue:
                self._reclaim()
        if (waiting := self._pending.jobs.get(job.name)) is not None and held != holdings.holds(job.name):
            self._join(waiting.candidate)

    def _reclaim(self) -> None:
        """Who is guaranteed more than is held may have room made."""
        quota, by_queue = self._shares.quota, self._pending.by_queue
        below = [queue for queue in by_queue if quota.below_guarantee(queue)]
        self._make_room_for({line.kind: None for queue in below for line in by_queue[queue]})

    def _make_room_for(self, kinds: Iterable[RequestClass]) -> None:
        """Others may be stopped that could not before."""
        for kind in list(kinds):
            kind.no_room_made = False
            for line in tuple(kind.lines.values()) if kind.counts_differ else ():
                self._parked.get(self._shares.family(line.queue), {}).pop(line, None)
                self._turns.unpark(line)
            self._turns.reopen(kind)

    def _know_datasets(self, news: News) -> None:
        """What can only go where its data is is tried again when the data may have come somewhere."""
        for fact in news.datasets:
            self._fleet.know_dataset(fact)
        for name in news.datasets_gone:
            self._fleet.forget_dataset(name)
        changed = {fact.name for fact in news.datasets} | set(news.datasets_gone)
        for kind in self._pending.classes if changed else ():
            if kind.request.hard_locality and not changed.isdisjoint(kind.request.datasets):
                self._try_again(kind)

    # waiting

    def _wait(self, name: str, candidate: Candidate | None) -> None:
        if candidate is None:
            self._leave(name)
            self._promises.leaves(name)
            return
        candidate = _asking_for_least(candidate)
        known = self._pending.jobs.get(name)
        if known is None or known.candidate != candidate:
            self._join(candidate)

    def _join(self, candidate: Candidate) -> None:
        job = candidate.job
        self._leave(job.name)
        near = job.attempt.nodes if job.attempt else ()
        asked = shape(job.spec, tuple(sorted(candidate.exclude)), near)
        line = self._pending.join(candidate, asked, own=self._stands_alone(job), lasts=self._promises.lasts(job)).line
        if self._reserved.find(job.spec) is None:
            self._promises.waits(job, asked)
        kind = line.kind
        if len(kind.lines) == 1 and len(line.names) == 1:
            self._needs.add(kind, kind.need)
        if line.first() == (job.create_time.timestamp(), job.name):
            self._turns.enter(line)
        quota = self._shares.quota
        if kind.settled and len(line.names) == 1 and quota.guarantees and quota.below_guarantee(line.queue):
            self._make_room_for((kind,))  # it was settled by queues for which nobody makes room
        elif not kind.settled:
            self._turns.activate(kind)
        if self._reasons:
            self._unanswered[job.name] = None

    def _stands_alone(self, job: Job) -> bool:
        """Whether it may have GPUs that others like it may not."""
        return self._fleet.holdings.holds(job.name) or left_for_a_move(job)

    def _leave(self, name: str) -> None:
        self._unanswered.pop(name, None)
        line = self._pending.leave(name)
        if line is None:
            return
        self._turns.leave(line)
        if line.parked:
            self._parked.get(self._shares.family(line.queue), {}).pop(line, None)
        if not line.kind.lines:
            self._needs.discard(line.kind, line.kind.need)
            self._hopeful.pop(line.kind, None)

    def _try_again(self, kind: RequestClass) -> None:
        kind.refused = kind.no_room_made = kind.hopeful = False
        self._hopeful.pop(kind, None)
        self._turns.reopen(kind)

    # whose turn it is

    def _take_in_gains(self) -> None:
        """Tries again whom the nodes that gained could help, and those whose queue or array holds less."""
        holdings = self._fleet.holdings
        for queue in holdings.eased:
            self._turns.fell(queue)
            self._unpark(self._shares.family(queue))
        holdings.eased.clear()
        for top in tuple(self._kept_from) if self._fleet.gained else ():
            self._unpark(top)
        if self._fleet.gained:
            self._stop_others_beside(self._fleet.gained_from)
        for kind in self._fleet.take_gains(self._needs, self._promises.covered() + self._reserved.covered()):
            if not self._could_hold(kind):
                continue
            was_refused = kind.refused
            self._try_again(kind)
            if was_refused:
                self._hopeful[kind] = None
                kind.hopeful = True

    def _stop_others_beside(self, priority: float) -> None:
        """Together with what came free, others may be stopped now for whom that was too little before.

        What those could have had stopped who are above `priority` is no gain for them.
        """
        lowest = min((of for of, gpus in self._fleet.holdings.stoppable.items() if gpus), default=None)
        if lowest is not None:
            self._make_room_for(filter(self._lower_hold_enough, self._pending.above(lowest, priority)))
        if self._shares.quota.guarantees:
            self._reclaim()

    def _could_hold(self, kind: RequestClass) -> bool:
        """Whether what nodes gained, with what is kept for promises that its jobs do not delay, could be enough for it."""
        lent = self._lent(kind)
        if kind.own and self._promises.has(kind.own):
            own = self._promises.covered((kind.own,)) + count(self._fleet.holdings.held(kind.own))
            return self._fleet.engine.free_gpus() + own + lent >= need_of(kind.request).gpus
        return self._fleet.could_hold(kind.need, lent)

    def _lent(self, kind: RequestClass) -> int:
        """GPUs that are kept for later, and may be used by it until then."""
        return self._promises.lent(kind.lasts, self._now) + self._reserved.lent(kind.lasts, self._now)

    def _give_up_hope(self) -> None:
        """What came free is taken again: nobody who waited for it need be tried."""
        for kind in [kind for kind in self._hopeful if not self._could_hold(kind)]:
            self._refuse(kind)

    def _park(self, line: Line, limit: QueueLimit | None) -> None:
        top = self._shares.family(line.queue)
        self._turns.park(line)
        self._parked.setdefault(top, {})[line] = None
        if limit is not None and limit.kept:
            self._kept_from[top] = None

    def _unpark(self, top: str) -> None:
        """Lines that their queue or array kept back, and may not any more."""
        for line in tuple(self._parked.get(top, ())):
            first = line.first()
            job = self._pending.jobs[first[1]].candidate.job if first else None
            if job is None or not (self._over_limit(job) or self._over_array_limit(job)):
                del self._parked[top][line]
                self._turns.unpark(line)
                if not line.kind.settled:
                    self._turns.activate(line.kind)

    # decisions

    def decide(self, now: datetime, budget_s: float = math.inf) -> list[Move]:
        """Tries the first in turn, the next when it fits, until none does or `budget_s` is over; then says why others wait."""
        watch = Stopwatch(now, budget_s, self._monotonic)
        if not self._hopeful:
            self._fleet.give_up()
        self._now = now
        moves = self._keep_reservations(now)
        self._take_in_gains()
        while self._turns.active and not watch.over:
            line = self._turns.next()
            if line is None:
                break
            begun = watch.now
            move = self._try(line, now)
            moves += self._take_also()
            if move is not None:
                moves.append(replace(move, begun=begun, ended=watch.now) if watch.bounded else move)
            if self._fleet.gained or self._fleet.holdings.eased:
                self._take_in_gains()
        if not self._turns.active:
            moves += self._promise({move.job for move in moves}, watch)
            moves += self._grow(now)
        return moves + self._answer(watch)

    def _keep_reservations(self, now: datetime) -> list[Move]:
        """What is to be stored of reservations; those who wait for one that has begun, has more room or is over are tried again."""
        changed = self._reserved.step(now)
        for name in self._reserved.take_gained() if len(self._pending) else ():
            for kind in [kind for kind in self._pending.classes if kind.request.reservation == name]:
                for waiting in [self._pending.jobs[job] for line in kind.lines.values() for job in line.names]:
                    self._join(waiting.candidate)
                self._try_again(kind)
        return [Move(one.name, SchedulingDecision(now, False, ""), reservation=one) for one in changed]

    def _promise(self, moved: set[str], watch: Stopwatch) -> list[Move]:
        """Keeps and gives promises, of those who wait and were not moved in this step already."""
        now, jobs = watch.began, self._pending.jobs
        due = [(name, claim) for name, claim in self._promises.due(now) if name in jobs and name not in moved]
        moves = [self._promised(name, claim, now) for name, claim in due]
        moved = moved | {move.job for move in moves}
        for name in self._promises.to_promise(now):
            waiting = jobs[name]
            job = waiting.candidate.job
            if name in moved or watch.over or self._over_limit(job) or self._over_array_limit(job):
                self._promises.put_off(name, now)
                continue
            request = replace(self._within_quota(waiting.line.kind.request, job), id=name)
            if (claim := self._promises.promise(job, request, now)) is not None:
                moves.append(self._promised(name, claim, now))
        return moves

    def _promised(self, name: str, claim: Claim, now: datetime) -> Move:
        candidate = self._pending.jobs[name].candidate
        self._fleet.hold(candidate.job, self._fleet.holdings.held(name), claim)
        self._promises.claims(name)
        self._join(candidate)
        self._refuse(self._pending.jobs[name].line.kind)  # as it was before it stood alone
        self._unanswered.pop(name, None)
        return Move(name, wait_reasons.promised(claim, now), claim=claim)

    def _try(self, line: Line, now: datetime) -> Move | None:
        """The first of the line; None: it waits as before."""
        kind, first = line.kind, line.first()
        assert first is not None
        job = self._pending.jobs[first[1]].candidate.job
        limit = self._over_limit(job)
        if limit or self._over_array_limit(job):
            self._park(line, limit)
            self._tell(job.name, "limit")
            return None
        if self._reserved.find(job.spec) is not None:
            return self._try_reserved(kind, job, now)
        if kind.own and (place := self._on(claimed_place, kind, job)) is not None:
            return self._give(job, place, now)
        request = self._within_quota(kind.request, job)
        if kind.own and self._others_may_come_back(job):
            self._tell(job.name, "room")
            self._refuse(kind)
            return None
        if not kind.refused and (placement := self._place(kind, self._wished(request, job, now), job, now)) is not None:
            return self._give(job, self._enlarged(kind, job, placement), now)
        if kind.own and (place := self._on(way_back, kind, job)) is not None:
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

    def _on(
        self,
        where: Callable[[Job, PlaceRequest, Engine, Holdings], Placement | None],
        kind: RequestClass,
        job: Job,
    ) -> Placement | None:
        """On GPUs that are the job's own more than anybody's."""
        return where(job, replace(kind.request, id=job.name), self._fleet.engine, self._fleet.holdings)

    def _refuse(self, kind: RequestClass) -> None:
        """It is not tried until something changes."""
        kind.refused = kind.no_room_made = True
        kind.hopeful = False
        self._hopeful.pop(kind, None)
        self._turns.drop(kind)

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
        claimants = [*self._promises.behind(job, now), *self._reserved.behind(job, now)]
        if not claimants or self._promises.covered(claimants) + engine.free_gpus() < kind.need.gpus:
            return None
        with self._fleet.holdings.without_claims(claimants):
            return engine.seek(request) if engine.feasible(request) else None

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

    def _give(self, job: Job, placement: Placement, now: datetime) -> Move:
        holdings = self._fleet.holdings
        assignment = decisions.assignment_of(placement, holdings.devices)
        decision = self._placed(job, placement, assignment, now)
        held = dict(holdings.held(job.name))
        for task in decision.tasks:
            held[task.node] = held.get(task.node, frozenset()) | places_of(task)
        self._leave(job.name)
        self._promises.leaves(job.name)
        self._fleet.hold(job, held)  # what it claimed and did not take is free again
        self._promises.starts(job, now)
        if self._hopeful and not self._fleet.any_hope:
            self._give_up_hope()
        return Move(job.name, decision, assignment)

    def _make_room(self, line: Line, job: Job, now: datetime) -> Claim | None:
        """What is kept for the job while others stop; None: nothing that is running may be stopped for it."""
        holdings, kind = self._fleet.holdings, line.kind
        wished = self._pending.jobs[job.name].candidate.wished
        with holdings.without(job.name):
            room = self._resizing.room_for(replace(kind.request, id=job.name), job, wished, now)
        if room is not None:
            self._shrink(room.shrinking, job, now)
            return room.claim
        if not (self._lower_hold_enough(kind) or self._shares.quota.below_guarantee(line.queue)):
            return None
        request = replace(self._within_quota(kind.request, job), id=job.name)
        with holdings.without(job.name):
            plan = room_for(self._fleet.engine, holdings, request, job)
        if plan is None:
            return None
        claim = claim_for(plan, holdings, now)
        self._shrink(shrinking(claim, [holdings.jobs[name] for name in claim.victims], holdings, now), job, now)
        return claim

    def _shrink(self, sizes: Mapping[str, Claim], by: Job, now: datetime) -> None:
        """Elastic jobs go on with what is left to them instead of being stopped."""
        for name, claim in sizes.items():
            known, held = self._fleet.holdings.jobs[name], self._fleet.holdings.held(name)
            self._fleet.hold(known, held, claim)
            self._also.append(Move(name, resize_reasons.shrinks(known, claim, by.name, now), claim=claim))

    def _take_also(self) -> list[Move]:
        """They are written before the claims that they make room for: so a job that is asked to leave has its smaller place already."""
        taken, self._also = self._also, []
        return taken

    def _grow(self, now: datetime) -> Iterator[Move]:
        """Into what nobody who waits could use."""
        for growth, claim in self._resizing.grown(self._fleet.version, now, self._over_limit):
            self._fleet.hold(growth.job, self._fleet.holdings.held(growth.job.name), claim)
            yield Move(growth.job.name, resize_reasons.grows(growth, now), claim=claim)

    def _may_make_room(self, kind: RequestClass) -> bool:
        """Whether others could be stopped for any of its lines, as far as numbers tell."""
        claim = self._fleet.holdings.claim(kind.own) if kind.own else None
        if kind.no_room_made or kind.impossible or (claim and claim.purpose is not ClaimPurpose.RESERVATION):
            return False
        quota = self._shares.quota
        below = quota.guarantees and any(quota.below_guarantee(line.queue) for line in kind.lines.values())
        return below or self._lower_hold_enough(kind) or self._resizing.may_give(kind.priority, kind.need.gpus)

    def _lower_hold_enough(self, kind: RequestClass) -> bool:
        stoppable = self._fleet.holdings.stoppable
        lower = sum(gpus for priority, gpus in stoppable.items() if priority < kind.priority)
        need = need_of(kind.request).gpus - self._fleet.holdings.count_of(kind.own) if kind.own else kind.need.gpus
        return lower > 0 and need <= lower + self._fleet.engine.free_gpus()

    def _keep(self, job: Job, claim: Claim, now: datetime) -> Move:
        """The next of its class may find other victims; the job itself is alone from now on."""
        candidate = self._pending.jobs[job.name].candidate
        short = self._refusals.short(self._pending.jobs[job.name].line.kind, job)
        decision = wait_reasons.does_not_fit(short, now, candidate.exclude)
        self._fleet.hold(job, self._fleet.holdings.held(job.name), claim)
        self._promises.claims(job.name)
        self._join(candidate)
        self._refuse(self._pending.jobs[job.name].line.kind)  # until its claim is stored
        self._unanswered.pop(job.name, None)
        return Move(job.name, self._with_victims(decision, job, claim.victims), claim=claim)

    def apply_rebalance(self, etag: str, now: datetime) -> tuple[RebalancePlan, list[Move]]:
        """A plan of `plan_rebalance`, and what is to be stored for it. Raises Aborted naming what is not as it found it."""
        waiting = {name: waiting.candidate.job for name, waiting in self._pending.jobs.items()}
        plan = self._rebalancer.unchanged(etag, waiting, now)
        return plan, [self._claim(new, now) for new in self._rebalancer.claims(plan, now)]

    def _claim(self, new: NewClaim, now: datetime) -> Move:
        name, waiting = new.job.name, self._pending.jobs.get(new.job.name)
        job = waiting.candidate.job if waiting is not None else self._fleet.holdings.jobs[name]
        self._fleet.hold(job, self._fleet.holdings.held(name), new.claim)
        self._promises.claims(name)
        if waiting is not None:
            self._join(waiting.candidate)
            self._unanswered.pop(name, None)
        return Move(name, SchedulingDecision(now, False, new.why), claim=new.claim)

    # reasons to wait

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
            return wait_reasons.queue_is_full(limit, now)
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
        if not line.kind.refused:
            return wait_reasons.others_alike_go_first(now)
        decision = wait_reasons.does_not_fit(self._refusals.of(line.kind, job), now, candidate.exclude)
        decision = wait_reasons.with_reservations(decision, self._reserved.in_the_way_of(job, now))
        decision = self._with_victims(decision, job, still_stopping(self._fleet.holdings, job.name))
        return wait_reasons.with_promise(decision, self._fleet.holdings.claim(job.name))


def _asking_for_least(candidate: Candidate) -> Candidate:
    """An elastic job waits for its least size, and takes more when it starts."""
    job, least = candidate.job, elastic.at_least(candidate.job.spec)
    return candidate if least is job.spec else Candidate(replace(job, spec=least), candidate.exclude, job.spec.gpus)


def _may_stop_sooner(before: Job, now: Job) -> bool:
    """Whether a running job may be stopped for others that could not have it stopped before."""
    return before.state is not JobState.RUNNING or now.spec.priority < before.spec.priority
