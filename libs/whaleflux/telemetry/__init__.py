"""Traces, metrics and logs of one process. Services import this; the command line must not (it is slow to import).

Everything has a registered name: attributes, metrics and event names live in `registry`, and asking for another
one raises, so that dashboards and queries never chase a misspelling.
"""

from whaleflux.telemetry.logs import get_logger, setup_logging
from whaleflux.telemetry.metrics import MetricsServer, MetricsTls, counter, from_zero, gauge, histogram, start_metrics
from whaleflux.telemetry.registry import Attribute, Event, Metric, UnregisteredName
from whaleflux.telemetry.traces import (
    attach,
    attach_for_good,
    current_trace_id,
    current_traceparent,
    emit_span,
    exemplar,
    flush,
    new_traceparent,
    server_span,
    setup_tracing,
    span,
    span_from,
    trace_id_of,
    tracer,
)

__all__ = [
    "Attribute",
    "Event",
    "Metric",
    "MetricsServer",
    "MetricsTls",
    "UnregisteredName",
    "attach",
    "attach_for_good",
    "counter",
    "current_trace_id",
    "current_traceparent",
    "emit_span",
    "exemplar",
    "flush",
    "from_zero",
    "gauge",
    "get_logger",
    "histogram",
    "new_traceparent",
    "server_span",
    "setup_logging",
    "setup_tracing",
    "span",
    "span_from",
    "start_metrics",
    "trace_id_of",
    "tracer",
]
