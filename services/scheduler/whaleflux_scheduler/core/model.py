"""Jobs as the core sees them: frozen data with the numbers of the contract's enums, and a few derived facts.

Instants are UTC. `convert` translates to and from `whaleflux.v1`; a test compares the enums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum


class JobState(IntEnum):
    """Where a job stands; `machine.NEXT` says what may follow."""

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
    """What an agent is doing with a task."""

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


OVER = frozenset({TaskPhase.EXITED, TaskPhase.KILLED, TaskPhase.REFUSED, TaskPhase.GONE})


class JobKind(IntEnum):
    """Whether a job ends by itself."""

    UNSPECIFIED = 0
    TRAINING = 1
    SERVICE = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """Ranks in runs of `size` (0: all) that a topology level (number of the contract's enum) holds together."""

    group: str = ""
    level: int = 0
    size: int = 0
    preferred: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """What a job asks for, as the contract's JobSpec; durations in seconds, None where a default applies."""

    command: tuple[str, ...] = ()
    image: str = ""
    gpus: int = 0
    min_nodes: int = 0
    max_nodes: int = 0
    any_of: tuple[str, ...] = ()
    min_memory_bytes: int = 0
    min_compute_capability: int = 0
    placement: tuple[Rule, ...] = ()
    datasets: tuple[str, ...] = ()
    require_local_data: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    priority: int = 0
    max_restarts: int | None = None
    backoff_s: float | None = None
    checkpoint_every_steps: int = 0
    checkpoint_keep: int = 0
    checkpoint_location: str = ""
    partition_wait_s: float | None = None
    never_reroute: bool = False
    deadline: datetime | None = None
    budget_usd: float = 0.0
    kind: JobKind = JobKind.UNSPECIFIED
    working_directory: str = ""
    cpu_millicores_per_rank: int = 0
    memory_bytes_per_rank: int = 0
    stop_grace_s: float | None = None
    sites: tuple[str, ...] = ()

    @property
    def is_service(self) -> bool:
        return self.kind is JobKind.SERVICE


DEFAULT_STOP_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Task:
    """The part of an attempt on one node."""

    id: str
    node: str
    gpus: tuple[int, ...]
    first_rank: int
    group_rank: int
    phase: TaskPhase = TaskPhase.UNSPECIFIED
    exit_code: int = 0
    message: str = ""
    endpoint: str = ""
    lost: bool = False

    @property
    def over(self) -> bool:
        return self.phase in OVER

    @property
    def failed(self) -> bool:
        return self.phase is TaskPhase.EXITED and self.exit_code != 0


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

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task.node for task in self.tasks))

    @property
    def gpus(self) -> int:
        return sum(len(task.gpus) for task in self.tasks)

    def holding(self) -> Iterator[Task]:
        """Tasks whose GPUs are still taken: until the agent says how they ended.

        A rank's failure is reported before its neighbours on the node are reaped; the agent itself starts nothing on GPUs that an old
        task's processes still hold.
        """
        return (task for task in self.tasks if not task.over)


@dataclass(frozen=True, slots=True)
class Cause:
    """What led to a state: a resource, the W3C context of that step, one sentence."""

    resource: str = ""
    traceparent: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A place that was considered and not taken."""

    summary: str
    relative_communication: float = 0.0
    usd_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
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


@dataclass(frozen=True, slots=True)
class Job:
    """A job and where it stands. `cost_usd` counts ended attempts only; `decision` None: as stored."""

    name: str
    spec: Spec
    state: JobState
    create_time: datetime
    state_message: str = ""
    epoch: int = 0
    attempt: Attempt | None = None
    restarts: int = 0
    recoveries: int = 0
    decision: Decision | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    traceparent: str = ""
    cause: Cause = field(default_factory=Cause)
    step: int = -1
    loss: float = 0.0
    cost_usd: float = 0.0
    past_attempts: tuple[Attempt, ...] = ()
    cancel_requested: bool = False
    not_before: datetime | None = None

    @property
    def queue(self) -> str:
        return self.name.split("/")[1]

    @property
    def id(self) -> str:
        return self.name.split("/")[3]

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def grace_s(self) -> float:
        return DEFAULT_STOP_GRACE_S if self.spec.stop_grace_s is None else self.spec.stop_grace_s

    def attempts(self) -> Iterator[Attempt]:
        """The past ones, oldest first, then the current or last."""
        yield from self.past_attempts
        if self.attempt is not None:
            yield self.attempt

    def holding(self) -> Iterator[tuple[Attempt, Task]]:
        """Tasks of any attempt whose GPUs are still taken."""
        for attempt in self.attempts():
            for task in attempt.holding():
                yield attempt, task

    def cost_at(self, now: datetime) -> float:
        """US dollars up to `now`, the running attempt included."""
        running = self.attempt
        if running is None or running.end_time is not None:
            return self.cost_usd
        return self.cost_usd + cost_of(running, now)


@dataclass(frozen=True, slots=True)
class Queue:
    """A line of jobs. `max_gpus` 0: no limit."""

    name: str
    weight: float = 1.0
    max_gpus: int = 0


def cost_of(attempt: Attempt, end: datetime) -> float:
    """US dollars of an attempt from its allocation to `end`."""
    return max(0.0, (end - attempt.allocate_time).total_seconds()) / 3600 * attempt.usd_per_hour
