"""Reservations in the store: made, changed and deleted by people through the leader, who knows the fleet; read through any replica."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, NoneCreated, Present, Put, Snapshot, Store, Unchanged
from whaleflux.trust import audit, ownership
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import reservation_rules
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.core.reservations import Reservation, ReservationState
from whaleflux_scheduler.job_access import JobAccess
from whaleflux_scheduler.job_verbs import RACES, contended
from whaleflux_scheduler.leader_session import Leading
from whaleflux_scheduler.reservation_records import RESERVATIONS, in_words
from whaleflux_scheduler.reservation_use import not_there, sees

UPDATABLE = ("start_time", "end_time", "gpus", "nodes", "members", "reason")
MOST_SAID = 20


class ReservationBook:
    """Any replica reads; `leading` is what changes are asked of."""

    def __init__(self, store: Store, access: JobAccess, clock: Clock) -> None:
        self._store, self._access, self._clock = store, access, clock

    # reading

    async def get(self, name: str, sight: Sight) -> pb.Reservation:
        """Raises NotFound, for one that is not there for the caller too."""
        return _shown(await self._entry(name, sight), sight)

    async def page(self, request: pb.ListReservationsRequest, sight: Sight) -> Page[pb.Reservation]:
        """Those that are there for the caller."""
        ownership.note_asked()
        return await list_page(
            self._store,
            keys.RESERVATIONS,
            lambda entry: _shown(entry, sight),
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda one: sees(one, sight) and (request.show_ended or one.state != pb.RESERVATION_STATE_ENDED),
        )

    async def _entry(self, name: str, sight: Sight) -> Entry:
        names.split(name, "reservations")
        ownership.note_asked()
        entry = await self._store.get(keys.of_name(keys.RESERVATIONS, name))
        if entry is None or not sees(RESERVATIONS.read(entry.value), sight):
            raise not_there(name)
        return entry

    # changing

    async def create(self, request: pb.CreateReservationRequest, leading: Leading) -> pb.Reservation:
        """A repeated request (by its request_id) answers with what the first made."""
        name = names.reservation(names.check_id("reservation_id", request.reservation_id))
        message, now = _asked(request.reservation, name), self._clock.now()
        await self._check_rights(message)
        _refuse(_wrong_names(message), reservation_rules.mistakes(RESERVATIONS.to_domain(message), now))
        message.creator = changes.actor()
        message.create_time.FromDatetime(now)
        message.state_time.FromDatetime(now)
        message.last_change.CopyFrom(changes.asked(What.CREATED, now, in_words(message)))
        key = keys.of_name(keys.RESERVATIONS, name)
        for _ in range(RACES):
            known = await self._known()
            if (existing := known.entries.get(name)) is not None:
                return self._made_before(existing, message, request)
            kept = await self._admit(RESERVATIONS.to_domain(message), known, leading)
            RESERVATIONS.merge(kept, message)
            if request.validate_only:
                return message
            with contextlib.suppress(ConditionFailed):
                put = Put(key, RESERVATIONS.pack(message))
                queue = [Present(keys.of_name(keys.QUEUES, message.queue))] if message.queue else []
                message.etag = f'"{await self._store.commit(put, when=[Absent(key), *queue, *known.unchanged])}"'
                return message
        raise contended(name)

    async def update(self, request: pb.UpdateReservationRequest, leading: Leading) -> pb.Reservation:
        """Sets the fields that the mask names."""
        paths, sight = paths_of(request.update_mask.paths, UPDATABLE), self._access.sight()
        for _ in range(RACES):
            entry = await self._entry(request.reservation.name, sight)
            message = pb.Reservation()
            message.CopyFrom(RESERVATIONS.read(entry.value))
            self._check_change(message, sight)
            check_etag(request.reservation.etag, entry)
            audit.note(before=in_words(message))
            before, now = RESERVATIONS.to_domain(message), self._clock.now()
            for path in paths:
                _set(message, request.reservation, path)
            after = RESERVATIONS.to_domain(message)
            began = before.state is not ReservationState.SCHEDULED
            _refuse(
                _too_late(before, after), _wrong_names(message), reservation_rules.mistakes(after, now, begun=began)
            )
            known = await self._known()
            RESERVATIONS.merge(await self._admit(after, known, leading), message)
            message.last_change.CopyFrom(changes.asked(What.CHANGED, now, in_words(message)))
            with contextlib.suppress(ConditionFailed):
                put = Put(entry.key, RESERVATIONS.pack(message))
                revision = await self._store.commit(put, when=[Unchanged(entry), *known.unchanged])
                message.etag = f'"{revision}"'
                return _cleaned(message, sight)
        raise contended(request.reservation.name)

    async def delete(self, request: pb.DeleteReservationRequest) -> None:
        """Its GPUs are everybody's at once."""
        sight = self._access.sight()
        for _ in range(RACES):
            entry = await self._entry(request.name, sight)
            message = pb.Reservation()
            message.CopyFrom(RESERVATIONS.read(entry.value))
            self._check_change(message, sight)
            check_etag(request.etag, entry)
            message.last_change.CopyFrom(changes.deletion(self._clock.now()))
            with contextlib.suppress(ConditionFailed):
                await changes.delete(self._store, entry, RESERVATIONS.pack(message))
                return
        raise contended(request.name)

    # rules

    async def _check_rights(self, asked: pb.Reservation) -> None:
        """Who may reserve: operators anything, those whom a queue names within what it is guaranteed."""
        who = auth.principal()
        ownership.note_asked()
        if who.is_operator or who.is_service:
            return
        if asked.maintenance:
            raise _denied("maintenance is for operators")
        (queue,) = names.split(asked.queue, "queues", field="reservation.queue")
        access = await self._access.sure(queue)
        await self._access.check_use(queue, 0)
        if who.role != roles.USER or not access.members or not ownership.may_use(who, queue, access):
            raise _denied(f"{asked.queue} is open to all users")

    def _check_change(self, one: pb.Reservation, sight: Sight) -> None:
        queue = names.last(one.queue) if one.queue else ""
        fleets = one.maintenance and not sight.everything
        if fleets or not (sight.everything or sight.changes(queue, one.creator)):
            raise ownership.not_owner(one.name, one.creator)

    async def _admit(self, asked: Reservation, known: _Known, leading: Leading) -> Reservation:
        """With the GPUs that it keeps. Raises InvalidArgument where it cannot be kept."""
        if not asked.maintenance:
            who = auth.principal()
            guarantee = not (who.is_operator or who.is_service)
            _refuse(reservation_rules.within_quota(asked, known.values, await self._queues(), guarantee=guarantee))
        await leading.view.caught_up()
        admit = reservation_rules.admitted
        kept, wrong = await leading.planner.ask(lambda plan: admit(asked, known.values, plan.reservation_fleet()))
        _refuse(wrong)
        return kept

    async def _known(self) -> _Known:
        return _Known.of(await self._store.list(keys.RESERVATIONS))

    async def _queues(self) -> dict[str, Queue]:
        snapshot, queues = await self._store.list(keys.QUEUES), dict[str, Queue]()
        for entry in snapshot.entries:
            with contextlib.suppress(DecodeError):
                queues[entry.key.removeprefix(keys.QUEUES)] = convert.queue_of(pb.Queue.FromString(entry.value))
        return queues

    def _made_before(
        self, existing: Entry, wanted: pb.Reservation, request: pb.CreateReservationRequest
    ) -> pb.Reservation:
        found = RESERVATIONS.read(existing.value)
        same = all(getattr(found, path) == getattr(wanted, path) for path in (*UPDATABLE, "queue", "maintenance"))
        if not (request.request_id and same and found.creator == wanted.creator):
            again = f"change it with: whaleflux reservation update {request.reservation_id}, or choose another name"
            raise AlreadyExists("reservation", found.name, again)
        return _shown(existing, self._access.sight())


@dataclass(frozen=True, slots=True)
class _Known:
    """All reservations at one revision."""

    entries: Mapping[str, Entry]
    values: Sequence[Reservation]
    unchanged: Sequence[NoneCreated]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Known:
        """Raises FailedPrecondition for a record of a newer version: which GPUs it keeps is not known."""
        entries = {names.reservation(entry.key.removeprefix(keys.RESERVATIONS)): entry for entry in snapshot.entries}
        try:
            values = [RESERVATIONS.decode(entry).value for entry in snapshot.entries]
        except (DecodeError, ValueError) as wrong:
            raise FailedPrecondition(
                f"a reservation {convert.UNREADABLE}: {wrong}", reason=ErrorReason.RECORD_UNREADABLE
            ) from None
        return cls(entries, values, [NoneCreated(keys.RESERVATIONS, snapshot.revision, or_written=True)])


def _shown(entry: Entry, sight: Sight) -> pb.Reservation:
    message = pb.Reservation()
    message.CopyFrom(RESERVATIONS.read(entry.value))
    message.etag = etag_of(entry)
    return _cleaned(message, sight)


def _cleaned(message: pb.Reservation, sight: Sight) -> pb.Reservation:
    message.victims[:] = sight.known(message.victims)
    return message


def _asked(given: pb.Reservation, name: str) -> pb.Reservation:
    """What may be asked for, and nothing else."""
    asked = pb.Reservation(name=name, state=pb.RESERVATION_STATE_SCHEDULED)
    for path in (*UPDATABLE, "gpu_type", "queue", "maintenance"):
        _set(asked, given, path)
    return asked


def _set(message: pb.Reservation, wanted: pb.Reservation, path: str) -> None:
    if path in ("nodes", "members"):
        getattr(message, path)[:] = dict.fromkeys(getattr(wanted, path))
    elif path.endswith("_time"):
        getattr(message, path).CopyFrom(getattr(wanted, path))
    else:
        setattr(message, path, getattr(wanted, path))


def _wrong_names(asked: pb.Reservation) -> Iterator[FieldViolation]:
    """Names that are none, and times that are not there."""
    for field in ("start_time", "end_time"):
        if not asked.HasField(field):
            yield FieldViolation(f"reservation.{field}", "is not set; say when")
    for name, collections, field in (
        *((node, ("sites", "nodes"), "reservation.nodes") for node in asked.nodes[: reservation_rules.MOST_NODES]),
        *(((asked.queue, ("queues",), "reservation.queue"),) if asked.queue else ()),
    ):
        try:
            names.split(name, *collections, field=field)
        except InvalidArgument as wrong:
            yield from wrong.violations


def _too_late(before: Reservation, after: Reservation) -> Iterator[FieldViolation]:
    if before.over:
        yield FieldViolation("reservation.name", f"{before.name} is over since {_at(before.end)}; make another one")
    elif before.state is not ReservationState.SCHEDULED and before.start != after.start:
        yield FieldViolation(
            "reservation.start_time", f"it has begun at {_at(before.start)}; change its end, or delete it"
        )


def _at(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def _refuse(*found: Sequence[FieldViolation] | Iterator[FieldViolation]) -> None:
    """Raises InvalidArgument where something is wrong; the first kind of mistake is told."""
    for kind in found:
        if wrong := list(kind):
            raise InvalidArgument(wrong[:MOST_SAID])


def _denied(why: str) -> PermissionDenied:
    return PermissionDenied(
        f"{why}; ask an operator, or be named by the queue (whaleflux queue set NAME --member users/NAME): members reserve what their "
        "queue is guaranteed",
        reason=ErrorReason.RESERVATION_DENIED,
    )
