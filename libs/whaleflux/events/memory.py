"""The Bus in memory: the model of what a bus promises, and the fake for unit tests and simulations.

`Durable` is pure: which event a consumer gets next, given what it has acknowledged and what time it is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Self

from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Unavailable
from whaleflux.events import api
from whaleflux.events.api import Ack, Delivery, Excerpt, Start, StoredEvent
from whaleflux.events.subjects import ACCOUNT_ROOT, matches
from whaleflux.events.trace import with_trace
from whaleflux.reasons import ErrorReason

STREAM = "EVENTS"


@dataclass(frozen=True, slots=True)
class _Unsettled:
    due_s: float  # monotonic: when it is delivered again
    attempt: int
    reader: int  # who holds it until then; 0: nobody


@dataclass(slots=True)
class Durable:
    """A named position: everything below `position` was delivered, and all but `unsettled` acknowledged."""

    filters: tuple[str, ...]
    position: int
    ack_wait_s: float
    unsettled: dict[int, _Unsettled] = field(default_factory=dict)

    def take(
        self, log: Mapping[int, StoredEvent], last: int, now_s: float, reader: int, max_in_flight: int
    ) -> tuple[StoredEvent, int] | None:
        """The next event and which attempt this is, or None when nothing may be delivered to this reader now."""
        held = sum(1 for u in self.unsettled.values() if u.reader == reader and u.due_s > now_s)
        if held >= max_in_flight:
            return None
        for sequence in sorted(self.unsettled):
            again = self.unsettled[sequence]
            if sequence not in log:  # aged out of the stream meanwhile
                del self.unsettled[sequence]
            elif again.due_s <= now_s:
                return self._given(log[sequence], now_s, again.attempt + 1, reader)
        while self.position <= last:
            event, self.position = log.get(self.position), self.position + 1
            if event and any(matches(one, event.subject) for one in self.filters):
                return self._given(event, now_s, 1, reader)
        return None

    def settle(self, sequence: int, attempt: int, again_at_s: float | None) -> None:
        """Acknowledges (None) or schedules again; what was settled before stays so."""
        if again_at_s is None:
            self.unsettled.pop(sequence, None)
        elif sequence in self.unsettled and self.unsettled[sequence].attempt == attempt:
            self.unsettled[sequence] = _Unsettled(again_at_s, attempt, 0)

    def due_s(self, now_s: float) -> float | None:
        """When the next redelivery is due (monotonic), if any is still to come."""
        return min((u.due_s for u in self.unsettled.values() if u.due_s > now_s), default=None)

    def _given(self, event: StoredEvent, now_s: float, attempt: int, reader: int) -> tuple[StoredEvent, int]:
        self.unsettled[event.sequence] = _Unsettled(now_s + self.ack_wait_s, attempt, reader)
        return event, attempt


class MemoryBus:
    """A Bus whose stream lives in this process. `reachable = False` makes it refuse, as a bus that is down does."""

    def __init__(
        self, clock: Clock | None = None, *, duplicate_window_s: float = 600.0, max_events: int = 100_000
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self._reachable = True
        self._window_s, self._max_events = duplicate_window_s, max_events
        self._log: OrderedDict[int, StoredEvent] = OrderedDict()
        self._last = 0
        self._accounts: dict[str, int] = {}  # sequence by subject: of each the newest is kept
        self._ids: OrderedDict[str, tuple[float, int]] = OrderedDict()  # id -> (monotonic, sequence)
        self._durables: dict[str, Durable] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._open: set[MemorySubscription] = set()
        self._readers = 0

    @property
    def reachable(self) -> bool:
        """Whether the bus answers."""
        return self._reachable

    @reachable.setter
    def reachable(self, answers: bool) -> None:
        self._reachable = answers
        self.wake()

    @property
    def events(self) -> tuple[StoredEvent, ...]:
        """What the stream holds, for tests to look at."""
        return tuple(self._log.values())

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        id: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = api.PUBLISH_TIMEOUT_S,
    ) -> Ack:
        carried = with_trace(headers)
        api.check_message(subject, data, id, carried)
        await asyncio.sleep(0)  # as a real one, lets others run
        if not self.reachable:
            raise Unavailable("the event bus does not answer", reason=ErrorReason.BUS_UNAVAILABLE)
        now_s = self.clock.monotonic()
        self._drop_old(now_s)
        if id in self._ids:
            return Ack(STREAM, self._ids[id][1], duplicate=True)
        self._last += 1
        if subject.startswith(f"{ACCOUNT_ROOT}."):
            self._log.pop(self._accounts.get(subject, 0), None)
            self._accounts[subject] = self._last
        self._log[self._last] = StoredEvent(self._last, subject, data, id, carried, self.clock.now())
        self._ids[id] = (now_s, self._last)
        self.wake()
        return Ack(STREAM, self._last, duplicate=False)

    def subscribe(
        self,
        subjects: Sequence[str],
        *,
        durable: str,
        start: Start = "all",
        max_in_flight: int = api.MAX_IN_FLIGHT,
        ack_wait_s: float = api.ACK_WAIT_S,
        forget_after_s: float = 0.0,
    ) -> MemorySubscription:
        filters = api.check_subscription(subjects, durable, max_in_flight, ack_wait_s, forget_after_s)
        known = self._durables.get(durable)
        if known is None:
            known = self._durables[durable] = Durable(filters, self._first(start), ack_wait_s)
        known.filters, known.ack_wait_s = filters, ack_wait_s
        self._readers += 1
        subscription = MemorySubscription(self, known, self._readers, max_in_flight)
        self._open.add(subscription)
        return subscription

    async def read(self, subjects: Sequence[str], *, start: Start = "all", limit: int = api.MAX_READ) -> Excerpt:
        filters = api.check_reading(subjects, limit)
        await asyncio.sleep(0)
        if not self.reachable:
            raise Unavailable("the event bus does not answer", reason=ErrorReason.BUS_UNAVAILABLE)
        first = self._first(start)
        found = [
            event
            for sequence, event in self._log.items()
            if sequence >= first and any(matches(one, event.subject) for one in filters)
        ]
        return Excerpt(tuple(found[:limit]), len(found), next(iter(self._log), self._last + 1), self._last)

    async def forget(self, durable: str) -> None:
        self._durables.pop(durable, None)

    async def close(self) -> None:
        for subscription in tuple(self._open):
            await subscription.aclose()

    def wake(self) -> None:
        """Lets every waiting subscription look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, due_s: float | None) -> None:
        """Until something is published or settled, or `due_s` (monotonic) has come."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(changed)
        timer = None
        try:
            if due_s is not None:
                timer = asyncio.ensure_future(self.clock.sleep(due_s - self.clock.monotonic()))
                timer.add_done_callback(lambda _: None if changed.done() else changed.set_result(None))
            await changed
        finally:
            self._waiting.discard(changed)
            if timer:
                timer.cancel()

    def take(self, durable: Durable, reader: int, max_in_flight: int) -> tuple[StoredEvent, int] | None:
        """The next event for this reader of `durable`, none while the bus is not reachable."""
        if not self.reachable:
            return None
        return durable.take(self._log, self._last, self.clock.monotonic(), reader, max_in_flight)

    def closed(self, subscription: MemorySubscription) -> None:
        self._open.discard(subscription)

    def _first(self, start: Start) -> int:
        if start == "all":
            return 1
        if isinstance(start, int):
            return max(1, start)
        if isinstance(start, datetime):
            return next((s for s, event in self._log.items() if event.timestamp >= start), self._last + 1)
        return self._last + 1

    def _drop_old(self, now_s: float) -> None:
        while self._ids and next(iter(self._ids.values()))[0] + self._window_s <= now_s:
            self._ids.popitem(last=False)
        while len(self._log) >= self._max_events:
            self._log.popitem(last=False)


class MemorySubscription:
    """One reader of a durable position."""

    def __init__(self, bus: MemoryBus, durable: Durable, reader: int, max_in_flight: int) -> None:
        self._bus, self._durable, self._closed = bus, durable, False
        self._reader, self._max_in_flight = reader, max_in_flight

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        while not self._closed:
            if taken := self._bus.take(self._durable, self._reader, self._max_in_flight):
                return self._delivery(*taken)
            await self._bus.wait(self._durable.due_s(self._bus.clock.monotonic()))
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self._closed = True
        self._bus.closed(self)
        self._bus.wake()

    def _delivery(self, event: StoredEvent, attempt: int) -> Delivery:
        async def settle(delay_s: float | None) -> None:
            if self._bus.reachable:
                again_at_s = None if delay_s is None else self._bus.clock.monotonic() + delay_s
                self._durable.settle(event.sequence, attempt, again_at_s)
                self._bus.wake()

        return Delivery(
            event.subject,
            event.data,
            event.id,
            event.headers,
            STREAM,
            event.sequence,
            event.timestamp,
            attempt,
            settle,
        )
