"""EventService: what happened, read from what the bus keeps. Nothing is held here; each question is bounded."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.events.api import Bus, Start
from whaleflux.events.newest import newest
from whaleflux.events.subjects import ROOT
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.trust.sight import Sight
from whaleflux.v1 import events_pb2 as pb
from whaleflux.v1 import events_pb2_grpc as rpc
from whaleflux_inventory.core.event_filter import EventFilter, event_filter, subjects
from whaleflux_inventory.event_sight import shown

READ_AT_ONCE = 500
MOST_READINGS = 4  # of one page: what is searched and does not match is bounded too
FORGOTTEN_S = 60.0  # the position of a watch whose reader went
REMEMBERED = 2_000  # sequences of a watch: a server that restarts tells its last events again
_SCOPE = {False: "newest:", True: "oldest:"}


class EventHistory(rpc.EventServiceServicer):
    """`bus` None: this fleet publishes nothing. `access`: whom a queue is for."""

    def __init__(self, bus: Bus | None, access: Callable[[str], Access] = lambda _: OPEN) -> None:
        self._bus, self._access = bus, access

    async def ListEvents(self, request: pb.ListEventsRequest, context: Any) -> pb.ListEventsResponse:
        wanted, size = _Asked(_filter(request.filter), self._sight()), page_size(request.page_size)
        key, last = parse_token(request.page_token, _SCOPE[request.oldest_first])
        at = int(key.rpartition(":")[2] or 0)
        last = last or (await self._needed().read([f"{ROOT}.>"], limit=0)).last
        if request.oldest_first:
            found, following = await self._oldest(wanted, size, at)
        else:
            found, following = await self._newest(wanted, size, at)
        token = page_token(f"{_SCOPE[request.oldest_first]}{following}", last) if following else ""
        return pb.ListEventsResponse(events=found, next_page_token=token, last_sequence=last)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        asked = pb.EventFilter(resource=request.filter.resource, kinds=request.filter.kinds, what=request.filter.what)
        wanted, bus = _Asked(_filter(asked), self._sight()), self._needed()
        if request.after_sequence < 0:
            raise InvalidArgument(FieldViolation("after_sequence", f"{request.after_sequence} is negative"))
        start: Start = request.after_sequence + 1 if request.after_sequence else "new"
        durable, told = f"watch-{names.ulid()}", deque[int](maxlen=REMEMBERED)
        news = bus.subscribe(subjects(wanted.filter, ROOT), durable=durable, start=start, forget_after_s=FORGOTTEN_S)
        try:
            async with news:
                async for delivery in news:
                    await delivery.ack()
                    if delivery.sequence not in told:
                        told.append(delivery.sequence)
                        for event in _matching([delivery], wanted):
                            yield pb.WatchEventsResponse(event=event)
        finally:
            with contextlib.suppress(Exception):  # it is forgotten by itself
                await bus.forget(durable)

    def _sight(self) -> Sight:
        """The caller's; what it does not see is left out, and may be all there is."""
        ownership.note_asked()
        return Sight(auth.principal(), self._access)

    async def _oldest(self, wanted: _Asked, size: int, begin: int) -> tuple[list[pb.Event], int]:
        """One page, and the sequence at which the next begins; 0: there is none."""
        found: list[pb.Event] = []
        start: Start = begin or wanted.filter.first_stored or "all"
        for _ in range(MOST_READINGS):
            read = await self._needed().read(subjects(wanted.filter, ROOT), start=start, limit=READ_AT_ONCE)
            for stored in read.events:
                if wanted.filter.is_over(stored.timestamp):
                    return found, 0
                found += _matching([stored], wanted)
                start = stored.sequence + 1
                if len(found) == size:
                    return found, start
            if read.matching <= len(read.events):
                return found, 0
        return found, start if isinstance(start, int) else 0

    async def _newest(self, wanted: _Asked, size: int, before: int) -> tuple[list[pb.Event], int]:
        """One page, and the sequence before which the next lies; 0: there is none."""
        found: list[pb.Event] = []
        for _ in range(MOST_READINGS):
            read = await newest(self._needed(), subjects(wanted.filter, ROOT), before=before, limit=READ_AT_ONCE)
            for stored in read:
                if wanted.filter.is_before(stored.timestamp):
                    return found, 0
                found += _matching([stored], wanted)
                before = stored.sequence
                if len(found) == size:
                    return found, before
            if len(read) < READ_AT_ONCE:
                return found, 0
        return found, before

    def _needed(self) -> Bus:
        if self._bus is None:
            raise Unavailable(
                "this fleet publishes no events: its services were started without nats",
                reason=ErrorReason.BUS_UNAVAILABLE,
            )
        return self._bus


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked for, and what of it is there for who asks."""

    filter: EventFilter
    sight: Sight


def _filter(asked: pb.EventFilter) -> EventFilter:
    since, until = _instant(asked, "since", asked.since), _instant(asked, "until", asked.until)
    return event_filter(asked.resource, asked.kinds, asked.what, since, until)


def _instant(asked: pb.EventFilter, field: str, stamp: Timestamp) -> datetime | None:
    try:
        return stamp.ToDatetime(tzinfo=UTC) if asked.HasField(field) else None
    except (ValueError, OverflowError):
        raise InvalidArgument(FieldViolation(f"filter.{field}", "is no time between the years 1 and 9999")) from None


def _matching(stored: Sequence[Any], wanted: _Asked) -> Iterable[pb.Event]:
    """What of it was asked for, as the caller may read it; what is no event of this version is left out."""
    for one in stored:
        try:
            event = pb.Event.FromString(one.data)
        except DecodeError:
            continue
        admitted = wanted.filter.admits(event.resource, event.what, event.time.ToDatetime(tzinfo=UTC))
        if admitted and (told := shown(event, wanted.sight)) is not None:
            told.sequence = one.sequence
            yield told
