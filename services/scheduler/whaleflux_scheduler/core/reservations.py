"""Reservations: GPUs that are kept for some from one time to another, and nodes that are kept free for maintenance. Pure.

A GPU is at any time at most one reservation's: windows of two that would share one are refused (`check`), and where lost GPUs are
replaced, only by such as no other's window needs (`choose`). Until its start a reservation is like a promise: who is over by then may
use its GPUs. Who is there nevertheless at its start leaves through a checkpoint.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import FieldViolation
from whaleflux.fleet.model import Gpu, Node
from whaleflux_scheduler.core import quota_rules
from whaleflux_scheduler.core.model import Queue

LEAST, LONGEST = timedelta(minutes=1), timedelta(days=366)
FARTHEST = timedelta(days=366)  # how far ahead one may begin
MOST_GPUS, MOST_NODES, MOST_MEMBERS, MOST_REASON_CHARS = 20_000, 10_000, 1_000, 500
MOST_KEPT = 1_000  # reservations that are not over
_MOST_NAMED = 3
_PROFILE = re.compile(r"\b\d+g\.\d+gb\b")
_PARTS = (
    "guarantee the queue as many instead, since each counts as a GPU (whaleflux queue set NAME --guaranteed N), or reserve whole GPUs of "
    "other nodes"
)
_AT = "reservation."


class ReservationState(IntEnum):
    """Where a reservation stands: SCHEDULED -> ACTIVE -> ENDED, or at once ENDED where nobody led in its time. Never back."""

    UNSPECIFIED = 0
    SCHEDULED = 1
    ACTIVE = 2
    ENDED = 3


@dataclass(frozen=True, slots=True)
class Reservation:
    """See the contract. `held`: (node, UUIDs), of an advance reservation only; `queue` is an id; instants are UTC."""

    name: str
    start: datetime
    end: datetime
    gpus: int = 0
    gpu_type: str = ""
    nodes: tuple[str, ...] = ()
    queue: str = ""
    members: tuple[str, ...] = ()
    maintenance: bool = False
    reason: str = ""
    state: ReservationState = ReservationState.SCHEDULED
    held: tuple[tuple[str, tuple[str, ...]], ...] = ()
    short: int = 0
    victims: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return names.last(self.name)

    @property
    def over(self) -> bool:
        return self.state is ReservationState.ENDED

    @property
    def window(self) -> str:
        """In words."""
        first, last = (at.isoformat(timespec="minutes") for at in (self.start, self.end))
        return f"{first} to {last}"

    def overlaps(self, other: Reservation) -> bool:
        """Whether there is a time that is within both."""
        return self.start < other.end and other.start < self.end

    def count(self) -> int:
        """GPUs that it keeps, of those that were chosen."""
        return sum(len(uuids) for _, uuids in self.held)


Gpus = Mapping[str, Collection[str]]
"""UUIDs by node."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What GPUs may be chosen from: nodes that take work, and what it costs to take a GPU (0: it is idle)."""

    nodes: Mapping[str, Node]
    open: Collection[str]
    cost: Callable[[str], int] = lambda _: 0


# what is asked for


def mistakes(asked: Reservation, now: datetime, *, begun: bool = False) -> Iterator[FieldViolation]:
    """What is wrong with it whatever else there is. `begun`: its start was right once."""
    yield from _times(asked, now, begun=begun)
    yield from _extent(asked)
    if len(asked.members) > MOST_MEMBERS:
        yield FieldViolation(_AT + "members", f"{len(asked.members)} members; name at most {MOST_MEMBERS}, or groups")
    for member in asked.members:
        if not names.is_member(member):
            yield FieldViolation(_AT + "members", f"{member[:64]!r} is nobody; name users/NAME or groups/NAME")
    if len(asked.reason) > MOST_REASON_CHARS or not asked.reason.isprintable():
        yield FieldViolation(_AT + "reason", f"must be one line of at most {MOST_REASON_CHARS} characters")


def _times(asked: Reservation, now: datetime, *, begun: bool) -> Iterator[FieldViolation]:
    start, end = (at.isoformat(timespec="seconds") for at in (asked.start, asked.end))
    if not begun and asked.start < now - CLOCK_SKEW:
        yield FieldViolation(_AT + "start_time", f"{start} is over; begin now or later")
    if asked.start > now + FARTHEST:
        yield FieldViolation(
            _AT + "start_time", f"{start} is more than {FARTHEST.days} days ahead; begin sooner, or ask again later"
        )
    if asked.end - asked.start < LEAST:
        yield FieldViolation(_AT + "end_time", f"{end} is not {LEAST.seconds} s after its start, {start}; end later")
    elif asked.end - asked.start > LONGEST:
        yield FieldViolation(
            _AT + "end_time", f"{end} is more than {LONGEST.days} days after its start; for ever is a queue's guarantee"
        )
    elif asked.end <= now:
        yield FieldViolation(_AT + "end_time", f"{end} is over; end later")


def _extent(asked: Reservation) -> Iterator[FieldViolation]:
    """Which GPUs, and for whom."""
    if len(asked.nodes) > MOST_NODES:
        yield FieldViolation(_AT + "nodes", f"{len(asked.nodes)} nodes; name at most {MOST_NODES}")
    if not asked.maintenance:
        if not 1 <= asked.gpus <= MOST_GPUS:
            yield FieldViolation(_AT + "gpus", f"{asked.gpus} is not 1 to {MOST_GPUS}; say how many GPUs to keep")
        if not asked.queue:
            yield FieldViolation(
                _AT + "queue", "is empty; name the queue whose jobs may use it, such as queues/default"
            )
        return
    if not asked.nodes:
        yield FieldViolation(_AT + "nodes", "is empty; name the nodes that are kept free, sites/SITE/nodes/NODE")
    for field, given in (("gpus", asked.gpus), ("gpu_type", asked.gpu_type), ("queue", asked.queue)):
        if given:
            yield FieldViolation(
                _AT + field, "is of reservations for jobs; maintenance keeps whole nodes free: leave it out"
            )
    if asked.members:
        yield FieldViolation(
            _AT + "members", "is of reservations for jobs; nobody runs under maintenance: leave it out"
        )


def admitted(
    asked: Reservation, others: Iterable[Reservation], fleet: Fleet
) -> tuple[Reservation, list[FieldViolation]]:
    """The reservation with the GPUs that it keeps, or why it cannot be kept. `others`: all that are not over."""
    rest = [other for other in others if not other.over and other.name != asked.name]
    if len(rest) >= MOST_KEPT:
        return asked, [FieldViolation("reservation_id", f"{MOST_KEPT} are kept already; delete one that nobody needs")]
    unknown = [node for node in asked.nodes if node not in fleet.nodes]
    if unknown:
        return asked, [FieldViolation(_AT + "nodes", f"{_few(unknown)}: no such node; see: whaleflux nodes")]
    beside = [other for other in rest if other.overlaps(asked)]
    if asked.maintenance:
        return asked, list(_free_of_others(asked, beside))
    kept = replan(replace(asked, held=_still_right(asked)), beside, fleet)
    return kept, list(_enough(kept, beside, fleet)) if kept.short else []


def _still_right(asked: Reservation) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Of what it kept before a change of its nodes."""
    return tuple((node, uuids) for node, uuids in asked.held if not asked.nodes or node in asked.nodes)


def _free_of_others(asked: Reservation, beside: Iterable[Reservation]) -> Iterator[FieldViolation]:
    for other in beside:
        theirs = other.nodes if other.maintenance else [node for node, _ in other.held]
        if both := sorted(set(asked.nodes).intersection(theirs)):
            yield FieldViolation(
                _AT + "nodes",
                f"{_few(both)}: kept by {other.name} from {other.window}; choose another time, or other nodes, or move that: "
                f"whaleflux reservation update {other.id}",
            )


def _enough(kept: Reservation, beside: Sequence[Reservation], fleet: Fleet) -> Iterator[FieldViolation]:
    """Why there are too few GPUs, and what would do."""
    all_ = sum(len(_usable(kept, node)) for node in fleet.nodes.values())
    have = kept.count()
    what = f"{kept.gpu_type} GPUs" if kept.gpu_type else "GPUs"
    where = "these nodes have" if kept.nodes else "the fleet has"
    if not all_ and _is_part(kept.gpu_type):
        yield FieldViolation(
            _AT + "gpu_type",
            f"{kept.gpu_type[:60]!r} is a part of a GPU (MIG), and only whole GPUs can be reserved; {_PARTS}",
        )
        return
    if not all_ and kept.gpu_type:
        types = sorted({gpu.model for node in fleet.nodes.values() for gpu in node.gpus if not gpu.parent_uuid})
        yield FieldViolation(_AT + "gpu_type", f"{where} no {what}; there are {_few(types) or 'none at all'}")
        return
    if not all_:
        why = f"{where} none that can be reserved: whole GPUs can, parts of them (MIG) cannot; {_PARTS}"
    elif all_ < kept.gpus:
        why = f"{where} {all_} {what}; ask for at most {all_}"
    elif have == 0 and not beside:
        why = f"no node that takes work has {what} now; see: whaleflux nodes"
    else:
        which = [other.name for other in beside]
        why = f"{have} of {all_} {what} can be kept in that time" + (f", beside {_few(which)}" if which else "")
        why += f"; ask for at most {have}, or choose another time" if have else "; choose another time"
    yield FieldViolation(_AT + "gpus", f"{kept.gpus} are asked for, and {why}")


def _is_part(gpu_type: str) -> bool:
    """Whether it names MIG instances: by their profile, alone or behind the GPU's type, or one by its UUID."""
    return gpu_type.startswith("MIG") or _PROFILE.search(gpu_type) is not None


def within_quota(
    asked: Reservation, others: Iterable[Reservation], queues: Mapping[str, Queue], *, guarantee: bool
) -> Iterator[FieldViolation]:
    """Whether its queue, and those above it, may keep that many in that time; `guarantee`: no more than it is guaranteed, too."""
    if asked.queue not in queues:
        yield FieldViolation(_AT + "queue", f"there is no {asked.queue!r}; use one of: whaleflux queue ls")
        return
    beside = [other for other in others if other.name != asked.name and not other.over and other.overlaps(asked)]
    below: dict[str, set[str]] = defaultdict(set)
    for id_ in queues:
        for up in quota_rules.path(queues, id_):
            below[names.last(up.name)].add(id_)
    for up in quota_rules.path(queues, asked.queue):
        if up.max_gpus:
            yield from _within(
                asked, beside, up, below[names.last(up.name)], up.max_gpus, "may hold at most", "--max-gpus"
            )
    if guarantee:
        own = next((up for up in quota_rules.path(queues, asked.queue) if up.guaranteed_gpus), queues[asked.queue])
        what = "is guaranteed"
        yield from _within(asked, beside, own, below[names.last(own.name)], own.guaranteed_gpus, what, "--guaranteed")


def _within(
    asked: Reservation,
    beside: Iterable[Reservation],
    queue: Queue,
    counted: Collection[str],
    most: int,
    what: str,
    option: str,
) -> Iterator[FieldViolation]:
    kept = sum(other.gpus for other in beside if other.queue in counted)
    if kept + asked.gpus > most:
        already = f", and {kept} are kept in that time already" if kept else ""
        fix = f"ask for at most {most - kept}" if most > kept else "choose another time"
        yield FieldViolation(
            _AT + "gpus",
            f"{asked.gpus} are asked for, and {queue.name} {what} {most} GPUs{already}; {fix}, or let an operator raise it: "
            f"whaleflux queue set {names.last(queue.name)} {option} N",
        )


# which GPUs


def replan(kept: Reservation, others: Iterable[Reservation], fleet: Fleet) -> Reservation:
    """With other GPUs in place of those that are lost, as far as there are any; those that are there stay its own."""
    taken = taken_by(kept, others)
    there = {
        node: tuple(uuid for uuid in uuids if uuid not in taken and is_there(kept, fleet, node, uuid))
        for node, uuids in kept.held
        if node not in taken
    }
    own = {node: uuids for node, uuids in there.items() if uuids}
    lacks = kept.gpus - sum(map(len, own.values()))
    if lacks < 0:  # it keeps fewer than before: its last ones go
        own = _first(own, kept.gpus)
    elif lacks:
        taken |= {uuid for uuids in own.values() for uuid in uuids}
        for node, uuids in choose(kept, lacks, taken, fleet, near=tuple(own)).items():
            own[node] = (*own.get(node, ()), *uuids)
    held = tuple(own.items())
    return replace(kept, held=held, short=kept.gpus - sum(len(uuids) for _, uuids in held))


def taken_by(asked: Reservation, others: Iterable[Reservation]) -> set[str]:
    """GPUs, and whole nodes by name, that other reservations keep at some time within its window."""
    taken = set[str]()
    for other in others:
        if other.over or other.name == asked.name or not other.overlaps(asked):
            continue
        taken.update(other.nodes if other.maintenance else (uuid for _, uuids in other.held for uuid in uuids))
    return taken


def choose(
    asked: Reservation, gpus: int, taken: Collection[str], fleet: Fleet, near: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """That many GPUs close together, those first that nobody has; fewer when there are no more.

    Of one type where that is possible, then in the smallest domain of the network that has enough, then on as few nodes as possible.
    """
    usable = {
        name: free
        for name in fleet.open
        if name in fleet.nodes and name not in taken
        if (free := [gpu for gpu in _usable(asked, fleet.nodes[name]) if gpu.uuid not in taken])
    }
    of_one_type = _by_type(usable)
    enough = [offer for offer in of_one_type if sum(map(len, offer.values())) >= gpus]
    best = min(
        (_closest(offer, gpus, fleet, near) for offer in enough or [usable]), key=lambda found: found[0], default=None
    )
    return best[1] if best is not None else {}


def _by_type(usable: Mapping[str, list[Gpu]]) -> list[dict[str, list[Gpu]]]:
    by_type: dict[str, dict[str, list[Gpu]]] = {}
    for name, gpus in usable.items():
        for gpu in gpus:
            by_type.setdefault(gpu.model, {}).setdefault(name, []).append(gpu)
    return [by_type[model] for model in sorted(by_type)]


def _closest(
    offer: Mapping[str, list[Gpu]], gpus: int, fleet: Fleet, near: Collection[str]
) -> tuple[tuple[int, ...], dict[str, tuple[str, ...]]]:
    """In the smallest domain with enough, with how good that is: the less the better."""
    for level in range(len(_domains(next(iter(fleet.nodes.values())))) if fleet.nodes else 0):
        domains: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in offer:
            domains[_domains(fleet.nodes[name])[level]].append(name)
        found = [
            _fill({name: offer[name] for name in members}, gpus, fleet.cost, near)
            for _, members in sorted(domains.items())
            if sum(len(offer[name]) for name in members) >= gpus
        ]
        if found:
            cost, taken = min(found, key=lambda one: one[0])
            return (level, *cost), taken
    cost, taken = _fill(offer, gpus, fleet.cost, near)
    return (99, *cost), taken


def _domains(node: Node) -> tuple[tuple[str, ...], ...]:
    """From the node to the fleet."""
    site, zone, spine, leaf = node.site, node.zone, node.spine, node.leaf
    return (node.name,), (site, zone, spine, leaf), (site, zone, spine), (site, zone), (site,), ()


def _fill(
    offer: Mapping[str, list[Gpu]], gpus: int, cost: Callable[[str], int], near: Collection[str]
) -> tuple[tuple[int, int], dict[str, tuple[str, ...]]]:
    """Nodes with most idle GPUs first; the last part where it leaves least behind. Returns (cost, nodes) and what is taken."""
    in_order = {name: sorted(free, key=lambda gpu: (cost(gpu.uuid), gpu.index)) for name, free in offer.items()}
    dear = {name: sum(cost(gpu.uuid) for gpu in free) for name, free in offer.items()}
    left, taken, spent = gpus, dict[str, tuple[str, ...]](), 0
    waiting = sorted(offer, key=lambda name: (name not in near, dear[name], -len(offer[name]), name))
    while left and waiting:
        name = next((one for one in waiting if len(offer[one]) <= left), None)
        if name is None:  # each has more than is needed
            name = min(waiting, key=lambda one: (sum(cost(g.uuid) for g in in_order[one][:left]), len(offer[one]), one))
        waiting.remove(name)
        part = in_order[name][:left]
        taken[name] = tuple(gpu.uuid for gpu in part)
        left, spent = left - len(part), spent + sum(cost(gpu.uuid) for gpu in part)
    return (spent, len(taken)), taken


def _usable(asked: Reservation, node: Node) -> list[Gpu]:
    """Whole GPUs of the node that would do."""
    if asked.nodes and node.name not in asked.nodes:
        return []
    wanted = asked.gpu_type
    return [g for g in node.gpus if g.offered and g.uuid and not g.parent_uuid and wanted in ("", g.model)]


def is_there(kept: Reservation, fleet: Fleet, node: str, uuid: str) -> bool:
    """Whether a GPU is as it was when it was chosen, and its node takes work."""
    known = fleet.nodes.get(node)
    return known is not None and node in fleet.open and any(g.uuid == uuid for g in _usable(kept, known))


def _first(gpus: Mapping[str, tuple[str, ...]], most: int) -> dict[str, tuple[str, ...]]:
    """So many of them, the first ones."""
    kept = {}
    for node, uuids in gpus.items():
        if part := uuids[:most]:
            kept[node] = part
        most -= len(part)
    return kept


# what is kept now


def kept_now(reservations: Iterable[Reservation], nodes: Mapping[str, Node]) -> dict[str, dict[str, tuple[str, ...]]]:
    """By reservation that is not over, the GPUs that wait for it: of two windows that need one GPU one after the other, the first's."""
    kept: dict[str, dict[str, tuple[str, ...]]] = {}
    seen = set[str]()
    for one in sorted((one for one in reservations if not one.over), key=lambda one: (one.start, one.name)):
        parts = {node: tuple(uuid for uuid in uuids if uuid not in seen) for node, uuids in _extent_now(one, nodes)}
        kept[one.name] = {node: uuids for node, uuids in parts.items() if uuids}
        seen.update(uuid for uuids in parts.values() for uuid in uuids)
    return kept


def _extent_now(one: Reservation, nodes: Mapping[str, Node]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Maintenance keeps whatever its nodes have, also what was put in since."""
    if not one.maintenance:
        yield from one.held
        return
    for name in one.nodes:
        if (node := nodes.get(name)) is not None:
            yield name, tuple(gpu.uuid for gpu in node.gpus if gpu.uuid and gpu.healthy)


def state_at(kept: Reservation, now: datetime) -> ReservationState:
    """Never back: not when a clock is set back, and not by a record of a backup whose time is over."""
    if kept.over or now >= kept.end:
        return ReservationState.ENDED
    if kept.state is ReservationState.ACTIVE or now >= kept.start:
        return ReservationState.ACTIVE
    return ReservationState.SCHEDULED


def has_to_leave(job: str, held: Gpus, one: Reservation) -> bool:
    """Whether the job, which has these GPUs (none of work without), was asked to leave for the reservation and is still there."""
    return not one.over and job in one.victims and touches(one, held)


def touches(one: Reservation, held: Gpus) -> bool:
    """Whether some of these GPUs are the reservation's, or lie on its nodes under maintenance."""
    if one.maintenance:
        return not held.keys().isdisjoint(one.nodes)
    return any(not set(uuids).isdisjoint(held.get(node, ())) for node, uuids in one.held)


def _few(listed: Sequence[str]) -> str:
    more = len(listed) - _MOST_NAMED
    return ", ".join(listed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
