"""Spans reach an OTLP collector, and a collector that is away holds nobody up."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tests.support.spans import untraced
from whaleflux import telemetry
from whaleflux.telemetry import Attribute


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans, self.services = [], set()

    def Export(self, request, context):
        for resource in request.resource_spans:
            named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            self.services.add(named["service.name"])
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(autouse=True)
def _as_before():
    yield
    untraced()


@pytest.fixture
def collector():
    servicer, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0)


def test_a_job_of_two_services_is_one_trace_at_the_collector(collector):
    telemetry.setup_tracing("scheduler", endpoint=collector.endpoint)
    job = telemetry.new_traceparent()
    with telemetry.span_from(job, "decide", {Attribute.JOB: "queues/q/jobs/j"}):
        decided = telemetry.current_traceparent()
    assert telemetry.flush()
    telemetry.setup_tracing("agent", endpoint=collector.endpoint)
    with telemetry.span_from(decided, "launch"):
        pass
    end = datetime.now(UTC)
    telemetry.emit_span("job", end - timedelta(hours=1), end, traceparent=job)
    assert telemetry.flush()

    named = {span.name: span for span in collector.spans}
    assert set(named) == {"job", "decide", "launch"}
    assert collector.services == {"scheduler", "agent"}
    assert len({span.trace_id for span in collector.spans}) == 1
    assert named["decide"].parent_span_id == named["job"].span_id
    assert named["launch"].parent_span_id == named["decide"].span_id
    assert not named["job"].parent_span_id


class Away(SpanExporter):
    """A collector that takes nothing until it is back."""

    def __init__(self):
        self.back, self.taken = threading.Event(), 0

    def export(self, spans):
        self.back.wait(100)
        self.taken += len(spans)
        return SpanExportResult.SUCCESS


def test_a_collector_that_is_away_costs_neither_time_nor_memory():
    away = Away()
    telemetry.setup_tracing("scheduler", exporter=away)
    began = time.monotonic()
    for _ in range(10_000):
        with telemetry.span("step"):
            pass
    assert time.monotonic() - began < 50
    began = time.monotonic()
    assert not telemetry.flush(timeout_s=0.5)
    assert time.monotonic() - began < 20
    away.back.set()
    assert telemetry.flush(timeout_s=30)
    assert 0 < away.taken <= 4096 + 512, "what waited, and the batch that was under way"
