"""Client side without asyncio, for the command line and scripts: the same status errors, deadlines and repeats.

    with connect(target, tls) as channel:
        node = InventoryServiceStub(channel).GetNode(request)

Use one channel per process and thread pool; long streams of services belong to `channel`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import grpc

from whaleflux.errors import DeadlineExceeded, InvalidArgument, StatusError
from whaleflux.rpc import propagation
from whaleflux.rpc.connection_pool import STAMP_EVERY_S
from whaleflux.rpc.retry_policy import CallPolicy, channel_options, repeatable
from whaleflux.rpc.status import from_rpc_error
from whaleflux.rpc.tls_files import Tls, TlsFiles

Metadata = tuple[tuple[str, str], ...]
Beside = Callable[[str], AbstractContextManager[Callable[[StatusError], None]]]
"""By the call's method."""


def _nobody(_: str) -> AbstractContextManager[Callable[[StatusError], None]]:
    return nullcontext(lambda _: None)


def connect(
    target: str,
    tls: Tls | TlsFiles,
    *,
    server: str = "",
    policy: CallPolicy | None = None,
    metadata: Metadata = (),
) -> SyncChannel:
    """A channel to `target` showing `tls`; arguments as in `whaleflux.rpc.channel.connect`."""

    def dial() -> grpc.Channel:
        shown = tls.load() if isinstance(tls, TlsFiles) else tls
        credentials = grpc.ssl_channel_credentials(shown.roots, shown.key or None, shown.chain or None)
        return grpc.secure_channel(target, credentials, channel_options(server))

    return SyncChannel(dial(), policy, metadata, (tls, dial) if isinstance(tls, TlsFiles) else None)


class SyncChannel:
    """What a generated stub is built on. Use `connect`. `renewable`: files that are looked at again, and how one dials with them.

    `beside` stands around each unary call, all its attempts, and around the wait for the first message of a stream (`awaiting`), and is told of
    those that failed: for who shows what is waited for.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        policy: CallPolicy | None = None,
        metadata: Metadata = (),
        renewable: tuple[TlsFiles, Callable[[], grpc.Channel]] | None = None,
    ) -> None:
        self._channel, self.policy, self.metadata = channel, policy or CallPolicy(), metadata
        self._renewable = renewable
        self.beside: Beside = _nobody
        self._stamp = renewable[0].stamp() if renewable else None
        self._stamped_at = time.monotonic()

    def current(self) -> grpc.Channel:
        """The connection of the next call: dialled anew once the certificate was renewed. Calls on the one before end by themselves."""
        if self._renewable is not None and time.monotonic() - self._stamped_at >= STAMP_EVERY_S:
            self._stamped_at = time.monotonic()
            files, dial = self._renewable
            try:
                if (stamp := files.stamp()) != self._stamp:
                    self._channel, self._stamp = dial(), stamp
            except (OSError, InvalidArgument):
                pass  # being replaced right now; the old certificate serves until the next look
        return self._channel

    def awaiting(self, method: str) -> FirstMessage:
        """For who opens streams of this method, one after another, until something comes."""
        return FirstMessage(self, method)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Unary(self, _Callable(self, "unary_unary", method, request_serializer, response_deserializer))

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        made = _Callable(self, "stream_unary", method, request_serializer, response_deserializer)
        return _Unary(self, made, consumes=True)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, _Callable(self, "unary_stream", method, request_serializer, response_deserializer))

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, _Callable(self, "stream_stream", method, request_serializer, response_deserializer))


class FirstMessage:
    """The wait for a message, over as many streams as it takes; use it as a context: then it ends, whatever happens."""

    def __init__(self, channel: SyncChannel, method: str) -> None:
        self._channel, self._method = channel, method
        self._around: AbstractContextManager[Callable[[StatusError], None]] | None = None
        self._failed: Callable[[StatusError], None] = lambda _: None

    def __enter__(self) -> Self:
        self.begins()
        return self

    def __exit__(self, *_: object) -> None:
        self.came()

    def begins(self, because: StatusError | None = None) -> None:
        """Nothing has come yet; the last stream broke because of this."""
        if self._around is None:
            self._around = self._channel.beside(self._method)
            self._failed = self._around.__enter__()
        if because is not None:
            self._failed(because)

    def came(self) -> None:
        """A message came, or nobody waits any more."""
        if self._around is not None:
            around, self._around = self._around, None
            around.__exit__(None, None, None)


class _Callable:
    """A method on the connection of the moment; made anew when that was."""

    def __init__(self, channel: SyncChannel, kind: str, method: str, serialize: Any, deserialize: Any) -> None:
        self._channel, self._kind, self.method = channel, kind, method
        self._types = serialize, deserialize
        self._made: tuple[grpc.Channel, Any] | None = None

    def __call__(self, request: Any, **options: Any) -> Any:
        connection, made = self._channel.current(), self._made
        if made is None or made[0] is not connection:
            made = self._made = connection, getattr(connection, self._kind)(self.method, *self._types)
        return made[1](request, **options)


class _Unary:
    def __init__(self, channel: SyncChannel, callable_: _Callable, *, consumes: bool = False) -> None:
        self._channel, self._method, self._callable, self._consumes = channel, callable_.method, callable_, consumes

    def __call__(self, request: Any, timeout: float | None = None, metadata: Metadata = ()) -> Any:
        """`timeout` in seconds for all attempts together; the policy's when None."""
        policy = self._channel.policy
        deadline = time.monotonic() + (policy.timeout_s if timeout is None else timeout)
        again = repeatable(self._method, request)
        attempt = policy.attempts if self._consumes else 1  # a stream of requests is used up by its first attempt
        with (
            self._channel.beside(self._method) as failed,
            propagation.outgoing(self._method, streaming=False) as headers,
        ):
            sent = (*self._channel.metadata, *headers, *metadata)
            while True:
                try:
                    return self._once(request, deadline - time.monotonic(), sent)
                except StatusError as error:
                    failed(error)
                    left_s = deadline - time.monotonic()
                    pause_s = policy.pause_s(attempt, error, again, left_s, random.random())
                    if pause_s is None:
                        raise
                time.sleep(pause_s)
                attempt += 1

    def _once(self, request: Any, left_s: float, metadata: Metadata) -> Any:
        if left_s <= 0:
            raise DeadlineExceeded(f"no time was left for {self._method}", metadata={"method": self._method})
        try:
            return self._callable(request, timeout=left_s, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


class _Streaming:
    def __init__(self, channel: SyncChannel, callable_: _Callable) -> None:
        self._channel, self._method, self._callable = channel, callable_.method, callable_

    def __call__(self, request: Any, timeout: float | None = None, metadata: Metadata = ()) -> Iterator[Any]:
        """`timeout` in seconds for the whole stream. Closing the iterator (or Ctrl-C) cancels the call."""
        with propagation.outgoing(self._method, streaming=True) as headers:
            call = self._callable(request, timeout=timeout, metadata=(*self._channel.metadata, *headers, *metadata))
        return _messages(call)


def _messages(call: Any) -> Iterator[Any]:
    try:
        yield from call
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()
