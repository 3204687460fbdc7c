"""The planner: the placement engine, what every job holds in it, and the jobs that wait.

It belongs to one thread at a time. `learn` brings news, `decide` chooses for as many waiting jobs as fit into its time. What it
chooses is held in the engine at once; when the store refuses the write, `learn` with the job as it is stored takes it back.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, Conflict
from whaleflux.fleet.model import Level, LinkKind, Node
from whaleflux_scheduler.core import decisions
from whaleflux_scheduler.core.lifecycle import Place, next_epoch
from whaleflux_scheduler.core.model import Decision, Job, JobState, Queue
from whaleflux_scheduler.core.placement.api import (
    Bottleneck,
    Cost,
    DatasetFact,
    GpuOption,
    NodeAssignment,
    NoPlacement,
    Placement,
    PlaceRequest,
    PreemptionPlan,
    Victim,
)
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.queueing import Candidate, Turns, over_limit
from whaleflux_scheduler.core.request import place_request

log = logging.getLogger(__name__)

Holding = dict[str, frozenset[int]]  # node -> GPU indices
_MOST_AHEAD = 10


@dataclass(frozen=True, slots=True)
class News:
    """What changed since the planner last looked."""

    nodes: tuple[Node, ...] = ()
    removed: tuple[str, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)  # node -> why it takes no work; "": it does
    jobs: tuple[Job, ...] = ()
    gone: tuple[str, ...] = ()  # jobs deleted
    candidates: Mapping[str, Candidate | None] = field(default_factory=dict)  # None: waits no more
    queues: Mapping[str, Queue] | None = None
    datasets: tuple[DatasetFact, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with one waiting job: give it a place, make room by suspending others, or let it wait."""

    job: str
    decision: Decision
    place: Place | None = None
    victims: tuple[str, ...] = ()
    begun: datetime | None = None
    ended: datetime | None = None


class Planner:
    """See the module."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._engine = clock, Engine()
        self._nodes: dict[str, Node] = {}
        self._open: set[str] = set()
        self._held: dict[str, Holding] = {}  # by job, on nodes known or not
        self._jobs: dict[str, Job] = {}  # jobs that hold something
        self._disputed: set[str] = set()  # jobs whose holding the engine could not take
        self._queue_held: Counter[str] = Counter()
        self._queues: Mapping[str, Queue] = {}
        self._waiting: dict[str, Candidate] = {}
        self._untried: set[str] = set()
        self._making_room: dict[str, frozenset[str]] = {}  # waiting job -> jobs suspended for it
        self._refused: dict[PlaceRequest, NoPlacement] = {}  # shapes that do not fit at present

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return len(self._waiting)

    @property
    def unfinished(self) -> bool:
        """True when `decide` ran out of time before it had tried every job."""
        return bool(self._untried)

    def learn(self, news: News) -> None:
        """Takes in what changed; cheap, decides nothing."""
        if news.queues is not None:
            self._queues = news.queues
            self._try_all()
        for fact in news.datasets:
            self._engine.upsert_dataset(fact)
        for node in news.nodes:
            self._upsert(node)
        for name in news.removed:
            self._remove(name)
        for name, why in news.closed.items():
            self._close(name, why)
        for job in news.jobs:
            self._hold(job, _holding(job))
        for name in news.gone:
            self._release(name)
        for name, candidate in news.candidates.items():
            self._wait(name, candidate)

    def decide(self, budget_s: float = 0.05) -> list[Choice]:
        """Tries waiting jobs in turn until all were tried or `budget_s` is over."""
        end_s = self._clock.monotonic() + budget_s
        candidates = [self._waiting[name] for name in self._untried if name in self._waiting]
        self._untried.clear()
        choices: list[Choice] = []
        turns = iter(Turns(candidates, self._queues, self._queue_held))
        for candidate in turns:
            choices.append(self._choose(candidate))
            if self._clock.monotonic() >= end_s:
                self._untried.update(left.job.name for left in turns)
        return choices

    def dry_run(self, job: Job, now: datetime) -> Decision:
        """What `decide` would answer for a job that does not exist yet; changes nothing."""
        if why := over_limit(job, self._queues, self._queue_held):
            return decisions.held_back(why, now, "raise the queue's max_gpus")
        request = place_request(job.name, job.spec)
        answer = self._engine.place(request)
        if isinstance(answer, Placement):
            return decisions.placed(job, answer, self._nodes, next_epoch(job), now)
        decision = self._in_line(decisions.waits(answer, now), job)
        victims = self._victims(job)
        plan = self._engine.preempt(request, victims) if victims else answer
        return replace(decision, preempts=plan.victims[:_MOST_AHEAD]) if isinstance(plan, PreemptionPlan) else decision

    def explain(self, job: Job, exclude: Iterable[str], now: datetime) -> Decision:
        """Why a waiting job waits, at this moment."""
        own = _count(self._held.get(job.name, {}))
        if job.not_before is not None and job.not_before > now:
            return decisions.held_back(f"pauses until {job.not_before.isoformat()} after a failure", now)
        if why := over_limit(job, self._queues, self._queue_held, own):
            return self._in_line(decisions.held_back(why, now, "raise the queue's max_gpus"), job)
        avoided = frozenset(exclude)
        with self._without_own(job.name):
            answer = self._engine.place(place_request(f"{job.name}?", job.spec, exclude_nodes=avoided))
        if isinstance(answer, Placement):
            return self._in_line(decisions.held_back("it is its turn any moment", now), job)
        return self._in_line(decisions.waits(answer, now, avoided), job)

    def gpus(self) -> tuple[Counter[str], Counter[str]]:
        """GPUs of open nodes and GPUs held, by model; for metrics."""
        open_gpus = Counter(gpu.model for name in self._open for gpu in self._nodes[name].gpus)
        held: Counter[str] = Counter()
        for holding in self._held.values():
            for name, indices in holding.items():
                node = self._nodes.get(name)
                models = {gpu.index: gpu.model for gpu in node.gpus} if node else {}
                held.update(models.get(index, "unknown") for index in indices)
        return open_gpus, held

    def held(self) -> dict[str, Holding]:
        """What each job holds."""
        return {job: dict(holding) for job, holding in self._held.items()}

    def check(self) -> None:
        """Raises AssertionError when the engine holds something else than the jobs do."""
        self._engine.check()
        assert self._engine.placements.keys() | self._disputed == self._held.keys(), "holdings differ"

    # nodes

    def _upsert(self, node: Node) -> None:
        if self._nodes.get(node.name) == node:
            return
        self._nodes[node.name] = node
        self._engine.upsert_node(node)
        if node.name not in self._open:
            self._engine.set_schedulable(node.name, False, "not ready yet")
        self._try_all()

    def _remove(self, name: str) -> None:
        if self._nodes.pop(name, None) is not None:
            self._engine.remove_node(name)
            self._open.discard(name)
            self._refused.clear()

    def _close(self, name: str, why: str) -> None:
        if name not in self._nodes:
            return
        self._engine.set_schedulable(name, not why, why)
        if why:
            self._open.discard(name)
            self._refused.clear()  # they say how many nodes each constraint excludes
        elif name not in self._open:
            self._open.add(name)
            self._try_all()

    # holdings

    def _hold(self, job: Job, wanted: Holding) -> None:
        before = self._held.get(job.name, {})
        if wanted:
            self._jobs[job.name] = job
        else:
            self._jobs.pop(job.name, None)
        if before == wanted:
            return
        self._queue_held[job.queue] += _count(wanted) - _count(before)
        if before and job.name not in self._disputed:
            self._engine.release(job.name)
        self._disputed.discard(job.name)
        self._held.pop(job.name, None)
        if wanted:
            self._held[job.name] = wanted
            self._claim(job)
        if any(not indices <= wanted.get(node, frozenset()) for node, indices in before.items()):
            self._freed()

    def _claim(self, job: Job) -> None:
        try:
            self._engine.apply(_as_placement(job, self._held[job.name]))
            self._disputed.discard(job.name)
        except (AlreadyExists, Conflict) as twice:  # keep deciding for the others, and say so loudly
            log.error("%s holds GPUs that another job holds: %s", job.name, twice)  # no news in a trace
            self._disputed.add(job.name)

    def _freed(self) -> None:
        for name in sorted(self._disputed):
            self._claim(self._jobs[name])
        self._try_all()

    def _release(self, name: str) -> None:
        self._wait(name, None)
        if known := self._jobs.get(name):
            self._hold(known, {})

    @contextlib.contextmanager
    def _without_own(self, name: str) -> Iterator[None]:
        """The engine as if the job held nothing: it may start again on GPUs where its own remains are being killed."""
        if name not in self._held or name in self._disputed:
            yield
            return
        with self._engine.transaction():  # never committed
            self._engine.release(name)
            yield

    # waiting

    def _wait(self, name: str, candidate: Candidate | None) -> None:
        if candidate is None:
            self._waiting.pop(name, None)
            self._untried.discard(name)
            self._making_room.pop(name, None)
        elif self._waiting.get(name) != candidate:
            self._waiting[name] = candidate
            self._untried.add(name)

    def _try_all(self) -> None:
        self._refused.clear()
        self._untried.update(self._waiting)

    def _choose(self, candidate: Candidate) -> Choice:
        begun = self._clock.now()
        choice = self._try(candidate, begun)
        return replace(choice, begun=begun, ended=self._clock.now())

    def _try(self, candidate: Candidate, now: datetime) -> Choice:
        job = candidate.job
        own = _count(self._held.get(job.name, {}))
        if why := over_limit(job, self._queues, self._queue_held, own):
            return Choice(job.name, decisions.held_back(why, now, "raise the queue's max_gpus"))
        near = job.attempt.nodes if job.attempt else ()
        request = place_request(job.name, job.spec, exclude_nodes=candidate.exclude, near_nodes=near)
        shape = replace(request, id="")
        refused = self._refused.get(shape)
        if refused is not None and not own:
            return Choice(job.name, decisions.waits(refused, now, candidate.exclude))
        with self._without_own(job.name):
            answer = self._engine.place(request)
        if isinstance(answer, Placement):
            return self._give(job, answer, now)
        if not own:
            self._refused[shape] = answer
        return self._make_room(candidate, request, answer, now)

    def _give(self, job: Job, placement: Placement, now: datetime) -> Choice:
        decision = decisions.placed(job, placement, self._nodes, next_epoch(job), now)
        place = decisions.place_of(placement)
        wanted = dict(self._held.get(job.name, {}))
        for node, gpus in place.nodes:
            wanted[node] = wanted.get(node, frozenset()) | frozenset(gpus)
        self._wait(job.name, None)
        self._hold(job, wanted)
        return Choice(job.name, decision, place)

    def _make_room(self, candidate: Candidate, request: PlaceRequest, answer: NoPlacement, now: datetime) -> Choice:
        job = candidate.job
        decision = decisions.waits(answer, now, candidate.exclude)
        stopping = {name for name in self._making_room.get(job.name, ()) if name in self._held}
        if stopping:
            return Choice(job.name, replace(decision, preempts=tuple(sorted(stopping))[:_MOST_AHEAD]))
        victims = self._victims(job)
        plan = self._engine.preempt(request, victims) if victims else answer
        if not isinstance(plan, PreemptionPlan):
            return Choice(job.name, decision)
        self._making_room[job.name] = frozenset(plan.victims)
        return Choice(job.name, replace(decision, preempts=plan.victims[:_MOST_AHEAD]), victims=plan.victims)

    def _victims(self, job: Job) -> list[Victim]:
        """Running training of lower priority that is not being suspended already."""
        asked = frozenset[str]().union(*self._making_room.values())
        return [
            Victim(name, held.spec.priority, _lost_gpu_s(held))
            for name, held in self._jobs.items()
            if held.spec.priority < job.spec.priority
            and held.state is JobState.RUNNING
            and not held.spec.is_service
            and name not in asked
            and name not in self._disputed
        ]

    def _in_line(self, decision: Decision, job: Job) -> Decision:
        """With its position in its queue, and who goes first."""
        line = Turns([c for c in self._waiting.values() if c.job.name != job.name], self._queues, self._queue_held)
        key = (-job.spec.priority, job.create_time.timestamp(), job.name)
        first = [c.job for c in line if (-c.job.spec.priority, c.job.create_time.timestamp(), c.job.name) < key]
        same = sum(other.queue == job.queue for other in first)
        return replace(decision, ahead=tuple(other.name for other in first[:_MOST_AHEAD]), position=same + 1)


def _holding(job: Job) -> Holding:
    holding: Holding = {}
    for _, task in job.holding():
        holding[task.node] = holding.get(task.node, frozenset()) | frozenset(task.gpus)
    return holding


def _count(holding: Holding) -> int:
    return sum(map(len, holding.values()))


def _lost_gpu_s(job: Job) -> float:
    """Work since it began to run, an upper bound of what a preemption loses."""
    attempt = job.attempt
    if attempt is None or attempt.run_time is None:
        return 0.0
    return -attempt.run_time.timestamp() * attempt.gpus  # only compared: the later it began, the less is lost


def _as_placement(job: Job, holding: Holding) -> Placement:
    parts, rank = [], 0
    for node, indices in holding.items():
        count = len(indices)
        parts.append(
            NodeAssignment(
                node,
                tuple(sorted(indices)),
                "workers",
                tuple(range(rank, rank + count)),
                cpu_millicores=count * job.spec.cpu_millicores_per_rank,
                host_memory_bytes=count * job.spec.memory_bytes_per_rank,
            )
        )
        rank += count
    return Placement(job.name, tuple(parts), GpuOption(), Cost(), Bottleneck(Level.NODE, LinkKind.PCIE_HOST, 0.0))
