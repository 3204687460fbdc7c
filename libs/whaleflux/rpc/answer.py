"""How a call ends: what was raised becomes its status, its metric, its log line and its span's status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import grpc
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from prometheus_client import Counter

from whaleflux import telemetry
from whaleflux.errors import StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.status import ServerFailure, from_rpc_error, on_the_wire
from whaleflux.telemetry import Attribute, Event, Metric

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_NUMBERS: dict[str, int] = {code.name: code.value[0] for code in grpc.StatusCode}
_STATUS = Attribute.RPC_STATUS.value
_log = telemetry.get_logger("whaleflux.rpc")


@dataclass(frozen=True, slots=True)
class Call:
    """One call being answered. Streams have no span."""

    method: str
    context: Context
    span: Span | None
    draining: Callable[[], bool]


def gone() -> Unavailable:
    """What open streams and new ones get while the server drains."""
    return Unavailable("this server is stopping; call again", reason=ErrorReason.DRAINING, retry_after_s=0.1)


@contextlib.asynccontextmanager
async def answering(call: Call) -> AsyncIterator[None]:
    """Around the whole handling of `call`. Answered by aborting, so that `AbortError` leaves it, or nothing."""
    try:
        yield
    except BaseException as error:
        await failed(call, error)
        raise
    succeeded(call)


def succeeded(call: Call) -> None:
    """Notes that the handler has given its answer."""
    _note(call, "OK")


async def failed(call: Call, error: BaseException) -> None:
    """Answers by aborting, which raises AbortError; returns when `error` itself is to be raised on."""
    match error:
        case grpc.aio.AbortError():  # the handler answered by itself
            _note(call, str(getattr(call.context.code(), "name", "UNKNOWN")))
        case asyncio.CancelledError() if call.span is None and call.draining():
            _note(call, "UNAVAILABLE")
            await _refuse(call, gone())
        case GeneratorExit() | asyncio.CancelledError():  # the client went, or its deadline has passed
            _note(call, "CANCELLED")
        case StatusError() | grpc.RpcError():  # a bare channel raises the latter, ours raise status errors
            status = error if isinstance(error, StatusError) else from_rpc_error(error)
            _note(call, status.code)
            await (_confess(call, error) if status.code == "INTERNAL" else _refuse(call, status))
        case Exception():
            _note(call, "INTERNAL")
            await _confess(call, error)


def _note(call: Call, code: str) -> None:
    if call.span is not None and code in _NUMBERS:
        call.span.set_attribute(_STATUS, _NUMBERS[code])
    _requests(call.method, code).inc()


@cache  # as many as there are methods and codes
def _requests(method: str, code: str) -> Counter:
    return telemetry.counter(Metric.RPC_REQUESTS).labels(method, code)


async def _refuse(call: Call, error: StatusError) -> None:
    """A status error is a right answer: the span says so and is no error."""
    if call.span is not None:
        call.span.set_attribute(Attribute.REASON.value, error.reason)
    await call.context.abort(*on_the_wire(error))


async def _confess(call: Call, bug: BaseException) -> None:
    """A bug: everything for our own eyes, a trace id for the caller's."""
    with _span_of(call) as span:
        span.record_exception(bug)
        span.set_status(Status(StatusCode.ERROR, type(bug).__name__))
        trace_id = telemetry.current_trace_id()
        _log.error(Event.RPC_FAILED, method=call.method, exc_info=bug)
    hidden = ServerFailure(f"internal error, trace {trace_id}", metadata={"trace_id": trace_id})
    await call.context.abort(*on_the_wire(hidden))


@contextlib.contextmanager
def _span_of(call: Call) -> Any:
    """The call's span; for a stream a short one that exists only to carry its failure."""
    if call.span is not None:
        yield call.span
        return
    with telemetry.tracer().start_as_current_span(call.method.lstrip("/"), kind=SpanKind.SERVER) as span:
        yield span
