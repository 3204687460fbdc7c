"""The Bus on NATS JetStream; the only module that imports nats.

Rests on four habits. Every call has a deadline. Reconnecting never ends. A publish that no stream takes first makes
sure that the streams exist, since a server can come back empty. And a pull request is trusted only while its
heartbeats arrive: a request that a restarted server has forgotten is otherwise waited for in silence (nats.py #504).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as Inbox
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    ExternalStream,
    PubAck,
    StorageType,
    StreamConfig,
    StreamSource,
)

from whaleflux.errors import FailedPrecondition, StatusError, Unavailable
from whaleflux.events import api, nats_reading
from whaleflux.events.api import Ack, Delivery, Excerpt, Start
from whaleflux.events.deadline import within
from whaleflux.events.nats_reading import taken_at
from whaleflux.events.pull import HEARTBEAT_S, MAX_BATCH, REQUEST_S, Notice, PullSubscription, Said, drain
from whaleflux.events.subjects import HUB
from whaleflux.events.topology import StreamSpec, hub_streams, site_streams, streams_for
from whaleflux.events.trace import with_trace
from whaleflux.reasons import ErrorReason
from whaleflux.telemetry import Event, get_logger

log = get_logger(__name__)
T = TypeVar("T")
CALL_TIMEOUT_S = 5.0
MAX_PUBLISHES_IN_FLIGHT = 256
SERVER_MAX_UNACKNOWLEDGED = 20_000  # more than a crash can make it forget; see `pull`
_NOT_NOW = (408, 429)  # request timeout, too many requests
_NO_STREAM = 10059  # the server's error codes
_NAME_IN_USE = 10058
_NO_CONSUMER = 10014


@dataclass(frozen=True, slots=True)
class NatsOptions:
    """How to reach the event bus. `location` is `hub`, or the site whose leaf server this is."""

    servers: tuple[str, ...]  # nats://host:port or tls://host:port
    location: str = HUB
    user: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    name: str = "whaleflux"  # shown in the server's connection list
    inbox: str = "_INBOX"  # below which answers are heard; a user may hear its own alone
    streams: tuple[StreamSpec, ...] = ()  # what to create where absent; empty: the location's own
    create_streams: bool = True  # False for users who may only publish

    def wanted(self) -> tuple[StreamSpec, ...]:
        """The streams that must exist here."""
        return self.streams or (hub_streams() if self.location == HUB else site_streams(self.location))


class NatsBus:
    """A Bus on JetStream. Made by `NatsBus.connect`; survives its server."""

    def __init__(self, client: Client, options: NatsOptions) -> None:
        self.client, self.options = client, options
        self._js: JetStreamContext = client.jetstream(timeout=CALL_TIMEOUT_S)
        self._publishing = asyncio.Semaphore(MAX_PUBLISHES_IN_FLIGHT)
        self._open: set[PullSubscription] = set()
        self._closing = False
        self._renewed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, options: NatsOptions, *, timeout_s: float = 30.0) -> NatsBus:
        """Connects and makes sure that the streams exist; raises Unavailable after `timeout_s`."""
        client = Client()
        bus = cls(client, options)
        try:
            await within(timeout_s, bus._connected())
        except (TimeoutError, nats.errors.Error, OSError) as error:
            await _close(client)
            raise _unavailable(f"cannot connect to the event bus within {timeout_s} s", error) from error
        except BaseException:
            await _close(client)
            raise
        return bus

    async def _connected(self) -> None:
        callbacks = {"reconnected_cb": self._reconnected, "disconnected_cb": self._disconnected}
        await self.client.connect(**_client_options(self.options), **callbacks)
        await self._until_ready()

    @property
    def connected(self) -> bool:
        """Whether the connection stands at this moment."""
        return bool(self.client.is_connected)

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
        carried["Nats-Msg-Id"] = id
        try:
            async with asyncio.timeout(timeout_s), self._publishing:
                return await self._publish(subject, data, carried)
        except (TimeoutError, nats.errors.Error) as error:
            raise _status_error(f"publishing to {subject} was not acknowledged", error) from error

    def subscribe(
        self,
        subjects: Sequence[str],
        *,
        durable: str,
        start: Start = "all",
        max_in_flight: int = api.MAX_IN_FLIGHT,
        ack_wait_s: float = api.ACK_WAIT_S,
        forget_after_s: float = 0.0,
    ) -> PullSubscription:
        filters = api.check_subscription(subjects, durable, max_in_flight, ack_wait_s, forget_after_s)
        wanted = _consumer(durable, start, ack_wait_s, forget_after_s)
        feeds = [
            _NatsFeed(self, stream, replace(wanted, filter_subjects=list(share)))
            for stream, share in streams_for(self.options.location, filters)
        ]
        subscription = PullSubscription(feeds, max_in_flight, ack_wait_s, self._open.discard)
        self._open.add(subscription)
        return subscription

    async def read(self, subjects: Sequence[str], *, start: Start = "all", limit: int = api.MAX_READ) -> Excerpt:
        filters = api.check_reading(subjects, limit)
        if self.options.location != HUB:
            raise FailedPrecondition("history is kept at the hub; ask there", reason=ErrorReason.BUS_REFUSED)
        if not self.connected:
            raise _unavailable("the event bus does not answer", ConnectionError("not connected"))
        ((stream, share),) = streams_for(HUB, filters)
        try:
            return await nats_reading.read(self, stream, share, start, limit)
        except FailedPrecondition as refused:
            if refused.metadata.get("err_code") != str(_NO_STREAM):
                raise
            await self.ensure(self.options.wanted())  # the server came back without its files
            return await nats_reading.read(self, stream, share, start, limit)

    async def forget(self, durable: str) -> None:
        for spec in self.options.wanted():
            try:
                await self.call(self._js.delete_consumer(spec.name, durable))
            except FailedPrecondition as refused:
                if refused.metadata.get("err_code") not in {str(_NO_STREAM), str(_NO_CONSUMER)}:
                    raise

    async def close(self) -> None:
        self._closing = True
        for subscription in tuple(self._open):
            await subscription.aclose()
        await _close(self.client)

    # What follows is for the subscription, for `stream_links` and for tests.

    def jetstream(self, api: str = "", timeout_s: float = CALL_TIMEOUT_S) -> JetStreamContext:
        """The JetStream interface of the own account, or another one that is reached under `api` (see `topology`)."""
        return self.client.jetstream(prefix=api, timeout=timeout_s) if api else self._js

    async def call(self, request: Awaitable[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Awaits a request to the server; its errors become Unavailable or FailedPrecondition."""
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(timeout_s):
                answer = await request
        except (TimeoutError, nats.errors.Error) as error:
            raise _status_error("the event bus refused or did not answer", error) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a site's server may answer anything
            raise _unavailable("the event bus answered what is no answer", error) from error
        if task and task.cancelling() > before:  # the client's wait_for can swallow it (Python 3.11)
            raise asyncio.CancelledError
        return answer

    async def reaches(self, api: str, timeout_s: float = 1.0) -> bool:
        """Whether the JetStream there answers, for instance a site's through its leaf link."""
        try:
            await self.call(self.jetstream(api, timeout_s).account_info(), timeout_s)
        except StatusError:
            return False
        return True

    async def ensure(self, specs: Iterable[StreamSpec]) -> None:
        """Creates what is absent and leaves alone what exists (only its owner changes a stream).

        Looks first: the server counts the bytes of a stream that is there once more when it is asked to make it again, and says
        that there is no room.
        """
        js = self.jetstream()
        for spec in specs:
            try:
                await self.call(js.stream_info(spec.name))
            except FailedPrecondition as refused:
                if refused.metadata.get("err_code") != str(_NO_STREAM):
                    raise
                await self._create(js, spec)

    async def _create(self, js: JetStreamContext, spec: StreamSpec) -> None:
        try:
            await self.call(js.add_stream(_config(spec)))
        except FailedPrecondition as refused:
            if refused.metadata.get("err_code") != str(_NAME_IN_USE):  # another service was quicker
                raise

    async def apply(self, spec: StreamSpec, *, api: str = "") -> None:
        """Makes a stream be as `spec` says: creates or changes it."""
        js = self.jetstream(api)
        try:
            await self.call(js.update_stream(_config(spec)))
        except FailedPrecondition as refused:
            if refused.metadata.get("err_code") != str(_NO_STREAM):
                raise
            await self.call(js.add_stream(_config(spec)))

    async def nudge(self, spec: StreamSpec, *, api: str = "") -> None:
        """Makes a stream ask its sources anew at once, instead of at the server's next try (up to 40 s).

        They are taken out and put back; the server finds in the stream how far it had come. Call it when the link to them is
        back. When it raises, `apply(spec)` must follow, or the stream stays without them.
        """
        await self.apply(spec.without_sources(), api=api)
        await self.apply(spec, api=api)

    async def _publish(self, subject: str, data: bytes, headers: dict[str, Any]) -> Ack:
        try:
            answer = await self._acknowledged(subject, data, headers)
        except nats.js.errors.NoStreamResponseError:
            if not self.options.create_streams:
                raise
            await self.ensure(self.options.wanted())  # the server may have come back without its files
            answer = await self._acknowledged(subject, data, headers)
        return Ack(answer.stream, answer.seq, bool(answer.duplicate))

    async def _acknowledged(self, subject: str, data: bytes, headers: dict[str, Any]) -> PubAck:
        """Sends, and again on a new connection: the answer to what went over the old one never comes. The id makes it safe."""
        while True:
            renewed = self._renewed
            answer = await self._js.publish_async(subject, data, headers=dict(headers))
            try:
                await asyncio.wait({answer, renewed}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    return answer.result()
            finally:
                answer.cancel()

    async def _until_ready(self) -> None:
        """JetStream answers a little later than the server."""
        while True:
            try:
                if self.options.create_streams:
                    await self.ensure(self.options.wanted())
                return
            except Unavailable:
                await asyncio.sleep(0.1)

    async def _disconnected(self) -> None:
        if not self._closing:
            log.warning(Event.BUS_UNREACHABLE, client=self.options.name)

    async def _reconnected(self) -> None:
        self._renewed.set_result(None)
        self._renewed = asyncio.get_running_loop().create_future()
        log.info(Event.BUS_REACHABLE, server=str(self.client.connected_url and self.client.connected_url.netloc))
        for subscription in tuple(self._open):
            subscription.ask_again()


class _NatsFeed:
    """One durable pull consumer of one stream; see `pull.Feed`."""

    def __init__(self, bus: NatsBus, stream: str, wanted: ConsumerConfig) -> None:
        self._bus, self.stream, self._wanted = bus, stream, wanted
        self.arrivals: asyncio.Queue[Delivery | Notice] = asyncio.Queue(2 * MAX_BATCH)
        self._inbox: Inbox | None = None
        self._reply = ""

    async def ensure(self) -> None:
        js = self._bus.jetstream()
        durable = self._wanted.durable_name
        try:
            known = (await self._bus.call(js.consumer_info(self.stream, durable))).config
        except FailedPrecondition as refused:
            if refused.metadata.get("err_code") not in {str(_NO_STREAM), str(_NO_CONSUMER)}:
                raise
            await self._bus.ensure(self._bus.options.wanted())
            await self._bus.call(js.add_consumer(self.stream, self._wanted))
        else:
            if known.deliver_subject:
                raise FailedPrecondition(
                    f"consumer {durable!r} of {self.stream} was made by somebody else, to push; choose another durable",
                    reason=ErrorReason.BUS_REFUSED,
                )
            if not _same(known, self._wanted):
                await self._bus.call(js.add_consumer(self.stream, _changed(known, self._wanted)))
        if self._inbox is None:
            self._reply = self._bus.client.new_inbox()
            self._inbox = await self._bus.call(self._bus.client.subscribe(f"{self._reply}.*", cb=self._arrived))

    async def ask(self, request: int, batch: int) -> None:
        seconds = {"expires": REQUEST_S, "idle_heartbeat": HEARTBEAT_S}
        body = {"batch": batch, **{name: int(value * 1e9) for name, value in seconds.items()}}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self._wanted.durable_name}"
        await self._bus.call(
            self._bus.client.publish(subject, json.dumps(body).encode(), reply=f"{self._reply}.{request}")
        )

    async def close(self, unseen: Sequence[Delivery] = ()) -> None:
        with contextlib.suppress(nats.errors.Error, StatusError):
            await self._leave()
        with contextlib.suppress(nats.errors.Error, StatusError):
            given_back = sorted([*unseen, *drain(self.arrivals)], key=lambda event: event.sequence)
            if (
                given_back
            ):  # the question makes the server drop the requests that nobody waits for; for them it would reorder
                await self._bus.call(self._bus.jetstream().consumer_info(self.stream, str(self._wanted.durable_name)))
            for event in given_back:
                await event.nak()

    async def _leave(self) -> None:
        """What is on its way arrives first: else nobody would give it back, and it came again only when its time to be settled is over."""
        if self._inbox is None:
            return
        if self._bus.client.is_connected:
            await self._bus.call(self._inbox.drain())
        else:
            await self._inbox.unsubscribe()

    async def _arrived(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status", "")
        if not status:
            await self.arrivals.put(_delivery(message))
            return
        said = {"100": Said.HEARTBEAT, "404": Said.ENDED, "408": Said.ENDED}.get(status, Said.LOST)
        if said is Said.HEARTBEAT and not self.arrivals.empty():
            return  # events wait to be read, which is life enough
        request = int(message.subject.rpartition(".")[2])
        await self.arrivals.put(Notice(said, request, f"{status} {(message.headers or {}).get('Description', '')}"))


def _delivery(message: Msg) -> Delivery:
    async def settle(delay_s: float | None) -> None:
        with contextlib.suppress(nats.errors.Error):  # settled before, or not connected: then it comes again
            await (message.ack() if delay_s is None else message.nak(delay_s))

    headers = message.headers or {}
    place = message.metadata
    return Delivery(
        subject=message.subject,
        data=message.data,
        id=headers.get("Nats-Msg-Id", ""),
        headers={name: value for name, value in headers.items() if not name.startswith("Nats-")},
        stream=place.stream,
        sequence=place.sequence.stream,
        timestamp=taken_at(message.reply),
        attempt=place.num_delivered,
        settle=settle,
    )


def beginning(start: Start) -> dict[str, Any]:
    """The part of a consumer's configuration that says where it begins."""
    if isinstance(start, datetime):
        return {"deliver_policy": DeliverPolicy.BY_START_TIME, "opt_start_time": start}
    if isinstance(start, int):
        return {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": max(1, start)}
    return {"deliver_policy": {"all": DeliverPolicy.ALL, "new": DeliverPolicy.NEW}[start]}


def _consumer(durable: str, start: Start, ack_wait_s: float, forget_after_s: float) -> ConsumerConfig:
    return ConsumerConfig(
        name=durable,
        durable_name=durable,
        **beginning(start),
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait_s,
        max_ack_pending=SERVER_MAX_UNACKNOWLEDGED,
        inactive_threshold=forget_after_s or None,
    )


def _same(known: ConsumerConfig, wanted: ConsumerConfig) -> bool:
    """Whether the durable consumer is as wanted; where it started the first time does not count."""
    filters = known.filter_subjects or ([known.filter_subject] if known.filter_subject else [])
    return (
        sorted(filters) == sorted(wanted.filter_subjects or [])
        and known.ack_wait == wanted.ack_wait
        and known.max_ack_pending == wanted.max_ack_pending
        and (known.inactive_threshold or None) == wanted.inactive_threshold
    )


def _changed(known: ConsumerConfig, wanted: ConsumerConfig) -> ConsumerConfig:
    """`known` with what may be changed of a durable consumer; its beginning may not."""
    return replace(
        known,
        name=wanted.name,
        filter_subject=None,
        filter_subjects=wanted.filter_subjects,
        ack_wait=wanted.ack_wait,
        max_ack_pending=wanted.max_ack_pending,
        inactive_threshold=wanted.inactive_threshold,
    )


def _client_options(options: NatsOptions) -> dict[str, Any]:
    last = ""

    async def note(error: Exception) -> None:
        nonlocal last
        text = f"{type(error).__name__}: {error}"
        if last != text:  # an outage is one line, not one per attempt
            last = text
            log.warning(Event.BUS_ERROR, error=text)

    chosen: dict[str, Any] = {
        "servers": list(options.servers),
        "name": options.name,
        "inbox_prefix": options.inbox.encode(),
        "error_cb": note,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.2,
        "connect_timeout": 2,
        "ping_interval": 2,  # a silent server is given up after three of these
        "max_outstanding_pings": 2,
        "pending_size": 4 << 20,
        "flush_timeout": CALL_TIMEOUT_S,
    }
    if options.user:
        chosen |= {"user": options.user, "password": options.password}
    if options.tls:
        chosen["tls"] = options.tls
    return chosen


def _config(spec: StreamSpec) -> StreamConfig:
    return StreamConfig(
        name=spec.name,
        subjects=list(spec.subjects) or None,
        sources=[
            StreamSource(
                name=s.stream, filter_subject=s.subjects, external=ExternalStream(api=s.api, deliver=s.deliver)
            )
            for s in spec.sources
        ],
        storage=StorageType.FILE,
        max_bytes=spec.limits.max_bytes,
        max_age=spec.limits.max_age_s,
        max_msgs_per_subject=spec.limits.max_per_subject or -1,
        duplicate_window=spec.limits.duplicate_window_s,
        num_replicas=spec.limits.replicas,
        deny_delete=spec.sealed,
        deny_purge=spec.sealed,
    )


def _status_error(what: str, error: BaseException) -> StatusError:
    """A server's error with a 4xx code says no for good, but for "too slow" and "too many"; all others pass with time."""
    code = (error.code or 0) if isinstance(error, nats.js.errors.APIError) else 0
    if isinstance(error, nats.js.errors.APIError) and 400 <= code < 500 and code not in _NOT_NOW:
        metadata = {"code": str(error.code), "err_code": str(error.err_code)}
        return FailedPrecondition(f"{what}: {error.description}", reason=ErrorReason.BUS_REFUSED, metadata=metadata)
    return _unavailable(what, error)


def _unavailable(what: str, error: BaseException) -> Unavailable:
    return Unavailable(f"{what}: {str(error) or type(error).__name__}", reason=ErrorReason.BUS_UNAVAILABLE)


async def _close(client: Client) -> None:
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        async with asyncio.timeout(2):
            if client.is_connected:
                await client.flush()  # acknowledgements are on their way
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        async with asyncio.timeout(2):
            await client.close()
