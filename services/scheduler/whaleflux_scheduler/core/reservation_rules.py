"""What reservations may be asked for: what is wrong with one by itself, beside others, in its queue, and in the fleet. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import FieldViolation
from whaleflux_scheduler.core import quota_rules
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.core.reservations import ANY_TYPE, LONGEST, Reservation
from whaleflux_scheduler.core.reserved_gpus import Fleet, replan, usable

LEAST = timedelta(minutes=1)
FARTHEST = timedelta(days=366)  # how far ahead one may begin
MOST_GPUS, MOST_NODES, MOST_MEMBERS, MOST_REASON_CHARS = 20_000, 10_000, 1_000, 500
MOST_KEPT = 1_000  # reservations that are not over
_MOST_NAMED = 3
_PARTS = "name the type of those that are wanted, as `whaleflux gpus` shows it: --gpu-type 'H200 1g.18gb'"
_AT = "reservation."


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
    by_type = Counter(gpu.model for node in fleet.nodes.values() for gpu in usable(kept, node))
    all_, have = by_type.total(), kept.count()
    what = f"{kept.gpu_type} GPUs" if kept.gpu_type not in ("", ANY_TYPE) else "GPUs"
    where = "these nodes have" if kept.nodes else "the fleet has"
    if not all_ and kept.gpu_type not in ("", ANY_TYPE):
        types = sorted({gpu.model for node in fleet.nodes.values() for gpu in node.gpus})
        yield FieldViolation(_AT + "gpu_type", f"{where} no {what}; there are {_few(types) or 'none at all'}")
        return
    if not all_:
        why = f"{where} no whole ones; to keep parts of them (MIG), {_PARTS}"
    elif not kept.gpu_type and len(by_type) > 1:
        beside_which = f", beside {_few([other.name for other in beside])}" if beside else ""
        most = ", ".join(f"{many} {model}" for model, many in by_type.most_common(_MOST_NAMED))
        why = f"of one type {have} can be kept in that time{beside_which} ({where} {most}); "
        why += f"ask for at most {have}, or" if have else "choose another time, or"
        why += f" take several types: --gpu-type {ANY_TYPE}"
    elif all_ < kept.gpus:
        why = f"{where} {all_} {what}; ask for at most {all_}"
    elif have == 0 and not beside:
        why = f"no node that takes work has {what} now; see: whaleflux nodes"
    else:
        which = [other.name for other in beside]
        why = f"{have} of {all_} {what} can be kept in that time" + (f", beside {_few(which)}" if which else "")
        why += f"; ask for at most {have}, or choose another time" if have else "; choose another time"
    yield FieldViolation(_AT + "gpus", f"{kept.gpus} are asked for, and {why}")


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


def _few(listed: Sequence[str]) -> str:
    more = len(listed) - _MOST_NAMED
    return ", ".join(listed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
