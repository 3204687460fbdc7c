"""A trace collector in this process: what OTLP exporters send is kept for tests to look at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from whaleflux import telemetry
from whaleflux.rpc import propagation


@dataclass(frozen=True, slots=True)
class SeenSpan:
    """One span as it arrived; times in nanoseconds since the epoch."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    is_error: bool
    start_ns: int
    end_ns: int
    attributes: dict[str, object]


class Collector(rpc.TraceServiceServicer):
    """Takes all spans; `spans` is a copy of what has arrived."""

    def __init__(self) -> None:
        self._lock, self._spans = threading.Lock(), []
        self.endpoint = ""

    @property
    def spans(self) -> list[SeenSpan]:
        with self._lock:
            return list(self._spans)

    def Export(self, request, context):
        found = [
            _seen(_value(_attributes(of.resource.attributes)["service.name"]), span)
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans.extend(found)
        return pb.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of the loopback interface."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()


@contextmanager
def traced() -> Iterator[InMemorySpanExporter]:
    """Keeps the spans of this process as they end; afterwards nothing is traced, as before."""
    kept = InMemorySpanExporter()
    telemetry.setup_tracing("test", exporter=kept, at_once=True)
    try:
        yield kept
    finally:
        untraced()


def untraced() -> None:
    """Tracing as it is before anybody sets it up."""
    telemetry.setup_tracing("unknown")
    propagation.use(propagation.untraced)


def _seen(service: object, span: trace_pb2.Span) -> SeenSpan:
    return SeenSpan(
        str(service),
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        {key: _value(value) for key, value in _attributes(span.attributes).items()},
    )


def _attributes(pairs):
    return {pair.key: pair.value for pair in pairs}


def _value(value):
    return getattr(value, value.WhichOneof("value"))
