"""Pulling events from a durable consumer so that no outage ends it in silence.

A pull request lives in the server's memory: a restart forgets it, and its client would wait for ever (nats.py #504). So
a request is trusted only while something arrives, an event or a heartbeat. After `silence_s` of nothing, or when the
connection came back, the consumer is made sure of and asked anew.

How many events may be unacknowledged is counted here (`Window`), not by the server: a crash makes a server believe that
the last acknowledged events still are not, and with its own small limit it would deliver nothing until `ack_wait_s` is
over. Nothing here knows the wire; see `nats.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import Any, Protocol, Self

from whaleflux.errors import StatusError, Unavailable
from whaleflux.events.api import Delivery
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff
from whaleflux.telemetry import Event, get_logger

log = get_logger(__name__)
HEARTBEAT_S = 1.0  # asked of the server while a request waits
SILENCE_S = 3.0  # three missed: the request is gone
REQUEST_S = 30.0  # how long one request waits for events
RETRY = Backoff(longest_s=0.5)
MAX_BATCH = 256
GATHER_S = 0.005


class Said(Enum):
    """What the server says besides events."""

    HEARTBEAT = "heartbeat"
    ENDED = "ended"  # the request ran out; ask again
    LOST = "lost"  # consumer or connection gone; make sure of it first


@dataclass(frozen=True, slots=True)
class Notice:
    """A word about request number `request`; 0 means all of them."""

    said: Said
    request: int = 0
    reason: str = ""


class Feed(Protocol):
    """One durable consumer of one stream, as the wire gives it."""

    stream: str
    arrivals: asyncio.Queue[Delivery | Notice]

    async def ensure(self) -> None:
        """Makes the consumer exist as wanted; Unavailable without an answer, FailedPrecondition when it is refused."""
        ...

    async def ask(self, request: int, batch: int) -> None:
        """Requests up to `batch` events under this number."""
        ...

    async def close(self, unseen: Sequence[Delivery] = ()) -> None:
        """Nothing more arrives; `unseen` and `arrivals` go to the next reader at once and in order, not after ack_wait_s."""
        ...


class _BrokenError(Exception):
    """The request in hand will not be answered."""


@dataclass(slots=True)
class Out:
    """Where events go: a bounded queue, and those that were on their way into it when the reader left."""

    ready: asyncio.Queue[Delivery | StatusError] = field(default_factory=lambda: asyncio.Queue(1))
    unseen: list[Delivery] = field(default_factory=list)

    async def put(self, event: Delivery) -> None:
        """Waits while the reader is slow."""
        try:
            await self.ready.put(event)
        except asyncio.CancelledError:
            self.unseen.append(event)
            raise


class Window:
    """How many events one reader may hold: those delivered, not settled, and not yet due for delivery elsewhere."""

    def __init__(self, capacity: int, hold_s: float) -> None:
        self._capacity, self._hold_s = capacity, hold_s
        self._held: dict[int, float] = {}  # sequence -> when the server gives up waiting, oldest first
        self._freed = asyncio.Event()

    def hold(self, event: Delivery) -> Delivery:
        """Counts the event until it is settled through what this returns."""

        async def settle(delay_s: float | None) -> None:
            if self._held.pop(event.sequence, None) is not None:
                self._freed.set()
            await event.settle(delay_s)

        self._held.pop(event.sequence, None)
        self._held[event.sequence] = asyncio.get_running_loop().time() + self._hold_s
        return replace(event, settle=settle)

    async def room(self) -> int:
        """Waits for room and returns how much there is; a moment longer when it is little, to ask less often."""
        if (room := self._room()) * 2 >= self._capacity:
            return room
        await asyncio.sleep(GATHER_S)
        while not (room := self._room()):
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next(iter(self._held.values()))):
                    await self._freed.wait()
        return room

    def _room(self) -> int:
        now_s = asyncio.get_running_loop().time()  # as the timeouts that wait for it
        while self._held and next(iter(self._held.values())) <= now_s:
            del self._held[next(iter(self._held))]
        return self._capacity - len(self._held)


async def pull(feed: Feed, out: Out, window: Window, silence_s: float = SILENCE_S) -> None:
    """Moves events from `feed` to `out` until cancelled; ends only with a status error that time does not cure."""
    request, failures = 0, 0
    while True:
        try:
            await feed.ensure()
            if failures:
                log.info(Event.PULL_RESUMED)
            failures = 0
            while True:
                request, batch = request + 1, min(await window.room(), MAX_BATCH)
                await feed.ask(request, batch)
                await _receive(feed, out, window, request, batch, silence_s)
        except (Unavailable, _BrokenError) as reason:
            failures += 1
            if failures == 1:
                log.warning(Event.PULL_INTERRUPTED, reason=str(reason))
            await asyncio.sleep(RETRY.pause_s(failures))


async def _receive(feed: Feed, out: Out, window: Window, request: int, batch: int, silence_s: float) -> None:
    """Passes on what one request brings."""
    while batch:
        try:
            async with asyncio.timeout(silence_s):
                arrival = await feed.arrivals.get()
        except TimeoutError:
            raise _BrokenError(f"nothing for {silence_s} s, not even a heartbeat") from None
        if isinstance(arrival, Delivery):
            await out.put(window.hold(arrival))
            batch -= 1
        elif arrival.request in {0, request}:  # else an older request speaks
            if arrival.said is Said.LOST:
                raise _BrokenError(arrival.reason)
            if arrival.said is Said.ENDED:
                return


class PullSubscription:
    """Merges feeds into one bounded queue; the Subscription that a bus on a server gives out."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        max_in_flight: int,
        ack_wait_s: float,
        on_close: Callable[[PullSubscription], object],
    ) -> None:
        self._feeds, self._on_close = tuple(feeds), on_close
        self._windows = [Window(-(-max_in_flight // len(feeds)), ack_wait_s) for _ in feeds]
        self._out = Out()
        self._pulls: list[asyncio.Task[None]] = []
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        if self._closed:
            raise StopAsyncIteration
        if not self._pulls:
            self._pulls = [
                asyncio.create_task(self._pull(*one)) for one in zip(self._feeds, self._windows, strict=True)
            ]
        event = await self._out.ready.get()
        if isinstance(event, StatusError):
            if self._closed:
                raise StopAsyncIteration
            await self.aclose()
            raise event
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def ask_again(self) -> None:
        """Call it when the connection came back: whatever was asked before is forgotten there."""
        for feed in self._feeds:
            with contextlib.suppress(asyncio.QueueFull):  # then events are there, and silence will tell
                feed.arrivals.put_nowait(Notice(Said.LOST, reason="the connection was renewed"))

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._on_close(self)
        for task in self._pulls:
            task.cancel()
        await asyncio.gather(*self._pulls, return_exceptions=True)
        out = [*drain(self._out.ready), *self._out.unseen]
        for feed in self._feeds:
            await feed.close([event for event in out if event.stream == feed.stream])
        self._out.ready.put_nowait(Unavailable("closed", reason=ErrorReason.CLOSED))  # wakes a reader that still waits

    async def _pull(self, feed: Feed, window: Window) -> None:
        try:
            await pull(feed, self._out, window)
        except StatusError as error:
            await self._out.ready.put(error)


def drain(queue: asyncio.Queue[Any]) -> list[Delivery]:
    """Takes out what is there and returns the events among it."""
    waiting = [queue.get_nowait() for _ in range(queue.qsize())]
    return [item for item in waiting if isinstance(item, Delivery)]
