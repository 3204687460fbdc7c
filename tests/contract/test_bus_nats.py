"""What JetStream's failures must not cost: crashes, stalls, cut links, lost files, wrong secrets."""

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from tests.support.nats_server import Link, NatsServer
from whaleflux.errors import FailedPrecondition, StatusError, Unavailable
from whaleflux.events.nats import NatsBus
from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.events.stream_links import StreamLinks
from whaleflux.events.topology import StreamLimits, StreamSpec, hub_streams
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore

pytestmark = pytest.mark.integration


@contextlib.asynccontextmanager
async def running(*servers):
    try:
        for server in servers:
            server.launch()
        yield
    finally:
        for server in servers:
            server.kill()


@contextlib.asynccontextmanager
async def background(coroutine):
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition, limit_s=45.0):
    """How long it took, in seconds."""
    began = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def collect(bus, into, durable="reader", subjects=("wf.v1.>",), **options):
    async with bus.subscribe(subjects, durable=durable, **options) as news:
        async for event in news:
            into.append(event)
            await event.ack()


async def publish_until_acknowledged(bus, subject, number):
    """As a publisher does: the same id until there is an answer."""
    while True:
        try:
            return await bus.publish(subject, b"%d" % number, id=f"{subject}/{number}", timeout_s=1.0)
        except Unavailable:
            await asyncio.sleep(0.05)


async def publish_stream(bus, subject, acknowledged, stop, gap_s=0.002):
    while not stop.is_set():
        number = len(acknowledged)
        await publish_until_acknowledged(bus, subject, number)
        acknowledged.append(number)
        await asyncio.sleep(gap_s)


def unique_in_order(events):
    """The numbers in order of their first arrival."""
    return list(dict.fromkeys(int(e.data) for e in events))


def said(events, site):
    """What arrived of a site's events, in order; repeats, which a crash brings, left out."""
    return unique_in_order(e for e in events if e.subject.startswith(f"wf.v1.{site}."))


async def test_a_crash_of_the_server_during_a_pull_loop_loses_nothing_acknowledged(tmp_path):
    """nats.py #504: a pull loop must go on after its server was killed and started again."""
    server = NatsServer(tmp_path)
    async with running(server):
        bus, got, acknowledged, stop = await server.connect(), [], [], asyncio.Event()
        async with (
            background(collect(bus, got)),
            background(publish_stream(bus, "wf.v1.a.node.n.x", acknowledged, stop)) as publishing,
        ):
            for _ in range(2):
                reached = len(got) + 100
                await until(lambda n=reached: len(got) >= n)
                server.kill()
                await server.start()
                assert await until(lambda n=reached: len(got) > n + 100) < 15
            stop.set()
            await publishing
            await until(lambda: len(unique_in_order(got)) >= len(acknowledged))
        assert unique_in_order(got) == acknowledged  # all, and in order where each came first
        again = await bus.publish("wf.v1.a.node.n.x", b"0", id="wf.v1.a.node.n.x/0")
        assert again.duplicate  # ids outlive a crash
        await bus.close()


async def test_an_idle_pull_loop_notices_that_its_server_was_restarted(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus, got = await server.connect(), []
        async with background(collect(bus, got)):
            await bus.publish("wf.v1.a.node.n.x", b"1", id="1")
            await until(lambda: len(got) == 1)
            server.kill()
            await server.start()
            other = await server.connect()
            await other.publish("wf.v1.a.node.n.x", b"2", id="2")
            assert await until(lambda: len(got) == 2) < 15
            await other.close()
        await bus.close()


async def test_a_stalled_server_delays_and_loses_nothing(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus, got, acknowledged, stop = await server.connect(), [], [], asyncio.Event()
        async with (
            background(collect(bus, got)),
            background(publish_stream(bus, "wf.v1.a.node.n.x", acknowledged, stop)) as publishing,
        ):
            await until(lambda: len(got) > 50)
            server.stall()
            began = time.monotonic()
            with pytest.raises(Unavailable):  # a deadline holds also when nobody answers
                await bus.publish("wf.v1.a.node.n.y", b"", id="y", timeout_s=0.5)
            assert time.monotonic() - began < 4
            await asyncio.sleep(max(0.0, 5 - (time.monotonic() - began)))
            server.resume()
            before = len(acknowledged)
            assert await until(lambda: len(acknowledged) > before + 20) < 15
            stop.set()
            await publishing
            await until(lambda: len([e for e in got if e.subject.endswith(".x")]) >= len(acknowledged))
        assert unique_in_order(e for e in got if e.subject.endswith(".x")) == acknowledged
        await bus.close()


async def test_a_server_that_lost_its_files_gets_its_streams_and_consumers_back(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus, got = await server.connect(), []
        async with background(collect(bus, got)):
            await bus.publish("wf.v1.a.node.n.x", b"1", id="1")
            await until(lambda: len(got) == 1)
            server.kill()
            server.lose_files()
            await server.start()
            await publish_until_acknowledged(bus, "wf.v1.a.node.n.x", 2)
            await until(lambda: unique_in_order(got) == [1, 2])
        await bus.close()


async def test_a_consumer_deleted_under_its_reader_is_made_again(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus, got = await server.connect(), []
        async with background(collect(bus, got, durable="d")):
            await bus.publish("wf.v1.a.node.n.x", b"1", id="1")
            await until(lambda: len(got) == 1)
            await bus.forget("d")
            await bus.publish("wf.v1.a.node.n.x", b"2", id="2")
            await until(lambda: 2 in unique_in_order(got))
        await bus.close()


async def test_connecting_waits_for_the_server_and_gives_up_in_time(tmp_path):
    server = NatsServer(tmp_path)
    with pytest.raises(Unavailable):
        await NatsBus.connect(server.options(), timeout_s=0.5)
    connecting = asyncio.create_task(server.connect())
    async with running(server):
        bus = await connecting
        assert bus.connected
        await bus.close()


async def test_a_wrong_password_never_gets_in(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        await (await server.connect()).close()
        with pytest.raises(Unavailable):
            await NatsBus.connect(server.options(password="guess"), timeout_s=1)


async def test_agents_of_a_site_say_what_they_observe_there_and_nothing_else(tmp_path):
    server = NatsServer(tmp_path, "a", hub_url="nats://a:secret@127.0.0.1:1", agents=True)
    async with running(server):
        await (await server.connect("a")).close()  # makes the streams
        agent_options = server.options(user="agents", password="agent-secret", create_streams=False)
        agent = await NatsBus.connect(agent_options, timeout_s=30)
        await agent.publish("wf.v1.a.node.n.x", b"", id="1")
        for subject in ("wf.v1.b.node.n.x", "wf.v1.a.job.j.x", "wf.v1.hub.node.n.x"):
            with pytest.raises(Unavailable):
                await agent.publish(subject, b"", id="2", timeout_s=0.2)
        await agent.close()


async def test_a_cut_site_goes_on_and_catches_up_at_once(tmp_path):
    """While the link is cut, and the hub crashes, the site publishes and reads its own; later both sides have all, once."""
    hub = NatsServer(tmp_path, sites={"a": "leaf-secret"})
    link = Link(hub.leaf)
    site = NatsServer(tmp_path, "a", hub_url=f"nats://a:leaf-secret@{link.address}")
    await link.mend()
    async with running(hub, site):
        at_hub, at_site = await hub.connect(), await site.connect("a")
        stream_links = StreamLinks(at_hub, ["a"])
        hub_got, site_got = [], []
        async with (
            background(stream_links.run()),
            background(collect(at_hub, hub_got)),
            background(collect(at_site, site_got, subjects=("wf.v1.a.>",))),
        ):
            await until(lambda: stream_links.linked == {"a"})
            for n in range(20):
                await publish_until_acknowledged(at_site, "wf.v1.a.node.n.x", n)
            await publish_until_acknowledged(at_hub, "wf.v1.hub.job.j.x", 1000)
            await until(lambda: len(hub_got) == 21 and len(site_got) == 20)

            link.cut()
            for n in range(20, 70):
                await publish_until_acknowledged(at_site, "wf.v1.a.node.n.x", n)
            await publish_until_acknowledged(at_hub, "wf.v1.hub.job.j.x", 1001)
            await until(lambda: said(site_got, "a") == list(range(70)) and said(hub_got, "hub") == [1000, 1001])
            assert said(hub_got, "a") == list(range(20))
            hub.kill()  # it comes back, asks its sources over the missing link, and would ask again after 30 s
            await hub.start()
            await until(lambda: not stream_links.linked)
            await until(lambda: at_hub.connected)

            await link.mend()
            took_s = await until(lambda: len(said(hub_got, "a")) == 70)
            assert took_s < 20, "the hub's own next question would come after 30 s"
            again = await at_site.publish("wf.v1.a.node.n.x", b"50", id="wf.v1.a.node.n.x/50")
            assert again.duplicate
        assert said(hub_got, "a") == said(site_got, "a") == list(range(70))
        assert said(hub_got, "hub") == [1000, 1001]
        assert said(site_got, "hub") == [], "nobody at a site reads what others say: whoever takes its server would"
        await at_hub.close()
        await at_site.close()


async def test_a_publisher_outlives_the_bus_and_says_each_change_once(tmp_path):
    server, store = NatsServer(tmp_path), MemoryStore()

    def describe(change: EntryChange):
        name = change.key.rpartition("/")[2]
        return OutgoingEvent(f"wf.v1.hub.job.{name}.changed", change.new.value if change.new else b"-1")

    async with running(server):
        bus, got = await server.connect(), []
        publisher = Publisher(store, bus, keys.JOBS, describe, name="test")
        async with background(publisher.run()), background(collect(bus, got)):
            await store.commit(Put(keys.JOBS + "q/j", b"0"))
            await until(lambda: len(got) == 1)
            server.kill()
            for n in range(1, 30):
                await store.commit(Put(keys.JOBS + "q/j", b"%d" % n))
            await server.start()
            await until(lambda: len(got) >= 30)
        assert unique_in_order(got) == list(range(30))
        await bus.close()


async def test_a_stream_that_cannot_be_is_refused_and_not_waited_for(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus = await server.connect()
        overlapping = (StreamSpec("OTHER", ("wf.v1.a.>",)),)
        with pytest.raises(FailedPrecondition, match="overlap"):
            await NatsBus.connect(server.options(streams=overlapping), timeout_s=30)
        await bus.close()


async def test_a_stream_that_takes_most_of_the_room_is_found_again_by_who_connects_later(tmp_path):
    """The server refuses to make what is there already when it would not fit twice."""
    server = NatsServer(tmp_path)
    large = (StreamSpec("EVENTS", ("wf.v1.>",), limits=StreamLimits(max_bytes=3 << 30)),)
    async with running(server):
        for _ in range(2):
            bus = await NatsBus.connect(server.options(streams=large), timeout_s=30)
            await bus.close()


async def test_a_durable_of_another_kind_is_refused_to_its_reader(tmp_path):
    """A push consumer of that name, made by somebody else, cannot be pulled: the reader is told instead of waiting."""
    server = NatsServer(tmp_path)
    async with running(server):
        bus = await server.connect()
        made = ConsumerConfig(durable_name="d", name="d", deliver_subject="wf.elsewhere", ack_policy=AckPolicy.EXPLICIT)
        await bus.jetstream().add_consumer("EVENTS", made)
        with pytest.raises(FailedPrecondition):
            async with asyncio.timeout(30), bus.subscribe(["wf.v1.>"], durable="d") as news:
                await anext(news)
        await bus.close()


async def test_reading_from_a_server_that_is_away_is_refused_and_never_empty(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus = await server.connect()
        await bus.publish("wf.v1.hub.job.q_j.running", b"1", id="1")
        server.kill()
        with pytest.raises(Unavailable):
            await bus.read(["wf.v1.hub.job.q_j.*"])
        server.launch()
        await until(lambda: bus.connected)
        assert (await bus.read(["wf.v1.hub.job.q_j.*"])).matching == 1
        await bus.close()


async def test_nobody_deletes_of_the_audit_trail_or_makes_it_a_stream_of_which_one_can(tmp_path):
    server = NatsServer(tmp_path)
    async with running(server):
        bus = await server.connect()
        await bus.publish("wf.audit.scheduler.embedded.a.records", b"1", id="1")
        js = bus.jetstream()
        for attempt in (
            lambda: js.delete_msg("AUDIT", 1),
            lambda: js.purge_stream("AUDIT"),
            lambda: js.update_stream(StreamConfig(name="AUDIT", subjects=["wf.audit.>"])),
        ):
            with pytest.raises(StatusError, match=r"not permitted|can not|cannot"):
                await bus.call(attempt())
        assert (await bus.read(["wf.audit.>"])).matching == 1
        longer = replace(hub_streams()[-1], limits=StreamLimits(max_age_s=500 * 86400.0, max_per_subject=0))
        await bus.apply(longer)  # its bounds can be set
        await bus.close()
