"""Jobs as the core sees them: frozen data with the numbers of the contract's enums, and a few derived facts.

Instants are UTC. `convert` translates to and from `whaleflux.v1`; a test compares the enums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from whaleflux import names
from whaleflux.manifests.job_fields import Spec
from whaleflux.planning.wish import Kept


class JobState(IntEnum):
    """Where a job stands; `state_machine.NEXT` says what may follow."""

    UNSPECIFIED = 0
    QUEUED = 1
    STARTING = 2
    RUNNING = 3
    RECOVERING = 4
    SUSPENDING = 5
    SUCCEEDED = 6
    FAILED = 7
    CANCELLED = 8


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING})  # the attempt's tasks are desired on their nodes


class TaskPhase(IntEnum):
    """What an agent is doing with a task. Their order is that of `reached`, not of their numbers."""

    UNSPECIFIED = 0
    ACCEPTED = 1
    PULLING = 2
    FETCHING = 3
    STARTING = 4
    RUNNING = 5
    EXITED = 6
    KILLED = 7
    REFUSED = 8
    GONE = 9
    SETTING_UP = 10

    def reached(self, other: TaskPhase) -> bool:
        """Whether it is `other`, or comes after it."""
        return _ORDER[self] >= _ORDER[other]


_AFTER_FETCHING = TaskPhase.FETCHING + 0.5
_ORDER = tuple(_AFTER_FETCHING if phase is TaskPhase.SETTING_UP else float(phase) for phase in TaskPhase)  # by number

_FIRST_OVER, _LAST_OVER = int(TaskPhase.EXITED), int(TaskPhase.GONE)


@dataclass(frozen=True, slots=True)
class Task:
    """The part of an attempt on one node."""

    id: str
    node: str
    gpus: tuple[str, ...]  # UUIDs in rank order
    first_rank: int  # -1: `global_ranks` do not follow one another
    group_rank: int
    phase: TaskPhase = TaskPhase.UNSPECIFIED
    exit_code: int = 0
    message: str = ""
    endpoint: str = ""
    lost: bool = False
    stuck: str = ""  # what of it cannot be ended on its node, with evidence
    ending: bool = False  # how it ended is known, and its agent still ends what it left
    unfit: bool = False  # refused for what no later try on its node mends
    share_bytes: int = 0  # of each of its GPUs' memory; 0: they are its own alone
    cpu_ranks: int = 0  # of a task that holds no GPUs
    isolation: str = ""  # how it is kept apart on its node, in words
    gpu_parts: float = 0.0  # how many GPUs its shares or MIG instances are together; 0: its devices are whole GPUs
    global_ranks: tuple[int, ...] = ()  # of its GPUs, rising; (): they follow `first_rank`

    @property
    def gpus_worth(self) -> float:
        """How many GPUs it holds, parts counted by their memory."""
        return self.gpu_parts or len(self.gpus)

    @property
    def ranks(self) -> int:
        """How many: one for each GPU, or those without any."""
        return len(self.gpus) or self.cpu_ranks

    @property
    def all_ranks(self) -> Sequence[int]:
        """Its global ranks, rising."""
        return self.global_ranks or range(self.first_rank, self.first_rank + self.ranks)

    @property
    def over(self) -> bool:
        return (
            _FIRST_OVER <= self.phase <= _LAST_OVER
        )  # EXITED, KILLED, REFUSED, GONE; asked of every task of a gang, and faster than its enum's hash

    @property
    def holds(self) -> bool:
        """Whether its GPUs are taken."""
        return not self.over or self.ending or bool(self.stuck)

    @property
    def failed(self) -> bool:
        return self.phase is TaskPhase.EXITED and self.exit_code != 0


@dataclass(frozen=True, slots=True)
class AttemptSplit:
    """How the model is split over an attempt's ranks. `words` for people, `mesh` for the ranks (JSON); `why` where it is not as before."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch: int
    words: str
    mesh: str
    why: str = ""
    virtual_stages: int = 0  # 0: as its mesh says
    first_layers: int = 0
    last_layers: int = 0

    @property
    def kept(self) -> Kept:
        """What a checkpoint of its pipeline's stages keeps."""
        return Kept(self.tensor, self.pipeline, self.context, self.virtual_stages, self.first_layers, self.last_layers)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to run the job. `end_time` is set when it is fenced, cancelled or done."""

    epoch: int
    tasks: tuple[Task, ...]
    allocate_time: datetime
    rendezvous: str = ""
    run_time: datetime | None = None
    end_time: datetime | None = None
    end_reason: str = ""
    incident: str = ""
    traceparent: str = ""
    restore_checkpoint: str = ""
    communication_s: float = 0.0
    usd_per_hour: float = 0.0
    started: bool = False
    number: int = 0  # from 1
    gpus_by_model: tuple[tuple[str, int], ...] = ()
    step: int = -1  # when it ended, as the loss
    loss: float | None = None
    first_step_time: datetime | None = None  # of elastic jobs
    remote_datasets: tuple[str, ...] = ()  # that its nodes do not pull for it: its queue holds as much as it may
    best_communication_s: float | None = None  # on the best place of an empty fleet
    best_free_communication_s: float | None = None  # on the best place of what was free when it was placed
    split: AttemptSplit | None = None  # of a job that is planned anew for other GPUs

    @property
    def began(self) -> tuple[int, datetime, datetime | None]:
        """Its epoch, and since when it holds GPUs and runs."""
        return self.epoch, self.allocate_time, self.run_time

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task.node for task in self.tasks))

    @property
    def gpus(self) -> int:
        return sum(len(task.gpus) for task in self.tasks)

    @property
    def ranks(self) -> int:
        return sum(task.ranks for task in self.tasks)

    def holding(self) -> Iterator[Task]:
        """Tasks whose GPUs are still taken: until the agent says how they ended, and that nothing of them is left.

        A rank's failure is reported before its neighbours on the node are reaped. What cannot be ended keeps its GPUs.
        """
        return (task for task in self.tasks if task.holds)


@dataclass(frozen=True, slots=True)
class Cause:
    """What led to a state: a resource, the W3C context of that step, one sentence, and who asked for it or which rule decided."""

    resource: str = ""
    traceparent: str = ""
    message: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A place that was considered and not taken."""

    summary: str
    relative_communication: float = 0.0
    usd_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class SchedulingDecision:
    """Why the scheduler did what it did, at one time; see the contract."""

    time: datetime
    placed: bool
    summary: str
    reasons: tuple[str, ...] = ()
    alternatives: tuple[Option, ...] = ()
    exclusions: tuple[tuple[str, int], ...] = ()
    smallest_change: str = ""
    ahead: tuple[str, ...] = ()
    position: int = 0
    preempts: tuple[str, ...] = ()
    usd_per_hour: float = 0.0
    communication_s: float = 0.0
    tasks: tuple[Task, ...] = ()


class ClaimPurpose(IntEnum):
    """Why GPUs are kept for a job."""

    UNSPECIFIED = 0  # as PREEMPTION
    PREEMPTION = 1  # it waits until those who hold them have been suspended
    RESERVATION = 2  # it waits for its promised start
    RESIZE = 3  # it runs, and goes on there with more or fewer GPUs
    MOVE = 4  # it runs, and goes on there with as many


GOES_ON = frozenset({ClaimPurpose.RESIZE, ClaimPurpose.MOVE})  # purposes of jobs that run


@dataclass(frozen=True, slots=True)
class Claim:
    """GPUs that are kept for a job while `victims` leave them: (node, UUIDs in rank order).

    Over when the job is placed or ends, at the latest at `expire_time`. `start_time`: when a reservation has to be kept.
    `limited_queue`: the limit of this queue, by id, keeps the job back, so that victims leave which ran by `make_time`, wherever they are.
    `datasets`: those of the job that its nodes pull already, with their room.
    """

    nodes: tuple[tuple[str, tuple[str, ...]], ...]
    victims: tuple[str, ...]
    expire_time: datetime
    purpose: ClaimPurpose = ClaimPurpose.PREEMPTION
    start_time: datetime | None = None
    make_time: datetime | None = None
    limited_queue: str = ""
    datasets: tuple[str, ...] = ()

    @property
    def gpus(self) -> dict[str, frozenset[str]]:
        return {node: frozenset(uuids) for node, uuids in self.nodes}

    def asks(self, victim: Job, held: Mapping[str, Collection[str]]) -> bool:
        """Whether one of its victims, which holds these UUIDs by node, has to leave, or loses what it claims itself."""
        if self.concerns(held) or (victim.claim is not None and self.concerns(victim.claim.gpus)):
            return True
        if not self.limited_queue or self.make_time is None:
            return False
        began = victim.attempt.allocate_time if held and victim.attempt is not None else None
        claimed = victim.claim.make_time if victim.claim is not None else None
        return any(at is not None and at <= self.make_time for at in (began, claimed))

    def concerns(self, held: Mapping[str, Collection[str]]) -> bool:
        """Whether any of these GPUs, UUIDs by node, is claimed."""
        return any(not set(uuids).isdisjoint(held.get(node, ())) for node, uuids in self.nodes)


class When(IntEnum):
    """How a job must have ended for those that depend on it."""

    UNSPECIFIED = 0
    SUCCEEDED = 1
    ENDED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Awaited:
    """A job whose end another waits for; another job of that name does not count."""

    job: str
    uid: str
    when: When


@dataclass(frozen=True, slots=True)
class Hold:
    """That a job is not to be placed until someone releases it."""

    by: str
    reason: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Job:
    """A job and where it stands. `cost_usd`, `run_s` and `gpu_s` count ended attempts only; `decision` None: as stored."""

    name: str
    spec: Spec
    state: JobState
    create_time: datetime
    state_message: str = ""
    epoch: int = 0
    attempt: Attempt | None = None
    restarts: int = 0
    recoveries: int = 0
    decision: SchedulingDecision | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    traceparent: str = ""
    cause: Cause = field(default_factory=Cause)
    step: int = -1
    loss: float | None = None  # any number, also NaN or infinity
    cost_usd: float = 0.0
    past_attempts: tuple[Attempt, ...] = ()
    cancel_requested: bool = False
    not_before: datetime | None = None
    claim: Claim | None = None
    uid: str = ""
    state_time: datetime | None = None
    run_s: float = 0.0
    gpu_s: float = 0.0
    awaits: tuple[Awaited, ...] = ()
    hold: Hold | None = None
    priority: int | None = None  # where it was changed; `spec` has it already
    is_ray_worker: bool = False  # somebody's task waits for it
    submitter: str = ""  # role/name: whose it is

    @property
    def queue(self) -> str:
        return names.top(self.name)

    @property
    def id(self) -> str:
        return names.last(self.name)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def readable(self) -> bool:
        """False: a newer version wrote it. Nothing is concluded from it, its tasks go on, its GPUs stay its own."""
        return self.state is not JobState.UNSPECIFIED

    @property
    def grace_s(self) -> float:
        return self.spec.grace_s

    @property
    def may_be_suspended(self) -> bool:
        """Whether it is of the kind that makes room for others, and has begun."""
        return self.state in ACTIVE and not self.spec.is_service

    def attempts(self) -> Iterator[Attempt]:
        """The past ones, oldest first, then the current or last."""
        yield from self.past_attempts
        if self.attempt is not None:
            yield self.attempt

    def numbered(self) -> Iterator[tuple[int, Attempt]]:
        """The attempts with their numbers, from 1; of records that have none, the kept ones are counted."""
        return ((attempt.number or position, attempt) for position, attempt in enumerate(self.attempts(), 1))

    def holding(self) -> Iterator[tuple[Attempt, Task]]:
        """Tasks of any attempt whose GPUs are still taken."""
        for attempt in self.attempts():
            for task in attempt.holding():
                yield attempt, task


@dataclass(frozen=True, slots=True)
class Queue:
    """A line of jobs, and a node in the tree of queues; what queues below it hold counts in it."""

    name: str
    weight: float = 1.0
    max_gpus: int = 0  # 0: no limit
    parent: str = ""  # id of the queue above; "": none
    guaranteed_gpus: int = 0
    lending_limit_gpus: int | None = None  # of its unused guarantee; None: all of it
    data_quota_bytes: int = 0  # of datasets on nodes, all copies together; 0: no limit
