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
from whaleflux.errors import AlreadyExists, Conflict, Invalid
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
from whaleflux_scheduler.core.queueing import Candidate, Line, Lines, order_of, over_limit
from whaleflux_scheduler.core.request import place_request, shape

log = logging.getLogger(__name__)

Holding = dict[str, frozenset[int]]  # node -> GPU indices
_MOST_AHEAD = 10
_MOST_SHAPES = 20_000


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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A candidate with what it asks of the engine, worked out once."""

    candidate: Candidate
    request: PlaceRequest
    line: Line


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
        self._waiting: dict[str, Waiting] = {}
        self._lines = Lines()
        self._untried: set[Line] = set()  # something changed since the first of the line was tried
        self._untold: set[str] = set()  # jobs that wait and were not given a reason yet
        self._making_room: dict[str, frozenset[str]] = {}  # waiting job -> jobs suspended for it
        self._shapes: dict[PlaceRequest, int] = {}  # what is asked for, whoever asks, by number
        self._numbered = 0
        self._refused: dict[int, NoPlacement] = {}  # shapes that do not fit at present

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return len(self._waiting)

    @property
    def nodes(self) -> int:
        """Nodes that it knows."""
        return len(self._nodes)

    @property
    def unfinished(self) -> bool:
        """True when `decide` ran out of time before it had answered every job."""
        return bool(self._untried or self._untold)

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
        """Tries the first of each line in turn, the next when it fits, until none does or `budget_s` is over."""
        end_s = self._clock.monotonic() + budget_s
        choices: list[Choice] = []
        while self._untried and self._clock.monotonic() < end_s:
            line = self._lines.next_turn(self._untried, self._queues, self._queue_held)
            if line is None:
                self._untried.clear()
                break
            choice = self._choose(self._first(line))
            choices.append(choice)
            if choice.place is None:
                self._untried.discard(line)
        return choices + self._tell(end_s)

    def _first(self, line: Line) -> Waiting:
        first = self._lines.first(line)
        assert first is not None
        return self._waiting[first[1]]

    def _tell(self, end_s: float) -> list[Choice]:
        """Those behind the first of a line that does not fit wait for the same reason."""
        choices = []
        now = self._clock.now()
        for name in list(self._untold):
            waiting = self._waiting[name]
            if waiting.line in self._untried or self._clock.monotonic() >= end_s:
                continue
            self._untold.discard(name)
            choices.append(Choice(name, self._why(waiting, now)))
        return choices

    def _why(self, waiting: Waiting, now: datetime) -> Decision:
        job = waiting.candidate.job
        if why := self._over_limit(job):
            return decisions.held_back(why, now, "raise the queue's max_gpus")
        refused = self._refused.get(waiting.line.shape)
        if refused is None:
            return decisions.held_back("others of its kind go first", now)
        return decisions.waits(refused, now, waiting.candidate.exclude)

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
        try:
            self._engine.upsert_node(node)
        except Invalid as strange:  # inventory checks facts; what it let through must not stop the others
            log.error("%s is left out: %s", node.name, strange)
            return
        self._nodes[node.name] = node
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
            self._lines.leave(name)
            self._untold.discard(name)
            self._making_room.pop(name, None)
            return
        known = self._waiting.get(name)
        if known is not None and known.candidate == candidate:
            return
        job = candidate.job
        near = job.attempt.nodes if job.attempt else ()
        asked = shape(job.spec, tuple(sorted(candidate.exclude)), near)
        request = replace(asked, id=name)
        line = Line(job.spec.priority, job.queue, self._number(asked))
        self._waiting[name] = Waiting(candidate, request, line)
        self._lines.join(line, job)
        self._untold.add(name)
        own = bool(self._held.get(name))
        if own or line.shape not in self._refused or self._lines.first(line) == (order_of(job)[1], name):
            self._untried.add(line)

    def _number(self, asked: PlaceRequest) -> int:
        """The number of what is asked for; numbers are small to compare, requests are not."""
        if len(self._shapes) >= _MOST_SHAPES:
            used = {waiting.line.shape for waiting in self._waiting.values()}
            self._shapes = {known: number for known, number in self._shapes.items() if number in used}
        self._numbered += 1
        return self._shapes.setdefault(asked, self._numbered)

    def _try_all(self) -> None:
        self._refused.clear()
        self._untried = self._lines.all()

    def _over_limit(self, job: Job) -> str:
        return over_limit(job, self._queues, self._queue_held, _count(self._held.get(job.name, {})))

    def _choose(self, waiting: Waiting) -> Choice:
        begun = self._clock.now()
        self._untold.discard(waiting.candidate.job.name)
        choice = self._try(waiting, begun)
        return replace(choice, begun=begun, ended=self._clock.now())

    def _try(self, waiting: Waiting, now: datetime) -> Choice:
        job, request = waiting.candidate.job, waiting.request
        if why := self._over_limit(job):
            return Choice(job.name, decisions.held_back(why, now, "raise the queue's max_gpus"))
        own = bool(self._held.get(job.name))
        refused = self._refused.get(waiting.line.shape)
        if refused is not None and not own:
            return Choice(job.name, decisions.waits(refused, now, waiting.candidate.exclude))
        try:
            with self._without_own(job.name):
                answer = self._engine.place(request)
        except Invalid as never:  # of an older version's rules
            return Choice(job.name, decisions.held_back(str(never), now, "cancel it and submit it in another shape"))
        if isinstance(answer, Placement):
            return self._give(job, answer, now)
        if not own:
            self._refused[waiting.line.shape] = answer
        return self._make_room(waiting.candidate, request, answer, now)

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
        key = order_of(job)
        others = (waiting.candidate.job for waiting in self._waiting.values())
        first = sorted((order_of(other), other.queue) for other in others if order_of(other) < key)
        same = sum(queue == job.queue for _, queue in first)
        return replace(decision, ahead=tuple(name for (_, _, name), _ in first[:_MOST_AHEAD]), position=same + 1)


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
