"""Our channels against servers that fail, restart, drain and hang."""

import asyncio
import contextlib
import threading
from datetime import UTC, datetime

import pytest

from tests.support.relay import Relay
from tests.support.toy_rpc import CA, NAME, TABLE, Stub, Toy, add_toy, dial, serving, text
from whaleflux import errors
from whaleflux.retry import Backoff
from whaleflux.rpc import auth, sync
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import server_name
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.rpc.tls_files import TlsFiles

PATIENT = CallPolicy(attempts=20, backoff=Backoff(0.05, 0.2), timeout_s=20)


def failing(times, error):
    """A method that refuses `times` times and then answers how often it was called."""
    calls = []

    async def method(request, context):
        calls.append(request.value)
        if len(calls) <= times:
            raise error
        return text(str(len(calls)))

    return method


async def start(toy, port=0):
    server = Server(CA.issue("scheduler", "test", datetime.now(UTC)), Authority(table=TABLE))
    server.add(add_toy, toy, NAME)
    server.bind(f"127.0.0.1:{port}")
    await server.start()
    return server


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_a_company_proxy_in_the_environment_is_not_the_way_to_a_service(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    toy = Toy({"GetIt": failing(0, None)})
    async with serving(toy) as server, dial(server, policy=CallPolicy(attempts=1, timeout_s=30)) as channel:
        assert (await Stub(channel).unary("GetIt")(text())).value == "1"


class TestRepeats:
    async def test_a_read_is_repeated_until_it_is_answered(self):
        toy = Toy({"GetIt": failing(2, errors.Unavailable("store away", retry_after_s=0.0))})
        async with serving(toy) as server, dial(server, policy=PATIENT) as channel:
            assert (await Stub(channel).unary("GetIt")(text())).value == "3"

    async def test_a_mutation_is_not_unless_the_server_did_nothing(self):
        unknown = errors.Unavailable("lost", reason="COMMIT_UNKNOWN", retry_after_s=0.0)
        follower = errors.Unavailable("not me", reason="NOT_LEADER", retry_after_s=0.0)
        toy = Toy({"CreateIt": failing(1, unknown), "DeleteIt": failing(1, follower)})
        async with serving(toy) as server, dial(server, policy=PATIENT) as channel:
            with pytest.raises(errors.Unavailable) as caught:
                await Stub(channel).unary("CreateIt")(text())
            assert caught.value.reason == "COMMIT_UNKNOWN"
            assert (await Stub(channel).unary("DeleteIt")(text())).value == "2"

    async def test_other_status_errors_come_at_once(self):
        toy = Toy({"GetIt": failing(99, errors.NotFound("job", "queues/q/jobs/j"))})
        async with serving(toy) as server, dial(server, policy=PATIENT) as channel:
            with pytest.raises(errors.NotFound):
                await Stub(channel).unary("GetIt")(text())

    async def test_all_attempts_together_keep_the_deadline(self):
        toy = Toy({"GetIt": failing(10**6, errors.Unavailable("store away", retry_after_s=0.0))})
        loop = asyncio.get_running_loop()
        async with serving(toy) as server, dial(server, policy=PATIENT) as channel:
            began = loop.time()
            with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
                await Stub(channel).unary("GetIt")(text(), timeout=0.5)
            assert loop.time() - began < 5

    async def test_a_timeout_of_nothing_is_not_even_sent(self):
        toy = Toy({"GetIt": failing(0, errors.Unavailable("x"))})
        async with serving(toy) as server, dial(server) as channel:
            with pytest.raises(errors.DeadlineExceeded, match="no time was left"):
                await Stub(channel).unary("GetIt")(text(), timeout=0)


class TestRestart:
    async def test_calls_go_on_when_the_server_comes_back_on_its_port(self):
        toy = Toy({"GetIt": failing(0, errors.Unavailable("x"))})
        server = await start(toy)
        port = server.port
        async with dial(server, policy=PATIENT) as channel:
            ask = Stub(channel).unary("GetIt")
            assert (await ask(text())).value == "1"
            await server.drain(0)
            waiting = asyncio.create_task(ask(text()))
            second = await start(toy, port)
            try:
                assert (await waiting).value == "2"
            finally:
                await second.drain(0)

    async def test_a_stream_whose_server_dies_is_unavailable_and_not_cancelled(self):
        async def watch(request, context):
            yield text("one")
            await asyncio.sleep(60)

        server = await start(Toy(stream={"Watch": watch}))
        async with Relay(server.port) as relay, dial(server, at=relay.endpoint) as channel:
            stream = Stub(channel).stream("Watch")(text())
            await anext(stream)
            relay.cut()  # without the courtesy of draining
            with pytest.raises(errors.Unavailable):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        await server.drain(0)

    async def test_nobody_there_is_unavailable_within_the_deadline(self):
        tls = CA.issue("user", "ann", datetime.now(UTC))
        async with connect("127.0.0.1:1", tls, policy=CallPolicy(attempts=1)) as channel:
            with pytest.raises(errors.Unavailable) as caught:
                await Stub(channel).unary("CreateIt")(text())
            assert caught.value.reason == "SERVER_UNREACHABLE"
            with pytest.raises(errors.Unavailable, match="did not answer within"):
                await channel.ready(0.1)

    async def test_a_server_that_accepts_and_says_nothing_costs_the_deadline_only(self):
        async def silent(reader, writer):
            await reader.read()

        listener = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        tls = CA.issue("user", "ann", datetime.now(UTC))
        async with connect(f"127.0.0.1:{port}", tls, policy=CallPolicy(attempts=1)) as channel:
            with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)):
                async with asyncio.timeout(15):
                    await Stub(channel).unary("GetIt")(text(), timeout=0.2)
        listener.close()


class TestLeader:
    """A follower names the leader, and calls go there by themselves."""

    @contextlib.asynccontextmanager
    async def pair(self):
        led = []

        async def lead(request, context):
            led.append(request.value)
            return text("from the leader")

        async def follow(request, context):
            raise not_leader()

        async def lead_stream(request, context):
            yield text("from the leader")

        async def follow_stream(request, context):
            raise not_leader()
            yield

        def not_leader():
            known = {"leader": f"127.0.0.1:{leader.port}"}
            return errors.Unavailable("not me", reason="NOT_LEADER", metadata=known, retry_after_s=0.0)

        leader = await start(Toy({"CreateIt": lead}, {"Watch": lead_stream}))
        follower = await start(Toy({"CreateIt": follow}, {"Watch": follow_stream}))
        try:
            yield leader, follower, led
        finally:
            await leader.drain(0)
            await follower.drain(0)

    def dial(self, server, **more):
        tls = CA.issue("user", "ann", datetime.now(UTC))
        target = f"127.0.0.1:{server.port}"
        return connect(target, tls, server=server_name("scheduler"), policy=PATIENT, **more)

    async def test_calls_and_streams_find_it(self):
        async with self.pair() as (_, follower, led), self.dial(follower, follow_leader=True) as channel:
            assert (await Stub(channel).unary("CreateIt")(text("job"))).value == "from the leader"
            assert led == ["job"]
        async with self.pair() as (_, follower, _), self.dial(follower, follow_leader=True) as channel:
            with pytest.raises(errors.Unavailable):
                await anext(Stub(channel).stream("Watch")(text()))
            assert (await anext(Stub(channel).stream("Watch")(text()))).value == "from the leader"

    async def test_when_it_is_gone_they_ask_the_first_address_again(self):
        async with self.pair() as (leader, follower, _), self.dial(follower, follow_leader=True) as channel:
            ask = Stub(channel).unary("CreateIt")
            await ask(text())
            port = leader.port
            await leader.drain(0)
            with pytest.raises(errors.Unavailable):
                await ask(text())
            again = await start(Toy({"CreateIt": failing(0, errors.NotFound("x", "y"))}), port)
            try:
                assert (await ask(text())).value == "1", "through the follower to the new leader"
            finally:
                await again.drain(0)

    async def test_only_when_asked_to_and_only_to_an_address(self):
        async with self.pair() as (_, follower, led), self.dial(follower) as channel:
            with pytest.raises(errors.Unavailable):
                await Stub(channel).unary("CreateIt")(text(), timeout=0.3)
            assert not led
        tls = CA.issue("user", "ann", datetime.now(UTC))
        async with connect("127.0.0.1:1", tls, follow_leader=True) as channel:
            for leader in ("", "scheduler-1", "unix:/tmp/x", "dns://evil/x:1", "a:1,b:2"):
                await channel.connections.on_error(
                    errors.Unavailable("x", reason="NOT_LEADER", metadata={"leader": leader})
                )
                assert channel.connections.at == "127.0.0.1:1"


class TestClosing:
    async def test_a_closed_channel_refuses_and_does_not_cancel_the_task(self):
        async def linger(request, context):
            await asyncio.sleep(60)

        async def watch(request, context):
            yield text("one")
            await asyncio.sleep(60)

        async with serving(Toy({"Linger": linger}, {"Watch": watch})) as server:
            channel = dial(server)
            stream = Stub(channel).stream("Watch")(text())
            await anext(stream)
            unary = asyncio.create_task(Stub(channel).unary("Linger")(text()))
            following = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            await channel.close()
            for task in (unary, following):
                with pytest.raises(errors.Unavailable):
                    await task
            with pytest.raises(errors.Unavailable) as caught:
                await Stub(channel).unary("GetIt")(text())
            assert caught.value.reason == "CHANNEL_CLOSED"

    async def test_ones_own_cancelling_stays_a_cancelling(self):
        async def watch(request, context):
            yield text("one")
            await asyncio.sleep(60)

        async with serving(Toy(stream={"Watch": watch})) as server, dial(server) as channel:
            stream = Stub(channel).stream("Watch")(text())
            await anext(stream)
            following = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.01)
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following


@contextlib.contextmanager
def serving_in_a_thread(toy):
    """The server in its own loop, for clients that block."""
    ready, state = threading.Event(), {}

    async def run():
        state["stop"], state["loop"] = asyncio.Event(), asyncio.get_running_loop()
        async with serving(toy) as server:
            state["server"] = server
            ready.set()
            await state["stop"].wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield state["server"]
    finally:
        state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join(60)


class TestSync:
    def test_a_renewed_certificate_is_shown_by_the_same_stub(self, tmp_path, monkeypatch):
        monkeypatch.setattr("whaleflux.rpc.sync.STAMP_EVERY_S", 0.0)

        async def who(request, context):
            return text(auth.caller().name)

        shown = TlsFiles.under(tmp_path, "client")
        shown.save(CA.issue("user", "before", datetime.now(UTC)))
        with serving_in_a_thread(Toy({"GetWho": who})) as server:
            target = f"127.0.0.1:{server.port}"
            with sync.connect(target, shown, server=server_name("scheduler")) as channel:
                ask = Stub(channel).unary("GetWho")
                assert ask(text(), timeout=30).value == "before"
                shown.save(CA.issue("user", "after", datetime.now(UTC)))
                assert ask(text(), timeout=30).value == "after"
                shown.chain.unlink()  # being replaced just now
                assert ask(text(), timeout=30).value == "after"

    def test_the_same_status_errors_repeats_and_streams_without_asyncio(self):
        closed = threading.Event()

        async def watch(request, context):
            yield text("one")
            yield text("two")
            raise errors.Compacted(9)

        async def forever(request, context):
            try:
                while True:
                    yield text("tick")
                    await asyncio.sleep(0.01)
            finally:
                closed.set()

        async def refuse(request, context):
            raise errors.FailedPrecondition("drain first", reason="NODE_NOT_DRAINED")

        read = failing(2, errors.Unavailable("x", retry_after_s=0.0))
        toy = Toy({"GetIt": read, "Refuse": refuse}, {"Watch": watch, "Forever": forever})
        with serving_in_a_thread(toy) as server:
            tls = CA.issue("user", "ann", datetime.now(UTC))
            target = f"127.0.0.1:{server.port}"
            with sync.connect(target, tls, server=server_name("scheduler"), policy=PATIENT) as channel:
                stub = Stub(channel)
                assert stub.unary("GetIt")(text()).value == "3"
                with pytest.raises(errors.FailedPrecondition) as caught:
                    stub.unary("Refuse")(text())
                assert caught.value.reason == "NODE_NOT_DRAINED"
                seen = []
                with pytest.raises(errors.Compacted):
                    seen.extend(message.value for message in stub.stream("Watch")(text()))
                endless = stub.stream("Forever")(text())
                assert next(endless).value == "tick"
                endless.close()
                assert closed.wait(30), "leaving the iterator ends the stream at the server"

    def test_nobody_there(self):
        tls = CA.issue("user", "ann", datetime.now(UTC))
        with sync.connect("127.0.0.1:1", tls, policy=CallPolicy(attempts=2, backoff=Backoff(0.01))) as channel:
            with pytest.raises(errors.Unavailable):
                Stub(channel).unary("GetIt")(text())
            with pytest.raises(errors.Unavailable):
                next(Stub(channel).stream("Watch")(text()))


def test_dialling_needs_neither_opentelemetry_nor_structlog():
    """The command line pays for neither."""
    import subprocess
    import sys

    code = (
        "import sys; import whaleflux.rpc.sync, whaleflux.rpc.channel;"
        "print([m for m in ('opentelemetry', 'structlog', 'prometheus_client', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
