"""Spans, and the W3C trace contexts that jobs, events and calls carry between processes.

A context is stored and passed on as its `traceparent` text. The span of a whole job outlives the processes that
serve it: its id is chosen with the job (`new_traceparent`), children name it as their parent at once, and
`emit_span` writes it when the job ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from whaleflux.errors import StatusError
from whaleflux.rpc import propagation
from whaleflux.telemetry.registry import Attribute, UnregisteredName
from whaleflux.telemetry.span_ids import IdTracer, chosen_ids, new_span_id, new_trace_id, span_of_ids

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Value = str | bool | int | float
Attributes = Mapping[Attribute, Value]
_ATTRIBUTES = frozenset(Attribute)
_PROPAGATOR = TraceContextTextMapPropagator()
_PROPAGATED = frozenset(_PROPAGATOR.fields)
_provider: TracerProvider | None = None  # none: nothing is exported
_tracer: trace.Tracer = IdTracer()


def setup_tracing(
    service: str, *, endpoint: str = "", exporter: SpanExporter | None = None, at_once: bool = False
) -> None:
    """Sends the spans of this process to an OTLP/gRPC `endpoint` (http://host:4317), or to `exporter`, or nowhere.

    `at_once`: each span as it ends, by whom it ends, for those who look at them in the same process; else in batches.
    At most 4096 spans wait for the exporter; more are dropped rather than kept when it does not answer.
    """
    global _provider, _tracer
    _provider, _tracer = None, IdTracer()
    if endpoint or exporter is not None:
        from whaleflux.telemetry import (
            exporting,
        )  # the SDK and gRPC's exporter: 4 MB that serve nobody without a collector

        _provider = exporting.provider(service, exporter or exporting.to_collector(endpoint), at_once=at_once)
        _tracer = _provider.get_tracer("whaleflux")
    propagation.use(client_span)


def flush(timeout_s: float = 3.0) -> bool:
    """Sends what waits, blocking up to `timeout_s`; False when the exporter did not take it in time.

    In a thread that nobody waits for longer: the SDK's own time limit does not count while its exporter retries.
    """
    if (provider := _provider) is None:
        return True
    taken: list[bool] = []
    sending = threading.Thread(target=lambda: taken.append(provider.force_flush()), daemon=True)
    sending.start()
    sending.join(timeout_s)
    return taken == [True]


def tracer() -> trace.Tracer:
    """The tracer of this process; ask for it at each use, `setup_tracing` replaces it."""
    return _tracer


def current_traceparent() -> str:
    """The running span as text to store or send; "" outside of a trace."""
    return _text(trace.get_current_span().get_span_context())


def current_trace_id() -> str:
    """32 hex digits, "" outside of a trace."""
    return trace_id_of(trace.get_current_span())


def trace_id_of(span: trace.Span) -> str:
    """As `current_trace_id`, without looking for the span."""
    number = span.get_span_context().trace_id
    return f"{number:032x}" if number else ""


def new_traceparent(parent: str = "") -> str:
    """A context for a span to be emitted later, in the trace of `parent` (or of the running span, or a new trace)."""
    context = trace.get_current_span(_context_of(parent)).get_span_context() if parent else _running()
    flags = context.trace_flags if context.is_valid else _default_flags()
    trace_id = context.trace_id if context.is_valid else new_trace_id()
    return _text(trace.SpanContext(trace_id, new_span_id(), is_remote=False, trace_flags=flags))


@contextlib.contextmanager
def span(name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A child of the running span."""
    with _started(name, None, attributes, kind) as started:
        yield started


@contextlib.contextmanager
def span_from(
    traceparent: str, name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> Iterator[Span]:
    """A child of a stored or received context (a new trace when that is "" or malformed), for the steps of loops.

    A status error is noted with its reason; any other exception makes the span an error. Both are raised on.
    """
    with _started(name, _context_of(traceparent), attributes, kind) as started:
        yield started


@contextlib.contextmanager
def attach(traceparent: str) -> Iterator[None]:
    """Runs the block as a child of `traceparent` without a span of its own (long streams)."""
    token = otel_context.attach(_context_of(traceparent))
    try:
        yield
    finally:
        otel_context.detach(token)


def attach_for_good(traceparent: str) -> None:
    """Makes the rest of this task run as a child of `traceparent`, without a span of its own (long streams)."""
    otel_context.attach(_context_of(traceparent))


@contextlib.contextmanager
def server_span(method: str, headers: Iterable[tuple[str, str | bytes]], *, traced: bool = True) -> Iterator[Span]:
    """The span of a served call, child of the caller's. Its status is the boundary's business, whatever is raised."""
    if not traced:
        yield trace.INVALID_SPAN
        return
    remote = {key: value for key, value in headers if key in _PROPAGATED and isinstance(value, str)}
    parent = _PROPAGATOR.extract(remote, otel_context.Context()) if remote else otel_context.Context()
    if _provider is None:  # a fifth of what the rest would take for a span that nobody will see
        with trace.use_span(span_of_ids(parent), record_exception=False, set_status_on_exception=False) as unrecorded:
            yield unrecorded
        return
    service, _, name = method.lstrip("/").partition("/")
    known: Attributes = {
        Attribute.RPC_SYSTEM: "grpc",
        Attribute.RPC_SERVICE: service,
        Attribute.RPC_METHOD: name,
    }
    with _tracer.start_as_current_span(
        method.lstrip("/"),
        parent,
        SpanKind.SERVER,
        _checked(known),
        record_exception=False,
        set_status_on_exception=False,
    ) as started:
        yield started


def exemplar(traceparent: str = "") -> dict[str, str] | None:
    """What a histogram is given beside a value, so that a slow one leads to its trace (the running one by itself).

    None where no collector is told of it: neither without one nor of a trace that is not sampled.

    https://prometheus.io/docs/specs/om/open_metrics_spec/#exemplars
    """
    if _provider is None:
        return None
    context = trace.get_current_span(_context_of(traceparent)).get_span_context() if traceparent else _running()
    return {"trace_id": f"{context.trace_id:032x}"} if context.trace_flags.sampled else None


def emit_span(
    name: str,
    start_time: datetime,
    end_time: datetime,
    *,
    traceparent: str = "",
    parent: str = "",
    error: str = "",
    attributes: Attributes | None = None,
) -> str:
    """Writes a span that is over. `traceparent` is its own context when its id was chosen before (`new_traceparent`).

    `error` says what went wrong ("" for nothing). Returns the span's own context.
    """
    own = trace.get_current_span(_context_of(traceparent)).get_span_context()
    token = chosen_ids.set((own.trace_id, own.span_id) if own.is_valid else None)
    try:
        written = _tracer.start_span(
            name, _context_of(parent), attributes=_checked(attributes), start_time=_nanoseconds(start_time)
        )
    finally:
        chosen_ids.reset(token)
    if error:
        written.set_status(Status(StatusCode.ERROR, error))
    written.end(end_time=_nanoseconds(end_time))
    return traceparent if own.is_valid else _text(written.get_span_context())


@contextlib.contextmanager
def client_span(method: str, streaming: bool) -> Iterator[propagation.Headers]:
    """The span of an outgoing unary call; a stream is opened inside the running span and gets none of its own."""
    if streaming:
        yield _headers()
        return
    service, _, name = method.lstrip("/").partition("/")
    known: Attributes = {
        Attribute.RPC_SYSTEM: "grpc",
        Attribute.RPC_SERVICE: service,
        Attribute.RPC_METHOD: name,
    }
    with _started(method.lstrip("/"), None, known, SpanKind.CLIENT) as started:
        try:
            yield _headers()
        except StatusError as error:
            started.set_status(Status(StatusCode.ERROR, error.reason))
            raise


@contextlib.contextmanager
def _started(
    name: str, context: otel_context.Context | None, attributes: Attributes | None, kind: SpanKind
) -> Iterator[Span]:
    with _tracer.start_as_current_span(
        name, context, kind, _checked(attributes), record_exception=False, set_status_on_exception=False
    ) as started:
        try:
            yield started
        except StatusError as error:
            started.set_attribute(Attribute.REASON.value, error.reason)
            raise
        except Exception as bug:
            started.record_exception(bug)
            started.set_status(Status(StatusCode.ERROR, type(bug).__name__))
            raise


def _checked(attributes: Attributes | None) -> dict[str, Value]:
    for key in attributes or {}:
        if key not in _ATTRIBUTES:
            raise UnregisteredName(f"attribute {key!r} is not in whaleflux.telemetry.registry.Attribute")
    return {Attribute(key).value: value for key, value in (attributes or {}).items()}


def _running() -> trace.SpanContext:
    return trace.get_current_span().get_span_context()


def _default_flags() -> trace.TraceFlags:
    return trace.TraceFlags(trace.TraceFlags.SAMPLED if _provider else trace.TraceFlags.DEFAULT)


def _context_of(traceparent: str) -> otel_context.Context:
    """A context with only this remote parent: what runs here now must not leak into a stored trace."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, otel_context.Context())


def _headers() -> propagation.Headers:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return tuple(carrier.items())


def _text(context: trace.SpanContext) -> str:
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _nanoseconds(instant: datetime) -> int:
    return int(instant.timestamp() * 1_000_000) * 1000  # microseconds are exact in a float, nanoseconds are not
