"""The ids of spans, and spans that are nothing but their ids: what a process without a collector makes of them.

Logs, errors and events show these ids, and calls pass them on, also where nothing is recorded.
"""

from __future__ import annotations

import random
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context

# Trace and span id of the span that is started next, when they have been chosen before it.
chosen_ids: ContextVar[tuple[int, int] | None] = ContextVar("whaleflux_chosen_ids", default=None)


def new_trace_id() -> int:
    """128 random bits, never 0."""
    return random.getrandbits(128) or 1


def new_span_id() -> int:
    """64 random bits, never 0."""
    return random.getrandbits(64) or 1


def span_of_ids(parent: Context | None = None) -> trace.Span:
    """A child of the span in `parent` (the running one without it; a new trace without either) that records nothing."""
    context = trace.get_current_span(parent).get_span_context()
    if context.is_valid:
        own = trace.SpanContext(context.trace_id, new_span_id(), False, context.trace_flags, context.trace_state)
    else:
        own = trace.SpanContext(new_trace_id(), new_span_id(), is_remote=False)
    return trace.NonRecordingSpan(own)


class IdTracer(trace.Tracer):
    """Starts spans that record nothing, whatever else it is told about them."""

    def start_span(self, name: str, context: Context | None = None, *_: Any, **__: Any) -> trace.Span:
        return span_of_ids(context)

    def start_as_current_span(self, name: str, context: Context | None = None, *_: Any, **__: Any) -> Any:
        return trace.use_span(span_of_ids(context), record_exception=False, set_status_on_exception=False)
