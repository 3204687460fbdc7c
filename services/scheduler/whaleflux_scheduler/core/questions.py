"""What is asked of a plan: nothing changes by it that a decision could see, whatever happens in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import capacity, decisions, wait_reasons
from whaleflux_scheduler.core.devices import Gpus
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.lifecycle import next_epoch
from whaleflux_scheduler.core.model import Job, SchedulingDecision
from whaleflux_scheduler.core.pending import Pending
from whaleflux_scheduler.core.placement.api import Placement, PreemptionPlan
from whaleflux_scheduler.core.preemption import may_stop, still_stopping, stopped
from whaleflux_scheduler.core.queue_order import ArrayLimit, order_of, over_array_limit
from whaleflux_scheduler.core.queue_shares import QueueShares, QueueUse
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.request import place_request, shape


class Questions:
    """What a plan knows, and the answers that follow from it."""

    def __init__(self, half_life_s: float) -> None:
        self._shares = QueueShares(half_life_s)
        self._fleet, self._pending = KnownFleet(self._shares), Pending()

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return len(self._pending)

    @property
    def nodes(self) -> int:
        """Nodes that it knows."""
        return self._fleet.size

    def could_hold(self, queue: str, spec: Spec) -> bool:
        """Whether queue and fleet are known to be large enough for the job; asked of any thread, False when it has to be worked out."""
        return not self._over_queue(queue, spec) and self._fleet.capacity.known_enough(shape(spec))

    def dry_run(self, job: Job, now: datetime) -> SchedulingDecision:
        """What `decide` would answer for a job that does not exist yet."""
        if limit := self._over_limit(job):
            return wait_reasons.queue_is_full(limit, now)
        if not self.nodes:
            return wait_reasons.no_nodes(now)
        request = place_request(job.name, job.spec)
        answer = self._fleet.engine.place(request)
        if isinstance(answer, Placement):
            devices = self._fleet.holdings.devices
            assignment = decisions.assignment_of(answer, devices)
            return decisions.placed(job, answer, assignment, devices, next_epoch(job), now)
        decision = self._in_line(wait_reasons.does_not_fit(answer, now), job)
        victims = may_stop(self._fleet.holdings, job)
        plan = self._fleet.engine.preempt(request, victims) if victims else answer
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
        with self._fleet.holdings.without(job.name):
            answer = self._fleet.engine.place(place_request(f"{job.name}?", job.spec, exclude_nodes=avoided))
        if isinstance(answer, Placement):
            return self._in_line(wait_reasons.is_next(now), job)
        decision = wait_reasons.does_not_fit(answer, now, avoided)
        decision = wait_reasons.with_claims(
            decision, [name for name in self._fleet.holdings.claims if name != job.name]
        )
        return self._in_line(self._with_victims(decision, job, still_stopping(self._fleet.holdings, job.name)), job)

    def shortage(self, queue: str, spec: Spec) -> str:
        """Why the job can never run in this queue and fleet as they are, however long it waits; "" when it can, or nobody knows."""
        if limit := self._over_queue(queue, spec):
            return wait_reasons.queue_is_small(limit, spec.gpus)
        short = self._fleet.capacity.short_of(shape(spec)) if not self._fleet.left_out else None
        if short is None:
            return ""
        return self._fleet.capacity.unknown_sites(shape(spec)) or capacity.in_words(short)

    def _over_queue(self, queue: str, spec: Spec) -> QueueLimit | None:
        limits = ((up.id, up.queue.max_gpus) for up in self._shares.quota.node(queue).path())
        return next((QueueLimit(id_, 0, most) for id_, most in limits if 0 < most < spec.gpus), None)

    def queue_use(self, queues: Iterable[str]) -> dict[str, QueueUse]:
        """What queues hold, by id."""
        return {queue: self._shares.use(queue) for queue in queues}

    def gpus(self) -> tuple[Counter[str], Counter[str]]:
        """GPUs of open nodes and GPUs held, by model; for metrics."""
        return self._fleet.holdings.by_model()

    def held(self) -> dict[str, Gpus]:
        """What each job holds."""
        return self._fleet.holdings.by_job()

    def check(self) -> None:
        """Raises AssertionError when the engine holds something else than the jobs do, or a GPU is held twice."""
        self._fleet.holdings.check()

    def _over_limit(self, job: Job) -> QueueLimit | None:
        own, lends_back = self._fleet.holdings.count_of(job.name), not job.spec.is_service
        quota = self._shares.quota
        return quota.admit(job.queue, job.spec.gpus, own=own, free=self._fleet.engine.free_gpus, lends_back=lends_back)

    def _over_array_limit(self, job: Job) -> ArrayLimit | None:
        return over_array_limit(job, self._fleet.holdings.by_array, own=self._fleet.holdings.holds(job.name))

    def _with_victims(self, decision: SchedulingDecision, job: Job, victims: Sequence[str]) -> SchedulingDecision:
        known = (self._fleet.holdings.jobs.get(victim) for victim in victims)
        reclaimed = any(other is not None and other.spec.priority >= job.spec.priority for other in known)
        return wait_reasons.with_victims(decision, victims, reclaimed=reclaimed)

    def _in_line(self, decision: SchedulingDecision, job: Job) -> SchedulingDecision:
        """With its position in its queue, and who goes first."""
        key = order_of(job)
        others = (waiting.candidate.job for waiting in self._pending.jobs.values())
        first = sorted((order_of(other), other.queue) for other in others if order_of(other) < key)
        same = sum(queue == job.queue for _, queue in first)
        return wait_reasons.in_line(decision, [name for (_, _, name), _ in first], same + 1)
