"""The boundary as clients see it: over real mTLS on loopback, through our own channel."""

import asyncio

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import REGISTRY

from tests.support.spans import traced
from tests.support.toy_rpc import CA, NAME, Stub, Toy, dial, serving, text
from whaleflux import errors, telemetry
from whaleflux.rpc import auth
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.status import ServerFailure


@pytest.fixture
def spans():
    with traced() as kept:
        yield kept


def server_spans(spans):
    return [span for span in spans.get_finished_spans() if span.kind is SpanKind.SERVER]


async def server_span(spans):
    """The one span of the server; it ends a moment after its caller has the answer."""
    await until(lambda: server_spans(spans))
    (span,) = server_spans(spans)
    return span


def count(method, code):
    labels = {"method": f"/{NAME}/{method}", "code": code}
    return REGISTRY.get_sample_value("whaleflux_rpc_requests_total", labels) or 0.0


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # a metric has no event to wait for
            await asyncio.sleep(0.005)


async def echo(request, context):
    return StringValue(value=f"{request.value} {auth.caller().role}/{auth.caller().name}")


class TestUnary:
    async def test_an_answer_is_an_answer_and_the_servicer_knows_its_caller(self, spans):
        before = count("GetEcho", "OK")
        async with serving(Toy({"GetEcho": echo})) as server, dial(server) as channel:
            assert (await Stub(channel).unary("GetEcho")(text("hi"))).value == "hi user/ann"
        span = await server_span(spans)
        assert span.name == f"{NAME}/GetEcho"
        assert (span.attributes["rpc.grpc.status_code"], span.status.status_code) == (0, StatusCode.UNSET)
        assert span.attributes["whaleflux.caller"] == "spiffe://whaleflux/user/ann"
        assert count("GetEcho", "OK") == before + 1

    async def test_a_status_error_arrives_as_its_class_and_is_no_error_of_the_span(self, spans):
        async def refuse(request, context):
            raise errors.NotFound("node", "sites/a/nodes/n1", "list them first")

        async with serving(Toy({"Refuse": refuse})) as server, dial(server) as channel:
            with pytest.raises(errors.NotFound, match="list them first") as caught:
                await Stub(channel).unary("Refuse")(text())
        assert (caught.value.kind, caught.value.name) == ("node", "sites/a/nodes/n1")
        span = await server_span(spans)
        assert (span.attributes["rpc.grpc.status_code"], span.status.status_code) == (5, StatusCode.UNSET)
        assert span.attributes["whaleflux.reason"] == "NODE_NOT_FOUND"
        assert not span.events

    async def test_a_bug_shows_a_trace_id_and_nothing_else(self, spans):
        async def stumble(request, context):
            raise KeyError("the password is hunter2")

        async with serving(Toy({"Stumble": stumble})) as server, dial(server) as channel:
            with pytest.raises(ServerFailure) as caught:
                await Stub(channel).unary("Stumble")(text())
        span = await server_span(spans)
        trace_id = f"{span.context.trace_id:032x}"
        assert caught.value.message == f"internal error, trace {trace_id}"
        assert caught.value.metadata == {"trace_id": trace_id}
        assert (span.attributes["rpc.grpc.status_code"], span.status.status_code) == (13, StatusCode.ERROR)
        assert [event.name for event in span.events] == ["exception"]

    async def test_a_status_error_without_a_class_of_its_own_is_a_bug(self):
        async def vague(request, context):
            raise errors.StatusError("secret internals")

        async with serving(Toy({"Vague": vague})) as server, dial(server) as channel:
            with pytest.raises(ServerFailure, match="internal error, trace"):
                await Stub(channel).unary("Vague")(text())

    async def test_the_server_span_is_a_child_of_the_clients_span(self, spans):
        async with serving(Toy({"GetEcho": echo})) as server, dial(server) as channel:
            with telemetry.span("the cause"):
                await Stub(channel).unary("GetEcho")(text())
        named = {(span.kind, span.name): span for span in spans.get_finished_spans()}
        cause = named[SpanKind.INTERNAL, "the cause"]
        sent = named[SpanKind.CLIENT, f"{NAME}/GetEcho"]
        served = named[SpanKind.SERVER, f"{NAME}/GetEcho"]
        assert sent.parent.span_id == cause.context.span_id
        assert served.parent.span_id == sent.context.span_id
        assert served.context.trace_id == cause.context.trace_id

    async def test_a_handlers_own_abort_passes_through(self, spans):
        async def abort(request, context):
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

        async with serving(Toy({"Abort": abort})) as server, dial(server) as channel:
            with pytest.raises(ServerFailure) as caught:
                await Stub(channel).unary("Abort")(text())
        assert caught.value.reason == "DATA_LOSS"
        span = await server_span(spans)
        assert span.attributes["rpc.grpc.status_code"] == 15
        assert not span.events

    async def test_a_cancelled_call_stops_the_handler(self):
        started, stopped = asyncio.Event(), asyncio.Event()

        async def linger(request, context):
            started.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        before = count("Linger", "CANCELLED")
        async with serving(Toy({"Linger": linger})) as server, dial(server) as channel:
            call = asyncio.create_task(Stub(channel).unary("Linger")(text()))
            await started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            async with asyncio.timeout(30):
                await stopped.wait()
            await until(lambda: count("Linger", "CANCELLED") == before + 1)

    async def test_an_unknown_method_is_unimplemented(self):
        async with serving(Toy({"GetEcho": echo})) as server, dial(server) as channel:
            with pytest.raises(ServerFailure) as caught:
                await Stub(channel).unary("Nonsense")(text())
        assert caught.value.reason == "UNIMPLEMENTED"


class TestBounds:
    async def test_a_large_request_is_refused_before_it_is_parsed(self):
        limits = CallLimits(request_bytes=1000)
        async with serving(Toy({"GetEcho": echo}), limits) as server, dial(server) as channel:
            with pytest.raises(errors.ResourceExhausted) as caught:
                await Stub(channel).unary("GetEcho")(text("x" * 2000))
        assert caught.value.reason == "REQUEST_TOO_LARGE"
        assert caught.value.metadata["limit_bytes"] == "1000"

    @pytest.mark.parametrize("unit", ["x", "\u00e9", "\U0001f40b"])
    async def test_a_status_error_that_quotes_megabytes_arrives(self, unit):
        async def refuse(request, context):
            raise errors.InvalidArgument([errors.FieldViolation(unit * 100_000, unit * 100_000)] * 5)

        async with serving(Toy({"Refuse": refuse})) as server, dial(server) as channel:
            with pytest.raises(errors.InvalidArgument, match=r"\(1\d{6} characters\)") as caught:
                await Stub(channel).unary("Refuse")(text())
        assert caught.value.violations[0].field.startswith(unit)

    async def test_bytes_that_are_no_message_are_the_callers_fault(self):
        async with serving(Toy({"GetEcho": echo})) as server, dial(server) as channel:
            raw = channel.unary_unary(f"/{NAME}/GetEcho", None, None)
            with pytest.raises(errors.InvalidArgument, match="not a valid message"):
                await raw(b"\xff\xff\xff")

    async def test_a_call_without_a_deadline_gets_the_servers(self):
        async def linger(request, context):
            await asyncio.sleep(60)

        async with serving(Toy({"Linger": linger}), CallLimits(deadline_s=0.05)) as server:
            async with raw_channel(server) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/{NAME}/Linger")(b"")
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not finish in 0.050 s" in (caught.value.details() or "")

    async def test_the_callers_deadline_stops_the_handler(self):
        started, stopped = asyncio.Event(), asyncio.Event()

        async def linger(request, context):
            started.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        async with serving(Toy({"Linger": linger})) as server, dial(server) as channel:
            for timeout_s in (0.1, 1, 10):  # on a busy machine a call may be late before it has come to the server
                with pytest.raises(errors.DeadlineExceeded):
                    await Stub(channel).unary("Linger")(text(), timeout=timeout_s)
                if started.is_set():
                    break
            async with asyncio.timeout(30):
                await stopped.wait()

    async def test_an_inner_timeout_is_a_bug_and_not_a_deadline(self):
        async def impatient(request, context):
            raise TimeoutError

        async with serving(Toy({"Impatient": impatient})) as server, dial(server) as channel:
            with pytest.raises(ServerFailure, match="internal error"):
                await Stub(channel).unary("Impatient")(text())

    async def test_one_caller_cannot_occupy_the_server(self):
        release = asyncio.Event()

        async def wait(request, context):
            await release.wait()
            return text("done")

        toy, limits = Toy({"Wait": wait, "GetEcho": echo}), CallLimits(calls_per_caller=1)
        async with serving(toy, limits) as server, dial(server) as ann, dial(server, name="bob") as bob:
            waiting = asyncio.create_task(Stub(ann).unary("Wait")(text()))
            await until(lambda: REGISTRY.get_sample_value(telemetry.Metric.RPC_IN_FLIGHT) == 1)
            with pytest.raises(errors.ResourceExhausted, match="1 calls at a time"):
                await Stub(ann).unary("GetEcho")(text())
            await Stub(bob).unary("GetEcho")(text("others are served"))
            release.set()
            await waiting
            await Stub(ann).unary("GetEcho")(text("and so is ann, afterwards"))

    async def test_one_caller_cannot_call_too_often_and_nobody_hardly_at_all(self):
        limits = CallLimits(calls_per_s=0.001, burst=3, anonymous_per_s=0.001, anonymous_burst=1)
        toy = Toy({"GetEcho": echo, "Join": echo})
        async with serving(toy, limits) as server, dial(server) as ann, dial(server, "frontdoor", "1") as door:
            for _ in range(3):
                await Stub(ann).unary("GetEcho")(text())
            with pytest.raises(errors.ResourceExhausted, match="too often") as caught:
                await Stub(ann).unary("GetEcho")(text())
            assert caught.value.retry_after_s == pytest.approx(1000, rel=0.01)
            await Stub(door).unary("Join")(text())
            with pytest.raises(errors.ResourceExhausted, match="anonymous"):
                await Stub(door).unary("Join")(text())


class TestStreams:
    async def test_messages_then_a_status_error_with_its_details(self, spans):
        async def watch(request, context):
            yield text("one")
            yield text("two")
            raise errors.Compacted(7)

        async with serving(Toy(stream={"Watch": watch})) as server, dial(server) as channel:
            seen = []
            with pytest.raises(errors.Compacted) as caught:
                async for message in Stub(channel).stream("Watch")(text()):
                    seen.append(message.value)
        assert seen == ["one", "two"]
        assert caught.value.revision == 7
        assert not server_spans(spans), "a watch must not hold a span open"

    async def test_a_bug_in_a_stream_leaves_one_short_error_span(self, spans):
        async def watch(request, context):
            yield text("one")
            raise ZeroDivisionError

        async with serving(Toy(stream={"Watch": watch})) as server, dial(server) as channel:
            with (
                telemetry.span("the cause") as cause,
                pytest.raises(ServerFailure, match="internal error, trace"),
            ):
                async for _ in Stub(channel).stream("Watch")(text()):
                    pass
        span = await server_span(spans)
        assert span.status.status_code is StatusCode.ERROR
        assert span.parent.span_id == cause.get_span_context().span_id

    async def test_what_a_stream_does_is_a_child_of_its_caller_and_knows_it(self, spans):
        async def watch(request, context):
            with telemetry.span("inside"):
                yield text(auth.caller().name)

        async with serving(Toy(stream={"Watch": watch})) as server, dial(server) as channel:
            with telemetry.span("the cause") as cause:
                assert [m.value async for m in Stub(channel).stream("Watch")(text())] == ["ann"]
        (inside,) = [span for span in spans.get_finished_spans() if span.name == "inside"]
        assert inside.parent.span_id == cause.get_span_context().span_id

    async def test_every_arity(self):
        async def joined(requests, context):
            return text("".join([request.value async for request in requests]))

        async def shout(requests, context):
            async for request in requests:
                yield text(request.value.upper())

        async def written(request, context):
            await context.write(text("by write"))

        async def abc():
            for letter in "abc":
                yield text(letter)

        toy = Toy(stream={"Write": written})
        toy.collect["Join"], toy.talk["Shout"] = joined, shout
        async with serving(toy) as server, dial(server) as channel:
            stub = Stub(channel)
            assert (await stub.collect("Join")(abc())).value == "abc"
            assert [m.value async for m in stub.talk("Shout")(abc())] == ["A", "B", "C"]
            assert [m.value async for m in stub.stream("Write")(text())] == ["by write"]

    async def test_leaving_a_stream_ends_it_at_the_server(self):
        closed = asyncio.Event()

        async def watch(request, context):
            try:
                yield text("one")
                await asyncio.sleep(60)
            finally:
                closed.set()

        async with serving(Toy(stream={"Watch": watch})) as server, dial(server) as channel:
            async with Stub(channel).stream("Watch")(text()) as stream:
                assert (await anext(stream)).value == "one"
            async with asyncio.timeout(30):
                await closed.wait()

    async def test_streams_of_one_caller_are_bounded(self):
        async def watch(request, context):
            yield text("open")
            await asyncio.sleep(60)

        limits = CallLimits(streams_per_caller=1)
        async with serving(Toy(stream={"Watch": watch}), limits) as server, dial(server) as channel:
            async with (
                Stub(channel).stream("Watch")(text()) as first,
                Stub(channel).stream("Watch")(text()) as second,
            ):
                await anext(first)
                with pytest.raises(errors.ResourceExhausted, match="1 open streams"):
                    await anext(second)


class TestDrain:
    async def test_unary_calls_finish_and_streams_are_told_to_go_elsewhere(self):
        release, closed = asyncio.Event(), asyncio.Event()

        async def slow(request, context):
            await release.wait()
            return text("finished")

        async def watch(request, context):
            try:
                yield text("open")
                await asyncio.sleep(60)
            finally:
                closed.set()

        async with serving(Toy({"Slow": slow}, {"Watch": watch})) as server, dial(server) as channel:
            stream = Stub(channel).stream("Watch")(text())
            await anext(stream)
            unary = asyncio.create_task(Stub(channel).unary("Slow")(text()))
            await until(lambda: REGISTRY.get_sample_value(telemetry.Metric.RPC_IN_FLIGHT) == 1)
            drained = asyncio.create_task(server.drain(grace_s=60))
            with pytest.raises(errors.Unavailable) as caught:
                await anext(stream)
            assert caught.value.reason == "DRAINING"
            assert closed.is_set()
            assert not drained.done(), "the unary call is still being answered"
            release.set()
            assert (await unary).value == "finished"
            async with asyncio.timeout(30):
                await drained

    async def test_health_says_not_serving_before_the_server_is_gone(self):
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        async with serving(Toy({"GetEcho": echo})) as server, dial(server) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", NAME):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
            await server.set_serving(False)
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            async with asyncio.timeout(30):
                await server.drain(grace_s=60)
            with pytest.raises(errors.Unavailable):
                await anext(watch)


def raw_channel(server):
    """gRPC's own channel: for what our client would not let a caller do."""
    from datetime import UTC, datetime

    tls = CA.issue("user", "raw", datetime.now(UTC))
    credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
    options = (("grpc.ssl_target_name_override", "scheduler.whaleflux"),)
    return grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials, options)
