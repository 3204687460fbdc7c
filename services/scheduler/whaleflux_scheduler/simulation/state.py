"""What all parts of a simulation share: its time, its jobs, what the planner was not told yet, and what is written down."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from datetime import datetime

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core import plan
from whaleflux_scheduler.core.holdings import held_by
from whaleflux_scheduler.core.model import Job, JobState, Queue
from whaleflux_scheduler.core.observed import NodeCondition
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.rebalance import RebalancePlan
from whaleflux_scheduler.core.reservations import Reservation, has_to_leave
from whaleflux_scheduler.job_pointers import JobPointers
from whaleflux_scheduler.simulation.records import MoveLog, Outcomes, Series, Spans
from whaleflux_scheduler.simulation.running import SimulatedJob
from whaleflux_scheduler.simulation.timeline import Timeline, instant
from whaleflux_scheduler.simulation.workload import Delays


@dataclass(slots=True)
class Unsaid:
    """What the planner was not told yet."""

    nodes: list[Node] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)  # as they are now, by name
    urgent: bool = False  # whether a job's record alone is something to decide about
    candidates: dict[str, Candidate | None] = field(default_factory=dict)
    queues: dict[str, Queue] | None = None
    reservations: dict[str, Reservation] | None = None

    def __bool__(self) -> bool:
        told = self.queues is not None or self.reservations is not None
        return bool(self.urgent or self.candidates or self.closed or self.nodes or told)

    def record(self, job: Job, *, urgent: bool = True) -> None:
        """The job as it is now, in place of what it was before, at the time of this change."""
        self.jobs.pop(job.name, None)
        self.jobs[job.name] = job
        self.urgent = self.urgent or urgent

    def as_news(self) -> plan.News:
        """For the planner."""
        return plan.News(
            nodes=tuple(self.nodes),
            closed=self.closed,
            jobs=tuple(self.jobs.values()),
            candidates=self.candidates,
            queues=self.queues,
            reservations=self.reservations,
        )


@dataclass(slots=True)
class Result:
    """What came of it; the records are complete up to `end_s`, where the last event was or the simulation was stopped."""

    gpus: int
    fleet_usd_per_hour: float
    moves: MoveLog
    spans: Spans | None = None
    outcomes: Outcomes = field(default_factory=Outcomes)
    held: Series = field(default_factory=Series)  # GPUs
    asked: Series = field(default_factory=Series)  # GPUs of jobs that wait
    closed: Series = field(default_factory=Series)  # GPUs of nodes that take no work
    job_usd: float = 0.0  # of the GPU-hours that jobs held, at their nodes' prices
    end_s: float = 0.0
    steps: int = 0
    step_s: float = 0.0  # CPU time in the planner
    apply_s: float = 0.0  # the same in the transitions that its moves make
    total_s: float = 0.0
    rebalances: list[RebalancePlan] = field(default_factory=list)  # that were carried out
    looks: int = 0  # for moves of running jobs
    look_s: float = 0.0  # wall time in them


class State:
    """See the module."""

    def __init__(
        self,
        nodes: Iterable[Node],
        queues: dict[str, Queue],
        delays: Delays,
        result: Result,
        reservations: Iterable[Reservation] = (),
    ) -> None:
        self.now_s, self.timeline = 0.0, Timeline()
        self.delays, self.result, self.queues = delays, result, dict(queues)
        self.reservations = {one.name: one for one in reservations}
        self.jobs: dict[str, SimulatedJob] = {}  # not ended
        self.claimants, self.leaving = JobPointers(), JobPointers()  # for other jobs, and for reservations
        self.sizes = {node.name: len(node.gpus) for node in nodes}
        self.conditions: dict[str, NodeCondition] = {}  # of nodes that take no work
        self.on_node: dict[str, dict[str, None]] = {}  # jobs in the order of their start
        self.claiming: dict[str, Set[str]] = {}  # by job: nodes of what it claims
        self.going_on: dict[str, None] = {}  # jobs that run, and claim where they go on
        self.news = Unsaid(nodes=list(nodes), closed=dict.fromkeys(self.sizes, ""), queues=dict(queues))
        self.news.reservations = dict(self.reservations) or None

    def take_news(self) -> plan.News:
        """What came since the last call."""
        taken, self.news = self.news, Unsaid()
        return taken.as_news()

    def is_on(self, job: Job, nodes: Iterable[str]) -> None:
        """An attempt has begun there."""
        for node in nodes:
            self.on_node.setdefault(node, {})[job.name] = None

    def is_off(self, job: Job, nodes: Iterable[str]) -> None:
        """Nothing of the job is there any more."""
        for node in nodes:
            self.on_node[node].pop(job.name, None)

    def saved(self, now_s: float) -> dict[str, datetime]:
        """When the newest regular checkpoint of each running job was written."""
        every_s = self.delays.checkpoint_every_s
        working = ((name, one) for name, one in self.jobs.items() if one.job.state is JobState.RUNNING)
        return {name: instant(one.saved_s(now_s, every_s)) for name, one in working if one.works_from_s <= now_s}

    def claimed_by(self, job: Job, now: datetime) -> str:
        """A job or a reservation that waits for GPUs of this one, "" for none: as the leader's loop works it out."""
        attempt = job.attempt
        held = {task.node: task.gpus for task in attempt.holding()} if attempt is not None else {}
        for name in sorted(self.claimants.to(job.name)):
            claimant = self.jobs.get(name)
            claim = claimant.job.claim if claimant is not None else None
            if claim is None or now >= claim.expire_time:
                continue
            if claim.asks(job, held):
                return name
        leaving = sorted(self.leaving.to(job.name))
        return next((name for name in leaving if has_to_leave(job.name, held, self.reservations[name])), "")

    def claim_is_free(self, job: Job) -> bool:
        """Whether nobody else holds any of what a running job claims to go on there: as the leader's loop works it out."""
        if job.claim is None or job.state is not JobState.RUNNING:
            return False
        others = {name: None for node, _ in job.claim.nodes for name in self.on_node.get(node, ()) if name != job.name}
        return not any(job.claim.concerns(held_by(self.jobs[name].job)) for name in others)

    def conditions_of(self, job: Job) -> dict[str, NodeCondition]:
        """Of the nodes that it is on, or claims, those that are not in order."""
        if not self.conditions:
            return {}
        nodes = {*(task.node for _, task in job.holding()), *(job.claim.gpus if job.claim else ())}
        return {node: self.conditions[node] for node in sorted(nodes) if node in self.conditions}
