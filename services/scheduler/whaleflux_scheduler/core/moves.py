"""What goes into a decision and what comes out: what changed since the last one, and what to do with each job. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import Claim, Job, Queue, SchedulingDecision
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.queue_shares import PastUse
from whaleflux_scheduler.core.reservations import Reservation


@dataclass(frozen=True, slots=True)
class News:
    """What changed since the last step."""

    nodes: tuple[Node, ...] = ()
    removed: tuple[str, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)  # node -> why it takes no work; "": it does
    jobs: tuple[Job, ...] = ()
    gone: tuple[str, ...] = ()  # jobs deleted
    candidates: Mapping[str, Candidate | None] = field(default_factory=dict)  # None: waits no more
    queues: Mapping[str, Queue] | None = None
    past_uses: tuple[PastUse, ...] = ()  # of queues, before this plan began
    reservations: Mapping[str, Reservation] | None = None  # all that are stored, by name; None: as before
    saved: Mapping[str, datetime] | None = None  # job -> when its newest checkpoint was committed; None: as before
    datasets: tuple[DatasetFact, ...] = ()
    datasets_gone: tuple[str, ...] = ()
    look_over: bool = False  # some who wait are tried again though nothing is known to have changed for them


@dataclass(frozen=True, slots=True)
class Move:
    """What to do with one waiting job: give it a place, keep a place for it that others are to leave, or let it wait."""

    job: str
    decision: SchedulingDecision
    assignment: GpuAssignment | None = None
    claim: Claim | None = None
    begun: datetime | None = None
    ended: datetime | None = None
    reservation: Reservation | None = None  # to be stored like this; `job` is its name
