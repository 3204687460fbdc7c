"""A small fleet whose plan is told whatever can happen: the simulation's jobs and nodes, and news that no simulation has.

Transitions are the production core's (`lifecycle`, through the simulation); what the plan decides is written and comes back as news with the
next step, as the leader's loop does it. After each change the world comes to rest, and `checks` look at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tests.support.plan_soak import checks
from tests.support.scheduler_world import GB, node
from whaleflux.fleet.model import Node
from whaleflux_scheduler.core import elastic
from whaleflux_scheduler.core.estimates import safe_s
from whaleflux_scheduler.core.model import Job, JobState, Queue
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.plan import Move, News, Plan
from whaleflux_scheduler.core.queue_shares import past_uses
from whaleflux_scheduler.core.quota import Claimant
from whaleflux_scheduler.simulation import happenings, moves
from whaleflux_scheduler.simulation.records import MoveLog
from whaleflux_scheduler.simulation.runner import first_of_each
from whaleflux_scheduler.simulation.running import SimulatedJob
from whaleflux_scheduler.simulation.state import Result, State
from whaleflux_scheduler.simulation.timeline import NEVER_S, instant, second_of
from whaleflux_scheduler.simulation.workload import Delays

NODES = tuple(
    node(f"s/{leaf}{i}", leaf=leaf, model=model)
    for leaf, model in (("x", "H100-80GB"), ("y", "A100-80GB"))
    for i in (1, 2)
)
QUEUES = {name: Queue(f"queues/{name}") for name in "pq"}
DELAYS = Delays(start_s=20.0, save_s=15.0, checkpoint_every_s=600.0, restart_s=20.0, recover_s=5.0)
CHECK_EVERY = 10  # times at rest: each plan is compared with one that is built anew
MOST_STEPS = 60  # until it rests
REMEMBERED = 60  # ended jobs that a new leader learns from


class SoakedPlan(Plan):
    """The production plan, with what checks ask of it."""

    def lasts_s(self, job: Job) -> float:
        """In how many seconds the job would surely be over; of an elastic one, as it waits: for its least size."""
        return safe_s(self._estimates, replace(job, spec=elastic.at_least(job.spec)))

    def claimant(self, job: Job, gpus: int) -> Claimant:
        return Claimant(self._shares.quota, job.name, job.queue, gpus, job.spec.priority)

    def waits(self, name: str) -> bool:
        return name in self._pending.jobs

    def claims_of(self) -> dict[str, tuple[tuple[str, tuple[str, ...]], ...]]:
        return {name: claim.nodes for name, claim in self._fleet.holdings.claims.items()}


class TriesAll(SoakedPlan):
    """The reference: nobody is passed over."""

    def decide(self, now, budget_s=float("inf")):
        for kind in list(self._pending.classes):
            self._try_again(kind)
        for top in list(self._parked):
            self._unpark(top)
        self._swaps |= {line: None for lines in self._parked.values() for line in lines}
        return super().decide(now, budget_s)


@dataclass
class More:
    """News that simulations have none of."""

    removed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    datasets: dict[str, DatasetFact | None] = field(default_factory=dict)
    saved: bool = False

    def __bool__(self) -> bool:
        return bool(self.removed or self.gone or self.datasets or self.saved)


class PlanWorld:
    """See the module. `against_all`: a second plan that passes nobody over has to decide the same."""

    def __init__(
        self, *, against_all: bool = False, reasons: bool = False, plan: type[SoakedPlan] = SoakedPlan
    ) -> None:
        self.kinds = (plan, TriesAll) if against_all else (plan,)
        self.against_all, self.reasons, self.nodes = against_all, reasons, {one.name: one for one in NODES}
        self.why_closed = dict.fromkeys(self.nodes, "")
        self.state = State(NODES, QUEUES, DELAYS, Result(16, 0.0, MoveLog()))
        self.plans = tuple(kind(reasons=reasons) for kind in self.kinds)
        self.more, self.number, self.steps, self.rests = More(), 0, 0, 0
        self.seen = -1
        self.over: list[Job] = []  # the newest of the ended jobs
        self.datasets: dict[str, DatasetFact] = {}
        self.rest()

    @property
    def plan(self) -> SoakedPlan:
        return self.plans[0]

    @property
    def now_s(self) -> float:
        return self.state.now_s

    @property
    def now(self):
        return instant(self.state.now_s)

    @property
    def records(self) -> dict[str, Job]:
        """Jobs that have not ended, as they are stored."""
        return {name: one.job for name, one in self.state.jobs.items()}

    # time

    def passes(self, seconds: float) -> None:
        """To the next thing that happens, at the latest until then; the plan is asked when it wants to be."""
        due_s = min(self.state.timeline.next_s, self.plan_s())
        self.state.now_s = max(self.now_s, min(self.now_s + seconds, due_s))
        self.state.timeline.run_until(self.now_s)
        self.rest(look=self.plan_s() <= self.now_s)

    def plan_s(self) -> float:
        looks = (plan.next_look for plan in self.plans)
        return min((second_of(at) for at in looks if at is not None), default=NEVER_S)

    # deciding

    def rest(self, *, look: bool = False) -> None:
        """Decides until nothing follows any more."""
        for _ in range(MOST_STEPS):
            if not (self.state.news or self.more or look):
                self.looked_at()
                return
            look = False
            self.step()
        raise AssertionError(f"it does not come to rest within {MOST_STEPS} steps")

    def looked_at(self) -> None:
        """Whether all is right where anything happened since it was asked last."""
        if self.steps == self.seen:
            return
        self.seen, self.rests = self.steps, self.rests + 1
        checks.at_rest(self, wholly=self.rests % CHECK_EVERY == 0)

    def step(self) -> None:
        news = self.take_news()
        self.steps += 1
        made = [plan.step(news, self.now) for plan in self.plans]
        self.carry_out(made)

    def carry_out(self, made: list[list[Move]]) -> None:
        """What the plans decided alike is written."""
        checks.alike(made)
        chosen = list(first_of_each(made[0]))
        before = checks.Before(self)
        for move in chosen:
            moves.apply(self.now_s, self.state, move)
        before.compare(self, chosen)

    def take_news(self) -> News:
        more, self.more, news = self.more, More(), self.state.take_news()
        self.over = [*self.over, *(job for job in news.jobs if job.ended)][-REMEMBERED:]
        return replace(
            news,
            candidates={name: None if one and one.job.hold else one for name, one in news.candidates.items()},
            removed=tuple(more.removed),
            gone=tuple(more.gone),
            saved=self.state.saved(self.now_s) if more.saved else None,
            datasets=tuple(fact for fact in more.datasets.values() if fact is not None),
            datasets_gone=tuple(name for name, fact in more.datasets.items() if fact is None),
        )

    def take_over(self) -> None:
        """Another leads, who knows what is stored and nothing else."""
        state = self.state
        self.plans = tuple(kind(reasons=self.reasons) for kind in self.kinds)
        pending, state.news = state.news, type(state.news)()
        self.more = More(saved=True, datasets=dict(self.datasets))
        jobs = (*self.over, *self.records.values())
        waiting = {name: Candidate(job) for name, job in self.records.items() if self.may_be_placed(job)}
        known = [one for one in self.nodes.values() if one.name in self.why_closed]
        news = replace(
            self.take_news(),
            nodes=tuple(known),
            closed={one.name: self.why_closed[one.name] for one in known},
            jobs=(*jobs, *(job for job in pending.jobs.values() if job.ended)),
            candidates=waiting,
            queues=dict(state.queues),
            reservations=dict(state.reservations),
            past_uses=past_uses(jobs, self.now),
        )
        self.steps += 1
        self.carry_out([plan.step(news, self.now) for plan in self.plans])
        self.rest()

    def may_be_placed(self, job: Job) -> bool:
        """Whether the leader offers it to the plan."""
        waits = job.state is JobState.QUEUED or (job.state is JobState.RECOVERING and self.diagnosed(job))
        paused = job.not_before is not None and second_of(job.not_before) > self.now_s
        return waits and job.hold is None and not paused

    def diagnosed(self, job: Job) -> bool:
        """Whether it is known why its attempt ended: the plan has it, or is about to."""
        return self.plan.waits(job.name) or job.name in self.state.news.candidates

    # what rules use

    def known(self, *states: JobState) -> list[SimulatedJob]:
        return [one for one in self.state.jobs.values() if one.job.state in states]

    def record(self, simulated: SimulatedJob, job: Job) -> None:
        """The job is written like this; nothing of it happens but that."""
        simulated.job = job
        happenings.claims(self.state, job)
        self.state.news.record(job)
        if self.may_be_placed(job):
            self.state.news.candidates[job.name] = Candidate(job)
        elif job.hold is not None:
            self.state.news.candidates[job.name] = None

    def look(self, names: Iterable[str]) -> None:
        """The leader looks at these jobs."""
        for name in names:
            if (one := self.state.jobs.get(name)) is not None:
                happenings.look(self.now_s, self.state, one, one.turn)

    def delete(self, simulated: SimulatedJob) -> None:
        """Its record is gone, whatever it was doing."""
        name, state = simulated.job.name, self.state
        happenings.leave(self.now_s, state, simulated, "deleted")
        simulated.turn += 1
        state.claimants.set(name, ())
        state.going_on.pop(name, None)
        state.claiming.pop(name, None)
        state.news.jobs.pop(name, None)
        state.news.candidates.pop(name, None)
        del state.jobs[name]
        self.more.gone.append(name)

    def set_queues(self, queues: Mapping[str, Queue]) -> None:
        self.state.queues = dict(queues)
        self.state.news.queues = dict(queues)

    def set_reservations(self) -> None:
        for name, one in self.state.reservations.items():
            self.state.leaving.set(name, one.victims)
        self.state.news.reservations = dict(self.state.reservations)

    def tell_node(self, known: Node) -> None:
        self.nodes[known.name] = known
        self.state.news.nodes.append(known)

    def copy_of(self, nodes: tuple[str, ...]) -> DatasetFact:
        return DatasetFact("datasets/text", GB, nodes)
