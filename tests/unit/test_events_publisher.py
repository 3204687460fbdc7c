"""The publisher: every change becomes an event under its own id, however often store, bus or publisher fail."""

import asyncio
import contextlib
import random

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, PermissionDenied
from whaleflux.events import change_id
from whaleflux.events.memory import MemoryBus
from whaleflux.events.publisher import SAVE_IDLE_REVISIONS, EntryChange, OutgoingEvent, Publisher
from whaleflux.store import keys
from whaleflux.store.api import Delete, Fenced, Put
from whaleflux.store.memory import MemoryStore

CURSOR = keys.PUBLISHERS + "test"


def describe(change: EntryChange) -> OutgoingEvent:
    """Old and new value as text, so that the tests see what the publisher knew."""
    old, new = (e.value.decode() if e else "-" for e in (change.old, change.new))
    return OutgoingEvent(f"wf.v1.hub.job.{change.key.rpartition('/')[2]}.changed", f"{old}>{new}".encode())


class Room:
    """A store, a bus and, while `publishing`, a publisher between them."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store, self.bus = MemoryStore(self.clock), MemoryBus(self.clock)

    async def put(self, key, value):
        return await self.store.commit(Put(keys.JOBS + key, value.encode()))

    @contextlib.asynccontextmanager
    async def publishing(self, describe=describe, **options):
        publisher = Publisher(self.store, self.bus, keys.JOBS, describe, name="test", clock=self.clock, **options)
        task = asyncio.create_task(publisher.run())
        try:
            await self.clock.advance(0)
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def said(self):
        return [event.data.decode() for event in self.bus.events]

    @property
    def ids(self):
        return [event.id for event in self.bus.events]


@pytest.fixture
def room():
    return Room()


async def test_each_change_is_published_with_what_was_before_under_key_and_revision(room):
    async with room.publishing():
        revisions = [await room.put("q/a", "1"), await room.put("q/a", "2")]
        await room.store.commit(Put("/elsewhere", b"x"))
        revisions.append(await room.store.commit(Delete(keys.JOBS + "q/a")))
        await room.clock.advance(0)
    assert room.said == ["->1", "1>2", "2>-"]
    values = (b"1", b"2", None)
    assert room.ids == [change_id(f"{keys.JOBS}q/a", *told) for told in zip(revisions, values, strict=True)]


async def test_a_first_start_publishes_the_present_state(room):
    await room.put("q/a", "1")
    await room.put("q/a", "2")
    await room.put("q/b", "9")
    async with room.publishing():
        await room.clock.advance(0)
    assert room.said == ["->2", "->9"]


async def test_a_restart_goes_on_where_the_last_one_had_come(room):
    async with room.publishing():
        await room.put("q/a", "1")
        await room.clock.advance(2)  # the position is saved
    await room.put("q/a", "2")
    await room.put("q/a", "3")
    async with room.publishing():
        await room.clock.advance(0)
    assert room.said == ["->1", "1>2", "2>3"]


async def test_what_a_crash_makes_it_repeat_carries_the_same_ids(room):
    async with room.publishing():
        await room.put("q/a", "1")
        await room.clock.advance(2)
        await room.put("q/a", "2")
        await room.clock.advance(0.5)  # published, the position not yet saved
    assert room.said == ["->1", "1>2"]
    tried = []
    publish = room.bus.publish

    async def watched(subject, data, *, id, **more):
        tried.append(id)
        return await publish(subject, data, id=id, **more)

    room.bus.publish = watched
    async with room.publishing():
        await room.clock.advance(0)
    assert tried == room.ids[1:]  # it was repeated
    assert room.said == ["->1", "1>2"]  # and dropped as a repeat


async def test_an_unreachable_bus_delays_and_loses_nothing(room):
    async with room.publishing():
        room.bus.reachable = False
        for n in range(20):
            await room.put("q/a", str(n))
        await room.clock.advance(60)
        assert room.said == []
        room.bus.reachable = True
        await room.clock.advance(5)
    assert room.said == ["->0", *(f"{n}>{n + 1}" for n in range(19))]


async def test_an_unreachable_store_is_waited_for_also_at_the_start(room):
    room.store.down = True
    async with room.publishing():
        await room.clock.advance(30)
        room.store.down = False
        await room.put("q/a", "1")
        await room.clock.advance(5)
        assert room.said == ["->1"]
        room.store.down = True
        await room.clock.advance(30)
        room.store.down = False
        await room.put("q/a", "2")
        await room.clock.advance(5)
    assert room.said == ["->1", "1>2"]


async def test_compacted_history_is_replaced_by_the_present_state(room):
    async with room.publishing():
        await room.put("q/a", "1")
        await room.put("q/b", "1")
        await room.clock.advance(2)
    await room.put("q/a", "2")
    await room.put("q/a", "3")
    revision = await room.put("q/c", "1")
    await room.store.compact(revision)
    async with room.publishing():
        await room.clock.advance(2)
        await room.put("q/b", "2")
        await room.clock.advance(0)
    assert room.said == ["->1", "->1", "->3", "->1", "1>2"]  # q/a's 2 is gone, and what was before 3 with it


async def test_compaction_under_a_running_publisher_still_tells_what_was_deleted(room):
    async with room.publishing():
        await room.put("q/a", "1")
        await room.put("q/b", "1")
        await room.clock.advance(1)
        room.store.down = True
        await room.clock.advance(1)
        room.store.down = False
        room.bus.reachable = False
        await room.put("q/z", "0")  # holds the publisher while history goes
        await room.clock.advance(0.05)
        await room.store.commit(Delete(keys.JOBS + "q/a"))
        await room.store.compact(await room.put("q/b", "2"))
        room.bus.reachable = True
        await room.clock.advance(5)
    assert sorted(room.said) == sorted(["->1", "->1", "->0", "1>-", "1>2"])


@pytest.mark.parametrize("overtaken", [False, True])
async def test_a_restored_backup_is_noticed_and_the_news_go_on(room, overtaken):
    """What the lost history had and the backup has not is told as gone, what came back as changed, and ids never repeat."""
    async with room.publishing():
        backup = await room.put("q/a", "1")
        await room.put("q/a", "lost")
        await room.put("q/b", "lost")
        await room.clock.advance(2)  # the position is saved, and lost with the rest
        room.bus.reachable = False
        await room.store.restore(backup)
        for n in range(9 if overtaken else 1):
            await room.put("q/c", str(n))
        room.bus.reachable = True
        await room.clock.advance(5)
        before = len(room.said)
        await room.put("q/a", "2")
        await room.clock.advance(5)
    assert room.said[:3] == ["->1", "1>lost", "->lost"]
    assert sorted(room.said[3:before]) == sorted(["lost>1", "lost>-", "->8" if overtaken else "->0"])
    assert room.said[before:] == ["1>2"]
    assert len(set(room.ids)) == len(room.ids)
    assert int((await room.store.get(CURSOR)).value.split()[0]) <= (await room.store.list("")).revision


async def test_what_is_written_after_a_restoring_that_nobody_noticed_is_told(room):
    async with room.publishing():
        backup = await room.put("q/a", "1")
        await room.put("q/a", "lost")
        await room.clock.advance(2)
    await room.store.restore(backup)
    async with room.publishing():
        await room.put("q/a", "2")  # under the revision of what was lost
        await room.clock.advance(5)
    assert room.said[-1].endswith(">2")


@pytest.mark.parametrize("kept", [b"100000", b"no number", b""])
async def test_a_kept_position_that_cannot_be_is_replaced_by_the_present_state(room, kept):
    await room.put("q/a", "1")
    await room.store.commit(Put(CURSOR, kept))
    async with room.publishing() as task:
        await room.put("q/a", "2")
        await room.clock.advance(5)
        assert not task.done()
    assert room.said == ["->1", "1>2"]
    assert int((await room.store.get(CURSOR)).value.split()[0]) <= (await room.store.list("")).revision


async def test_no_error_of_store_or_bus_ends_it_but_the_loss_of_its_leadership(room):
    """It runs in its leader's group: news that cannot be told must not end the leadership."""
    listing, failures = room.store.list, [PermissionDenied("not this prefix"), ValueError("a bug"), InvalidArgument(())]

    async def failing(*args, **more):
        if failures:
            raise failures.pop()
        return await listing(*args, **more)

    room.store.list = failing
    async with room.publishing() as task:
        await room.put("q/a", "1")
        await room.clock.advance(60)
        assert not task.done()
    assert room.said == ["->1"]


async def test_a_publisher_that_leads_no_more_stops(room):
    class Deposed:
        key, created = keys.LEADERS + "test", 1

    async with room.publishing(leader=Deposed()) as task:
        await room.put("q/a", "1")
        await room.clock.advance(2)
        assert task.done()
        assert isinstance(task.exception(), Fenced)
    assert await room.store.get(CURSOR) is None  # the fenced one wrote nothing


async def test_what_cannot_be_described_or_published_is_skipped(room):
    def picky(change):
        value = change.new.value.decode()
        if value == "bug":
            raise KeyError(value)
        if value == "private":
            return None
        return OutgoingEvent("nonsense" if value == "bad" else "wf.v1.hub.job.a.changed", value.encode())

    async with room.publishing(picky):
        for value in ("1", "bug", "private", "bad", "2"):
            await room.put("q/a", value)
        await room.clock.advance(2)
    assert room.said == ["1", "2"]
    with pytest.raises(InvalidArgument):
        await room.bus.publish("nonsense", b"", id="1")


async def test_headers_of_the_description_travel_along(room):
    parent = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    async with room.publishing(lambda change: OutgoingEvent("wf.v1.hub.job.a.changed", b"", parent)):
        await room.put("q/a", "1")
        await room.clock.advance(0)
    assert room.bus.events[0].headers == parent


async def test_an_idle_publisher_saves_its_position_seldom_but_before_history_is_gone(room):
    async with room.publishing():
        await room.clock.advance(10)
        first = (await room.store.get(CURSOR)).revision
        for _ in range(10):
            await room.store.commit(Put("/elsewhere", b"x"))
            await room.clock.advance(5)
        assert (await room.store.get(CURSOR)).revision == first
        for _ in range(SAVE_IDLE_REVISIONS):
            await room.store.commit(Put("/elsewhere", b"x"))
        await room.clock.advance(2)
        assert (await room.store.get(CURSOR)).revision > first


@pytest.mark.parametrize("seed", range(5))
async def test_any_mixture_of_failures_leaves_every_change_published_once_and_in_order(room, seed):
    chance, values, expected = random.Random(seed), {}, {}
    async with room.publishing():
        await room.clock.advance(2)  # a position exists: what was deleted before the first start nobody knows
    for _ in range(6):
        async with room.publishing():
            for _ in range(25):
                key = chance.choice("abc")
                old = values.get(key, "-")
                if key in values and chance.random() < 0.2:
                    room.store.down = False
                    await room.store.commit(Delete(keys.JOBS + "q/" + key))
                    del values[key]
                else:
                    room.store.down = False
                    values[key] = str(chance.randrange(10**6))
                    await room.put("q/" + key, values[key])
                expected.setdefault(key, []).append(f"{old}>{values.get(key, '-')}")
                room.store.down = chance.random() < 0.2
                room.bus.reachable = chance.random() > 0.2
                await room.clock.advance(chance.choice([0, 0, 0.1, 3]))
        room.store.down, room.bus.reachable = False, True
    async with room.publishing():
        await room.clock.advance(10)
    for key, changes in expected.items():
        assert [e.data.decode() for e in room.bus.events if f".{key}." in e.subject] == changes
