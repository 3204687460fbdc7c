"""Spans that are recorded and sent. Imported only by processes that have somewhere to send them to."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from whaleflux.telemetry.span_ids import chosen_ids


class _ChosenIds(RandomIdGenerator):
    """Random ids, unless `emit_span` has chosen them."""

    def generate_trace_id(self) -> int:
        chosen = chosen_ids.get()
        return chosen[0] if chosen else super().generate_trace_id()

    def generate_span_id(self) -> int:
        chosen = chosen_ids.get()
        return chosen[1] if chosen else super().generate_span_id()


def to_collector(endpoint: str) -> SpanExporter:
    """To an OTLP/gRPC collector (http://host:4317), each batch within 5 s."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # not for tests' exporters

    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)


def provider(service: str, exporter: SpanExporter, *, at_once: bool) -> TracerProvider:
    """Sends the spans of `service` to `exporter`: each as it ends, or in batches of at most 4096 that wait."""
    made = TracerProvider(
        resource=Resource.create({"service.name": service}),
        sampler=ParentBased(ALWAYS_ON),
        id_generator=_ChosenIds(),
        shutdown_on_exit=False,
    )
    made.add_span_processor(SimpleSpanProcessor(exporter) if at_once else _batches(exporter))
    return made


def _batches(exporter: SpanExporter) -> BatchSpanProcessor:
    return BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=500, export_timeout_millis=5000)
