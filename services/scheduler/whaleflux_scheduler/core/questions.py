"""What is asked of a plan: nothing changes by it that a decision could see, whatever happens in between."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from whaleflux import names
from whaleflux.fleet.links import Fabric
from whaleflux.fleet.model import Level, Node
from whaleflux.manifests.job_fields import Rule, Spec
from whaleflux_scheduler.core import (
    after_failure,
    budgets,
    capacity,
    data_quota,
    decisions,
    elastic,
    goals,
    planned_sizes,
    rank_maps,
    wait_reasons,
)
from whaleflux_scheduler.core.data_ahead import DataAhead
from whaleflux_scheduler.core.data_quota import DataLimit
from whaleflux_scheduler.core.devices import Gpus
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.holdings import is_reservation
from whaleflux_scheduler.core.in_order import order_of
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.lending import Lending
from whaleflux_scheduler.core.lifecycle import GpuAssignment, next_epoch
from whaleflux_scheduler.core.model import ClaimPurpose, Job, SchedulingDecision
from whaleflux_scheduler.core.never_starts import NeverStarts
from whaleflux_scheduler.core.offered import BurstFacts, Waiting
from whaleflux_scheduler.core.patience import Patience
from whaleflux_scheduler.core.pending import Line, Pending
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest, PreemptionPlan
from whaleflux_scheduler.core.placement.pin_book import PinBook
from whaleflux_scheduler.core.preemption import room_for, still_stopping, stopped
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.promises import Promises
from whaleflux_scheduler.core.queue_order import ArrayLimit, over_array_limit
from whaleflux_scheduler.core.queue_shares import QueueShares, QueueUse, Turn
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.ray_nodes import FreeNode, free_nodes
from whaleflux_scheduler.core.rebalance import Gang, RebalancePlan, RebalanceRules
from whaleflux_scheduler.core.rebalancing import Rebalancer
from whaleflux_scheduler.core.request import of_model, place_request, shape, that_may
from whaleflux_scheduler.core.reserved_gpus import Fleet
from whaleflux_scheduler.core.reserving import Reserved
from whaleflux_scheduler.core.soon_over import SoonOver
from whaleflux_scheduler.core.under_limit import room_under_limit

MOST_LINES, MOST_BEFORE = 2_000, 1_000  # lines of jobs that wait, and jobs, that are looked at for one answer
MOST_BURST = 100  # jobs that are looked at to be rented for
SERVES_S = 86_400.0  # of a service: what renting for it is reckoned with
HIGHEST_PRIORITY = 1_000


class Questions:
    """What a plan knows, and the answers that follow from it."""

    def __init__(
        self, half_life_s: float, rules: RebalanceRules | None = None, promises: PromiseRules | None = None
    ) -> None:
        self._shares = QueueShares(half_life_s)
        self._fleet, self._pending = KnownFleet(self._shares), Pending()
        self._estimates = Estimates()
        self._promises = Promises(self._fleet.engine, self._fleet.holdings, self._estimates, promises)
        self._reserved = Reserved(self._fleet, self._estimates)
        kept = self._promises.starts_s, self._reserved.starts_s
        self._lending = Lending(self._fleet.engine, self._estimates, *kept)
        self._limits = NeverStarts(self._fleet, self._shares, self._reserved)
        self._patience = Patience(self._promises.soonest)
        self._soon_over = SoonOver(self._fleet.holdings, self._estimates)
        self.data_ahead = DataAhead(self._fleet.engine, self._shares)
        self._data_short: dict[str, DataLimit] = {}  # jobs that wait because their queue may not hold their data
        self._rebalancer = Rebalancer(self._fleet.engine, self._fleet.holdings, self._estimates, rules)

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return len(self._pending)

    @property
    def data_book(self) -> PinBook:
        """Whose data has its room where."""
        return self._fleet.engine.book

    @property
    def nodes(self) -> int:
        """Nodes that it knows."""
        return self._fleet.size

    @property
    def known_nodes(self) -> Mapping[str, Node]:
        """As they were told last."""
        return self._fleet.holdings.devices.nodes

    def could_hold(self, queue: str, spec: Spec) -> bool:
        """Whether queue and fleet are known to be large enough for the job; asked of any thread, False when it has to be worked out."""
        spec = elastic.at_least(spec)
        return not self._over_queue(queue, spec.gpus) and self._fleet.capacity.known_enough(self._ever(queue, spec))

    def dry_run(self, job: Job, now: datetime) -> SchedulingDecision:
        """What `decide` would answer for a job that does not exist yet."""
        if planned_sizes.wish_of(job.spec) is not None:  # it starts with what it was planned for, where that is free
            decision = self._planned(job, now)
            if decision.placed:
                return decision
        sizes = tuple(planned_sizes.why_sizes(job.spec))
        job = replace(job, spec=elastic.at_least(job.spec))
        decision = self._planned(job, now)
        decision = replace(decision, reasons=(*decision.reasons, *sizes))
        return decision if decision.placed else self._with_money(decision, job, now)

    def _planned(self, job: Job, now: datetime) -> SchedulingDecision:
        if limit := self._over_limit(job):
            full = self._is_full(limit, job, now)
            swap = room_under_limit(self._fleet.engine, self._fleet.holdings, place_request(job.name, job.spec), job)
            return self._with_stops(full, job, swap, now) if isinstance(swap, PreemptionPlan) else full
        if not self.nodes:
            return wait_reasons.no_nodes(now)
        if reserved := self._reserved.why(job, now):
            there = self._reserved.place(job, shape(job.spec))
            if there is None:
                return self._in_line(reserved, job)
            return self._priced(job, there, now)
        request = self._within_quota(place_request(job.name, job.spec), job)
        wished = self._wished(self._reserved.away(request, job, now), job, now)
        answer = self._fleet.engine.place(wished)
        if isinstance(answer, Placement):
            if waits := self._patience.cheaper(job, wished, answer, now):
                return self._in_line(wait_reasons.for_cheaper(waits, now), job)
            return self._priced(job, answer, now)
        decision = self._kept_few(wait_reasons.does_not_fit(answer, now), request, job)
        decision = self._in_line(self._in_time(decision, job, now), job)
        asked = self._reserved.away(request, job, now)
        plan = room_for(self._fleet.engine, self._fleet.holdings, asked, job)
        return decision if plan is None else self._with_stops(decision, job, plan, now)

    def explain(self, job: Job, exclude: Iterable[str], now: datetime) -> SchedulingDecision:
        """Why a waiting job waits, at this moment."""
        waits = self._with_money(self._waits_why(job, exclude, now), replace(job, spec=elastic.at_least(job.spec)), now)
        return replace(waits, reasons=(*planned_sizes.why_sizes(job.spec), *waits.reasons))

    def _waits_why(self, job: Job, exclude: Iterable[str], now: datetime) -> SchedulingDecision:
        if kept := wait_reasons.kept_back(job, now):
            return kept
        if (until := after_failure.paused_until(job, now)) is not None:
            return wait_reasons.pauses(until, now)
        job = replace(job, spec=elastic.at_least(job.spec))
        if limit := self._over_limit(job):
            return self._in_line(self._full(limit, job, now), job)
        if full := self._over_array_limit(job):
            return self._in_line(wait_reasons.array_is_full(full, now), job)
        if short := self._data_short.get(job.name):
            return self._in_line(wait_reasons.data_is_full(short, now), job)
        if reserved := self._reserved.why(job, now):
            next_ = self._reserved.place(job, shape(job.spec)) is not None
            return self._in_line(wait_reasons.is_next(now) if next_ else reserved, job)
        if not self.nodes:
            return self._in_line(wait_reasons.no_nodes(now), job)
        avoided = frozenset(exclude)
        request = self._within_quota(place_request(f"{job.name}?", job.spec, exclude_nodes=avoided), job)
        with self._fleet.holdings.without(job.name):
            answer = self._fleet.engine.place(request)
        if isinstance(answer, Placement):
            waits = self._patience.of(job.name)
            return self._in_line(wait_reasons.for_cheaper(waits, now) if waits else wait_reasons.is_next(now), job)
        decision = self._kept_few(wait_reasons.does_not_fit(answer, now, avoided), request, job)
        claims = [name for name in self._fleet.holdings.claims if name != job.name and not is_reservation(name)]
        decision = wait_reasons.with_claims(decision, claims)
        decision = wait_reasons.with_reservations(decision, self._reserved.in_the_way_of(job, now))
        decision = self._with_those_who_leave(decision, job, now)
        if (claim := self._fleet.holdings.claim(job.name)) is not None:
            decision = wait_reasons.with_promise(decision, claim)
        elif (expected := self._expected_start(job, now)) is not None:
            decision = wait_reasons.with_expected_start(decision, *expected)
        if not decision.preempts:
            decision = self._sooner(decision, request, job, now)
        return self._in_line(self._in_time(decision, job, now), job)

    def _expected_start(self, job: Job, now: datetime) -> tuple[datetime, datetime] | None:
        return self._promises.expected_start(job, self._before(job), now, self._reserved.returns())

    def _before(self, job: Job) -> list[Job]:
        """Jobs of all queues that were submitted before it or are of higher priority, in order."""
        key, others = order_of(job), (waiting.candidate.job for waiting in self._pending.jobs.values())
        return heapq.nsmallest(MOST_BEFORE, (other for other in others if order_of(other) < key), key=order_of)

    def shortage(self, queue: str, spec: Spec) -> str:
        """Why the job can never run in this queue and fleet as they are, however long it waits; "" when it can, or nobody knows."""
        spec = elastic.at_least(spec)
        if limit := self._over_queue(queue, spec.gpus):
            return wait_reasons.queue_is_small(limit, spec.gpus)
        short = self._fleet.capacity.short_of(self._ever(queue, spec)) if not self._fleet.left_out else None
        if short is None:
            return ""
        known, asked = self._fleet.capacity, shape(spec)
        return known.unknown_sites(asked) or known.unknown_types(asked) or capacity.in_words(short)

    def _over_queue(self, queue: str, gpus: int) -> QueueLimit | None:
        return self._limits.ever_over(queue, gpus)

    def _is_full(self, limit: QueueLimit, job: Job, now: datetime) -> SchedulingDecision:
        return self._limits.is_full(limit, job, now)

    def _ever(self, queue: str, spec: Spec) -> PlaceRequest:
        """What is asked for, of the GPU types of which the queue could ever take enough."""
        return that_may(shape(spec), lambda gpus: self._over_queue(queue, gpus) is None)

    def reservation_fleet(self) -> Fleet:
        """What GPUs reservations may be given."""
        return self._reserved.fleet()

    def free_nodes(self) -> list[FreeNode]:
        """What nodes that take work have left."""
        return free_nodes(self._fleet.engine)

    def network(self) -> Fabric:
        """What lies above the nodes."""
        return self._fleet.engine.fabric

    def gpus_wanted(self) -> Counter[str]:
        """GPUs that jobs wait for in vain, and would start with, by catalogue name of each type that would do; "": any. Of `MOST_BEFORE` jobs at most."""
        found: Counter[str] = Counter()
        for one in itertools.islice(self._pending.jobs.values(), MOST_BEFORE):
            job = one.candidate.job
            if one.line.kind.refused and self._could_burst(job):
                models = [choice.model for choice in job.spec.gpu_choices] or [""]
                found.update(dict.fromkeys(models, elastic.at_least(job.spec).gpus))
        return found

    def plan_rebalance(self, now: datetime, *, thorough: bool = False) -> RebalancePlan:
        """Running jobs that should go elsewhere now; `thorough`: also for those who wait that were looked at lately in vain."""
        gangs = sorted(self._gangs(), key=lambda gang: order_of(gang.job))
        return self._rebalancer.plan(gangs, now, thorough=thorough)

    def _gangs(self) -> Iterator[Gang]:
        """The first ones in line of whom it is known that they fit nowhere, though as many GPUs are free in all."""
        free, holdings = self._fleet.engine.free_gpus(), self._fleet.holdings
        for kind in self._pending.classes:
            claim = holdings.claim(kind.own) if kind.own else None
            promised = claim is not None and claim.purpose is ClaimPurpose.RESERVATION
            if not (kind.refused or promised) or kind.impossible or kind.gpus < 2 or (kind.own and not promised):
                continue
            for line in kind.lines.values():
                first = line.first()
                job = self._pending.jobs[first[1]].candidate.job if first else None
                if job is None or free + holdings.count_of(job.name) < kind.need.gpus or self._kept_back(job):
                    continue
                yield Gang(job, replace(self._within_quota(kind.request, job), id=job.name))

    def burst_facts(self, nodes: Iterable[str], now: datetime) -> BurstFacts:
        """The first ones who wait for whole GPUs, and what is on these nodes, which are rented, and beside them."""
        holdings, waiting = self._fleet.holdings, (one.candidate.job for one in self._pending.jobs.values())
        jobs = heapq.nsmallest(MOST_BURST, (job for job in waiting if self._could_burst(job)), key=order_of)
        claimed = {node for claim in holdings.claims.values() for node, _ in claim.nodes}
        asked = frozenset(nodes)
        free = Counter[str]()
        for one in free_nodes(self._fleet.engine):
            if one.gpus and one.node.name not in asked:
                free[one.node.gpus[0].model] += one.gpus
        return BurstFacts(
            waiting=tuple(self._waits(job, now) for job in jobs),
            busy=frozenset(node for node in asked if node in claimed or holdings.jobs_on(node)),
            known=asked & frozenset(holdings.devices.open),
            free=free,
        )

    def _could_burst(self, job: Job) -> bool:
        """Whether more GPUs would let it start: no limit keeps it back."""
        return self._is_rented_for(job.spec) and not self._kept_back(job)

    def _is_rented_for(self, spec: Spec) -> bool:
        """No machine is rented with MIG instances, and what is reserved is there."""
        return bool(spec.gpus) and not spec.mig_profile and not spec.mig_memory_bytes and not spec.reservation

    def would_wait(self, job: Job, now: datetime) -> Waiting | None:
        """What renting would be asked of a job that is not there yet; None: nothing is rented for such jobs."""
        limited = self._over_queue(job.queue, elastic.at_least(job.spec).gpus)
        return self._waits(job, now) if not limited and self._is_rented_for(job.spec) else None

    def _waits(self, job: Job, now: datetime) -> Waiting:
        """How long, as far as that is known, and what it needs."""
        claim, spec = self._fleet.holdings.claim(job.name), elastic.at_least(job.spec)
        expected = self._promises.expected_start(job, self._before(job), now)
        start = claim.start_time if claim is not None and claim.start_time else expected[0] if expected else None
        return Waiting(
            name=job.name,
            queue=job.queue,
            gpus=spec.gpus,
            wait_s=None if start is None else max(0.0, (start - now).total_seconds()),
            run_s=self._runs_s(job),
            waited_s=(now - (job.state_time or job.create_time)).total_seconds(),
            late_s=None if spec.deadline is None else (spec.deadline - now).total_seconds(),
            models=frozenset(choice.model for choice in spec.gpu_choices),
            sites=frozenset(map(names.last, spec.sites)),
            least_memory_bytes=spec.min_memory_bytes,
            no_spot=spec.no_spot,
            one_node=spec.max_nodes == 1 or any(_within_node(rule, spec.gpus) for rule in spec.placement),
            min_nodes=spec.min_nodes,
            per_unit={choice.model: choice.per_unit for choice in spec.gpu_choices if choice.per_unit > 1},
            share_memory_bytes=spec.share_memory_bytes,
            least_capability=divmod(spec.min_compute_capability, 10),
            labels=frozenset(spec.node_labels),
            nvme=spec.needs_nvme,
        )

    def _runs_s(self, job: Job) -> float:
        """For how long it will run, likely; a service, which ends when somebody says so, for a day."""
        if job.spec.is_service and job.spec.time_limit_s is None:
            return SERVES_S
        return max(60.0, self._estimates.of(job, job.run_s).likely_s - job.run_s)

    def _full(self, limit: QueueLimit, job: Job, now: datetime) -> SchedulingDecision:
        """Its queue may not take it now; unless others are on their way out for it."""
        return self._with_those_who_leave(self._is_full(limit, job, now), job, now)

    def _kept_back(self, job: Job) -> bool:
        return bool(self._over_limit(job) or self._over_array_limit(job))

    def queue_use(self, queues: Iterable[str]) -> dict[str, QueueUse]:
        """What queues hold, by id, and who of them can never start."""
        stuck = self._limits.stuck(self._first_in_lines())
        data = data_quota.held(self._shares.quota, self._fleet.engine.book)
        return {
            queue: self._shares.use(queue)._replace(stuck=tuple(stuck.get(queue, ())), data_bytes=data[queue])
            for queue in queues
        }

    def gpus(self) -> tuple[Counter[str], Counter[str]]:
        """GPUs of open nodes and GPUs held, by model; for metrics."""
        return self._fleet.holdings.by_model()

    def held(self) -> dict[str, Gpus]:
        """What each job holds."""
        return self._fleet.holdings.by_job()

    def check(self) -> None:
        """Raises AssertionError when the engine holds something else than the jobs do, or a GPU is held twice."""
        self._fleet.holdings.check()

    def _over_limit(self, job: Job, gpus: int | None = None) -> QueueLimit | None:
        """What keeps its queue from taking as many GPUs as it asks for, or so many. What is reserved was admitted with its reservation."""
        if self._reserved.find(job.spec) is not None:
            return None
        own, lends_back = self._fleet.holdings.count_of(job.name), not job.spec.is_service
        wanted, free = job.spec.gpus if gpus is None else gpus, self._fleet.engine.free_gpus
        swap = self._fleet.holdings.swap_of(job.name)
        return self._shares.quota.admit(job.queue, wanted, own=own, free=free, lends_back=lends_back, swap=swap)

    def _within_quota(self, request: PlaceRequest, job: Job) -> PlaceRequest:
        """Of the GPU types of which its queue may take as many as are needed now."""
        return that_may(request, lambda gpus: self._over_limit(job, gpus) is None)

    # money and time

    def _wished(self, request: PlaceRequest, job: Job, now: datetime) -> PlaceRequest:
        """With what the job prefers at this moment."""
        work_s = goals.work_left_s(job, self._estimates, now) if goals.looks_ahead(job.spec) else 0.0
        return goals.asked(request, job, work_s, now)

    def _assigned(self, job: Job, placement: Placement) -> GpuAssignment:
        """The GPUs, with the rank that each gets."""
        devices = self._fleet.holdings.devices
        assignment = planned_sizes.with_split(decisions.assignment_of(placement, devices), job)
        return rank_maps.laid(assignment, job.spec, devices.nodes, self._fleet.engine.fabric)

    def _placed(self, job: Job, placement: Placement, assignment: GpuAssignment, now: datetime) -> SchedulingDecision:
        """The decision, with when and for how much it would end there."""
        decision = decisions.placed(job, placement, assignment, self._fleet.holdings.devices, next_epoch(job), now)
        ahead = goals.of_placement(job, placement, self._outlooks(job, now), now)
        return replace(decision, reasons=(*ahead, *decision.reasons)) if ahead else decision

    def _priced(self, job: Job, placement: Placement, now: datetime) -> SchedulingDecision:
        """The decision for who asks before it is made, with what would be cheaper where its budget is too small."""
        decision = self._placed(job, placement, self._assigned(job, placement), now)
        over = budgets.is_over(job, placement, now)
        cheaper = budgets.of_cheapest(job, self._cheapest(job, now), now, over=True) if over else ""
        told = filter(None, (cheaper, budgets.of_sizes(job, placement)))
        return replace(decision, reasons=(*told, *decision.reasons))

    def _with_money(self, decision: SchedulingDecision, job: Job, now: datetime) -> SchedulingDecision:
        """Of one that waits: with what its budget allows, and what an elastic job's sizes cost, on the cheapest GPUs that suit it."""
        if job.spec.budget_usd <= 0 and not job.spec.is_elastic:
            return decision
        cheapest = self._cheapest(job, now)
        sizes = budgets.of_sizes(job, cheapest) if cheapest is not None else ""
        told = filter(None, (budgets.of_cheapest(job, cheapest, now), sizes))
        return replace(decision, reasons=(*told, *decision.reasons))

    def _cheapest(self, job: Job, now: datetime) -> Placement | None:
        return self._fleet.capacity.cheapest(self._wished(self._ever(job.queue, job.spec), job, now))

    def _in_time(self, decision: SchedulingDecision, job: Job, now: datetime) -> SchedulingDecision:
        """With until when it has to start to keep its deadline, or that it cannot any more."""
        ahead = goals.of_waiting(job, self._outlooks(job, now), now)
        return replace(decision, reasons=(*ahead, *decision.reasons)) if ahead else decision

    def _outlooks(self, job: Job, now: datetime) -> list[goals.Outlook]:
        if job.spec.deadline is None or (work_s := goals.work_left_s(job, self._estimates, now)) <= 0:
            return []
        asked = shape(job.spec)

        def holds(model: str) -> bool:
            return self._fleet.capacity.short_of(of_model(asked, model) if model else asked) is None

        return goals.outlooks(job.spec, work_s, now, holds)

    def _kept_few(self, decision: SchedulingDecision, request: PlaceRequest, job: Job) -> SchedulingDecision:
        """With the GPU types that its queue keeps it from."""
        left = {option.model for option in request.requirement.any_of}
        kept = [choice for choice in job.spec.gpu_choices if choice.per_unit > 1 and choice.model not in left]
        return wait_reasons.with_quota(decision, kept, job) if kept else decision

    def _over_array_limit(self, job: Job) -> ArrayLimit | None:
        return over_array_limit(job, self._fleet.holdings.by_array, own=self._fleet.holdings.holds(job.name))

    def _with_victims(self, decision: SchedulingDecision, job: Job, victims: Sequence[str]) -> SchedulingDecision:
        known = (self._fleet.holdings.jobs.get(victim) for victim in victims)
        reclaimed = any(other is not None and other.spec.priority >= job.spec.priority for other in known)
        return wait_reasons.with_victims(decision, victims, reclaimed=reclaimed)

    def _with_those_who_leave(self, decision: SchedulingDecision, job: Job, now: datetime) -> SchedulingDecision:
        """With those who are stopped for it, or whom it lets end."""
        if (waits := self._soon_over.of(job.name, now)) is not None:
            return wait_reasons.lets_end(decision, waits, now)
        return self._with_victims(decision, job, still_stopping(self._fleet.holdings, job.name))

    def _with_stops(
        self, decision: SchedulingDecision, job: Job, plan: PreemptionPlan, now: datetime
    ) -> SchedulingDecision:
        """With those who would be stopped for it, now or unless they end before."""
        victims = stopped(plan)
        if (waits := self._soon_over.weighed(job, dict.fromkeys(victims), now)) is not None:
            return wait_reasons.lets_end(decision, waits, now)
        return self._with_victims(decision, job, victims)

    def positions(self, names: Iterable[str]) -> dict[str, int]:
        """Of those that wait: their positions in their queues, from 1."""
        return self._pending.positions(names)

    def _in_line(self, decision: SchedulingDecision, job: Job) -> SchedulingDecision:
        """With its position in its queue, and who goes first."""
        return wait_reasons.in_line(decision, self._pending.before(job), self._queues_before(job))

    def _queues_before(self, job: Job) -> list[str]:
        """Other queues whose turn it is before the job's, the first one first."""
        turn, due = self._shares.turn, dict[str, Turn]()
        own = turn(job.queue, job.spec.gpus, job.spec.priority)
        for queue, line in itertools.islice(self._waiting_lines(), MOST_LINES):
            if queue != job.queue and not line.parked:
                key = turn(queue, line.kind.gpus, line.kind.priority)
                due[queue] = min(due.get(queue, key), key)
        return sorted((queue for queue, key in due.items() if key < own), key=due.__getitem__)

    def _first_in_lines(self) -> Iterator[Job]:
        """Of jobs that ask for the same in one queue, the first."""
        for _, line in itertools.islice(self._waiting_lines(), MOST_LINES):
            if (first := line.first()) is not None:
                yield self._pending.jobs[first[1]].candidate.job

    def _waiting_lines(self) -> Iterator[tuple[str, Line]]:
        return ((queue, line) for queue, lines in self._pending.by_queue.items() for line in lines)

    def _sooner(
        self, decision: SchedulingDecision, request: PlaceRequest, job: Job, now: datetime
    ) -> SchedulingDecision:
        """With what would start it now, as far as that is known without trying everything."""
        return wait_reasons.sooner(decision, self._over_in_s(request, job, now), self._enough_priority(request, job))

    def _over_in_s(self, request: PlaceRequest, job: Job, now: datetime) -> float | None:
        """In how many seconds it had to be over to start now on GPUs that are promised to others; None: it would not fit there either."""
        holdings, found = self._fleet.holdings, None
        with holdings.without(job.name):
            for left_s, claimants in self._promises.windows(job, now):
                with holdings.without_claims(claimants):
                    found = left_s if self._fleet.engine.feasible(request) else None
                if found is not None:
                    break
        return found

    def _enough_priority(self, request: PlaceRequest, job: Job) -> int | None:
        """The least priority below which enough GPUs are held by work that may be stopped; None: there are not, or it is above that already."""
        free, found = self._fleet.engine.free_gpus() + self._fleet.holdings.count_of(job.name), 0
        for priority, gpus in sorted(self._fleet.holdings.stoppable.items()):
            found += gpus
            if gpus and free + found >= request.units:
                return priority + 1 if job.spec.priority <= priority < HIGHEST_PRIORITY else None
        return None


def _within_node(rule: Rule, gpus: int) -> bool:
    """Whether all ranks have to be on one node."""
    return not rule.preferred and rule.size in (0, gpus) and rule.level >= Level.NODE
