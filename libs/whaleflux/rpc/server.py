"""A gRPC server as every service runs it: mTLS, the boundary, health, reflection, and an orderly end.

server = Server(files, Authority(trust_domain))
server.add(add_InventoryServiceServicer_to_server, servicer, "whaleflux.v1.InventoryService")
port = await server.start("127.0.0.1:0")
...
await server.drain(grace_s=5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc import reflection
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.boundary import Boundary
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.tls_files import Tls, TlsFiles
from whaleflux.trust.admission import Admission
from whaleflux.trust.audit import Audit

_TRANSPORT_SLACK_BYTES = 1 << 20  # so that the boundary refuses what is a little too large, with details
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", 32 << 20),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    (
        "grpc.http2.min_ping_interval_without_data_ms",
        1_000,
    ),  # agents ping each 10 s, the front door each 5 s, also when idle
    ("grpc.http2.max_ping_strikes", 5),  # then the connection ends: pings are no way to keep a server busy
    ("grpc.so_reuseport", 0),  # a second process on the same port is a mistake to be told about
)
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """One listening server: `bind` and `add`, then `start`; `drain` at the end, or again with less grace."""

    def __init__(self, tls: Tls | TlsFiles, authority: Authority, limits: CallLimits | None = None) -> None:
        limits = limits or CallLimits()
        self._boundary = Boundary(authority, limits)
        size = ("grpc.max_receive_message_length", limits.request_bytes + _TRANSPORT_SLACK_BYTES)
        self._server = grpc.aio.server(interceptors=[self._boundary], options=[*_OPTIONS, size])
        self._credentials = server_credentials(tls)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self.serving = False
        self.port = 0
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: Any, name: str) -> None:
        """Registers a servicer by its generated function under its full service name."""
        add_to_server(servicer, self._server)
        self._names.append(name)

    def guard(self, admission: Admission, trail: Audit) -> None:
        """Who is admitted beyond what certificates say, and where the audit trail goes; before `start`."""
        self._boundary.guard(admission, trail)

    async def end_streams_of_the_revoked(self) -> None:
        """A loop for as long as the server runs."""
        await self._boundary.end_streams_of_the_revoked()

    def bind(self, listen: str) -> int:
        """Takes `listen` (host:port, port 0 for a free one), returns the port. `InvalidArgument` when it is taken."""
        try:
            self.port = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError:
            raise InvalidArgument(FieldViolation("listen", f"cannot bind {listen!r}; is the port taken?")) from None
        return self.port

    async def start(self, *, reflects_all: bool = False) -> None:
        """Serves what was added, on the ports that were bound. `reflects_all`: reflection speaks for the whole contract."""
        reflection.enable(self._server, (*self._names, _HEALTH), whole_contract=reflects_all)
        await self.set_serving(True)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks and readiness probes see, for every service and for ""."""
        self.serving = serving
        for name in ("", *self._names):
            await self._health.set(name, _SERVING if serving else _NOT_SERVING)

    async def drain(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls, streams ended with DRAINING, unary calls finished or cut off after `grace_s`."""
        await self.set_serving(False)
        self._boundary.drain()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._server.wait_for_termination()


def server_credentials(tls: Tls | TlsFiles) -> grpc.ServerCredentials:
    """Credentials that demand a certificate of our CA from every client; files are re-read when they are renewed."""
    if isinstance(tls, Tls):
        return grpc.ssl_server_credentials([(tls.key, tls.chain)], tls.roots, require_client_auth=True)
    reload = _Reload(tls)
    return grpc.dynamic_ssl_server_credentials(
        reload.first(),
        reload,  # type: ignore[arg-type]  # None means "no change", says gRPC; its stubs do not
        require_client_authentication=True,
    )


class _Reload:
    """Called by gRPC, in its own thread, before each handshake."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp: Any = None

    def first(self) -> grpc.ServerCertificateConfiguration:
        self._stamp = self._files.stamp()
        return _configuration(self._files.load())

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate, or None to go on with the one in use."""
        try:
            if (stamp := self._files.stamp()) == self._stamp:
                return None
            fresh = _configuration(self._files.load())
        except Exception:  # being replaced right now, or damaged: the one in use is still good
            return None
        self._stamp = stamp
        return fresh


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.chain)], tls.roots)
