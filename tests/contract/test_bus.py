"""What every Bus promises: one suite over the model in memory and over a real JetStream."""

import asyncio
import itertools
from datetime import UTC, datetime

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from tests.support.nats_server import NatsServer
from whaleflux.errors import InvalidArgument
from whaleflux.events.api import MAX_DATA_BYTES
from whaleflux.events.memory import MemoryBus
from whaleflux.events.newest import newest
from whaleflux.events.subjects import usage_id, usage_subject
from whaleflux.events.trace import context_of

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.launch()  # connecting waits until it is ready
    yield server
    server.kill()


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.integration)])
async def bus(request):
    if request.param == "memory":
        made = MemoryBus()
    else:
        made = await request.getfixturevalue("server").connect()
    yield made
    await made.close()


@pytest.fixture
def site():
    """Tests share a server: each speaks as a site of its own."""
    return f"t{next(_numbers)}"


async def say(bus, site, numbers, node="n1"):
    for n in numbers:
        await bus.publish(f"wf.v1.{site}.node.{node}.said", b"%d" % n, id=f"{site}/{node}/{n}")


async def read(subscription, count, *, ack=True, limit_s=30.0):
    got = []
    async with asyncio.timeout(limit_s):
        while len(got) < count:
            got.append(await anext(subscription))
            if ack:
                await got[-1].ack()
    return got


async def nothing_comes(subscription, for_s=0.3):
    try:
        async with asyncio.timeout(for_s):
            event = await anext(subscription)
    except TimeoutError:
        return True
    pytest.fail(f"unexpected {event}")


def numbers(events):
    return [int(e.data) for e in events]


async def test_an_event_arrives_as_it_was_published(bus, site):
    data = bytes(range(256))
    subject = f"wf.v1.{site}.job.q_j.running"
    before = datetime.now(UTC)
    ack = await bus.publish(subject, data, id="key@7", headers={"wf-epoch": "3"})
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        (event,) = await read(news, 1)
    assert (event.subject, event.data, event.id, event.headers["wf-epoch"]) == (subject, data, "key@7", "3")
    assert (event.stream, event.sequence, event.attempt) == (ack.stream, ack.sequence, 1)
    assert before.timestamp() - 1 <= event.timestamp.timestamp() <= datetime.now(UTC).timestamp() + 1


async def test_the_same_id_is_kept_once(bus, site):
    first = await bus.publish(f"wf.v1.{site}.node.n1.a", b"1", id=f"{site}@1")
    again = await bus.publish(f"wf.v1.{site}.node.n1.a", b"1", id=f"{site}@1")
    other = await bus.publish(f"wf.v1.{site}.node.n1.a", b"2", id=f"{site}@2")
    assert not first.duplicate
    assert again.duplicate
    assert again.sequence == first.sequence
    assert other.sequence > first.sequence
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        assert numbers(await read(news, 2)) == [1, 2]
        assert await nothing_comes(news)


async def test_a_durable_goes_on_after_its_last_acknowledgement(bus, site):
    await say(bus, site, range(5))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        assert numbers(await read(news, 3)) == [0, 1, 2]
    await say(bus, site, range(5, 7))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        assert numbers(await read(news, 4)) == [3, 4, 5, 6]
        assert await nothing_comes(news)


async def test_what_was_not_acknowledged_comes_again(bus, site):
    await say(bus, site, range(2))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, ack_wait_s=1.0) as news:
        first = await read(news, 2, ack=False)
        await first[1].ack()
        (again,) = await read(news, 1)
        assert (again.id, again.attempt) == (first[0].id, 2)
        assert await nothing_comes(news, 1.2)


async def test_what_a_crashed_reader_held_comes_to_the_next_one(bus, site):
    await say(bus, site, range(1))
    crashed = bus.subscribe([f"wf.v1.{site}.>"], durable=site, ack_wait_s=0.5)
    await read(crashed, 1, ack=False)
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, ack_wait_s=0.5) as news:
        assert numbers(await read(news, 1)) == [0]
    await crashed.aclose()


async def test_a_refused_event_comes_again_after_the_delay(bus, site):
    await say(bus, site, range(1))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        (event,) = await read(news, 1, ack=False)
        await event.nak()
        (event,) = await read(news, 1, ack=False)
        await event.nak(0.6)
        assert await nothing_comes(news, 0.2)
        (event,) = await read(news, 1)
        assert event.attempt == 3


async def test_events_of_one_subject_arrive_in_order(bus, site):
    await asyncio.gather(*(say(bus, site, range(50), node) for node in ("a", "b", "c", "d")))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        events = await read(news, 200)
    for node in "abcd":
        assert numbers([e for e in events if f".{node}." in e.subject]) == list(range(50))


async def test_no_more_than_max_in_flight_are_unacknowledged(bus, site):
    await say(bus, site, range(6))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, max_in_flight=3) as news:
        held = await read(news, 3, ack=False)
        assert await nothing_comes(news)
        await held[0].ack()
        assert numbers(await read(news, 1, ack=False)) == [3]
        assert await nothing_comes(news)


async def test_only_what_matches_a_filter_arrives(bus, site):
    for subject in ("node.n1.up", "node.n2.up", "node.n1.down", "job.n1.up"):
        await bus.publish(f"wf.v1.{site}.{subject}", b"", id=f"{site}/{subject}")
    async with bus.subscribe([f"wf.v1.{site}.node.*.up", f"wf.v1.{site}.job.>"], durable=site) as news:
        found = {e.subject.removeprefix(f"wf.v1.{site}.") for e in await read(news, 3)}
        assert found == {"node.n1.up", "node.n2.up", "job.n1.up"}
        assert await nothing_comes(news)


async def test_the_filters_of_a_durable_can_be_changed(bus, site):
    async with bus.subscribe([f"wf.v1.{site}.node.*.up"], durable=site) as news:
        assert await nothing_comes(news, 0.1)
    await say(bus, site, [1])
    async with bus.subscribe([f"wf.v1.{site}.node.*.said"], durable=site, ack_wait_s=5) as news:
        assert numbers(await read(news, 1)) == [1]


async def test_a_durable_may_start_with_what_comes_or_at_an_instant(bus, site):
    await say(bus, site, [0])
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=f"{site}-all") as everything:
        since = (await read(everything, 1))[0].timestamp
    await asyncio.sleep(0.01)  # makes the next event's time a later one
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=f"{site}-new", start="new") as new:
        assert await nothing_comes(new, 0.2)
        await say(bus, site, [1])
        assert numbers(await read(new, 1)) == [1]
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=f"{site}-since", start=since) as later:
        assert numbers(await read(later, 2)) == [0, 1]
    middle = datetime.fromtimestamp(since.timestamp() + 0.005, UTC)
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=f"{site}-middle", start=middle) as later:
        assert numbers(await read(later, 1)) == [1]


async def test_readers_of_one_durable_share_the_events(bus, site):
    got = []

    async def reader(news):
        async for event in news:
            got.append(int(event.data))
            await event.ack()
            await asyncio.sleep(0)

    readers = [bus.subscribe([f"wf.v1.{site}.>"], durable=site, max_in_flight=4) for _ in range(2)]
    tasks = [asyncio.create_task(reader(news)) for news in readers]
    await say(bus, site, range(40))
    async with asyncio.timeout(30):
        while len(got) < 40:  # a list tells nobody
            await asyncio.sleep(0.01)
    for news in readers:
        await news.aclose()
    await asyncio.gather(*tasks)
    assert sorted(got) == list(range(40))


async def test_what_a_closed_reader_had_not_seen_comes_to_the_next_at_once(bus, site):
    await say(bus, site, range(20))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, ack_wait_s=60) as news:
        assert numbers(await read(news, 1)) == [0]
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, ack_wait_s=60) as news:
        assert sorted(numbers(await read(news, 19))) == list(range(1, 20))


async def test_a_forgotten_durable_begins_anew(bus, site):
    await say(bus, site, range(2))
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        await read(news, 2)
    await bus.forget(site)
    await bus.forget("never-existed")
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        assert numbers(await read(news, 2)) == [0, 1]


async def test_closing_ends_a_waiting_reader(bus, site):
    news = bus.subscribe([f"wf.v1.{site}.>"], durable=site)

    async def drain():
        return [event async for event in news]

    waiting = asyncio.create_task(drain())
    await asyncio.sleep(0.05)
    await bus.close()
    async with asyncio.timeout(30):
        assert await waiting == []


async def test_trace_context_crosses_the_bus(bus, site):
    span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1)))
    with trace.use_span(span):
        await bus.publish(f"wf.v1.{site}.node.n1.a", b"", id=f"{site}@1")
        given = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"}
        await bus.publish(f"wf.v1.{site}.node.n1.a", b"", id=f"{site}@2", headers=given)
    await bus.publish(f"wf.v1.{site}.node.n1.a", b"", id=f"{site}@3")
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        current, own, none = await read(news, 3)
    seen = trace.get_current_span(context_of(current.headers)).get_span_context()
    assert (seen.trace_id, seen.span_id, seen.is_remote) == (0xABC, 0xDEF, True)
    assert own.headers["traceparent"] == given["traceparent"]
    assert "traceparent" not in none.headers


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"subject": "wf.v1.a.node.n1"}, "subject"),
        ({"subject": "wf.v1.*.node.n1.x"}, "subject"),
        ({"data": b"x" * (MAX_DATA_BYTES + 1)}, "data"),
        ({"id": ""}, "id"),
        ({"id": "a\r\nNats-Rollup: all"}, "id"),
        ({"headers": {"Nats-Rollup": "all"}}, "headers"),
        ({"headers": {"a": "b\r\nNats-Rollup: all"}}, "headers"),
        ({"headers": {"a b": "c"}}, "headers"),
        ({"headers": {"a": "x" * 20_000}}, "headers"),
    ],
)
async def test_bad_messages_are_refused_and_the_bus_goes_on(bus, site, message, field):
    good = {"subject": f"wf.v1.{site}.node.n1.x", "data": b"1", "id": f"{site}@1", "headers": {}}
    bad = good | message
    with pytest.raises(InvalidArgument) as refused:
        await bus.publish(bad["subject"], bad["data"], id=bad["id"], headers=bad["headers"])
    assert refused.value.violations[0].field.startswith(field)
    assert not (await bus.publish(good["subject"], b"", id=f"{site}@{field}{len(message)}{next(_numbers)}")).duplicate


async def test_an_event_of_the_greatest_size_passes(bus, site):
    data = b"x" * MAX_DATA_BYTES
    await bus.publish(f"wf.v1.{site}.node.n1.x", data, id=f"{site}@1", headers={"a": "y" * 16_000})
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site) as news:
        assert (await read(news, 1))[0].data == data


@pytest.mark.parametrize(
    "wrong",
    [{"durable": "a.b"}, {"durable": ""}, {"subjects": ["wf.v1.>", "wf.v1.a.>"]}, {"subjects": []}, {"max_in_flight": 0},
     {"ack_wait_s": 0.0}, {"forget_after_s": -5.0}],
)  # fmt: skip
async def test_bad_subscriptions_are_refused_at_once(bus, wrong):
    arguments = {"subjects": ["wf.v1.>"], "durable": "d"} | wrong
    with pytest.raises(InvalidArgument):
        bus.subscribe(arguments.pop("subjects"), **arguments)


async def test_what_is_kept_can_be_read_from_anywhere_on(bus, site):
    await say(bus, site, range(5))
    await say(bus, site, range(10, 13), node="n2")
    one = await bus.read([f"wf.v1.{site}.node.n1.*"])
    assert (numbers(one.events), one.matching) == ([0, 1, 2, 3, 4], 5)
    assert one.events[0].subject == f"wf.v1.{site}.node.n1.said"
    assert one.events[0].id == f"{site}/n1/0"
    part = await bus.read([f"wf.v1.{site}.>"], start=one.events[3].sequence, limit=3)
    assert (numbers(part.events), part.matching) == ([3, 4, 10], 5)
    assert part.first <= one.events[0].sequence < part.events[-1].sequence < part.last
    since = await bus.read([f"wf.v1.{site}.>"], start=part.events[0].timestamp)
    assert numbers(since.events)[-3:] == [10, 11, 12]
    counted = await bus.read([f"wf.v1.{site}.>"], limit=0)
    assert (counted.events, counted.matching) == ((), 8)
    nothing = await bus.read([f"wf.v1.{site}.job.*.*"])
    assert (nothing.events, nothing.matching) == ((), 0)


async def test_more_than_one_batch_is_read_in_order(bus, site):
    await asyncio.gather(*(say(bus, site, [n]) for n in range(600)))
    kept = await bus.read([f"wf.v1.{site}.>"])
    assert sorted(numbers(kept.events)) == list(range(600))
    assert [e.sequence for e in kept.events] == sorted(e.sequence for e in kept.events)


async def test_a_durable_may_begin_behind_what_was_read(bus, site):
    await say(bus, site, range(3))
    kept = await bus.read([f"wf.v1.{site}.>"])
    async with bus.subscribe([f"wf.v1.{site}.>"], durable=site, start=kept.events[1].sequence + 1) as news:
        assert numbers(await read(news, 1)) == [2]


async def test_of_each_subject_of_accounting_the_newest_record_is_kept(bus, site):
    for n in range(3):
        await bus.publish(f"wf.account.{site}.user-a.j.u-1", b"%d" % n, id=f"{site}/u-1/{n}")
    await bus.publish(f"wf.account.{site}.user-a.j.u-2", b"9", id=f"{site}/u-2")
    kept = await bus.read([f"wf.account.{site}.>"])
    assert (numbers(kept.events), kept.matching) == ([2, 9], 2)
    assert (await bus.read(["wf.v1.*.j.*.*"], limit=0)).matching == 0


@pytest.mark.parametrize("wrong", [{"subjects": ["wf.v1.>", "wf.account.>"]}, {"limit": 1001}, {"subjects": ["x.>"]}])
async def test_bad_readings_are_refused(bus, wrong):
    arguments = {"subjects": ["wf.v1.>"]} | wrong
    with pytest.raises(InvalidArgument):
        await bus.read(arguments.pop("subjects"), **arguments)


async def test_the_newest_can_be_read_first(bus, site):
    await say(bus, site, range(6))
    page = await newest(bus, [f"wf.v1.{site}.node.n1.*"], limit=4)
    assert numbers(page) == [5, 4, 3, 2]
    rest = await newest(bus, [f"wf.v1.{site}.node.n1.*"], before=page[-1].sequence, limit=4)
    assert numbers(rest) == [1, 0]


async def test_what_gpus_did_is_kept_whole_and_read_by_a_durable_of_its_own(bus, site):
    subject = usage_subject(f"sites/{site}/nodes/n1", "01jz")
    for n in (1, 2, 2, 3):
        await bus.publish(subject, b"%d" % n, id=usage_id(f"sites/{site}/nodes/n1", "boot", "01jz", n))
    async with bus.subscribe([f"wf.usage.{site}.>"], durable=f"ledger-{site}") as news:
        assert numbers(await read(news, 3)) == [1, 2, 3]
        await nothing_comes(news)
    async with bus.subscribe([f"wf.usage.{site}.>"], durable=f"ledger-{site}") as news:
        await bus.publish(subject, b"4", id=usage_id(f"sites/{site}/nodes/n1", "boot", "01jz", 4))
        assert numbers(await read(news, 1)) == [4], "it goes on where it was"
    assert (await bus.read([f"wf.v1.{site}.>"], limit=0)).matching == 0
