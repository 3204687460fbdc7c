"""AuditService: the audit trail, read from what the bus keeps, and compared with the heads that the store keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.events.api import Bus, Start, StoredEvent
from whaleflux.events.newest import newest
from whaleflux.events.subjects import AUDIT_ROOT
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.rpc.paging import page_size, page_token, parse_token
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.reading import read_all
from whaleflux.trust import ownership
from whaleflux.trust.audit_chain import Verifier
from whaleflux.v1 import audit_pb2 as pb
from whaleflux.v1 import audit_pb2_grpc as rpc
from whaleflux_inventory.core.audit_filter import AuditFilter, checked

READ_AT_ONCE = 100  # messages of up to 200 records
MOST_READINGS = 20  # of one page: what is searched and does not match is bounded too
SLACK = timedelta(hours=1)  # about when a record ages out
FULL = 0.5  # of its bytes, without what NATS adds to each message: then it had to let records go
_SUBJECTS = [f"{AUDIT_ROOT}.>"]
_SCOPE = {False: "newest:", True: "oldest:"}


class AuditReading(rpc.AuditServiceServicer):
    """`bus` None: this fleet keeps no trail. `kept_days`, `max_bytes`: how long its records are kept, and how many."""

    def __init__(self, bus: Bus | None, store: Store, clock: Clock, kept_days: float, max_bytes: int = 1 << 30) -> None:
        self._bus, self._store, self._clock, self._kept_days = bus, store, clock, kept_days
        self._max_bytes = max_bytes

    async def ListAudit(self, request: pb.ListAuditRequest, context: Any) -> pb.ListAuditResponse:
        who = auth.principal()
        ownership.note_asked()  # the filter itself leaves out what is not the caller's
        wanted = _filter(request.filter, only="" if who.is_operator else who.subject)
        scope = _SCOPE[request.oldest_first]
        at, skip = _place(parse_token(request.page_token, scope)[0].removeprefix(scope))
        page = _Page(page_size(request.page_size), skip, step=1 if request.oldest_first else -1)
        read = self._oldest if request.oldest_first else self._newest
        for _ in range(MOST_READINGS):
            messages, more = await read(wanted, at)
            for stored in messages:
                if wanted.is_over(stored.timestamp) if request.oldest_first else wanted.is_before(stored.timestamp):
                    return page.answer("")
                if page.take(stored, wanted):
                    return page.answer(scope)
            if not more:
                return page.answer("")
            at = messages[-1].sequence + page.step
        page.following = f"{at}/0"
        return page.answer(scope)

    async def VerifyAudit(self, request: pb.VerifyAuditRequest, context: Any) -> pb.VerifyAuditResponse:
        snapshot = await self._store.list(keys.AUDIT_HEADS)  # before the trail is read: never ahead of it
        heads = read_all(snapshot.entries, lambda entry: pb.AuditHead.FromString(entry.value))
        kept_since = self._clock.now() - timedelta(days=self._kept_days) + SLACK
        verifier = Verifier((head for _, head in heads.values), kept_since)
        size, oldest = 0, None
        async for stored in self._stored(AuditFilter()):
            size, oldest = size + len(stored.data), oldest or stored
            for link in _links(stored):
                verifier.take(link)
        if oldest is not None and oldest.sequence > 1 and size >= FULL * self._max_bytes:  # they went for want of room
            verifier.kept_since = max(kept_since, oldest.timestamp + SLACK)
        findings = verifier.finish()
        answer = pb.VerifyAuditResponse(
            records=verifier.records, chains=verifier.chains, findings=findings, lost=verifier.lost
        )
        if verifier.oldest is not None:
            answer.oldest.FromDatetime(verifier.oldest)
        return answer

    async def ExportAudit(self, request: pb.ExportAuditRequest, context: Any) -> AsyncIterator[pb.ExportAuditResponse]:
        asked = pb.AuditFilter(since=request.filter.since, until=request.filter.until)
        for field in ("since", "until"):
            if not request.filter.HasField(field):
                asked.ClearField(field)
        async for stored in self._stored(_filter(asked)):
            yield pb.ExportAuditResponse(links=_links(stored))

    async def _newest(self, wanted: AuditFilter, at: int) -> tuple[list[StoredEvent], bool]:
        """Messages from sequence `at` (0: the end) backwards, and whether there are more."""
        read = await newest(self._needed(), _SUBJECTS, before=at + 1 if at else 0, limit=READ_AT_ONCE)
        return read, len(read) == READ_AT_ONCE and read[-1].sequence > 1

    async def _oldest(self, wanted: AuditFilter, at: int) -> tuple[list[StoredEvent], bool]:
        """Messages from sequence `at` (0: the beginning asked for) on, and whether there are more."""
        start: Start = at or wanted.first_stored or "all"
        read = await self._needed().read(_SUBJECTS, start=start, limit=READ_AT_ONCE)
        return list(read.events), read.matching > len(read.events)

    async def _stored(self, wanted: AuditFilter) -> AsyncIterator[StoredEvent]:
        """All messages within the times asked for, oldest first."""
        at, more = 0, True
        while more:
            messages, more = await self._oldest(wanted, at)
            for stored in messages:
                if wanted.is_over(stored.timestamp):
                    return
                at = stored.sequence + 1
                yield stored

    def _needed(self) -> Bus:
        if self._bus is None:
            raise Unavailable(
                "this fleet keeps no audit trail: its services were started without nats",
                reason=ErrorReason.BUS_UNAVAILABLE,
            )
        return self._bus


class _Page:
    """One page while it is filled. `step`: to the next message."""

    def __init__(self, size: int, skip: int, step: int) -> None:
        self._size, self._skip, self.step = size, skip, step
        self._found: list[pb.AuditRecord] = []
        self.following = ""

    def take(self, stored: StoredEvent, wanted: AuditFilter) -> bool:
        """Adds what a message has of it, from `skip` on; whether the page is full."""
        records = list(_matching(stored, wanted))[:: self.step][self._skip :]
        room = self._size - len(self._found)
        self._found += records[:room]
        if len(records) > room:
            self.following = f"{stored.sequence}/{self._skip + room}"
        elif len(self._found) == self._size and stored.sequence + self.step > 0:
            self.following = f"{stored.sequence + self.step}/0"
        self._skip = 0
        return len(self._found) == self._size

    def answer(self, scope: str) -> pb.ListAuditResponse:
        """The page; `scope` "": it is the last one."""
        token = page_token(f"{scope}{self.following}", 0) if scope and self.following else ""
        return pb.ListAuditResponse(records=self._found, next_page_token=token)


def _place(token: str) -> tuple[int, int]:
    """Message and records of it that were given already."""
    at, _, skip = token.partition("/")
    if token and not (at.isdecimal() and skip.isdecimal() and len(token) < 40):
        raise InvalidArgument(FieldViolation("page_token", "is not a token of this listing; start again without one"))
    return int(at or 0), int(skip or 0)


def _filter(asked: pb.AuditFilter, only: str = "") -> AuditFilter:
    since, until = _instant(asked, "since", asked.since), _instant(asked, "until", asked.until)
    return checked(AuditFilter(since, until, asked.who, asked.what, asked.object, asked.denied, only))


def _instant(asked: pb.AuditFilter, field: str, stamp: Timestamp) -> datetime | None:
    try:
        return stamp.ToDatetime(tzinfo=UTC) if asked.HasField(field) else None
    except (ValueError, OverflowError):
        raise InvalidArgument(FieldViolation(f"filter.{field}", "is no time between the years 1 and 9999")) from None


def _batch(stored: StoredEvent) -> pb.AuditBatch | None:
    try:
        return pb.AuditBatch.FromString(stored.data)
    except DecodeError:
        return None


def _links(stored: StoredEvent) -> Sequence[pb.AuditLink]:
    """What is no batch is one link that is no record."""
    return (_batch(stored) or pb.AuditBatch(links=[pb.AuditLink(record=b"\xff")])).links


def _matching(stored: StoredEvent, wanted: AuditFilter) -> Iterator[pb.AuditRecord]:
    """What of a message was asked for, in its order; what is no record is left to the verification."""
    for link in (_batch(stored) or pb.AuditBatch()).links:
        try:
            record = pb.AuditRecord.FromString(link.record)
        except DecodeError:
            continue
        at = record.time.ToDatetime(tzinfo=UTC)
        if wanted.admits(record.subject, record.method, record.object, record.result, at):
            yield record
