"""What the scheduler has observed of a job's tasks and nodes since it last looked, and what others concluded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from whaleflux.manifests.job_fields import DEFAULT_PARTITION_WAIT_S
from whaleflux_scheduler.core.model import JobState, TaskPhase


@dataclass(frozen=True, slots=True)
class Report:
    """What an agent said about a task."""

    task: str
    phase: TaskPhase
    exit_code: int = 0
    out_of_memory: bool = False
    message: str = ""
    rendezvous: str = ""
    endpoint: str = ""
    traceparent: str = ""
    failed_rank: int = 0
    stuck: str = ""
    ending: bool = False
    unfit: bool = False
    isolation: str = ""
    node: str = ""  # whose agent said it; "": the scheduler concluded it


@dataclass(frozen=True, slots=True)
class NodeCondition:
    """What a node's condition means for tasks on it; the default is a node in order.

    `unreachable` and `draining` say why ("" for not). `partitioned_since`: its whole site is silent.
    """

    unreachable: str = ""
    retired: bool = False
    draining: str = ""
    partitioned_since: datetime | None = None


IN_ORDER = NodeCondition()


class EndReason(StrEnum):
    """Why an attempt ended; the first word of `Attempt.end_reason`."""

    EXIT = "exit"  # a rank ended by itself
    VANISHED = "vanished"  # processes are gone and nobody asked for it
    LOST = "lost"  # a node was fenced or retired
    PARTITION = "partition"  # the site stayed silent for longer than the job waits
    DRAIN = "drain"
    REFUSED = "refused"
    UNFIT = "unfit"  # refused for what no later try on that node mends
    LATE = "late"  # the gang did not start in time
    PREEMPTED = "preempted"
    REQUEUED = "requeued"
    MOVED = "moved"  # goes on elsewhere, for the good of the whole
    RESIZED = "resized"  # goes on with more or fewer GPUs
    DONE = "done"
    CANCELLED = "cancelled"
    BUDGET = "budget"
    TIME_LIMIT = "time_limit"
    LOSS = "loss"  # NaN or infinite, and the job says stop


NEVER_STARTED = frozenset(
    {EndReason.REFUSED, EndReason.UNFIT, EndReason.LATE}
)  # the gang never ran: nothing to learn about the work itself
PLANNED = frozenset(
    {EndReason.DRAIN, EndReason.PREEMPTED, EndReason.REQUEUED, EndReason.MOVED, EndReason.RESIZED}
)  # our own doing, or asked for


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """Why the attempt cannot go on: `task` ended first, `nodes` are to be avoided for a while."""

    reason: EndReason
    message: str
    task: str = ""
    node: str = ""
    exit_code: int = 0
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What health_monitor and the checkpoint service said about the end of the attempt before `epoch`."""

    epoch: int
    application_fault: bool = False
    message: str = ""
    incident: str = ""
    traceparent: str = ""
    culprits: tuple[str, ...] = ()
    restore_checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class Observations:
    """All that is new about one job."""

    reports: tuple[Report, ...] = ()
    nodes: Mapping[str, NodeCondition] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    claimed_by: str = ""  # a job that waits for GPUs which this one holds or claims
    claim_is_free: bool = False  # nobody else holds any of what it claims
    step: int = -1  # the newest of the current attempt
    loss: float | None = None
    first_step_time: datetime | None = None  # when the first one of the current attempt was completed
    ends: Mapping[str, JobState] = field(default_factory=dict)  # of awaited jobs, by uid; UNSPECIFIED: deleted, unseen
    gone: frozenset[str] = frozenset()  # uids of awaited jobs that were deleted
    since: datetime | None = None  # when this leader first saw it in its state and epoch; None: as its record says
    clock_doubted: bool = False  # how long it has run is not known for sure, by more than clocks may differ


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the scheduler waits, seconds."""

    accept_s: float = 20.0
    start_s: float = 120.0
    fetch_s: float = 3600.0  # for a start that still pulls images or fetches data
    partition_wait_s: float = DEFAULT_PARTITION_WAIT_S
    avoid_s: float = 60.0  # a node that refused or failed a job is not tried again for it
    avoid_unfit_s: float = (
        3.0  # others that are free are tried in this time; the second refusal of one node ends the job
    )
    max_refusals: int = 8  # in a row until a job fails; services go on
