"""The small HTTP server by which the front door asks the policy (`request_authorizer`).

Of its own rather than a framework's: it is on the path of every request. It answers the front door alone, by its certificate. A body is kept only where the policy reads one, and within a bound: what Envoy sends here for a list of models has
not been asked for its key yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import httptools

from whaleflux import hostport, telemetry
from whaleflux.errors import Unauthenticated
from whaleflux.frontdoor.headers import CLIENT_ADDRESS
from whaleflux.frontdoor.http_paths import TO_ENGINES
from whaleflux.rpc import roles
from whaleflux.rpc.auth import DEFAULT_TRUST_DOMAIN
from whaleflux.rpc.peers import peer_of
from whaleflux.rpc.tls_files import TlsFiles, server_context
from whaleflux.telemetry import Metric
from whaleflux_inference_router.request_authorizer import Answer, Asked, RequestAuthorizer, error

_READ_HEADERS = (b"authorization", b"content-type", b"content-encoding", CLIENT_ADDRESS.encode())
MAX_BODY_BYTES = 17 << 20  # the front door refuses above 16 MiB; a little more, so that its answer is the one seen
_TAKES_BODY = frozenset(path.encode() for path in TO_ENGINES)


class _Connection(asyncio.Protocol):
    """One of the front door's connections; requests on it come one after another."""

    def __init__(self, authorizer: RequestAuthorizer, trust_domain: str) -> None:
        self._authorizer, self._trust_domain = authorizer, trust_domain
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._reset()

    def _reset(self) -> None:
        self._url, self._body, self._size = b"", [], 0  # type: ignore[var-annotated]
        self._headers: dict[bytes, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """After the handshake, which refuses those without a certificate of the fleet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not _is_frontdoor(transport, self._trust_domain):
            telemetry.get_logger(__name__).warning(
                telemetry.Event.POLICY_REFUSED, peer=transport.get_extra_info("peername")
            )
            transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._write(error(400, "not HTTP"))
            self._close()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in _READ_HEADERS:
            self._headers[name.lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= MAX_BODY_BYTES and self._url.partition(b"?")[0] in _TAKES_BODY:
            self._body.append(part)

    def on_message_complete(self) -> None:
        with telemetry.histogram(Metric.ROUTE_DURATION).time():
            self._write(self._answer())
        self._reset()

    def _answer(self) -> Answer:
        if self._size > MAX_BODY_BYTES:
            return error(413, f"the request has more than {MAX_BODY_BYTES >> 20} MiB; send less at a time")
        method, url = self._parser.get_method().decode(), self._url.decode("latin-1")
        headers = (self._headers.get(name, "") for name in _READ_HEADERS)
        try:
            return self._authorizer.answer(Asked(method, url, b"".join(self._body), *headers))
        except Exception:  # a bug must not hang the client until the front door's time-out
            telemetry.get_logger(__name__).exception(telemetry.Event.ROUTE_FAILED)
            return error(500, "internal error; the operator finds it in the router's log")

    def _write(self, answer: Answer) -> None:
        telemetry.counter(Metric.ROUTE_DECISIONS).labels(str(answer.status)).inc()
        headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers)
        head = f"HTTP/1.1 {answer.status} -\r\n{headers}content-length: {len(answer.body)}\r\n\r\n"
        if self._transport is not None:
            self._transport.write(head.encode("latin-1") + answer.body)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _is_frontdoor(transport: asyncio.Transport, trust_domain: str) -> bool:
    try:
        return peer_of(transport.get_extra_info("ssl_object"), trust_domain).role == roles.FRONTDOOR
    except Unauthenticated:
        return False


@contextlib.asynccontextmanager
async def serving(
    authorizer: RequestAuthorizer, listen: str, tls: TlsFiles, trust_domain: str = DEFAULT_TRUST_DOMAIN
) -> Any:
    """Serves the authorizer, showing `tls`; yields the bound port."""
    host, port = hostport.parse(listen, "policy_listen", listening=True)
    make: Callable[[], asyncio.Protocol] = lambda: _Connection(authorizer, trust_domain)  # noqa: E731
    server = await asyncio.get_running_loop().create_server(make, host, port, ssl=server_context(tls))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
