"""What consumers remember, what the memory bus models, and how the backbone follows its links."""

import asyncio

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Invalid, Unavailable
from whaleflux.events import LastSeen
from whaleflux.events.backbone import Backbone
from whaleflux.events.memory import MemoryBus


class TestLastSeen:
    def test_repeats_and_late_old_ones_are_no_news(self):
        seen = LastSeen()
        assert seen.is_news("a", 0)
        assert seen.note("a", 5)
        assert not seen.note("a", 5)
        assert not seen.note("a", 4)
        assert seen.is_news("a", 6)
        assert seen.is_news("b", 1)

    def test_asking_does_not_remember(self):
        seen = LastSeen()
        assert seen.is_news("a", 1)
        assert seen.is_news("a", 1)

    def test_the_key_not_touched_for_longest_is_forgotten(self):
        seen = LastSeen(capacity=2)
        for key in ("a", "b", "a", "c"):
            seen.note(key, 1)
        assert len(seen) == 2
        assert seen.is_news("b", 1)
        assert not seen.is_news("a", 1)

    def test_a_forgotten_key_is_news_again(self):
        seen = LastSeen()
        seen.note("a", 1)
        seen.forget("a")
        assert seen.is_news("a", 1)

    def test_no_room_is_refused(self):
        with pytest.raises(Invalid):
            LastSeen(0)


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
    """Servers as the backbone sees them; notes every nudge."""

    def __init__(self):
        self.up, self.applied, self.nudged, self.broken = {"a", "b"}, {}, [], False

    async def reaches(self, domain):
        return domain in self.up

    async def apply(self, spec, *, domain=None):
        if self.broken or (domain and domain not in self.up):
            raise Unavailable("away")
        self.applied[domain, spec.name] = spec

    async def nudge(self, spec, source, *, domain=None):
        await self.apply(spec.without(source), domain=domain)
        await self.apply(spec, domain=domain)
        self.nudged.append((domain, source))


class TestBackbone:
    async def test_both_ends_of_a_link_that_came_back_are_nudged_once(self):
        links = Links()
        backbone = Backbone(links, ["a", "b"], clock=VirtualClock())
        await backbone.look()
        assert backbone.linked == {"a", "b"}
        assert links.nudged == [("a", "hub"), (None, "a"), ("b", "hub"), (None, "b")]
        links.nudged.clear()
        links.up.remove("a")
        await backbone.look()
        assert backbone.linked == {"b"}
        assert links.nudged == []
        links.up.add("a")
        await backbone.look()
        await backbone.look()
        assert links.nudged == [("a", "hub"), (None, "a")]

    async def test_a_new_site_is_heard_by_all(self):
        links = Links()
        backbone = Backbone(links, ["a"], clock=VirtualClock())
        await backbone.look()
        backbone.set_sites(["a", "b"])
        await backbone.look()
        assert [s.domain for s in links.applied[None, "EVENTS"].sources] == ["a", "b"]
        assert "wf.v1.b.>" in {s.subjects for s in links.applied["a", "HEARD"].sources}

    async def test_a_nudge_that_broke_in_the_middle_is_mended_at_the_next_look(self):
        links = Links()
        backbone = Backbone(links, ["a"], clock=VirtualClock())
        await backbone.look()
        links.up.clear()
        await backbone.look()
        links.up.add("a")
        apply, calls = links.apply, []

        async def breaks_after_taking_the_source_out(spec, *, domain=None):
            calls.append(domain)
            if domain is None and not spec.without("a").sources == spec.sources:
                raise Unavailable("the hub crashed")
            await apply(spec, domain=domain)

        links.apply = breaks_after_taking_the_source_out
        await backbone.look()
        assert links.applied[None, "EVENTS"].sources == ()
        assert backbone.linked == set()
        links.apply = apply
        links.up.clear()  # even when the site cannot be reached
        await backbone.look()
        assert [s.domain for s in links.applied[None, "EVENTS"].sources] == ["a"]

    async def test_it_looks_each_second_and_waits_out_a_hub_that_is_away(self):
        links, clock = Links(), VirtualClock()
        links.broken = True
        backbone = Backbone(links, ["a"], clock=clock)
        task = asyncio.create_task(backbone.run())
        await clock.advance(5)
        assert backbone.linked == set()
        links.broken = False
        await clock.advance(1)
        assert backbone.linked == {"a"}
        task.cancel()
