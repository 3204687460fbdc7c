"""Spans reach an OTLP collector, and a collector that is away holds nobody up."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from whaleflux import telemetry
from whaleflux.rpc import propagation
from whaleflux.telemetry import Attribute, traces


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
def _as_before(monkeypatch):
    for name in ("_provider", "_tracer", "_exporting"):
        monkeypatch.setattr(traces, name, getattr(traces, name))
    monkeypatch.setattr(propagation, "_maker", propagation._maker)


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


def test_a_collector_that_is_away_costs_neither_time_nor_memory():
    telemetry.setup_tracing("scheduler", endpoint="http://127.0.0.1:1")
    began = time.monotonic()
    for _ in range(10_000):
        with telemetry.span("step"):
            pass
    assert time.monotonic() - began < 5
    began = time.monotonic()
    telemetry.flush(timeout_s=0.5)
    assert time.monotonic() - began < 3
    (processor,) = traces._provider._active_span_processor._span_processors
    assert len(processor._batch_processor._queue) <= 4096
    processor._batch_processor._exporter.shutdown()  # ends its retries, which would outlive the test
    traces._provider.shutdown()
