"""Reaching the members of an etcd cluster: one channel at a time, the next member when one fails, errors by name.

aetcd's client itself is not used: it knows one host and no TLS, its watch ends with the first broken stream, hands out
events without their revision and cannot tell a quiet server from a stopped one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
from aetcd import rpc

from whaleflux.errors import (
    Compacted,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.tls_files import Tls, TlsFiles

CONNECT_S = 1.0
NEXT_MEMBER_S = 0.05  # between two members: each gets its turn before a call's time is up
REQUIRE_LEADER = (("hasleader", "true"),)  # a member cut off from its quorum ends the stream
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the default of 4 MB ends a watch that catches up
    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is for the world outside
    ("grpc.use_local_subchannel_pool", 1),  # else a fresh channel gets the stuck connection back
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also the limit on one connection attempt
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # finds hosts that vanished; etcd refuses less than 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.bdp_probe", 0),  # else each answer after a pause costs a ping and its answer
    ("grpc.http2.lookahead_bytes", 1 << 20),  # what the probe would find, fixed
)
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
}


class Endpoints:
    """The members of one cluster ("host:port"); each `open` dials the next one, showing what is in the files of `tls` by then.

    One address per channel: behind several, gRPC stays with a member that accepts connections and answers nothing.
    """

    def __init__(self, hosts: Sequence[str], tls: TlsFiles | None) -> None:
        if not hosts:
            raise InvalidArgument(FieldViolation("etcd.endpoints", 'is empty; give at least one "host:port"'))
        self.count, self._hosts, self._tls = len(hosts), itertools.cycle(hosts), tls
        self._shown: Tls | None = tls.load() if tls else None

    def open(self) -> grpc.aio.Channel:
        host = next(self._hosts)
        if self._tls is None or self._shown is None:
            return grpc.aio.insecure_channel(host, options=_CHANNEL_OPTIONS)
        with contextlib.suppress(InvalidArgument):  # files that are gone for a moment: with what it had
            self._shown = self._tls.load()
        credentials = grpc.ssl_channel_credentials(self._shown.roots, self._shown.key, self._shown.chain)
        return grpc.aio.secure_channel(host, credentials, options=_CHANNEL_OPTIONS)


class EtcdLink:
    """One channel with its stubs, closed when it was left and nobody uses it any more.

    gRPC raises usage errors and cancellations in calls whose channel is closed under them.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.kv, self.leases = rpc.KVStub(channel), rpc.LeaseStub(channel)
        self.users = 0

    async def ready(self, timeout_s: float) -> bool:
        try:
            if self.channel.get_state() is grpc.ChannelConnectivity.READY:  # as nearly always: spares a timer
                return True
            async with asyncio.timeout(timeout_s):
                while (state := self.channel.get_state(try_to_connect=True)) != grpc.ChannelConnectivity.READY:
                    await self.channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # the latter when the store is closed meanwhile
            return False
        return True


class EtcdConnection:
    """The unary calls' current link; a member that fails or stays silent is left for the next one."""

    def __init__(self, endpoints: Endpoints, timeout_s: float) -> None:
        self._endpoints, self.timeout_s = endpoints, timeout_s
        self._attempt_s = timeout_s / min(endpoints.count, 3)
        self._link = EtcdLink(endpoints.open())
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def link(self, timeout_s: float) -> AsyncGenerator[EtcdLink, None]:
        """A connected link; Unavailable when there is none, and then nothing was sent."""
        end_s = now_s() + timeout_s
        while (left_s := end_s - now_s()) > 0 and not self._closed:
            link = self._link
            link.users += 1
            try:
                if await link.ready(min(CONNECT_S, left_s)):
                    yield link
                    return
                self.leave(link)
            finally:
                link.users -= 1
                self._close_unused(link)
        if self._closed:
            raise Unavailable("this store was closed", reason=ErrorReason.STORE_CLOSED)
        raise Unavailable(f"no etcd member could be reached within {timeout_s:g} s")

    def leave(self, link: EtcdLink) -> None:
        """The next call uses the next member; calls under way on this link keep it until their deadline."""
        if link is self._link:
            self._link = EtcdLink(self._endpoints.open())

    def _close_unused(self, link: EtcdLink) -> None:
        if link is not self._link and not link.users:
            closing = asyncio.get_running_loop().create_task(link.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def ask(self, method: Callable[[EtcdLink], Any], request: Any) -> Any:
        """A call that may be repeated: tries member after member until one answers or the time is up."""
        end_s = now_s() + self.timeout_s
        while True:
            async with self.link(end_s - now_s()) as link:
                try:
                    left_s = max(0.001, end_s - now_s())
                    return await method(link)(request, timeout=min(self._attempt_s, left_s))
                except grpc.aio.AioRpcError as error:
                    if error.code() not in TRANSIENT or now_s() >= end_s:
                        raise status_error(error) from error
                    self.leave(link)
            await asyncio.sleep(NEXT_MEMBER_S)

    async def close(self) -> None:
        self._closed = True
        await self._link.channel.close(grace=1.0)
        await asyncio.gather(*self._closing)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def status_error(error: grpc.aio.AioRpcError, asked_revision: int = 0) -> StatusError:
    """What etcd's answer means: Unavailable when the same request may be taken later, whatever its code."""
    code, text = error.code(), error.details() or error.code().name
    match code:
        case grpc.StatusCode.OUT_OF_RANGE if "compacted" in text:
            return Compacted(asked_revision)
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return InvalidArgument(FieldViolation("store", text))
        case grpc.StatusCode.NOT_FOUND if "lease" in text:
            return NotFound("lease", "of the write", "it expired or was revoked")
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(f"etcd: {text}")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(f"etcd: {text}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in text:  # gRPC's own limit on a message
            return InvalidArgument(FieldViolation("store", text))
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "space" in text:  # until an operator compacts and defragments
            return Unavailable(f"etcd: {text}", reason=ErrorReason.STORE_FULL, retry_after_s=5.0)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Unavailable(f"etcd: {text}", reason=ErrorReason.STORE_BUSY)
        case _:
            return Unavailable(f"etcd: {text}")


async def next_beat(interval_s: float) -> None:
    """Sleeps until the clock shows a multiple of `interval_s`: what recurs in a process falls together and wakes it once."""
    await asyncio.sleep(interval_s - now_s() % interval_s)
