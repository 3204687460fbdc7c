"""A service of well-known types for tests of the rpc layer: no generated code, every arity, behaviour per test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from whaleflux.rpc import roles
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.pki import CertificateAuthority, server_name
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server

NAME = "test.v1.ToyService"
CA = CertificateAuthority.create(datetime.now(UTC))
TABLE: roles.Table = {
    f"/{NAME}/*": roles.KNOWN,
    f"/{NAME}/Join": roles.ANYONE,
    f"/{NAME}/Administer": frozenset({roles.ADMIN}),
    f"/{NAME}/AccessLog": frozenset({roles.FRONTDOOR}),
    **roles.TABLE,
}


class Toy:
    """Give it the behaviours a test needs; a method without one does not exist."""

    def __init__(self, unary: dict[str, Any] | None = None, stream: dict[str, Any] | None = None) -> None:
        self.unary, self.stream = unary or {}, stream or {}
        self.collect: dict[str, Any] = {}
        self.talk: dict[str, Any] = {}


def add_toy(toy: Toy, server: Any) -> None:
    makers: list[tuple[dict[str, Any], Callable[..., Any]]] = [
        (toy.unary, grpc.unary_unary_rpc_method_handler),
        (toy.stream, grpc.unary_stream_rpc_method_handler),
        (toy.collect, grpc.stream_unary_rpc_method_handler),
        (toy.talk, grpc.stream_stream_rpc_method_handler),
    ]
    codecs = (StringValue.FromString, StringValue.SerializeToString)
    handlers = {name: make(fn, *codecs) for methods, make in makers for name, fn in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


class Stub:
    """What protoc would generate, for any method name."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def _make(self, kind: str, name: str) -> Any:
        make = getattr(self._channel, kind)
        return make(f"/{NAME}/{name}", StringValue.SerializeToString, StringValue.FromString)

    def unary(self, name: str) -> Any:
        return self._make("unary_unary", name)

    def stream(self, name: str) -> Any:
        return self._make("unary_stream", name)

    def collect(self, name: str) -> Any:
        return self._make("stream_unary", name)

    def talk(self, name: str) -> Any:
        return self._make("stream_stream", name)


def text(value: str = "") -> StringValue:
    return StringValue(value=value)


@contextlib.asynccontextmanager
async def serving(toy: Toy, limits: CallLimits | None = None) -> AsyncIterator[Server]:
    """The toy behind the real boundary, on a free loopback port with mTLS."""
    server = Server(CA.issue("scheduler", "test", datetime.now(UTC)), Authority(table=TABLE), limits)
    server.add(add_toy, toy, NAME)
    server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0)


def dial(
    server: Server, role: str = "user", name: str = "ann", policy: CallPolicy | None = None, *, at: str = ""
) -> Channel:
    """A client of the server, or of what stands before it `at` "host:port"."""
    tls = CA.issue(role, name, datetime.now(UTC))
    once = policy or CallPolicy(attempts=1)
    return connect(at or f"127.0.0.1:{server.port}", tls, server=server_name("scheduler"), policy=once)
