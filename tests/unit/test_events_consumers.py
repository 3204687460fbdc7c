"""What the memory bus models, and how stream links are followed."""

import asyncio

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.stream_links import StreamLinks


class TestMemoryBus:
    async def test_ids_are_compared_for_the_window_only(self):
        clock = VirtualClock()
        bus = MemoryBus(clock, duplicate_window_s=600)
        await bus.publish("wf.v1.a.b.c.d", b"", id="1")
        await clock.advance(599)
        assert (await bus.publish("wf.v1.a.b.c.d", b"", id="1")).duplicate
        await clock.advance(1)
        assert not (await bus.publish("wf.v1.a.b.c.d", b"", id="1")).duplicate

    async def test_the_stream_is_bounded_and_old_events_go_first(self):
        bus = MemoryBus(VirtualClock(), max_events=3)
        for n in range(5):
            await bus.publish("wf.v1.a.b.c.d", b"%d" % n, id=str(n))
        assert [e.data for e in bus.events] == [b"2", b"3", b"4"]
        async with bus.subscribe(["wf.v1.>"], durable="d") as news:
            assert (await anext(news)).data == b"2"

    async def test_redelivery_follows_the_clock(self):
        clock = VirtualClock()
        bus = MemoryBus(clock)
        await bus.publish("wf.v1.a.b.c.d", b"", id="1")
        async with bus.subscribe(["wf.v1.>"], durable="d", ack_wait_s=10) as news:
            await anext(news)
            again = asyncio.create_task(anext(news))
            await clock.advance(9.9)
            assert not again.done()
            await clock.advance(0.2)
            assert (await again).attempt == 2

    async def test_an_unreachable_bus_refuses_and_delivers_nothing(self):
        bus = MemoryBus(VirtualClock())
        await bus.publish("wf.v1.a.b.c.d", b"", id="1")
        bus.reachable = False
        with pytest.raises(Unavailable) as refused:
            await bus.publish("wf.v1.a.b.c.d", b"", id="2")
        assert refused.value.reason == "BUS_UNAVAILABLE"
        async with bus.subscribe(["wf.v1.>"], durable="d") as news:
            waiting = asyncio.create_task(anext(news))
            await bus.clock.advance(100)
            assert not waiting.done()
            bus.reachable = True
            assert (await waiting).id == "1"


class Links:
    """Servers as `StreamLinks` sees them; notes every nudge."""

    def __init__(self):
        self.up, self.applied, self.nudged, self.broken = {"a", "b"}, {}, [], False

    async def reaches(self, api):
        return api.split(".")[1] in self.up

    async def apply(self, spec, *, api=""):
        if self.broken or (api.startswith("$JS.") and api.split(".")[1] not in self.up):
            raise Unavailable("away")
        self.applied[api, spec.name] = spec

    async def nudge(self, spec, *, api=""):
        await self.apply(spec.without_sources(), api=api)
        await self.apply(spec, api=api)
        self.nudged.append(api)


class TestStreamLinks:
    async def test_a_link_that_came_back_is_nudged_once(self):
        links = Links()
        stream_links = StreamLinks(links, ["a", "b"], clock=VirtualClock())
        await stream_links.look()
        assert stream_links.linked == {"a", "b"}
        assert links.nudged == ["taken.a.API", "taken.b.API"]
        assert set(links.applied) == {
            ("", "EVENTS"), ("", "ACCOUNTING"), ("", "AUDIT"), ("", "USAGE"), ("taken.a.API", "TAKEN-a"), ("taken.b.API", "TAKEN-b"),
            ("$JS.a.API", "EVENTS"), ("$JS.b.API", "EVENTS"),
        }  # fmt: skip
        links.nudged.clear()
        links.up.remove("a")
        await stream_links.look()
        assert stream_links.linked == {"b"}
        assert links.nudged == []
        links.up.add("a")
        await stream_links.look()
        await stream_links.look()
        assert links.nudged == ["taken.a.API"]

    async def test_a_new_site_is_taken_from(self):
        links = Links()
        stream_links = StreamLinks(links, ["a"], clock=VirtualClock())
        await stream_links.look()
        stream_links.set_sites(["a", "b"])
        await stream_links.look()
        assert [s.site for s in links.applied["", "EVENTS"].sources] == ["a", "b"]

    async def test_a_nudge_that_broke_in_the_middle_is_mended_at_the_next_look(self):
        links = Links()
        stream_links = StreamLinks(links, ["a"], clock=VirtualClock())
        await stream_links.look()
        links.up.clear()
        await stream_links.look()
        links.up.add("a")
        apply = links.apply

        async def breaks_after_taking_the_source_out(spec, *, api=""):
            if spec.name == "TAKEN-a" and spec.sources:
                raise Unavailable("the hub crashed")
            await apply(spec, api=api)

        links.apply = breaks_after_taking_the_source_out
        await stream_links.look()
        assert links.applied["taken.a.API", "TAKEN-a"].sources == ()
        assert stream_links.linked == set()
        links.apply = apply
        links.up.clear()  # even when the site cannot be reached
        await stream_links.look()
        assert [s.site for s in links.applied["taken.a.API", "TAKEN-a"].sources] == ["a"]

    async def test_it_looks_each_second_and_waits_out_a_hub_that_is_away(self):
        links, clock = Links(), VirtualClock()
        links.broken = True
        stream_links = StreamLinks(links, ["a"], clock=clock)
        task = asyncio.create_task(stream_links.run())
        await clock.advance(5)
        assert stream_links.linked == set()
        links.broken = False
        await clock.advance(1)
        assert stream_links.linked == {"a"}
        task.cancel()
