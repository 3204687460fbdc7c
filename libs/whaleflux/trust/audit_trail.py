"""The audit trail of one process: what is written down of calls, on its way to the bus.

Records are sealed into the process's chain and wait in a spool until they are shipped; the chain's head goes to the store every few
seconds. `record` costs some microseconds and never waits. What cannot be shipped waits; what there is no room for is counted, and the next
record that is kept says how many (`lost`), unless the fleet insists (`audit_required`): then nothing is changed that cannot be written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError, Unavailable
from whaleflux.events.api import Bus
from whaleflux.events.subjects import audit_subject
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff
from whaleflux.store import keys
from whaleflux.store.api import Put, Store
from whaleflux.telemetry import Event, Metric
from whaleflux.trust import audit_encoding
from whaleflux.trust.audit import MAY_BE_DONE, AuditRecord
from whaleflux.trust.audit_chain import Chain, head_of
from whaleflux.trust.audit_denials import Denials
from whaleflux.trust.audit_spool import FileSpool, Left, MemorySpool, Spool, first_of, left_behind
from whaleflux.v1 import audit_pb2 as pb

ANCHOR_EVERY_S = 5.0
GATHER_S = 0.05  # records that come within it are shipped together
BATCH, BATCH_BYTES = 200, 256 << 10
FAREWELL_S = 2.0
_OTHERS = re.compile(r"[^a-z0-9]+")
_AGAIN = Backoff()
_log = telemetry.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """`folder` None: what waits is lost with the process."""

    folder: Path | None = None
    max_bytes: int = 64 << 20
    required: bool = False


class Trail:
    """See the module; an `Audit`. `run` is a loop of its service, `close` its end."""

    def __init__(self, bus: Bus, store: Store, clock: Clock, role: str, replica: str, options: Options) -> None:
        telemetry.from_zero(Metric.AUDIT_LOST)
        self._bus, self._store, self._clock, self._options = bus, store, clock, options
        self._role, self._replica, self._start = role, token(replica), names.ulid()
        self._left, self._spool = self._opened(options.folder)
        predecessor = next((left.head for left in reversed(self._left) if left.head is not None), None)
        self._chain = Chain(self.writer, predecessor)
        self._shipped = pb.AuditHead(writer=self.writer)
        self._anchored, self._anchored_s = -1, float("-inf")  # the sequence that the store knows, and since when
        self._denials, self._lost = Denials(), 0
        self._news = asyncio.Event()

    @property
    def writer(self) -> str:
        """role/replica/start."""
        return f"{self._role}/{self._replica}/{self._start}"

    def record(self, record: AuditRecord) -> None:
        """See `Audit`."""
        if record.result in MAY_BE_DONE:
            self._keep(record)
        elif (first := self._denials.take(record, self._clock.monotonic())) is not None:
            self._keep(first)
        elif not self._news.is_set():
            self._news.set()  # it is due some time

    def check_room(self) -> None:
        """See `Audit`."""
        if self._options.required and self._spool.size_bytes >= self._options.max_bytes:
            raise Unavailable(
                "the audit trail has no room and this fleet changes nothing without it (audit_required); the event bus has been away for long",
                reason=ErrorReason.AUDIT_FULL,
                retry_after_s=5.0,
            )

    async def run(self) -> None:
        """Ships what waits and anchors the chain, until cancelled."""
        await self._introduce()
        while True:
            self._write_down_due()
            await self._stubbornly(self._ship)
            if self._clock.monotonic() >= self._anchor_due_s():
                await self._stubbornly(self._anchor)
            await self._until_news()

    async def close(self) -> None:
        """Ships the rest, within moments, and closes the chain if that worked."""
        for record, count in self._denials.rest():
            self._keep(record, count)
        with contextlib.suppress(StatusError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._ship()
                await self._put_head(self._shipped, closed=True)
        self._spool.close()

    def _keep(self, record: AuditRecord, count: int = 0) -> None:
        if self._spool.size_bytes >= self._options.max_bytes:
            self._count_lost()
            return
        try:
            self._chain.seal(record, self._clock.now(), self._spool.append, count=count, lost=self._lost)
        except OSError:
            self._count_lost()
            return
        self._lost = 0
        self._news.set()

    def _count_lost(self) -> None:
        self._lost += 1
        telemetry.counter(Metric.AUDIT_LOST).inc()
        if self._lost == 1:
            _log.error(Event.AUDIT_LOST, reason="no room where records wait for the bus", bytes=self._spool.size_bytes)

    def _write_down_due(self) -> None:
        for record, count in self._denials.due(self._clock.monotonic()):
            self._keep(record, count)

    async def _introduce(self) -> None:
        """The store knows of the chain before the bus does; what earlier starts left is shipped first."""
        await self._stubbornly(self._anchor)
        for left in self._left:
            await self._stubbornly(partial(self._ship_left, left))
        self._left = []

    async def _stubbornly(self, step: Callable[[], Awaitable[None]]) -> None:
        """Until it is done; store and bus may be away for as long as they like."""
        failures = 0
        while True:
            try:
                await step()
                return
            except StatusError as away:
                failures += 1
                if failures == 1:
                    _log.warning(Event.AUDIT_WAITING, reason=away.message, waiting_bytes=self._spool.size_bytes)
                await self._clock.sleep(_AGAIN.pause_s(failures))

    async def _ship_left(self, left: Left) -> None:
        while links := first_of(left.links, BATCH, BATCH_BYTES):
            await self._publish(links)
            for _ in links:
                left.links.popleft()
        if left.head is not None:
            await self._put_head(left.head, closed=True)
        left.forget()

    async def _ship(self) -> None:
        while links := self._spool.peek(BATCH, BATCH_BYTES):
            shipped = await self._publish(links)
            self._spool.drop(len(links), shipped)
            self._shipped = shipped

    async def _publish(self, links: list[bytes]) -> pb.AuditHead:
        """One message; returns the head that the bus then has. Its id makes a repetition harmless."""
        first, last = head_of(links[0]), head_of(links[-1])
        role, replica, start = last.writer.split("/")
        subject = audit_subject(role, replica, start)
        await self._bus.publish(
            subject, audit_encoding.batch(links), id=f"{last.writer}/{first.sequence}-{last.sequence}"
        )
        return last

    async def _anchor(self) -> None:
        await self._put_head(self._shipped)
        self._anchored, self._anchored_s = self._shipped.sequence, self._clock.monotonic()

    def _anchor_due_s(self) -> float:
        return float("inf") if self._anchored == self._shipped.sequence else self._anchored_s + ANCHOR_EVERY_S

    async def _put_head(self, head: pb.AuditHead, *, closed: bool = False) -> None:
        kept = pb.AuditHead()
        kept.CopyFrom(head)
        kept.closed = closed
        if not kept.HasField("time"):
            kept.time.FromDatetime(self._clock.now())
        await self._store.commit(Put(keys.AUDIT_HEADS + kept.writer, kept.SerializeToString()))

    async def _until_news(self) -> None:
        """Until records have come and a moment passed for more of them, or counted refusals or the chain's head are due."""
        due_s = min(self._anchor_due_s(), self._denials.next_s() or float("inf"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due_s == float("inf") else max(0.0, due_s - self._clock.monotonic())):
                await self._news.wait()
        if self._news.is_set():
            self._news.clear()
            await self._clock.sleep(GATHER_S)

    def _opened(self, folder: Path | None) -> tuple[list[Left], Spool]:
        if folder is None:
            return [], MemorySpool()
        own = folder / f"{self._role}-{self._replica}"
        left = list(left_behind(own))
        return left, FileSpool(own / self._start)


def token(replica: str) -> str:
    """The name of a replica as a part of a subject and a folder."""
    return _OTHERS.sub("-", replica.lower()).strip("-")[:63].strip("-") or "1"
