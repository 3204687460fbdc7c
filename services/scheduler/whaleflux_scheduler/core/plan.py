"""One decision, `step(news, now) -> moves`: the placement engine, what every job holds in it, and the jobs that wait.

It is entered by one caller at a time: the service's planner thread, a simulator, a replay. `now` is the caller's time, and the only one:
without a bound of time no clock is read, and equal news give equal moves. What is chosen is held in the engine at once; when the store
refuses the write, news of the job as it is stored takes it back.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import capacity, decisions, wait_reasons
from whaleflux_scheduler.core.capacity import Capacity
from whaleflux_scheduler.core.devices import Gpus
from whaleflux_scheduler.core.going_on import claimed_place
from whaleflux_scheduler.core.holdings import Holdings, places_of
from whaleflux_scheduler.core.lifecycle import GpuAssignment, next_epoch
from whaleflux_scheduler.core.model import Claim, Job, JobState, Queue, SchedulingDecision
from whaleflux_scheduler.core.pending import Candidate, QueueBucket, QueueBuckets
from whaleflux_scheduler.core.placement.api import (
    DatasetFact,
    NoPlacement,
    Placement,
    PlaceRequest,
    PreemptionPlan,
)
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.preemption import claim_for, may_stop, still_stopping, stopped
from whaleflux_scheduler.core.queue_order import ArrayLimit, next_turn, order_of, over_array_limit
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S, QueueShares, QueueUse, Turn
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.request import place_request, shape

log = logging.getLogger(__name__)

_MOST_SHAPES = 20_000


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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A candidate with what it asks of the engine, worked out once."""

    candidate: Candidate
    request: PlaceRequest
    bucket: QueueBucket


class Stopwatch:
    """The time of one step: `began` by the caller's clock. Without a bound no clock is read, and time stands still."""

    def __init__(self, began: datetime, budget_s: float, monotonic: Callable[[], float]) -> None:
        self.began, self._budget_s, self._monotonic = began, budget_s, monotonic
        self._bounded = budget_s != math.inf
        self._start_s = monotonic() if self._bounded else 0.0

    @property
    def passed_s(self) -> float:
        return self._monotonic() - self._start_s if self._bounded else 0.0

    @property
    def over(self) -> bool:
        return self._bounded and self.passed_s >= self._budget_s

    @property
    def now(self) -> datetime:
        """The caller's time when the step began, and what has passed since."""
        return self.began + timedelta(seconds=self.passed_s) if self._bounded else self.began


class Plan:
    """See the module. `monotonic` is read by steps that are bounded in time, and by no others."""

    def __init__(self, monotonic: Callable[[], float] = lambda: 0.0, half_life_s: float = HALF_LIFE_S) -> None:
        self._monotonic, self._engine, self._shares = monotonic, Engine(), QueueShares(half_life_s)
        self._holdings, self._capacity = Holdings(self._engine, self._shares), Capacity()
        self._left_out: set[str] = set()  # nodes whose facts placement cannot take
        self._waiting: dict[str, Waiting] = {}
        self._buckets = QueueBuckets()
        self._untried: set[QueueBucket] = set()  # something changed since the first of the bucket was tried
        self._unanswered: set[str] = set()  # jobs that wait and were not given a reason yet
        self._shapes: dict[PlaceRequest, int] = {}  # what is asked for, whoever asks, by number
        self._numbered = 0
        self._refused: dict[int, NoPlacement] = {}  # shapes that do not fit at present
        self._no_room: set[tuple[int, str]] = set()  # shapes and queues for which nobody makes room at present
        self._watch: Stopwatch

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return len(self._waiting)

    @property
    def nodes(self) -> int:
        """Nodes that it knows."""
        return len(self._holdings.devices.nodes)

    @property
    def unfinished(self) -> bool:
        """True when `decide` ran out of time before it had answered every job."""
        return bool(self._untried or self._unanswered)

    def step(self, news: News, now: datetime, budget_s: float = math.inf) -> list[Move]:
        """Takes in what changed, and decides; `budget_s` bounds the time that deciding takes."""
        self._shares.now_s = now.timestamp()
        self.apply(news)
        return self.decide(now, budget_s)

    def apply(self, news: News) -> None:
        """Takes in what changed; cheap, decides nothing."""
        if news.queues is not None:
            self._shares.set_queues(news.queues)
            self._try_all()
        self._know_datasets(news)
        for node in news.nodes:
            self._upsert(node)
        for name in news.removed:
            self._remove(name)
        for name, why in news.closed.items():
            self._close(name, why)
        for job in news.jobs:
            self._learn(job)
        for name in news.gone:
            self._wait(name, None)
            if self._holdings.forget(name):
                self._try_all()
        for name, candidate in news.candidates.items():
            self._wait(name, candidate)

    def decide(self, now: datetime, budget_s: float = math.inf) -> list[Move]:
        """Tries the first of each bucket in turn, the next when it fits, until none does or `budget_s` is over."""
        self._watch = Stopwatch(now, budget_s, self._monotonic)
        moves: list[Move] = []
        while self._untried and not self._watch.over:
            bucket = next_turn(self._buckets, self._untried, self._turn)
            if bucket is None:
                self._untried.clear()
                break
            move = self._choose(self._first(bucket))
            moves.append(move)
            if move.assignment is None:
                self._untried.discard(bucket)
        return moves + self._answer_others()

    def _turn(self, bucket: QueueBucket, first: str) -> Turn:
        return self._shares.turn(bucket.queue, self._waiting[first].candidate.job.spec.gpus, bucket.priority)

    def _first(self, bucket: QueueBucket) -> Waiting:
        first = self._buckets.first(bucket)
        assert first is not None
        return self._waiting[first[1]]

    def _answer_others(self) -> list[Move]:
        """Those behind the first of a bucket that does not fit wait for the same reason."""
        moves = []
        for name in list(self._unanswered):
            waiting = self._waiting[name]
            if waiting.bucket in self._untried or self._watch.over:
                continue
            self._unanswered.discard(name)
            moves.append(Move(name, self._why(waiting, self._watch.began)))
        return moves

    def _why(self, waiting: Waiting, now: datetime) -> SchedulingDecision:
        job = waiting.candidate.job
        if limit := self._over_limit(job):
            return wait_reasons.queue_is_full(limit, now)
        if full := self._over_array_limit(job):
            return wait_reasons.array_is_full(full, now)
        refused = self._refused.get(waiting.bucket.shape)
        if refused is None:
            return wait_reasons.others_alike_go_first(now)
        return wait_reasons.does_not_fit(refused, now, waiting.candidate.exclude)

    def could_hold(self, queue: str, spec: Spec) -> bool:
        """Whether queue and fleet are known to be large enough for the job; asked of any thread, False when it has to be worked out."""
        return not self._over_queue(queue, spec) and self._capacity.known_enough(shape(spec))

    # questions: none changes anything that a decision could see, whatever happens in between

    def dry_run(self, job: Job, now: datetime) -> SchedulingDecision:
        """What `decide` would answer for a job that does not exist yet."""
        if limit := self._over_limit(job):
            return wait_reasons.queue_is_full(limit, now)
        if not self.nodes:
            return wait_reasons.no_nodes(now)
        request = place_request(job.name, job.spec)
        answer = self._engine.place(request)
        if isinstance(answer, Placement):
            devices = self._holdings.devices
            assignment = decisions.assignment_of(answer, devices)
            return decisions.placed(job, answer, assignment, devices, next_epoch(job), now)
        decision = self._in_line(wait_reasons.does_not_fit(answer, now), job)
        victims = may_stop(self._holdings, job)
        plan = self._engine.preempt(request, victims) if victims else answer
        return self._with_victims(decision, job, stopped(plan)) if isinstance(plan, PreemptionPlan) else decision

    def explain(self, job: Job, exclude: Iterable[str], now: datetime) -> SchedulingDecision:
        """Why a waiting job waits, at this moment."""
        if kept := wait_reasons.kept_back(job, now):
            return kept
        if job.not_before is not None and job.not_before > now:
            return wait_reasons.pauses(job.not_before, now)
        if limit := self._over_limit(job):
            return self._in_line(wait_reasons.queue_is_full(limit, now), job)
        if full := self._over_array_limit(job):
            return self._in_line(wait_reasons.array_is_full(full, now), job)
        if not self.nodes:
            return self._in_line(wait_reasons.no_nodes(now), job)
        avoided = frozenset(exclude)
        with self._holdings.without(job.name):
            answer = self._engine.place(place_request(f"{job.name}?", job.spec, exclude_nodes=avoided))
        if isinstance(answer, Placement):
            return self._in_line(wait_reasons.is_next(now), job)
        decision = wait_reasons.does_not_fit(answer, now, avoided)
        decision = wait_reasons.with_claims(decision, [name for name in self._holdings.claims if name != job.name])
        return self._in_line(self._with_victims(decision, job, still_stopping(self._holdings, job.name)), job)

    def shortage(self, queue: str, spec: Spec) -> str:
        """Why the job can never run in this queue and fleet as they are, however long it waits; "" when it can, or nobody knows."""
        if limit := self._over_queue(queue, spec):
            return wait_reasons.queue_is_small(limit, spec.gpus)
        short = self._capacity.short_of(shape(spec)) if not self._left_out else None
        if short is None:
            return ""
        return self._capacity.unknown_sites(shape(spec)) or capacity.in_words(short)

    def _over_queue(self, queue: str, spec: Spec) -> QueueLimit | None:
        limits = ((up.id, up.queue.max_gpus) for up in self._shares.quota.node(queue).path())
        return next((QueueLimit(id_, 0, most) for id_, most in limits if 0 < most < spec.gpus), None)

    def queue_use(self, queues: Iterable[str]) -> dict[str, QueueUse]:
        """What queues hold, by id."""
        return {queue: self._shares.use(queue) for queue in queues}

    def gpus(self) -> tuple[Counter[str], Counter[str]]:
        """GPUs of open nodes and GPUs held, by model; for metrics."""
        return self._holdings.by_model()

    def held(self) -> dict[str, Gpus]:
        """What each job holds."""
        return self._holdings.by_job()

    def check(self) -> None:
        """Raises AssertionError when the engine holds something else than the jobs do, or a GPU is held twice."""
        self._holdings.check()

    # jobs, nodes and datasets

    def _learn(self, job: Job) -> None:
        """The job as it is stored. One that has begun to run may be stopped for those of higher priority."""
        known = self._holdings.jobs.get(job.name)
        if self._holdings.learn(job):
            self._try_all()
        elif job.state is JobState.RUNNING and (known is None or _may_stop_sooner(known, job)):
            for bucket in self._buckets.above(job.spec.priority):
                self._try_again(bucket)
            if self._shares.quota.guarantees and self._shares.quota.covering(job.name).id != job.queue:
                self._try_guaranteed()

    def _upsert(self, node: Node) -> None:
        devices = self._holdings.devices
        if devices.nodes.get(node.name) == node:
            return
        try:
            self._holdings.report(node)
            self._capacity.upsert(node)
        except InvalidArgument as strange:  # inventory checks facts; what it let through must not stop the others
            log.error("%s is left out: %s", node.name, strange)
            self._left_out.add(node.name)
            return
        self._left_out.discard(node.name)
        if node.name not in devices.open:
            self._engine.set_schedulable(node.name, False, "not ready yet")
        self._try_all()

    def _remove(self, name: str) -> None:
        self._left_out.discard(name)
        if name in self._holdings.devices.nodes:
            self._holdings.remove(name)
            self._capacity.remove(name)
            self._try_all()  # a GPU that it reported too may be offered by another now

    def _close(self, name: str, why: str) -> None:
        if name not in self._holdings.devices.nodes:
            return
        self._capacity.close(self._holdings.devices.nodes[name], why)
        if self._holdings.close(name, why):
            self._try_all()
        elif why:
            self._refused.clear()  # they say how many nodes each constraint excludes

    def _know_datasets(self, news: News) -> None:
        """What can only go where its data is is tried again when the data may have come somewhere."""
        for fact in news.datasets:
            self._engine.upsert_dataset(fact)
        for name in news.datasets_gone:
            self._engine.remove_dataset(name)
        changed = {fact.name for fact in news.datasets} | set(news.datasets_gone)
        for waiting in self._waiting.values() if changed else ():
            if waiting.request.hard_locality and not changed.isdisjoint(waiting.request.datasets):
                self._try_again(waiting.bucket)

    # waiting

    def _wait(self, name: str, candidate: Candidate | None) -> None:
        if candidate is None:
            self._waiting.pop(name, None)
            self._buckets.leave(name)
            self._unanswered.discard(name)
            return
        known = self._waiting.get(name)
        if known is not None and known.candidate == candidate:
            return
        job = candidate.job
        near = job.attempt.nodes if job.attempt else ()
        asked = shape(job.spec, tuple(sorted(candidate.exclude)), near)
        own = name if self._holdings.count_of(name) else ""
        limited = job.spec.array_name if job.spec.array_max_running else ""
        bucket = QueueBucket(job.spec.priority, job.queue, self._number(asked), own, limited)
        self._waiting[name] = Waiting(candidate, replace(asked, id=name), bucket)
        self._buckets.join(bucket, job)
        self._unanswered.add(name)
        if own or bucket.shape not in self._refused or self._buckets.first(bucket) == (order_of(job)[1], name):
            self._untried.add(bucket)

    def _number(self, asked: PlaceRequest) -> int:
        """The number of what is asked for; numbers are small to compare, requests are not."""
        if len(self._shapes) >= _MOST_SHAPES:
            used = {waiting.bucket.shape for waiting in self._waiting.values()}
            self._shapes = {known: number for known, number in self._shapes.items() if number in used}
        self._numbered += 1
        return self._shapes.setdefault(asked, self._numbered)

    def _try_all(self) -> None:
        self._refused.clear()
        self._no_room.clear()
        self._untried = self._buckets.all()

    def _try_again(self, bucket: QueueBucket) -> None:
        self._refused.pop(bucket.shape, None)
        self._no_room.discard(self._kind(bucket))
        self._untried.add(bucket)

    def _kind(self, bucket: QueueBucket) -> tuple[int, str]:
        """Those for whom the same jobs may be stopped."""
        return bucket.shape, bucket.queue if self._shares.quota.guarantees else ""

    def _try_guaranteed(self) -> None:
        """Something borrowed may be stopped: who is guaranteed more than is held may have room made."""
        for bucket in self._buckets.all():
            if self._shares.quota.node(bucket.queue).below_guarantee:
                self._try_again(bucket)

    def _over_limit(self, job: Job) -> QueueLimit | None:
        own, lends_back = self._holdings.count_of(job.name), not job.spec.is_service
        quota = self._shares.quota
        return quota.admit(job.queue, job.spec.gpus, own=own, free=self._engine.free_gpus, lends_back=lends_back)

    def _over_array_limit(self, job: Job) -> ArrayLimit | None:
        return over_array_limit(job, self._holdings.by_array, own=self._holdings.holds(job.name))

    # decisions

    def _choose(self, waiting: Waiting) -> Move:
        begun = self._watch.now
        self._unanswered.discard(waiting.candidate.job.name)
        return replace(self._try(waiting, self._watch.began), begun=begun, ended=self._watch.now)

    def _try(self, waiting: Waiting, now: datetime) -> Move:
        job, request = waiting.candidate.job, waiting.request
        if (place := claimed_place(job, request, self._engine, self._holdings)) is not None:
            return self._give(job, place, now)
        if limit := self._over_limit(job):
            return Move(job.name, wait_reasons.queue_is_full(limit, now))
        if full := self._over_array_limit(job):
            return Move(job.name, wait_reasons.array_is_full(full, now))
        own = self._holdings.count_of(job.name) > 0
        refused = self._refused.get(waiting.bucket.shape)
        if refused is not None and not own:
            return self._make_room(waiting, refused, now)
        try:
            with self._holdings.without(job.name):
                answer = self._engine.place(request)
        except InvalidArgument as never:  # of an older version's rules
            return Move(job.name, wait_reasons.cannot_be_asked(str(never), now))
        if isinstance(answer, Placement):
            return self._give(job, answer, now)
        if not own:
            self._refused[waiting.bucket.shape] = answer
        return self._make_room(waiting, answer, now)

    def _give(self, job: Job, placement: Placement, now: datetime) -> Move:
        devices = self._holdings.devices
        assignment = decisions.assignment_of(placement, devices)
        decision = decisions.placed(job, placement, assignment, devices, next_epoch(job), now)
        held = dict(self._holdings.held(job.name))
        for task in decision.tasks:
            held[task.node] = held.get(task.node, frozenset()) | places_of(task)
        self._wait(job.name, None)
        if self._holdings.hold(job, held):  # what it claimed and did not take
            self._try_all()
        return Move(job.name, decision, assignment)

    def _make_room(self, waiting: Waiting, answer: NoPlacement, now: datetime) -> Move:
        job, kind = waiting.candidate.job, self._kind(waiting.bucket)
        decision = wait_reasons.does_not_fit(answer, now, waiting.candidate.exclude)
        if self._holdings.claim(job.name) is not None:
            return Move(job.name, self._with_victims(decision, job, still_stopping(self._holdings, job.name)))
        if kind in self._no_room and not waiting.bucket.alone:
            return Move(job.name, decision)
        victims = may_stop(self._holdings, job)
        plan = self._engine.preempt(waiting.request, victims) if victims else answer
        if not isinstance(plan, PreemptionPlan):
            self._no_room.add(kind)
            return Move(job.name, decision)
        claim = claim_for(plan, self._holdings, now)
        self._holdings.hold(job, self._holdings.held(job.name), claim)
        self._refused.pop(self._waiting[job.name].bucket.shape, None)  # the next of its kind may find other victims
        return Move(job.name, self._with_victims(decision, job, claim.victims), claim=claim)

    def _with_victims(self, decision: SchedulingDecision, job: Job, victims: Sequence[str]) -> SchedulingDecision:
        known = (self._holdings.jobs.get(victim) for victim in victims)
        reclaimed = any(other is not None and other.spec.priority >= job.spec.priority for other in known)
        return wait_reasons.with_victims(decision, victims, reclaimed=reclaimed)

    def _in_line(self, decision: SchedulingDecision, job: Job) -> SchedulingDecision:
        """With its position in its queue, and who goes first."""
        key = order_of(job)
        others = (waiting.candidate.job for waiting in self._waiting.values())
        first = sorted((order_of(other), other.queue) for other in others if order_of(other) < key)
        same = sum(queue == job.queue for _, queue in first)
        return wait_reasons.in_line(decision, [name for (_, _, name), _ in first], same + 1)


def _may_stop_sooner(before: Job, now: Job) -> bool:
    """Whether a running job may be stopped for others that could not have it stopped before."""
    return before.state is not JobState.RUNNING or now.spec.priority < before.spec.priority
