"""Reservations: GPUs that are kept for some from one time to another, and nodes that are kept free for maintenance. Pure.

A GPU is at any time at most one reservation's: windows of two that would share one are refused (`reservation_rules`), and where lost
GPUs are replaced, only by such as no other's window needs (`reserved_gpus`). Until its start a reservation is like a promise: who is over by then may
use its GPUs. Who is there nevertheless at its start leaves through a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from types import MappingProxyType

from whaleflux import names
from whaleflux.fleet.model import Node

LONGEST = timedelta(days=366)
ANY_TYPE = "any"  # as a GPU type: several types will do; none said: GPUs of one type, whichever has them


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
NOTHING: Gpus = MappingProxyType({})


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
