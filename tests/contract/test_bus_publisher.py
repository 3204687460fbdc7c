"""The publisher between a real etcd and a real JetStream, both of which crash: each change is in the stream, once, in order."""

import asyncio
import contextlib

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.nats_server import NatsServer
from whaleflux.errors import Unavailable
from whaleflux.events import change_id
from whaleflux.events.memory import MemoryBus
from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore

pytestmark = pytest.mark.integration


def describe(change: EntryChange) -> OutgoingEvent:
    name = change.key.rpartition("/")[2]
    return OutgoingEvent(f"wf.v1.hub.job.q_{name}.changed", change.new.value if change.new else b"")


async def write(store, key, written, stop):
    """Counts up under one key; notes the id of each change that was acknowledged."""
    number = 0
    while not stop.is_set():
        with contextlib.suppress(Unavailable):  # unknown or refused: its event may or may not come
            value = b"%d" % number
            written.append(change_id(key, await store.commit(Put(key, value)), value))
        number += 1
        await asyncio.sleep(0.005)


async def read(bus, got):
    async with bus.subscribe(["wf.v1.hub.job.>"], durable="reader") as news:
        async for event in news:
            got.append(event)
            await event.ack()


async def until(condition, limit_s=60.0):
    async with asyncio.timeout(limit_s):
        while not condition():  # other tasks' lists tell nobody
            await asyncio.sleep(0.01)


async def test_news_go_on_after_a_restored_backup(tmp_path):
    etcd, bus = EtcdServer(tmp_path), MemoryBus()
    try:
        await etcd.start()
        store = EtcdStore([etcd.endpoint], timeout_s=2)
        await store.commit(Put(keys.JOBS + "q/a", b"1"))
        etcd.kill()
        etcd.back_up()
        await etcd.start()
        publisher = Publisher(store, bus, keys.JOBS, describe, name="test")
        running = asyncio.create_task(publisher.run())
        for n in range(20):
            await store.commit(Put(keys.JOBS + "q/a", b"lost %d" % n))
        await until(lambda: bus.events and bus.events[-1].data == b"lost 19")
        etcd.kill()
        etcd.restore()
        await etcd.start()
        await until(lambda: bus.events[-1].data == b"1")
        await store.commit(Put(keys.JOBS + "q/a", b"2"))
        await until(lambda: bus.events[-1].data == b"2")
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await store.close()
    finally:
        etcd.kill()


async def test_crashes_of_store_bus_and_publisher_lose_no_change_and_repeat_none(tmp_path):
    etcd, nats = EtcdServer(tmp_path), NatsServer(tmp_path)
    stop, written, got, tasks = asyncio.Event(), {}, [], []

    def start(coroutine):
        tasks.append(asyncio.create_task(coroutine))
        return tasks[-1]

    try:
        await asyncio.gather(etcd.start(), nats.start())
        store, bus = EtcdStore([etcd.endpoint]), await nats.connect()
        async with elect(store, "publisher-test", "here", ttl_s=30) as leader:

            def publish():
                return start(Publisher(store, bus, keys.JOBS, describe, name="test", leader=leader).run())

            first = publish()
            start(read(bus, got))
            await store.commit(Put(f"{keys.JOBS}q/first", b""))
            await until(lambda: got)  # from its first list on it tells each change; what was replaced before is no news
            writers = [start(write(store, f"{keys.JOBS}q/{name}", written.setdefault(name, []), stop)) for name in "ab"]

            async def more(count=30):
                reached = len({event.id for event in got}) + count
                await until(lambda: len({event.id for event in got}) >= reached)

            await more()
            nats.kill()
            await nats.start()
            await more()
            etcd.kill()
            await etcd.start()
            await more()
            first.cancel()  # crashes with up to a second of its position not saved
            publish()
            await more()
            stop.set()
            await asyncio.gather(*writers)
            everything = {change for changes in written.values() for change in changes}
            await until(lambda: everything <= {event.id for event in got})
        stored = [event.id for event in sorted(got, key=lambda event: event.sequence)]
        assert len({e.sequence for e in got}) == len(set(stored))  # what came again was a redelivery, not a second copy
        for name, changes in written.items():
            firsts = [i for i in dict.fromkeys(stored) if f"/{name}@" in i]
            revisions = [int(i.rpartition("@")[2].partition("-")[0]) for i in firsts]
            assert revisions == sorted(revisions)
            assert set(changes) <= set(firsts)
        await bus.close()
        await store.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        etcd.kill()
        nats.kill()
