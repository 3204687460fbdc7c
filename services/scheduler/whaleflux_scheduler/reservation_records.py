"""Reservations between the contract (`whaleflux.v1`), the core, and what is told of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.reasons import What
from whaleflux.store.codec import Codec, Stored
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.core.reservations import ANY_TYPE, Reservation, ReservationState

StoredReservation = Stored[Reservation, pb.Reservation]
SOURCE = "scheduler"
_NEVER = datetime.fromtimestamp(0, UTC)
_STATES = frozenset(int(state) for state in ReservationState if state)


def reservation_of(message: pb.Reservation) -> Reservation:
    """The reservation. Raises ValueError for a state of a newer version: such a record stays as it was last known."""
    if message.state and message.state not in _STATES:
        raise ValueError(f"{message.name} is in a state that this version does not know: {message.state}")
    return Reservation(
        name=message.name,
        start=convert.instant(message, "start_time") or _NEVER,
        end=convert.instant(message, "end_time") or _NEVER,
        gpus=message.gpus,
        gpu_type=message.gpu_type,
        nodes=tuple(dict.fromkeys(message.nodes)),
        queue=message.queue.removeprefix("queues/"),
        members=tuple(dict.fromkeys(message.members)),
        maintenance=message.maintenance,
        reason=message.reason,
        state=ReservationState(message.state) if message.state else ReservationState.SCHEDULED,
        held=tuple((part.node, tuple(part.gpu_uuids)) for part in message.held),
        short=message.short_gpus,
        victims=tuple(message.victims),
    )


def _merge(one: Reservation, message: pb.Reservation) -> None:
    message.name = one.name
    message.start_time.FromDatetime(one.start)
    message.end_time.FromDatetime(one.end)
    message.gpus, message.gpu_type, message.maintenance, message.reason = (
        one.gpus,
        one.gpu_type,
        one.maintenance,
        one.reason,
    )
    message.queue = names.queue(one.queue) if one.queue else ""
    message.nodes[:], message.members[:], message.victims[:] = one.nodes, one.members, one.victims
    message.state, message.short_gpus = one.state.value, one.short  # type: ignore[assignment]  # a test compares the enums
    if [(part.node, tuple(part.gpu_uuids)) for part in message.held] != list(one.held):
        del message.held[:]
        message.held.extend(pb.ClaimedNode(node=node, gpu_uuids=uuids) for node, uuids in one.held)


RESERVATIONS: Codec[Reservation, pb.Reservation] = Codec(
    pb.Reservation, reservation_of, _merge, packed_from_bytes=convert.PACKED_FROM_BYTES
)


def of_change(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, the new state (ACTIVE, ENDED), SHORT and WHOLE_AGAIN, CHANGED when somebody asked for it, DELETED."""
    new = RESERVATIONS.read(change.new.value) if change.new else None
    old = RESERVATIONS.read(change.old.value) if change.old else None
    told = _told(old, new)
    one = new or old
    if told is None or one is None:
        return None
    what, message = told
    asked = asked_for(old, new)
    by_itself = what in (What.CREATED, What.CHANGED) or (what == What.DELETED and asked is not None)
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=one.name,
        what=what,
        previous=_state(old) if old is not None and new is not None and old.state != new.state else "",
        message=message,
        cause=None if by_itself else types_pb2.Cause(actor=f"{SOURCE}/reservation"),
        attributes={"queue": one.queue, "gpus": str(one.gpus or ""), "short_gpus": str(one.short_gpus or "")},
        at=convert.instant(one, "state_time") if new is not None and not by_itself else None,
        asked=asked if by_itself else None,
    )


def _told(old: pb.Reservation | None, new: pb.Reservation | None) -> tuple[str, str] | None:
    if new is None:
        over = old is not None and old.state == pb.RESERVATION_STATE_ENDED
        return What.DELETED, "it was over, and is forgotten" if over else "its GPUs are everybody's"
    if old is None:
        return What.CREATED, in_words(new)
    if old.state != new.state:
        return _state(new), _of_state(new)
    if new.short_gpus > old.short_gpus:
        return What.SHORT, f"{new.short_gpus} of its {new.gpus} GPUs are lost, and no others are left"
    if old.short_gpus and not new.short_gpus:
        return What.WHOLE_AGAIN, f"it keeps {new.gpus} GPUs again"
    asked = asked_for(old, new)
    if asked is not None and asked.what == What.CHANGED:
        return What.CHANGED, asked.reason
    return None


def _of_state(new: pb.Reservation) -> str:
    if new.state == pb.RESERVATION_STATE_ENDED:
        return "its nodes take work again" if new.maintenance else "its GPUs are everybody's; what runs there goes on"
    victims = f"; {len(new.victims)} jobs were asked to leave" if new.victims else ""
    return ("its nodes take no work" if new.maintenance else f"{new.gpus} {_gpus(new)} for its members alone") + victims


def in_words(one: pb.Reservation) -> str:
    """What it keeps, for whom, and when."""
    first, last = (at.ToDatetime(tzinfo=UTC).isoformat(timespec="minutes") for at in (one.start_time, one.end_time))
    if one.maintenance:
        return f"{len(one.nodes)} node{'s' * (len(one.nodes) != 1)} under maintenance, {first} to {last}"
    kind = f" {one.gpu_type}" if one.gpu_type not in ("", ANY_TYPE) else ""
    return f"{one.gpus}{kind} {_gpus(one)} for {one.queue}, {first} to {last}"


def _gpus(one: pb.Reservation) -> str:
    return "GPU" if one.gpus == 1 else "GPUs"


def _state(message: pb.Reservation) -> str:
    return pb.ReservationState.Name(message.state).removeprefix("RESERVATION_STATE_")


KEPT_ENDED = timedelta(days=7)


def is_old(message: pb.Reservation, now: datetime) -> bool:
    """Whether it was over long enough to be deleted."""
    ended = convert.instant(message, "state_time") or convert.instant(message, "end_time") or _NEVER
    return message.state == pb.RESERVATION_STATE_ENDED and now - ended > KEPT_ENDED
