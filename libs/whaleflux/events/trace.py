"""Trace context on events: W3C `traceparent` and `tracestate` headers.

A consumer's span is a child of the publisher's: `with tracer.start_as_current_span(name, context=context_of(event.headers))`.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT = "traceparent"
_W3C = TraceContextTextMapPropagator()


def with_trace(headers: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of `headers` that carries the current trace context, unless it has one of its own."""
    carried = dict(headers or {})
    if TRACEPARENT not in carried:
        _W3C.inject(carried)
    return carried


def context_of(headers: Mapping[str, str]) -> Context:
    """The publisher's trace context; an empty one when the headers have none or a malformed one."""
    return _W3C.extract(dict(headers))
