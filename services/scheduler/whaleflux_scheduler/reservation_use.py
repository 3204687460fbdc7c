"""Who sees a reservation, and whether a job that is submitted may use it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
from whaleflux.rpc import auth, roles
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.job_access import JobAccess
from whaleflux_scheduler.reservation_records import RESERVATIONS

_AT = "job.spec.reservation"


def sees(one: pb.Reservation, sight: Sight) -> bool:
    """Whether it is there for the caller. Maintenance concerns everybody."""
    return one.maintenance or sight.everything or sight.sees_queue(names.last(one.queue))


def not_there(name: str) -> NotFound:
    """The same for one that is not there, and for one that is not there for the caller."""
    return NotFound("reservation", name, "list what there is with: whaleflux reservation ls")


async def check_use(store: Store, access: JobAccess, name: str, queue: str) -> None:
    """Raises NotFound for one that is not there, InvalidArgument for one that is over, or not for the caller's jobs in that queue."""
    entry = await store.get(keys.of_name(keys.RESERVATIONS, name))
    one = RESERVATIONS.read(entry.value) if entry is not None else None
    if one is None or not sees(one, access.sight()):
        raise not_there(name)
    if wrong := list(_wrong(one, {queue, *access.above(queue)})):
        raise InvalidArgument(wrong)


def _wrong(one: pb.Reservation, queues: Collection[str]) -> Iterator[FieldViolation]:
    if one.state == pb.RESERVATION_STATE_ENDED:
        ended = one.end_time.ToDatetime().isoformat(timespec="seconds")
        yield FieldViolation(_AT, f"{one.name} is over since {ended}Z; leave it out, or make another one")
    elif one.maintenance:
        yield FieldViolation(_AT, f"{one.name} is maintenance: nothing runs there; leave it out")
    elif (wanted := names.last(one.queue)) not in queues:
        yield FieldViolation(_AT, f"{one.name} is for jobs of queue {wanted}; submit it there (queue: {wanted})")
    elif one.members and not _is_member(one):
        whom = ", ".join(one.members[:5])
        yield FieldViolation(_AT, f"{one.name} is for {whom}; leave it out, or ask {one.creator or 'an operator'}")


def _is_member(one: pb.Reservation) -> bool:
    who = auth.principal()
    named = who.role in roles.HUMANS and f"users/{who.name}" in one.members
    return who.is_operator or named or any(f"groups/{group}" in one.members for group in who.groups)
