"""What a plan does about reservations: their GPUs are held in the engine as claims are, members are placed on them, others leave in time.

What is decided here (a begin, an end, GPUs in place of lost ones, who has to leave) holds in the plan at once, and is written by the
leader; records as they are stored take it back where that was refused. Named again until the record says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import reservations, wait_reasons
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.holdings import is_reservation
from whaleflux_scheduler.core.known_fleet import KnownFleet
from whaleflux_scheduler.core.lending import MARGIN_S, Lending
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState, SchedulingDecision
from whaleflux_scheduler.core.own_engines import OwnEngines
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.reservations import Reservation, ReservationState
from whaleflux_scheduler.core.reserved_gpus import Fleet, is_there, replan

LOST_AFTER_S = 60.0  # a node may come back: only then are its GPUs replaced by others
AGAIN_S = 60.0  # between two looks for what is short
LONGEST_GRACE_S = 3600.0  # that a job file may ask for
_HELD, _SERVES, _PROMISED = 1, 3, 9  # what it costs to take a GPU that a training holds, a service, or that is promised
_ABOVE_ALL = 1 << 30  # a priority
_SPEC = Spec(command=("reserved",), priority=_ABOVE_ALL, cpu_millicores_per_rank=1)


@dataclass(frozen=True, slots=True)
class _Facts:
    """Nodes of a reservation's GPUs as they were, each with whether it took work, and whether some of the GPUs were lost."""

    held: object
    nodes: list[tuple[Node | None, bool]]
    lost: bool


def _same(before: list[tuple[Node | None, bool]], now: list[tuple[Node | None, bool]]) -> bool:
    return all(a is b and x == y for (a, x), (b, y) in zip(before, now, strict=True))


class Reserved:
    """See the module."""

    def __init__(self, fleet: KnownFleet, estimates: Estimates) -> None:
        self._fleet = fleet
        self._stored: dict[str, Reservation] = {}
        self._now: dict[str, Reservation] = {}  # as decided
        self._said: dict[str, Reservation] = {}  # decided, and told to who writes it
        self._kept: dict[str, dict[str, tuple[str, ...]]] = {}  # GPUs in the engine
        self.starts_s: dict[str, float] = {}  # of these, seconds since the epoch
        self._lending = Lending(fleet.engine, estimates, self.starts_s)
        self._seen: dict[str, Node | None] = {}  # nodes under maintenance, as they were when their GPUs were counted
        self._why: dict[str, str] = {}  # why nodes are closed beside reservations
        self._under: dict[str, str] = {}  # nodes under maintenance, and what is said of them
        self._lost_since: dict[str, float] = {}
        self._dues: dict[str, list[float]] = {}  # when jobs are to be asked to leave
        self._looked: dict[
            str, tuple[object, float]
        ] = {}  # of those that began: GPUs, and when to look again who is there
        self._facts: dict[str, _Facts] = {}
        self._at_s = -math.inf  # of the last step
        self._again_s = math.inf
        self._room: dict[str, tuple[ReservationState, int, int]] = {}  # of those who wait for it
        self._own = OwnEngines(fleet, self._now)

    # what is the case

    def know(self, stored: Mapping[str, Reservation]) -> None:
        """All that there are, as they are stored."""
        for name in self._stored.keys() - stored.keys():
            for known in (self._now, self._said, self._lost_since, self._dues, self._looked, self._facts):
                known.pop(name, None)
            self._own.forget(name)
        for name, one in stored.items():
            if self._stored.get(name) != one:
                self._now[name] = one
                self._said.pop(name, None)
        self._stored = dict(stored)
        self._hold()

    def closes(self, node: str, why: str) -> str:
        """Why the node takes no work, with what reservations say to that."""
        self._why[node] = why
        return why or self._under.get(node, "")

    def forget_node(self, node: str) -> None:
        """It is gone."""
        self._why.pop(node, None)

    def _under_maintenance(self) -> dict[str, str]:
        return {
            node: f"under maintenance until {one.end.isoformat(timespec='minutes')} ({one.name})"
            for one in self._now.values()
            if one.maintenance and one.state is ReservationState.ACTIVE
            for node in one.nodes
        }

    @property
    def all(self) -> Mapping[str, Reservation]:
        """As decided, by name."""
        return self._now

    def find(self, spec: Spec) -> Reservation | None:
        """The reservation that a job asks for; None: none, or one that is over or gone: it is an ordinary job."""
        one = self._now.get(spec.reservation) if spec.reservation else None
        return None if one is None or one.over or one.maintenance else one

    def of(self, job: Job) -> Reservation | None:
        """The same, where jobs of its queue may use it."""
        one = self.find(job.spec)
        path = (node.id for node in self._fleet.holdings.shares.quota.node(job.queue).path())
        return one if one is not None and one.queue in path else None

    def starts(self, job: Job) -> None:
        """It was given GPUs, and may have to leave them for a reservation."""
        if not self._kept:
            return
        held = self._fleet.holdings.held(job.name)
        for name, one in self._now.items():
            far = self._at_s < self._first_s(one)
            if one.state is ReservationState.SCHEDULED and not far and reservations.touches(one, held):
                self._dues.setdefault(name, []).append(self._leave_by(one, job))

    # who may use its GPUs

    def away(self, request: PlaceRequest, job: Job, now: datetime) -> PlaceRequest:
        """The request without nodes on which work that has no GPU for itself would be in the way of a reservation."""
        if not self._kept or not (request.without_gpus or request.group.share):
            return request
        behind = set(self._lending.behind(job, now))
        avoided = {node for name in self._kept if name not in behind for node in _nodes_of(self._now[name])}
        return (
            replace(request, exclude_nodes=tuple(sorted(avoided.union(request.exclude_nodes)))) if avoided else request
        )

    def place(self, job: Job, request: PlaceRequest) -> Placement | None:
        """Where a member goes, on GPUs of its reservation alone; None: it has not begun, or they are in use."""
        one = self.of(job)
        own = self._fleet.holdings.count_of(job.name)
        if (
            one is None
            or one.state is not ReservationState.ACTIVE
            or self._lending.covered((one.name,)) + own < request.units
        ):
            return None
        return self._own.of(one, job).seek(replace(request, id=job.name))

    def take_gained(self) -> list[str]:
        """Reservations that began, are over, or have other room than when this was asked last: for whom it could mean something."""
        room = {name: self._room_of(one) for name, one in self._now.items() if not one.maintenance}
        before, self._room = self._room, room
        return [name for name in (*room, *(before.keys() - room.keys())) if before.get(name) != room.get(name)]

    def _room_of(self, one: Reservation) -> tuple[ReservationState, int, int]:
        """Its state, its idle GPUs, and its nodes that take work: a new leader hears of these later than of the others."""
        begun = one.state is ReservationState.ACTIVE
        opened = sum(node in self._fleet.holdings.devices.open for node, _ in one.held) if begun else 0
        return one.state, self._lending.covered((one.name,)), opened

    # reasons

    def why(self, job: Job, now: datetime) -> SchedulingDecision | None:
        """Why a member waits; None for who is an ordinary job."""
        one = self.find(job.spec)
        if one is None:
            return None
        if self.of(job) is None:
            text = f"{one.name} is for jobs of queue {one.queue}"
            return wait_reasons.for_reservation(text, now, "cancel it, and submit it to that queue")
        if one.state is not ReservationState.ACTIVE:
            begins = one.start.isoformat(timespec="seconds")
            return wait_reasons.for_reservation(f"{one.name} begins at {begins}", now)
        free, short = self._lending.covered((one.name,)), f", {one.short} of them lost" if one.short else ""
        text = f"{free} of the {one.gpus} GPUs of {one.name} are free{short}, and {job.spec.gpus} are asked for, in this shape"
        return wait_reasons.for_reservation(text, now, "wait until others of it have ended")

    def in_the_way_of(self, job: Job, now: datetime) -> list[Reservation]:
        """Reservations that keep idle GPUs from the job, the first to begin first."""
        behind = set(self._lending.behind(job, now))
        names = [name for name in self._kept if name not in behind and self._lending.covered((name,))]
        return sorted((self._now[name] for name in names), key=lambda one: (one.start, one.name))

    def returns(self) -> list[tuple[datetime, int]]:
        """When reservations are over, and how many GPUs come free then, as far as nobody else has them by then."""
        found = []
        for name, gpus in self._kept.items():
            one = self._now[name]
            members_run = one.state is ReservationState.ACTIVE and not one.maintenance
            found.append((one.end, self._lending.covered((name,)) if members_run else sum(map(len, gpus.values()))))
        return found

    # what is to be done

    @property
    def next_look(self) -> float:
        """Seconds since the epoch when something is due without news."""
        if not self._now:
            return math.inf
        dues = [self._again_s]
        for one in self._now.values():
            if not one.over:
                dues.append((one.end if one.state is ReservationState.ACTIVE else one.start).timestamp())
                dues += self._dues.get(one.name, ())
        due_s = min(dues)
        return due_s if due_s > self._at_s else self._at_s + 1.0  # what is due was seen to then

    def step(self, now: datetime) -> list[Reservation]:
        """What is to be written: reservations that began or are over, have other GPUs, or have more jobs leave."""
        self._again_s, self._at_s = math.inf, now.timestamp()
        if not self._now:
            return []
        before = {name: one.state for name, one in self._now.items()}
        for name, one in self._now.items():
            self._now[name] = replace(one, state=reservations.state_at(one, now))
        if before != {name: one.state for name, one in self._now.items()}:
            self._hold()
        for name in list(self._now):
            self._replan(name, now)
        self._see_nodes()
        self._own.look(now)
        for name in list(self._now):
            self._have_leave(name, now)
        return [one for name, one in self._now.items() if self._is_news(name, one)]

    def _is_news(self, name: str, one: Reservation) -> bool:
        if one == self._stored[name] or self._said.get(name) == one:
            return False
        self._said[name] = one
        return True

    def _replan(self, name: str, now: datetime) -> None:
        """Other GPUs in place of those that have been lost for a while."""
        one, now_s = self._now[name], now.timestamp()
        if one.maintenance or one.over:
            return
        lost = self._is_lost(one)
        if not lost and not one.short:
            self._lost_since.pop(name, None)
            return
        since = self._lost_since.setdefault(name, now_s)
        if now_s < since + LOST_AFTER_S and not (one.short and not lost):
            self._again_s = min(self._again_s, since + LOST_AFTER_S)
            return
        self._lost_since[name] = now_s
        self._again_s = min(self._again_s, now_s + AGAIN_S)
        self._now[name] = replan(one, self._now.values(), self.fleet())
        self._hold()

    def _is_lost(self, one: Reservation) -> bool:
        """Whether some of its GPUs are not there; worked out anew where its nodes are others than before."""
        devices, known = self._fleet.holdings.devices, self._facts.get(one.name)
        nodes = [(devices.nodes.get(node), self._takes_work(node)) for node, _ in one.held]
        if known is None or known.held is not one.held or not _same(known.nodes, nodes):
            fleet = self.fleet()
            lost = any(not is_there(one, fleet, node, uuid) for node, uuids in one.held for uuid in uuids)
            known = self._facts[one.name] = _Facts(one.held, nodes, lost)
        return known.lost

    def _takes_work(self, node: str) -> bool:
        """Or would, if it were not for maintenance."""
        return node in self._fleet.holdings.devices.open or (node in self._under and not self._why.get(node))

    def fleet(self) -> Fleet:
        """What GPUs may be chosen from."""
        devices = self._fleet.holdings.devices
        open_ = devices.open | {node for node in self._under if not self._why.get(node)}
        return Fleet(devices.nodes, open_, self._cost)

    def _cost(self, uuid: str) -> int:
        holdings = self._fleet.holdings
        promised = any(not is_reservation(name) for name in holdings.claimants_of((uuid,)))
        holders = [holdings.jobs[name].spec.is_service for name in holdings.holders(uuid)]
        return _PROMISED * promised + max((_SERVES if serves else _HELD for serves in holders), default=0)

    def _see_nodes(self) -> None:
        """What nodes under maintenance have, as it is now."""
        known = self._fleet.holdings.devices.nodes
        now = {
            node: known.get(node)
            for one in self._now.values()
            if one.maintenance and not one.over
            for node in one.nodes
        }
        if any(self._seen.get(node) is not found for node, found in now.items()):
            self._hold()
        self._seen = now

    def _hold(self) -> None:
        """Has the engine hold what is kept now, and closes what is under maintenance."""
        holdings = self._fleet.holdings
        kept = reservations.kept_now(self._now.values(), holdings.devices.nodes)
        for name in sorted(self._kept.keys() - kept.keys()):
            self._fleet.hold(_stand_in(name), {})
        for name, gpus in kept.items():
            if self._kept.get(name) != gpus:
                self._fleet.hold(_stand_in(name), {}, _claim(self._now[name], gpus))
        self._kept = kept
        self.starts_s.clear()
        self.starts_s.update({name: self._now[name].start.timestamp() for name in kept})
        before, self._under = self._under, self._under_maintenance()
        for node in sorted(before.keys() ^ self._under.keys()):
            self._fleet.close(node, self._why.get(node, "") or self._under.get(node, ""))

    def _have_leave(self, name: str, now: datetime) -> None:
        one, now_s = self._now[name], now.timestamp()
        if one.over:
            self._dues.pop(name, None)
            return
        if now_s < self._first_s(one):
            self._dues[name] = [self._first_s(one)]
            return
        held, again_s = self._looked.get(name, (None, 0.0))
        if one.state is ReservationState.ACTIVE and held is one.held and now_s < again_s:
            self._dues[name] = []
            return
        self._looked[name] = one.held, now_s + AGAIN_S if one.state is ReservationState.ACTIVE else 0.0
        jobs = self._fleet.holdings.jobs
        leave_by = {job: self._leave_by(one, jobs[job]) for job in self._in_the_way(one)}
        late = {job for job, at_s in leave_by.items() if at_s <= now_s}
        self._dues[name] = [at_s for job, at_s in leave_by.items() if job not in late]
        if not late <= set(one.victims):
            self._now[name] = replace(one, victims=tuple(sorted(late.union(one.victims))))

    def _first_s(self, one: Reservation) -> float:
        """Before this nobody has to be asked to leave."""
        return one.start.timestamp() - MARGIN_S - LONGEST_GRACE_S

    def _leave_by(self, one: Reservation, job: Job) -> float:
        """When the job has to be asked to leave so that it has left when the reservation begins."""
        return one.start.timestamp() - MARGIN_S - job.grace_s

    def _in_the_way(self, one: Reservation) -> set[str]:
        """Jobs that have to be gone when it begins."""
        holdings = self._fleet.holdings
        if one.maintenance:
            there = {job for node in one.nodes for job in holdings.jobs_on(node) if holdings.held(job).get(node)}
            return {job for job in there if not is_reservation(job)}
        there = {job for _, uuids in one.held for uuid in uuids for job in holdings.holders(uuid)}
        return {job for job in there if not self._is_member(holdings.jobs[job], one)}

    def _is_member(self, job: Job, one: Reservation) -> bool:
        own = self.of(job)
        return own is not None and own.name == one.name


def _stand_in(name: str) -> Job:
    """Who holds a reservation's GPUs in the engine: nobody may have it stopped, and no queue counts it."""
    return Job(name, _SPEC, JobState.QUEUED, datetime.fromtimestamp(0, UTC))


def _claim(one: Reservation, gpus: Mapping[str, tuple[str, ...]]) -> Claim | None:
    if not gpus:
        return None
    return Claim(tuple(gpus.items()), (), one.end, ClaimPurpose.RESERVATION, start_time=one.start)


def _nodes_of(one: Reservation) -> Iterable[str]:
    return one.nodes if one.maintenance else (node for node, _ in one.held)
