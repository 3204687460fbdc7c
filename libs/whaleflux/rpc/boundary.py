"""The one server interceptor: identity, bounds, deadline, span, errors and metrics of every call.

Servicers stay plain: they take messages, return messages, and raise refusals. What they get has an allowed caller
(`auth.caller()`), a bounded size and a deadline; what they raise reaches the client as a status with details, and a
bug as "internal error" with a trace id and nothing else.

Streaming methods may be async generators (preferred) or coroutines that use `context.write`; requests of streaming
methods come from the iterator, never from `context.read`. A stream has no span of its own: it may stay open for
months. What it does runs as a child of its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Histogram

from whaleflux import telemetry
from whaleflux.errors import DeadlineExceeded, FieldViolation, Invalid, OverLimit
from whaleflux.rpc import auth
from whaleflux.rpc.answer import Call, Context, answering, failed, gone, succeeded
from whaleflux.rpc.rate import Rate
from whaleflux.telemetry import Attribute, Metric

_Metadata = tuple[tuple[str, str | bytes], ...]
_INFRASTRUCTURE = "/grpc."  # health and reflection are asked all the time: not worth spans, nor counted


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one caller may ask of this server."""

    request_bytes: int = 4 << 20  # of one message
    deadline_s: float = 30.0  # of a unary call whose caller gave none
    longest_deadline_s: float = 300.0
    calls_per_caller: int = 1024  # unary calls at a time
    streams_per_caller: int = 256
    calls_per_s: float = 5000.0  # unary calls and streams that one caller may begin, and its burst
    burst: float = 10_000.0
    anonymous_per_s: float = 100.0  # of all who show no certificate together, that is who join


class Boundary(grpc.aio.ServerInterceptor):
    """See the module. One per server; `drain` ends its streams."""

    def __init__(self, authority: auth.Authority, limits: Limits | None = None) -> None:
        self._authority, self._limits = authority, limits or Limits()
        self._rate = Rate(self._limits.calls_per_s, self._limits.burst)
        self._anonymous = Rate(self._limits.anonymous_per_s, self._limits.anonymous_per_s)
        self._guarded: dict[str, tuple[Any, Any]] = {}  # handler and its guarded twin, by method
        self._calls: Counter[auth.Identity] = Counter()
        self._streams: Counter[auth.Identity] = Counter()
        self._stream_tasks: set[asyncio.Task[Any]] = set()
        self._draining = False

    def drain(self) -> None:
        """Ends open streams with UNAVAILABLE (reason DRAINING) and refuses new ones; their callers go elsewhere."""
        self._draining = True
        for task in self._stream_tasks:
            task.cancel()

    async def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:  # unknown method: gRPC itself answers UNIMPLEMENTED
            return None
        known, guarded = self._guarded.get(details.method, (None, None))
        if known is not handler:
            guarded = self._guard(details.method, handler)
            self._guarded[details.method] = handler, guarded
        return guarded

    def _guard(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of the same arity that gets raw bytes: they are not parsed before the caller was admitted."""
        parse = _Parser(handler.request_deserializer, self._limits.request_bytes)
        if not (handler.request_streaming or handler.response_streaming):
            behaviour = self._unary(method, handler.unary_unary, parse)
            return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)
        take = parse.each if handler.request_streaming else parse
        if not handler.response_streaming:
            behaviour = self._collecting(method, handler.stream_unary, take)
            return grpc.stream_unary_rpc_method_handler(behaviour, None, handler.response_serializer)
        behaviour = self._streaming(method, handler.unary_stream or handler.stream_stream, take)
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(behaviour, None, handler.response_serializer)

    def _unary(self, method: str, behaviour: Any, take: Callable[[Any], Any]) -> Any:
        """One function with plain blocks: what runs around every call is most of what a small call costs."""
        in_flight, durations, traced = telemetry.gauge(Metric.RPC_IN_FLIGHT), _durations(method), _traced(method)

        async def answer(raw: bytes, context: Context) -> Any:
            started = time.monotonic()
            in_flight.inc()
            metadata = _metadata(context)
            try:
                with telemetry.server_span(method, metadata, traced=traced) as span:
                    call = Call(method, context, span, lambda: False)
                    try:
                        answered = await self._served(call, behaviour, take, raw, metadata)
                    except BaseException as error:
                        await failed(call, error)
                        raise
                    succeeded(call)
                    return answered
            finally:
                in_flight.dec()
                durations.observe(time.monotonic() - started)

        return answer

    async def _served(
        self, call: Call, behaviour: Any, take: Callable[[Any], Any], raw: bytes, metadata: _Metadata
    ) -> Any:
        """What a unary handler answers to an admitted caller in time."""
        caller = self._admitted(call.method, call.context, metadata)
        assert call.span is not None
        if call.span.is_recording():
            call.span.set_attribute(Attribute.CALLER.value, caller.uri)
        auth.act_as(caller)  # never reset: the call's task ends with the call
        limit_s = self._time_for(call.context)
        with _counted(self._calls, caller, self._limits.calls_per_caller, "calls at a time"):
            if limit_s <= 0:
                raise _late(call.method, limit_s)
            try:
                async with asyncio.timeout(limit_s) as limit:
                    return await behaviour(take(raw), call.context)
            except TimeoutError:
                if limit.expired():
                    raise _late(call.method, limit_s) from None
                raise RuntimeError("a TimeoutError that no deadline caused") from None

    def _collecting(self, method: str, behaviour: Any, take: Callable[[Any], Any]) -> Any:
        async def answer(raw: Any, context: Context) -> Any:
            async with self._endless(method, context):
                return await behaviour(take(raw), context)

        return answer

    def _streaming(self, method: str, behaviour: Any, take: Callable[[Any], Any]) -> Any:
        async def answer(raw: Any, context: Context) -> AsyncIterator[Any]:
            async with self._endless(method, context):
                answers = behaviour(take(raw), context)
                if inspect.isawaitable(answers):  # writes by itself
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for message in answers:
                        yield message

        return answer

    @contextlib.asynccontextmanager
    async def _endless(self, method: str, context: Context) -> AsyncIterator[None]:
        """Around a stream.

        Context variables are set and never reset: the call's task ends with the call, and a generator that is closed
        late would reset them in another task's context.
        """
        task = asyncio.current_task()
        assert task is not None  # gRPC runs each call in a task of its own
        metadata = _metadata(context)
        telemetry.attach_for_good(_traceparent(metadata))
        open_streams = telemetry.gauge(Metric.RPC_STREAMS).labels(method)
        async with answering(Call(method, context, None, lambda: self._draining)):
            if self._draining:
                raise gone()
            caller = self._admitted(method, context, metadata)
            auth.act_as(caller)
            with _counted(self._streams, caller, self._limits.streams_per_caller, "open streams"):
                self._stream_tasks.add(task)
                open_streams.inc()
                try:
                    yield
                finally:
                    open_streams.dec()
                    self._stream_tasks.discard(task)

    def _admitted(self, method: str, context: Context, metadata: _Metadata) -> auth.Identity:
        """The caller, allowed and within its rate."""
        caller = self._authority.check(method, context.auth_context(), metadata)
        rate = self._anonymous if caller is auth.NOBODY else self._rate
        if _traced(method) and (wait_s := rate.wait_s(caller, time.monotonic())):
            known = {"subject": caller.uri}
            raise OverLimit(
                f"{caller.uri} calls too often; wait", reason="TOO_OFTEN", metadata=known, retry_after_s=wait_s
            )
        return caller

    def _time_for(self, context: Context) -> float:
        left_s = context.time_remaining()
        return min(self._limits.deadline_s if left_s is None else left_s, self._limits.longest_deadline_s)


class _Parser:
    """Bytes to message, within a bound."""

    def __init__(self, deserialize: Callable[[bytes], Any] | None, limit_bytes: int) -> None:
        self._deserialize, self._limit_bytes = deserialize, limit_bytes

    def __call__(self, raw: bytes) -> Any:
        if len(raw) > self._limit_bytes:
            raise OverLimit(
                f"the request has {len(raw)} bytes; at most {self._limit_bytes} are taken, split it",
                reason="REQUEST_TOO_LARGE",
                metadata={"bytes": str(len(raw)), "limit_bytes": str(self._limit_bytes)},
            )
        if self._deserialize is None:
            return raw
        try:
            return self._deserialize(raw)
        except DecodeError:
            raise Invalid(FieldViolation("request", "is not a valid message of the method's type")) from None

    async def each(self, raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in raws:
            yield self(raw)


def _late(method: str, limit_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{method} did not finish in {limit_s:.3f} s", metadata={"method": method})


class _counted:  # noqa: N801  # a context manager without a generator: around every call
    """One more of the caller's calls while the block runs; refuses beyond `bound`."""

    __slots__ = ("_caller", "_counts")

    def __init__(self, counts: Counter[auth.Identity], caller: auth.Identity, bound: int, what: str) -> None:
        if counts[caller] >= bound:
            known = {"subject": caller.uri, "limit": str(bound)}
            raise OverLimit(
                f"{caller.uri} has {bound} {what}; wait", reason="TOO_MANY", metadata=known, retry_after_s=1.0
            )
        self._counts, self._caller = counts, caller

    def __enter__(self) -> None:
        self._counts[self._caller] += 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._caller] -= 1
        if not self._counts[self._caller]:
            del self._counts[self._caller]


@cache  # as many as there are methods
def _durations(method: str) -> Histogram:
    return telemetry.histogram(Metric.RPC_DURATION).labels(method)


def _traced(method: str) -> bool:
    return not method.startswith(_INFRASTRUCTURE)


def _metadata(context: Context) -> _Metadata:
    return context.invocation_metadata() or ()  # type: ignore[return-value]  # a tuple, whatever its stub says


def _traceparent(metadata: _Metadata) -> str:
    return next((value for key, value in metadata if key == "traceparent" and isinstance(value, str)), "")
