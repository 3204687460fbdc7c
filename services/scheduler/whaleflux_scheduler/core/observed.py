"""What the scheduler has seen of a job's tasks and nodes since it last looked, and what others concluded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from whaleflux_scheduler.core.model import TaskPhase


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


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node's condition means for tasks on it; the default is a node in order.

    `unreachable` and `draining` say why ("" for not). `partitioned_since`: its whole site is silent.
    """

    unreachable: str = ""
    retired: bool = False
    draining: str = ""
    partitioned_since: datetime | None = None


IN_ORDER = Standing()


class End(StrEnum):
    """Why an attempt ended; the first word of `Attempt.end_reason`."""

    EXIT = "exit"  # a rank ended by itself
    VANISHED = "vanished"  # processes are gone and nobody asked for it
    LOST = "lost"  # a node was fenced or retired
    PARTITION = "partition"  # the site stayed silent for longer than the job waits
    DRAIN = "drain"
    REFUSED = "refused"
    LATE = "late"  # the gang did not start in time
    PREEMPTED = "preempted"
    DONE = "done"
    CANCELLED = "cancelled"
    BUDGET = "budget"


STARTLESS = frozenset({End.REFUSED, End.LATE})  # the gang never ran: nothing to learn about the work itself
PLANNED = frozenset({End.DRAIN, End.PREEMPTED})  # our own doing


@dataclass(frozen=True, slots=True)
class Break:
    """Why the attempt cannot go on: `task` ended first, `nodes` are to be avoided for a while."""

    end: End
    message: str
    task: str = ""
    node: str = ""
    exit_code: int = 0
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What health_monitor and the checkpoint service said about the end of the attempt before `epoch`."""

    epoch: int
    application_fault: bool = False
    message: str = ""
    incident: str = ""
    traceparent: str = ""
    culprits: tuple[str, ...] = ()
    restore_checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """All news about one job."""

    reports: tuple[Report, ...] = ()
    nodes: Mapping[str, Standing] = field(default_factory=dict)
    verdict: Verdict | None = None
    step: int = -1
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the scheduler waits, seconds."""

    accept_s: float = 20.0
    start_s: float = 120.0
    fetch_s: float = 3600.0  # for a start that still pulls images or fetches data
    partition_wait_s: float = 600.0
    shun_s: float = 60.0  # a node that refused or failed a job is not tried again for it
    refusals: int = 8  # in a row until a job fails; services go on
