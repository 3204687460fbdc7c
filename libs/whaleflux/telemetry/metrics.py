"""Prometheus metrics by registered name, and the small HTTP server that shows them beside the health probes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from whaleflux.telemetry.registry import METRICS, MetricSpec, UnregisteredName

_REQUEST_S = 5.0  # for one request, handshake included; a silent peer does not keep its thread
_BY_NAME: dict[str, MetricSpec] = {metric.value: spec for metric, spec in METRICS.items()}


def _spec(name: str, kind: str) -> MetricSpec:
    spec = _BY_NAME.get(name)
    if spec is None:
        raise UnregisteredName(f"metric {name!r} is not in whaleflux.telemetry.registry.METRICS")
    if spec.kind != kind:
        raise UnregisteredName(f"metric {name!r} is registered as a {spec.kind}, not as a {kind}")
    return spec


def counter(name: str) -> Counter:
    """The counter registered as `name`; raises UnregisteredName for any other."""
    return _counter(str(name))


def gauge(name: str) -> Gauge:
    """The gauge registered as `name`; raises UnregisteredName for any other."""
    return _gauge(str(name))


def histogram(name: str) -> Histogram:
    """The histogram registered as `name`; raises UnregisteredName for any other."""
    return _histogram(str(name))


# Cached by plain text: a cache would take an enum's member and its value for two names.


@cache
def _counter(name: str) -> Counter:
    spec = _spec(name, "counter")
    return Counter(name, spec.help, spec.labels)


@cache
def _gauge(name: str) -> Gauge:
    spec = _spec(name, "gauge")
    return Gauge(name, spec.help, spec.labels)


@cache
def _histogram(name: str) -> Histogram:
    spec = _spec(name, "histogram")
    return Histogram(name, spec.help, spec.labels, buckets=spec.buckets)


def from_zero(metric: str, *values: str) -> None:
    """Shows the series of a counter or histogram before it counts anything; `values` of its label, of which each is one.

    Call it where the process starts. Rates are taken between two samples: a series that begins with its first event hides that event.
    """
    kept = (counter if _BY_NAME[str(metric)].kind == "counter" else histogram)(metric)
    for value in values:
        kept.labels(value)


@dataclass(frozen=True, slots=True)
class MetricsTls:
    """How figures are shown beyond loopback: to whom `may_read`; probes, which kubelets send, need no certificate."""

    context: ssl.SSLContext
    may_read: Callable[[ssl.SSLSocket], bool]


class MetricsServer:
    """Serves /metrics, /healthz (the process runs) and /readyz (it takes work) over HTTP, plain or with `tls`."""

    def __init__(self, host: str, port: int, ready: Callable[[], bool], tls: MetricsTls | None = None) -> None:
        self._server = _HttpServer((host, port), _handler(ready, tls))
        self._server.tls = tls
        self._host, self._closing = host, False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The bound port, also when 0 was asked for."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops serving; waits for the request under way to be taken, not for its answer."""
        self._closing = True
        with contextlib.suppress(OSError), socket.create_connection((self._host, self.port), timeout=1):
            self._thread.join(timeout=1)  # the connection has woken it
        self._server.server_close()

    def _serve(self) -> None:
        """Sleeps until somebody asks; `serve_forever` would look several times a second whether it shall end."""
        while not self._closing:
            self._server.handle_request()


class _HttpServer(ThreadingHTTPServer):
    """Handshakes in the thread of their request: a peer that does not end its own holds nobody up."""

    daemon_threads = True
    tls: MetricsTls | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is None:
            return super().finish_request(request, client_address)
        request.settimeout(_REQUEST_S)
        with contextlib.suppress(OSError), self.tls.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)


def start_metrics(
    host: str = "127.0.0.1", port: int = 0, *, ready: Callable[[], bool] = lambda: True, tls: MetricsTls | None = None
) -> MetricsServer:
    """Starts the server; port 0 picks a free one. Raises OSError when the port is taken."""
    return MetricsServer(host, port, ready, tls)


def _handler(ready: Callable[[], bool], tls: MetricsTls | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_S

        def do_GET(self) -> None:
            if self.path == "/metrics" and tls is not None and not tls.may_read(self.connection):
                self._answer(403, b"figures are for a certificate of the role scraper, operator or admin\n")
            elif self.path == "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))  # OpenMetrics alone carries exemplars
                self._answer(200, encode(REGISTRY), kind)
            elif self.path == "/healthz":
                self._answer(200, b"ok\n")
            elif self.path == "/readyz":
                up = ready()
                self._answer(200 if up else 503, b"ready\n" if up else b"not ready\n")
            else:
                self._answer(404, b"try /metrics, /healthz or /readyz\n")

        def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes every few seconds are not news."""

    return Handler
