"""Client side without asyncio, for the command line and scripts: the same refusals, deadlines and repeats.

    with connect(target, tls) as channel:
        node = InventoryServiceStub(channel).GetNode(request)

Use one channel per process and thread pool; long streams of services belong to `channel`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any, Self

import grpc

from whaleflux.errors import DeadlineExceeded, Refusal
from whaleflux.rpc import propagation
from whaleflux.rpc.pki import Tls, TlsFiles
from whaleflux.rpc.policy import CallPolicy, channel_options, repeatable
from whaleflux.rpc.status import from_rpc_error

Metadata = tuple[tuple[str, str], ...]


def connect(
    target: str,
    tls: Tls | TlsFiles,
    *,
    server: str = "",
    policy: CallPolicy | None = None,
    metadata: Metadata = (),
) -> SyncChannel:
    """A channel to `target` showing `tls`; arguments as in `whaleflux.rpc.channel.connect`."""
    shown = tls.load() if isinstance(tls, TlsFiles) else tls
    credentials = grpc.ssl_channel_credentials(shown.roots, shown.key, shown.chain)
    return SyncChannel(
        grpc.secure_channel(target, credentials, channel_options(server)), policy or CallPolicy(), metadata
    )


class SyncChannel:
    """What a generated stub is built on. Use `connect`."""

    def __init__(self, channel: grpc.Channel, policy: CallPolicy, metadata: Metadata) -> None:
        self._channel, self.policy, self.metadata = channel, policy, metadata

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
        return _Unary(self, method, self._channel.unary_unary(method, request_serializer, response_deserializer))

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Unary(
            self,
            method,
            self._channel.stream_unary(method, request_serializer, response_deserializer),
            consumes=True,
        )

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, method, self._channel.unary_stream(method, request_serializer, response_deserializer))

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool = False,
    ) -> Any:
        return _Streaming(self, method, self._channel.stream_stream(method, request_serializer, response_deserializer))


class _Unary:
    def __init__(self, channel: SyncChannel, method: str, callable_: Any, *, consumes: bool = False) -> None:
        self._channel, self._method, self._callable, self._consumes = channel, method, callable_, consumes

    def __call__(self, request: Any, timeout: float | None = None, metadata: Metadata = ()) -> Any:
        """`timeout` in seconds for all attempts together; the policy's when None."""
        policy = self._channel.policy
        deadline = time.monotonic() + (policy.timeout_s if timeout is None else timeout)
        again = repeatable(self._method, request)
        attempt = policy.attempts if self._consumes else 1  # a stream of requests is used up by its first attempt
        with propagation.outgoing(self._method, streaming=False) as headers:
            sent = (*self._channel.metadata, *headers, *metadata)
            while True:
                try:
                    return self._once(request, deadline - time.monotonic(), sent)
                except Refusal as refusal:
                    left_s = deadline - time.monotonic()
                    pause_s = policy.pause_s(attempt, refusal, again, left_s, random.random())
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
    def __init__(self, channel: SyncChannel, method: str, callable_: Any) -> None:
        self._channel, self._method, self._callable = channel, method, callable_

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
