"""Who waits, and who of them is to be tried: what news does to that, until their turns come (`queue_order`).

A class of like requests is tried when somebody joins it, when nodes gained room that could be enough for it (`needs`), or when others may be
stopped for it that could not before. Lines whose queue or array may not take more are parked until it holds less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from whaleflux_scheduler.core import elastic
from whaleflux_scheduler.core.going_on import left_for_a_move
from whaleflux_scheduler.core.holdings import count
from whaleflux_scheduler.core.lazy_heap import LazyHeap
from whaleflux_scheduler.core.model import Job, Queue
from whaleflux_scheduler.core.moves import News
from whaleflux_scheduler.core.needs import NeedIndex, need_of
from whaleflux_scheduler.core.patience import may_wait
from whaleflux_scheduler.core.pending import Candidate, Line, RequestClass
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.questions import Questions
from whaleflux_scheduler.core.queue_order import Turns
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.request import shape

LOOKED_OVER = 32  # classes at once; each takes milliseconds
_NO_SLACK = (-math.inf, -math.inf)


class Waiting(Questions):
    """See the module."""

    def __init__(
        self, half_life_s: float, rules: RebalanceRules | None, promises: PromiseRules | None, *, reasons: bool
    ) -> None:
        super().__init__(half_life_s, rules, promises)
        self._reasons = reasons
        self._needs: NeedIndex[RequestClass] = NeedIndex()
        self._turns = Turns(self._shares.turn, self._shares.family)
        self._hopeful: dict[RequestClass, None] = {}  # that were refused, and are tried because nodes gained
        self._parked: dict[str, dict[Line, None]] = {}  # by the top of their queue's part of the tree
        self._swaps: dict[Line, None] = {}  # parked lines for which others of their queue could be stopped
        self._swaps_by_turn: LazyHeap[Line] = LazyHeap()  # of these, those that have been put in order
        self._vain: dict[Line, None] = {}  # those of which none fitted then
        self._kept_from: dict[str, None] = {}  # tops where lines are parked because idle GPUs are kept for others
        self._slack: tuple[float, float] = _NO_SLACK  # the least since those were asked last (`QuotaTree.slack`)
        self._unanswered: dict[str, None] = {}  # jobs that wait and were not given a reason yet
        self._looked_over = 0  # the place of the next class that is looked over
        self._now = datetime.min.replace(tzinfo=UTC)  # of the last decision

    @property
    def unfinished(self) -> bool:
        """True when the last step ran out of time before it had answered every job, or looked for every promise that was due."""
        return bool(self._turns.active or self._unanswered or self._may_be_swaps or self._promises.missed)

    @property
    def _may_be_swaps(self) -> bool:
        return bool(self._swaps) or self._swaps_by_turn.top() is not None

    def _set_queues(self, queues: Mapping[str, Queue]) -> None:
        parked = [line for lines in self._parked.values() for line in lines]
        guaranteed = self._shares.quota.guarantees
        self._shares.set_queues(queues)
        self._turns.regroup(self._pending.classes)
        self._parked.clear()
        for line in parked:
            self._parked.setdefault(self._shares.family(line.queue), {})[line] = None
        self._kept_from = dict.fromkeys(self._parked)  # whoever of them was kept back: their tops may be others now
        self._slack = _NO_SLACK
        self._swaps = dict.fromkeys(parked)
        for top in tuple(self._parked):
            self._unpark(top)
        if guaranteed or self._shares.quota.guarantees:  # what one covered may be free to take now
            self._make_room_for(self._pending.classes)

    def _reclaim(self, *, beside: bool = False) -> None:
        """Who is guaranteed more than is held may have room made."""
        quota, by_queue = self._shares.quota, self._pending.by_queue
        above = {queue: priority for queue in by_queue if (priority := quota.guarantees_above(queue)) < math.inf}
        lowest = min((priority for priority in above.values() if priority > -math.inf), default=math.inf)
        lines = [line for queue, priority in above.items() if priority == -math.inf for line in by_queue[queue]]
        high = (line for kind in self._pending.above(lowest) for line in kind.lines.values())
        lines += [line for line in high if line.kind.priority > above.get(line.queue, math.inf)]
        claiming = (self._pending.jobs.get(name) for name in self._fleet.holdings.claims)
        lines += [one.line for one in claiming if one is not None and self._may_reclaim(one.line)]
        self._make_room_for({line.kind: None for line in lines}, beside=beside)
        self._swaps |= {line: None for line in lines if line.parked}

    def _may_reclaim(self, line: Line) -> bool:
        """Whether somebody's guarantee may have room for its jobs."""
        return self._shares.quota.below_guarantee(line.queue, line.kind.priority, line.kind.own)

    def _borrows(self, job: Job) -> None:
        """What it has now may be taken back by those who are guaranteed it, where its own queue is not, or one below that is."""
        quota = self._shares.quota
        if quota.guarantees and ((at := quota.covering(job.name)).id != job.queue or at.below):
            self._reclaim()

    def _make_room_for(self, kinds: Iterable[RequestClass], *, beside: bool = False) -> None:
        """Others may be stopped that could not before; `beside`: together with what came free, as long as that is free."""
        for kind in list(kinds):
            kind.no_room_made = False
            if not beside:
                kind.may_stop, kind.hopeful = True, False  # it is not given up with what came free
                self._hopeful.pop(kind, None)
            for line in tuple(kind.lines.values()) if kind.counts_differ else ():
                self._parked.get(self._shares.family(line.queue), {}).pop(line, None)
                self._turns.unpark(line)
            self._turns.reopen(kind)

    def _know_datasets(self, news: News) -> None:
        """What can only go where its data is is tried again when the data may have come somewhere, or room where it is."""
        changed = {fact.name for fact in news.datasets} | set(news.datasets_gone)
        if not changed:
            return
        eased = set[str]().union(*map(self._fleet.know_dataset, news.datasets))
        eased |= set[str]().union(*map(self._fleet.forget_dataset, news.datasets_gone))
        for kind in self._pending.classes:
            if kind.request.hard_locality and (eased or not changed.isdisjoint(kind.request.datasets)):
                self._try_again(kind)
        for top in {self._shares.family(self._pending.jobs[name].line.queue) for name in self._data_short}:
            self._unpark(top)

    # waiting

    def _wait(self, name: str, candidate: Candidate | None) -> None:
        if candidate is None:
            self._leave(name)
            self._promises.leaves(name)
            self._patience.forget(name)
            self._soon_over.forget(name)
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
        line = self._pending.join(candidate, asked, own=self._stands_alone(job), lasts=self._lending.lasts(job)).line
        if self._reserved.find(job.spec) is None:
            self._promises.waits(job, asked)
        kind = line.kind
        if len(kind.lines) == 1 and len(line.names) == 1:
            self._needs.add(kind, kind.need)
        if line.first() == (job.create_time.timestamp(), job.name):
            self._turns.enter(line)
        quota = self._shares.quota
        if kind.settled and len(line.names) == 1 and quota.guarantees and self._may_reclaim(line):
            self._make_room_for((kind,))  # it was settled by queues for which nobody makes room
        elif not kind.settled:
            self._turns.activate(kind)
        if self._reasons:
            self._unanswered[job.name] = None

    def _stands_alone(self, job: Job) -> bool:
        """Whether it may have GPUs that others like it may not."""
        return self._fleet.holdings.holds(job.name) or left_for_a_move(job) or may_wait(job.spec)

    def _leave(self, name: str) -> None:
        if name not in self._pending.jobs:
            return
        self._unanswered.pop(name, None)
        self._data_short.pop(name, None)
        line = self._pending.leave(name)
        if line is None:
            return
        self._turns.leave(line)
        if line.parked:
            self._parked.get(self._shares.family(line.queue), {}).pop(line, None)
            self._swaps.pop(line, None)
            self._vain.pop(line, None)
        if not line.kind.lines:
            self._needs.discard(line.kind, line.kind.need)
            self._hopeful.pop(line.kind, None)

    def _look_over(self) -> None:
        """Tries the next classes again, round and round, whatever is known of them.

        Who waits is woken by what changes for it. Should that be missed once, nobody waits for ever beside what is free.
        """
        classes = list(self._pending.classes)
        first = self._looked_over % max(1, len(classes))
        for kind in [*classes[first:], *classes[:first]][:LOOKED_OVER]:
            self._try_again(kind)
            for line in tuple(kind.lines.values()):
                if line.parked:
                    line.vain = False
                    self._vain.pop(line, None)
                    self._look_at_parked(self._shares.family(line.queue), line)
        self._looked_over = first + LOOKED_OVER

    def _try_again(self, kind: RequestClass) -> None:
        kind.refused = kind.no_room_made = kind.hopeful = False
        self._hopeful.pop(kind, None)
        self._turns.reopen(kind)

    # whose turn it is

    def _take_in_gains(self) -> None:
        """Tries again whom the nodes that gained could help, and those whose queue or array holds less."""
        self._take_in_lost_cover()
        holdings = self._fleet.holdings
        for queue in holdings.eased:
            self._turns.fell(queue)
            self._unpark(self._shares.family(queue))
        if holdings.eased:
            self._swaps |= dict.fromkeys(self._swaps_by_turn.things())  # their turns may have come closer
        holdings.eased.clear()
        if not self._pending.jobs:
            self._fleet.nobody_waits()
            return
        for top in tuple(self._kept_from) if self._fleet.gained else ():
            self._unpark(top)
        if self._fleet.gained:
            self._stop_others_beside(self._fleet.gained_from)
            self._swaps |= self._vain
            self._vain.clear()
        lent = self._lent_for_now()
        for kind in self._fleet.take_gains(self._needs, self._lending.covered()):
            if not self._could_hold(kind, lent(kind)):
                continue
            was_refused = kind.refused
            self._try_again(kind)
            if was_refused and not kind.may_stop:
                self._hopeful[kind] = None
                kind.hopeful = True

    def _take_in_lost_cover(self) -> None:
        """What guarantees cover no more may be taken back by those who are guaranteed it, and by those of higher priority."""
        known = self._fleet.holdings.jobs
        lost = [known[name] for name in self._shares.quota.take_lost_cover() if name in known]
        if lost:
            self._reclaim()
            lowest = min(job.spec.priority for job in lost)
            self._make_room_for(filter(self._lower_hold_enough, self._pending.above(lowest)))
            self._swap_beside(lost)

    def _slack_rose(self) -> None:
        """Tries those again from whom idle GPUs are kept: those for whom they are took others, which were not idle, or fewer are kept."""
        before, self._slack = self._slack, self._slack_now()
        if any(now > then for now, then in zip(self._slack, before, strict=True)):
            for top in tuple(self._kept_from):
                self._unpark(top)

    def _slack_now(self) -> tuple[float, float]:
        return self._shares.quota.slack(self._fleet.engine.free_gpus())

    def _stop_others_beside(self, priority: float) -> None:
        """Together with what came free, others may be stopped now for whom that was too little before.

        What those could have had stopped who are above `priority` is no gain for them.
        """
        lowest = min((of for of, gpus in self._fleet.holdings.stoppable.items() if gpus), default=None)
        if lowest is not None:
            self._make_room_for(filter(self._lower_hold_enough, self._pending.above(lowest, priority)), beside=True)
        if self._shares.quota.guarantees:
            self._reclaim(beside=True)

    def _could_hold(self, kind: RequestClass, lent: int) -> bool:
        """Whether what nodes gained, with what is `lent` to it of what is kept for later, could be enough for it."""
        if kind.own and self._promises.has(kind.own):
            own = self._lending.covered((kind.own,)) + count(self._fleet.holdings.held(kind.own))
            return self._fleet.engine.free_gpus() + own + lent >= need_of(kind.request).gpus
        return self._fleet.could_hold(kind.need, lent)

    def _lent(self, kind: RequestClass) -> int:
        """GPUs that are kept for later, and may be used by it until then."""
        return self._lending.lent(kind.lasts, self._now)

    def _lent_for_now(self) -> Callable[[RequestClass], int]:
        """`_lent` while nothing changes: worked out once for each class of times, of which there are few among many classes of requests."""
        known: dict[int, int] = {}

        def lent(kind: RequestClass) -> int:
            if kind.lasts not in known:
                known[kind.lasts] = self._lent(kind)
            return known[kind.lasts]

        return lent

    def _give_up_hope(self) -> None:
        """What came free is taken again: nobody who waited for it need be tried."""
        lent = self._lent_for_now()
        for kind in [kind for kind in self._hopeful if not self._could_hold(kind, lent(kind))]:
            self._refuse(kind)

    def _lower_hold_enough(self, kind: RequestClass) -> bool:
        stoppable = self._fleet.holdings.stoppable
        lower = sum(gpus for priority, gpus in stoppable.items() if priority < kind.priority)
        need = need_of(kind.request).gpus - self._fleet.holdings.count_of(kind.own) if kind.own else kind.need.gpus
        return lower > 0 and need <= lower + self._fleet.engine.free_gpus()

    def _park(self, line: Line, limit: QueueLimit | None) -> None:
        top = self._shares.family(line.queue)
        self._turns.park(line)
        self._parked.setdefault(top, {})[line] = None
        if limit is not None and limit.kept:
            self._kept_from[top] = None
            lent, firm = self._slack_now()
            self._slack = min(lent, self._slack[0]), min(firm, self._slack[1])

    def _unpark(self, top: str) -> None:
        """Lines that their queue or array kept back, and may not any more."""
        for line in tuple(self._parked.get(top, ())):
            self._look_at_parked(top, line)

    def _look_at_parked(self, top: str, line: Line) -> None:
        first = line.first()
        job = self._pending.jobs[first[1]].candidate.job if first else None
        if job is None or not (self._over_limit(job) or self._over_array_limit(job)):
            self._unpark_line(top, line)
        elif not line.vain and self._may_swap(line):
            self._swaps[line] = None

    def _unpark_line(self, top: str, line: Line) -> None:
        del self._parked[top][line]
        self._swaps.pop(line, None)
        self._vain.pop(line, None)
        self._turns.unpark(line)
        if not line.kind.settled:
            self._turns.activate(line.kind)

    # limits under which others may be stopped

    def _may_swap(self, line: Line) -> bool:
        """Whether others could be stopped under the limit that keeps it back, as far as the least numbers tell."""
        quota = self._shares.quota
        first = line.first()
        if first is not None and self._soon_over.of(first[1], self._now):
            return False
        own = self._fleet.holdings.count_of(first[1]) if first is not None else 0
        within = quota.limited_at(line.queue, line.kind.gpus, own)
        if within is None:
            return False
        lower = any(gpus > 0 for priority, gpus in within.stoppable.items() if priority < line.kind.priority)
        return lower or (quota.guarantees and self._may_reclaim(line))

    def _swap_beside(self, jobs: Iterable[Job]) -> None:
        """These may be stopped that could not before: they may be under a limit that keeps others back."""
        lowest = dict[str, int]()
        for job in jobs:
            for top in (self._shares.family(job.queue), *self._kept_from):
                lowest[top] = min(job.spec.priority, lowest.get(top, job.spec.priority))
        for top, priority in lowest.items():
            above = (line for line in self._parked.get(top, ()) if line.kind.priority > priority)
            self._swaps |= {line: None for line in above if self._may_swap(line)}

    def _swap_with(self, leaving: Collection[str]) -> None:
        """These are about to leave, so they count under limits no more: with them, others may be enough."""
        known = self._fleet.holdings.jobs
        queues = {known[name].queue for name in leaving if name in known}
        for top in {**dict.fromkeys(sorted(map(self._shares.family, queues))), **self._kept_from}:
            lines = (line for line in self._parked.get(top, ()) if not line.vain)
            self._swaps |= {line: None for line in lines if self._may_swap(line)}

    def _next_line(self) -> Line | None:
        """The line whose turn it is: of those that are to be tried, and of parked ones for which others could be stopped."""
        swap = self._next_swap()
        line = self._turns.next() if self._turns.active else None
        if swap is None or swap.entry is None:
            return line
        if line is not None and line.entry is not None and line.entry[0] < swap.entry[0]:
            return line
        swap.entry = None
        return swap

    def _next_swap(self) -> Line | None:
        """The first of the parked lines for which others could be stopped; who is not kept back any more waits for its turn."""
        for line in self._swaps:
            if line.parked and line.names:
                self._swaps_by_turn.put(line, self._turns.key_of(line))
        self._swaps.clear()
        while (top := self._swaps_by_turn.top()) is not None:
            key, _, line = top
            if (first := line.first()) is None:
                line.entry = None
            elif not self._kept_back(self._pending.jobs[first[1]].candidate.job):
                self._unpark_line(self._shares.family(line.queue), line)
            elif key != (now := self._turns.key_of(line)):
                self._swaps_by_turn.put(line, now)
            else:
                return line
        return None

    def _refuse(self, kind: RequestClass) -> None:
        """It is not tried until something changes."""
        kind.refused = kind.no_room_made = True
        kind.hopeful = kind.may_stop = False
        self._hopeful.pop(kind, None)
        self._turns.drop(kind)


def _asking_for_least(candidate: Candidate) -> Candidate:
    """An elastic job waits for its least size, and takes more when it starts."""
    job, least = candidate.job, elastic.at_least(candidate.job.spec)
    return (
        candidate
        if least is job.spec
        else Candidate(replace(job, spec=least), candidate.exclude, max(job.spec.gpus, least.gpus))
    )
