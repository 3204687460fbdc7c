"""Client side for asyncio: a channel whose stubs raise status errors, have deadlines, repeat what is safe, and re-dial.

    channel = connect("10.0.0.5:7001", files, server=server_name("scheduler"))
    stub = SchedulerServiceStub(channel)
    job = await stub.GetJob(request)              # raises errors.NotFound, errors.Unavailable, ...
    async for change in stub.WatchJobs(request):  # a broken stream raises errors.Unavailable: resume it

Stubs keep working when the certificate on disk is renewed: new calls go over a new connection, open streams stay on
the old one until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Self, TypeVar

import grpc

from whaleflux.errors import DeadlineExceeded, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import propagation
from whaleflux.rpc.connection_pool import Connection, ConnectionPool
from whaleflux.rpc.retry_policy import CallPolicy, repeatable
from whaleflux.rpc.status import from_rpc_error
from whaleflux.rpc.tls_files import Tls, TlsFiles

Response = TypeVar("Response")
Metadata = tuple[tuple[str, str], ...]


def connect(
    target: str,
    tls: Tls | TlsFiles,
    *,
    server: str = "",
    policy: CallPolicy | None = None,
    metadata: Metadata = (),
    follow_leader: bool = False,
) -> Channel:
    """A channel to `target` (host:port, dns:///name:port), showing `tls`. Connects lazily; never raises for a dead peer.

    `server` is the name that the peer's certificate must have (`pki.server_name`), "" checks the dialled host.
    `metadata` goes with every call. With `follow_leader` a follower's NOT_LEADER sends the next attempt, and streams
    opened later, to the leader it names; without one behind it that answers, back to `target`.
    """
    connections = ConnectionPool(target, tls, server, follow_leader=follow_leader)
    return Channel(connections, policy or CallPolicy(), metadata)


class Channel:
    """What a generated stub is built on. Use `connect`."""

    def __init__(self, connections: ConnectionPool, policy: CallPolicy, metadata: Metadata) -> None:
        self.connections, self.policy, self.metadata = connections, policy, metadata

    @property
    def target(self) -> str:
        """Where it was asked to connect to."""
        return self.connections.target

    async def ready(self, timeout_s: float) -> None:
        """Returns when the connection stands; raises Unavailable when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await (await self.connections.current()).channel.channel_ready()
        except TimeoutError:
            raise Unavailable(
                f"{self.target} did not answer within {timeout_s} s", reason=ErrorReason.SERVER_UNREACHABLE
            ) from None

    async def close(self) -> None:
        """Ends the connection and the calls on it."""
        await self.connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # What generated stubs call. The extra keyword `_registered_method` is gRPC's own.

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Unary(self, "unary_unary", method, request_serializer, response_deserializer)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Unary(self, "stream_unary", method, request_serializer, response_deserializer)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, "unary_stream", method, request_serializer, response_deserializer)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, "stream_stream", method, request_serializer, response_deserializer)


class _Callable:
    def __init__(self, channel: Channel, kind: str, method: str, serializer: Any, deserializer: Any) -> None:
        self._channel, self._kind, self._method = channel, kind, method
        self._codecs = (serializer, deserializer)

    def _on(self, connection: Connection) -> Callable[..., Any]:
        found = connection.callables.get(self._method)
        if found is None:
            found = connection.callables[self._method] = getattr(connection.channel, self._kind)(
                self._method, *self._codecs
            )
        return found  # type: ignore[no-any-return]  # gRPC's multi-callables have no common type


class _Unary(_Callable):
    """`await stub.Method(request)`: one answer, or a status error."""

    async def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = (),
        wait_for_ready: bool | None = None,
    ) -> Any:
        """`timeout` in seconds for all attempts together; the policy's when None."""
        deadline = time.monotonic() + (self._channel.policy.timeout_s if timeout is None else timeout)
        again = repeatable(self._method, request)
        # A stream of requests is used up by its first attempt, whatever the server says.
        attempt = 1 if self._kind == "unary_unary" else self._channel.policy.attempts
        with propagation.outgoing(self._method, streaming=False) as headers:
            sent = (*self._channel.metadata, *headers, *metadata)
            while True:
                try:
                    return await self._once(request, deadline - time.monotonic(), sent, wait_for_ready)
                except StatusError as error:
                    await self._channel.connections.on_error(error)
                    left_s = deadline - time.monotonic()
                    pause_s = self._channel.policy.pause_s(attempt, error, again, left_s, random.random())
                    if pause_s is None:
                        raise
                await asyncio.sleep(pause_s)
                attempt += 1

    async def _once(self, request: Any, left_s: float, metadata: Metadata, wait_for_ready: bool | None) -> Any:
        if left_s <= 0:
            raise DeadlineExceeded(f"no time was left for {self._method}", metadata={"method": self._method})
        async with await self._channel.connections.current() as connection:
            with _as_status_errors():
                return await self._on(connection)(
                    request, timeout=left_s, metadata=metadata, wait_for_ready=wait_for_ready
                )


class _Streaming(_Callable):
    """`async for message in stub.Method(request)`: messages until the end, or a status error."""

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata = (),
        wait_for_ready: bool | None = None,
    ) -> Stream[Any]:
        """`timeout` in seconds for the whole stream; none when None."""

        def start(connection: Connection) -> Any:
            with propagation.outgoing(self._method, streaming=True) as headers:
                sent = (*self._channel.metadata, *headers, *metadata)
                return self._on(connection)(request, timeout=timeout, metadata=sent, wait_for_ready=wait_for_ready)

        return Stream(self._channel, start)


class Stream(Generic[Response]):
    """The answers of one call. It starts when first read; `aclose` (or leaving `async with`) ends it early."""

    def __init__(self, channel: Channel, start: Callable[[Connection], Any]) -> None:
        self._channel, self._start = channel, start
        self._call: Any = None
        self._connection: Connection | None = None
        self._ended = False

    def __aiter__(self) -> AsyncIterator[Response]:
        return self

    async def __anext__(self) -> Response:
        if self._ended:
            raise StopAsyncIteration
        try:
            with _as_status_errors():
                await self._started()
                message = await self._call.read()
        except BaseException as failure:
            await self._failed(failure)
            raise
        if message is grpc.aio.EOF:
            await self._finished()
            raise StopAsyncIteration
        return message  # type: ignore[no-any-return]  # the stub's deserializer knows the type

    async def _started(self) -> None:
        if self._connection is None:
            self._connection = await (await self._channel.connections.current()).__aenter__()
            self._call = self._start(self._connection)

    async def _finished(self) -> None:
        """After the last message comes the status, which may be a status error."""
        call = self._call
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            error = grpc.aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
            status = from_rpc_error(error)
            await self._failed(status)
            raise status
        await self.aclose()

    async def _failed(self, failure: BaseException) -> None:
        await self.aclose()
        if isinstance(failure, StatusError):
            await self._channel.connections.on_error(failure)

    async def aclose(self) -> None:
        """Cancels what is left of the call; nothing to do when it has ended."""
        self._ended = True
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._call is not None:
                self._call.cancel()
            await connection.__aexit__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


@contextlib.contextmanager
def _as_status_errors() -> Iterator[None]:
    """Failures as status errors, also those that gRPC reports by cancelling (a closed channel): nobody cancelled us."""
    task = asyncio.current_task()
    asked = task.cancelling() if task else 0
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except grpc.aio.UsageError as error:  # the channel was closed under us
        raise Unavailable(str(error), reason=ErrorReason.CHANNEL_CLOSED) from None
    except asyncio.CancelledError:
        if task is not None and task.cancelling() > asked:
            raise
        raise Unavailable("the connection was closed", reason=ErrorReason.CALL_CANCELLED, retry_after_s=0.1) from None
