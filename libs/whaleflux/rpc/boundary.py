"""The one server interceptor: identity, admission, owner rules, bounds, deadline, span, errors, metrics and audit of every call.

Servicers stay plain: they take messages, return messages, and raise status errors. What they get has an allowed caller
(`auth.principal()`), a bounded size and a deadline; what they raise reaches the client as a status with details, and a
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
from dataclasses import replace
from functools import cache, partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from opentelemetry.trace import Span
from prometheus_client import Histogram

from whaleflux import telemetry
from whaleflux.errors import (
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, owners, roles
from whaleflux.rpc.answer import Call, Context, answering, failed, gone, succeeded
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.quotas import Quotas
from whaleflux.telemetry import Attribute, Metric
from whaleflux.trust import audit, ownership
from whaleflux.trust.admission import Admission, Everybody
from whaleflux.trust.audit import Audit, AuditRecord, NoAudit

_Metadata = tuple[tuple[str, str | bytes], ...]
_INFRASTRUCTURE = "/grpc."  # health and reflection are asked all the time: not worth spans, nor counted
_JUDGED_AGAIN_S = 30.0  # open streams, whose sessions time alone may end
_GATHERED_S = 0.2  # changes of who is admitted that come within it are one: each has all streams judged
_NOTHING_DONE = frozenset({ErrorReason.NOT_LEADER, ErrorReason.DRAINING, ErrorReason.CACHE_BEHIND})
_DENIED = (Unauthenticated, PermissionDenied)
_NAMED_BY = (
    "parent",
    "checkpoint",
    "job",
    "queue",
    "dataset",
    "node",
    "site",
    "model",
)  # fields that say what a request is about


class _Serving:
    """One call while it is served, as the audit trail will tell of it."""

    __slots__ = (
        "answer",
        "asked",
        "certificate",
        "context",
        "metadata",
        "method",
        "noted",
        "principal",
        "refused",
        "request",
        "span",
        "written",
    )

    def __init__(self, method: str, context: Context) -> None:
        self.method, self.context, self.metadata = method, context, _metadata(context)
        self.certificate: Any = {}  # gRPC makes it anew each time it is asked
        self.principal: auth.Principal | None = None
        self.request: Any = None
        self.answer: Any = None
        self.refused: StatusError | None = None  # why its stream was ended from here
        self.span: Span | None = None  # of a unary call; a stream has none
        self.written = False  # that the stream was opened
        self.noted = audit.begin()
        self.asked = ownership.watch_questions() if owners.insists(method) else None

    @property
    def address(self) -> str:
        """Of who dialled."""
        return auth.address_of(self.context.peer() or "", self.certificate, self.metadata)

    def check_asked(self) -> None:
        """A bug: an answer is ready, and nobody asked whose things it is about."""
        if self.asked is not None and not self.asked.yes:
            raise RuntimeError(f"{self.method} did not ask for the owner (rpc/owners.py)")


class Boundary(grpc.aio.ServerInterceptor):
    """See the module. One per server; `drain` ends its streams."""

    def __init__(self, authority: auth.Authority, limits: CallLimits | None = None) -> None:
        self._authority, self._limits = authority, limits or CallLimits()
        self._admission: Admission = Everybody()
        self._audit: Audit = NoAudit()
        self._quotas = Quotas(self._limits)
        self._guarded: dict[str, tuple[Any, Any]] = {}  # handler and its guarded twin, by method
        self._calls: Counter[str] = Counter()  # by subject: several logins of one person share its bounds
        self._streams: Counter[str] = Counter()
        self._stream_tasks: dict[asyncio.Task[Any], _Serving] = {}
        self._draining = False

    def guard(self, admission: Admission, trail: Audit) -> None:
        """Who is admitted beyond what certificates say, and where the audit trail goes; before the first call."""
        self._admission, self._audit = admission, trail

    async def end_streams_of_the_revoked(self) -> None:
        """Ends each open stream whose caller is not admitted any more, or in other groups now, as soon as that is known; for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_JUDGED_AGAIN_S):
                    await self._admission.changed()
                    await asyncio.sleep(_GATHERED_S)
            for task, serving in self._stream_tasks.items():  # all in one go: a change in between would be missed
                self._judge_again(task, serving)

    def _judge_again(self, task: asyncio.Task[Any], serving: _Serving) -> None:
        assert serving.principal is not None
        try:
            if self._admission.admit(serving.principal.identity) == serving.principal:
                return
            serving.refused = _regrouped(serving.method)
        except StatusError as refused:  # also who cannot be judged just now: they open it again
            serving.refused = refused
        task.cancel()

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
            serving = _Serving(method, context)
            seen: dict[str, str] | None = None
            try:
                with telemetry.server_span(method, serving.metadata, traced=traced) as span:
                    seen = telemetry.exemplar()
                    call = Call(method, context, span, lambda: False)
                    serving.span = span
                    try:
                        serving.answer = answered = await self._served(call, serving, behaviour, take, raw)
                    except BaseException as error:
                        self._write_down(serving, error)
                        await failed(call, error)
                        raise
                    self._write_down(serving, None)
                    succeeded(call)
                    return answered
            finally:
                in_flight.dec()
                durations.observe(time.monotonic() - started, seen)

        return answer

    async def _served(
        self, call: Call, serving: _Serving, behaviour: Any, take: Callable[[Any], Any], raw: bytes
    ) -> Any:
        """What a unary handler answers to an admitted caller in time."""
        caller = self._admitted(serving)
        if owners.is_change(call.method):
            self._audit.check_room()
        assert call.span is not None
        if call.span.is_recording():
            call.span.set_attribute(Attribute.CALLER.value, caller.identity.uri)
        auth.act_as(caller)  # never reset: the call's task ends with the call
        limit_s = self._time_for(call.context)
        with _counted(self._calls, caller.subject, self._limits.calls_per_caller, "calls at a time"):
            if limit_s <= 0:
                raise _late(call.method, limit_s)
            try:
                async with asyncio.timeout(limit_s) as limit:
                    answered = await behaviour(self._taken(serving, take(raw)), call.context)
                    serving.check_asked()
                    return answered
            except TimeoutError:
                if limit.expired():
                    raise _late(call.method, limit_s) from None
                raise RuntimeError("a TimeoutError that no deadline caused") from None

    def _taken(self, serving: _Serving, request: Any) -> Any:
        """The request, once the rule that it can be judged by has let it pass."""
        serving.request = request
        rule = owners.rule_of(serving.method)
        if rule.asks is owners.Asks.BOUNDARY:
            rule.check(request)
        return request

    async def _each_taken(self, serving: _Serving, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The first one in time: who opens a stream and says nothing does not hold it for long."""
        if serving.method not in owners.TABLE:  # Envoy's own streams speak when there is something to say
            async for request in requests:
                yield request
            return
        try:
            async with asyncio.timeout(self._limits.first_request_s):
                first = await anext(requests)
        except TimeoutError:
            raise _silent(serving.method, self._limits.first_request_s) from None
        except StopAsyncIteration:
            return
        yield self._taken(serving, first)
        async for request in requests:
            yield request

    def _collecting(self, method: str, behaviour: Any, take: Callable[[Any], Any]) -> Any:
        async def answer(raw: Any, context: Context) -> Any:
            async with self._endless(method, context) as serving:
                answered = await behaviour(self._each_taken(serving, take(raw)), context)
                serving.check_asked()
                return answered

        return answer

    def _streaming(self, method: str, behaviour: Any, take: Callable[[Any], Any]) -> Any:
        async def answer(raw: Any, context: Context) -> AsyncIterator[Any]:
            async with self._endless(method, context) as serving:
                taken = take(raw)
                many = isinstance(taken, AsyncIterator)
                answers = behaviour(self._each_taken(serving, taken) if many else self._taken(serving, taken), context)
                if inspect.isawaitable(answers):  # writes by itself
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for message in answers:
                        serving.check_asked()
                        self._write_down_opened(serving)
                        yield message

        return answer

    @contextlib.asynccontextmanager
    async def _endless(self, method: str, context: Context) -> AsyncIterator[_Serving]:
        """Around a stream.

        Context variables are set and never reset: the call's task ends with the call, and a generator that is closed
        late would reset them in another task's context.
        """
        task = asyncio.current_task()
        assert task is not None  # gRPC runs each call in a task of its own
        serving = _Serving(method, context)
        serving.noted.refused = partial(self._write_down_unheeded, serving)
        telemetry.attach_for_good(_traceparent(serving.metadata))
        async with answering(Call(method, context, None, lambda: self._draining)):
            try:
                async with self._open(serving, task):
                    yield serving
            except asyncio.CancelledError as gone_away:
                self._write_down(serving, serving.refused or gone_away)
                if serving.refused is None:
                    raise
                raise serving.refused from None
            except BaseException as error:
                self._write_down(serving, error)
                raise
            self._write_down(serving, None)

    @contextlib.asynccontextmanager
    async def _open(self, serving: _Serving, task: asyncio.Task[Any]) -> AsyncIterator[None]:
        """The stream of an admitted caller, within its bounds."""
        if self._draining:
            raise gone()
        caller = self._admitted(serving)
        if owners.is_change(serving.method):
            self._audit.check_room()
        auth.act_as(caller)
        open_streams = telemetry.gauge(Metric.RPC_STREAMS).labels(serving.method)
        with _counted(self._streams, caller.subject, self._limits.streams_per_caller, "open streams"):
            self._stream_tasks[task] = serving
            open_streams.inc()
            try:
                yield
            finally:
                open_streams.dec()
                self._stream_tasks.pop(task, None)

    def _admitted(self, serving: _Serving) -> auth.Principal:
        """The caller: known, not revoked, allowed, within its rate."""
        method, metadata = serving.method, serving.metadata
        serving.certificate = serving.context.auth_context()
        identity = self._authority.identified(method, serving.certificate, metadata)
        serving.principal = auth.Principal(identity)  # for the trail, whatever is said of it
        if _traced(method):  # before anything is looked up for it: who is refused may not ask without end either
            address = serving.address if identity is auth.NOBODY else ""  # the known are counted by who they are
            self._quotas.take(identity, address, method, time.monotonic())
        serving.principal = self._admission.admit(identity)
        self._authority.judged(method, identity)
        return serving.principal

    def _write_down_opened(self, serving: _Serving) -> None:
        """A stream that is a change (a session inside of a job) counts from its first answer on, not when it ends."""
        if not serving.written and owners.is_change(serving.method):
            self._write_down(serving, None)
            serving.written = True

    def _write_down(self, serving: _Serving, error: BaseException | None) -> None:
        """One record of a change, or of an attempt that was denied."""
        if isinstance(error, StatusError) and error.reason in _NOTHING_DONE:
            return  # the caller asks again, or another replica
        denied = error is not None and (isinstance(error, _DENIED) or _is_hidden(serving, error))
        if not denied and not _counts(serving):
            return
        self._audit.record(_record(serving, error))

    def _write_down_unheeded(self, serving: _Serving, about: str, reason: str) -> None:
        """See `audit.note_refused`."""
        told = _record(serving, None)
        self._audit.record(replace(told, object=about[:256], result=PermissionDenied.code, reason=reason, after=""))

    def _time_for(self, context: Context) -> float:
        left_s = context.time_remaining()
        return min(self._limits.deadline_s if left_s is None else left_s, self._limits.longest_deadline_s)


class _Parser:
    """Bytes to message, within a bound."""

    def __init__(self, deserialize: Callable[[bytes], Any] | None, limit_bytes: int) -> None:
        self._deserialize, self._limit_bytes = deserialize, limit_bytes

    def __call__(self, raw: bytes) -> Any:
        if len(raw) > self._limit_bytes:
            raise ResourceExhausted(
                f"the request has {len(raw)} bytes; at most {self._limit_bytes} are taken, split it",
                reason=ErrorReason.REQUEST_TOO_LARGE,
                metadata={"bytes": str(len(raw)), "limit_bytes": str(self._limit_bytes)},
            )
        if self._deserialize is None:
            return raw
        try:
            return self._deserialize(raw)
        except DecodeError:
            raise InvalidArgument(FieldViolation("request", "is not a valid message of the method's type")) from None

    async def each(self, raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in raws:
            yield self(raw)


def _regrouped(method: str) -> StatusError:
    """What was answered so far was for who the caller was then: watches list again, other streams are opened again."""
    said, reason = "your groups have changed", ErrorReason.GROUPS_CHANGED
    watches = method.rpartition("/")[2].startswith("Watch")
    return (
        OutOfRange(f"{said}; list again", reason=reason)
        if watches
        else Unavailable(f"{said}; call again", reason=reason)
    )


def _silent(method: str, limit_s: float) -> InvalidArgument:
    violation = FieldViolation("request", f"the first message of {method} must come within {limit_s:g} s")
    return InvalidArgument(violation)


def _late(method: str, limit_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{method} did not finish in {limit_s:.3f} s", metadata={"method": method})


class _counted:  # noqa: N801  # a context manager without a generator: around every call
    """One more of the caller's calls while the block runs; refuses beyond `bound`."""

    __slots__ = ("_caller", "_counts")

    def __init__(self, counts: Counter[str], caller: str, bound: int, what: str) -> None:
        if counts[caller] >= bound:
            known = {"subject": caller, "limit": str(bound)}
            raise ResourceExhausted(
                f"{caller} has {bound} {what}; wait", reason=ErrorReason.TOO_MANY, metadata=known, retry_after_s=1.0
            )
        self._counts, self._caller = counts, caller

    def __enter__(self) -> None:
        self._counts[self._caller] += 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._caller] -= 1
        if not self._counts[self._caller]:
            del self._counts[self._caller]


def _counts(serving: _Serving) -> bool:
    """Whether the call is a change that is to be written down."""
    if serving.written or not owners.is_change(serving.method):
        return False
    kind = getattr(serving.request, "DESCRIPTOR", None)
    return not (_may_only_validate(kind) and serving.request.validate_only)


@cache  # as many as there are kinds of request
def _may_only_validate(kind: Any) -> bool:
    return kind is not None and "validate_only" in kind.fields_by_name


@cache  # as many as there are methods
def _durations(method: str) -> Histogram:
    return telemetry.histogram(Metric.RPC_DURATION).labels(method)


def _record(serving: _Serving, error: BaseException | None) -> AuditRecord:
    principal = serving.principal
    who = principal.identity if principal is not None else auth.NOBODY
    return AuditRecord(
        subject=who.subject,
        session=who.session,
        method=serving.method,
        object=_object_of(serving),
        result=_result(error),
        reason=str(error.reason) if isinstance(error, StatusError) else "",
        peer=serving.address,
        trace_id=telemetry.current_trace_id() if serving.span is None else telemetry.trace_id_of(serving.span),
        before=serving.noted.before,
        after=serving.noted.after or _reason(serving.request),
        groups=tuple(sorted(principal.groups)) if principal is not None and principal.groups else (),
        client=_client(serving.metadata),
    )


def _object_of(serving: _Serving) -> str:
    """What a call is about: what its request names, or what was made; at most 256 characters of whatever the caller sent."""
    if isinstance(value := getattr(serving.request, "name", None), str) and value:
        return value[:256]
    if isinstance(value := getattr(serving.answer, "name", None), str) and value:
        return value[:256]
    for field in _NAMED_BY:
        value = getattr(serving.request, field, None)
        if isinstance(value := getattr(value, "name", value), str) and value:
            return _with_id(serving.request, value)[:256]
    return _with_id(serving.request, "")[:256]


def _with_id(request: Any, parent: str) -> str:
    """Of what is to be made, the name that was asked for: queues/q and job_id j is queues/q/jobs/j."""
    for field in request.DESCRIPTOR.fields_by_name if isinstance(request, Message) else ():
        if (
            field.endswith("_id")
            and field != "request_id"
            and isinstance(value := getattr(request, field), str)
            and value
        ):
            return f"{parent}/{field.removesuffix('_id')}s/{value}".lstrip("/")
    return parent


def _result(error: BaseException | None) -> str:
    """Of a call, in the words of status codes; who did not wait for the answer, or met a bug, may have changed something all the same."""
    if error is None:
        return audit.OK
    if isinstance(error, StatusError):
        return error.code
    return audit.INTERNAL if isinstance(error, Exception) else audit.CANCELLED


def _traced(method: str) -> bool:
    return not method.startswith(_INFRASTRUCTURE)


def _metadata(context: Context) -> _Metadata:
    return context.invocation_metadata() or ()  # type: ignore[return-value]  # a tuple, whatever its stub says


def _is_hidden(serving: _Serving, error: BaseException | None) -> bool:
    """Whether somebody asked for what is not there for them. Whether it is there for others is not told here either: people read their own records."""
    who = serving.principal
    return (
        isinstance(error, NotFound)
        and owners.insists(serving.method)
        and serving.method not in owners.ASKS_WHETHER
        and who is not None
        and who.role in roles.LOGIN
    )


def _reason(request: Any) -> str:
    """Why somebody says that it is done."""
    given = getattr(request, "reason", "")
    return given if isinstance(given, str) else ""


def _client(metadata: _Metadata) -> str:
    """What the caller's program says it is."""
    for key, value in metadata:
        if key == "user-agent" and isinstance(value, str):
            return value
    return ""


def _traceparent(metadata: _Metadata) -> str:
    return next((value for key, value in metadata if key == "traceparent" and isinstance(value, str)), "")
