"""What happened, as it is read: EventService over the model of the bus, and the stories that owners tell into it."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.acting import AsAdmin
from tests.support.scheduler_world import World, node, until
from tests.support.virtual_time import LoopClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.subjects import Subject
from whaleflux.rpc import auth
from whaleflux.v1 import events_pb2 as pb
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as sched
from whaleflux_inventory.event_history import EventHistory

NOW = datetime(2026, 5, 1, tzinfo=UTC)
J, N = "queues/q/jobs/j", "sites/a/nodes/n1"


def history_of(bus):
    return AsAdmin(EventHistory(bus))


async def tell(bus, number, resource=J, what="RUNNING", at=None):
    event = pb.Event(id=f"{resource}{number}", resource=resource, what=what, message=f"{number}")
    event.time.FromDatetime(at or bus.clock.now())
    await bus.publish(str(Subject.of(resource, what)), event.SerializeToString(), id=event.id)


async def all_pages(history, **asked):
    found, token = [], ""
    while True:
        answer = await history.ListEvents(pb.ListEventsRequest(page_token=token, **asked), None)
        found += answer.events
        token = answer.next_page_token
        if not token:
            return found


def said(events):
    return [int(event.message) for event in events]


async def test_pages_newest_or_oldest_first_hold_everything_once():
    bus = MemoryBus(LoopClock())
    for n in range(30):
        await tell(bus, n, N if n % 3 == 0 else J)
    history = history_of(bus)
    assert said(await all_pages(history, page_size=7)) == list(range(29, -1, -1))
    assert said(await all_pages(history, page_size=7, oldest_first=True)) == list(range(30))
    assert said(await all_pages(history, page_size=4, filter=pb.EventFilter(resource=N))) == list(range(27, -1, -3))
    assert said(await all_pages(history, filter=pb.EventFilter(kinds=["node"]), oldest_first=True)) == list(
        range(0, 30, 3)
    )


async def test_times_are_those_at_which_it_happened_and_not_of_the_telling():
    clock = LoopClock()
    bus = MemoryBus(clock)
    start = clock.now()
    for n, happened_h in enumerate((0, 1, 2)):
        await tell(bus, n, at=start + timedelta(hours=happened_h, seconds=2))  # by a clock that is ahead
        await asyncio.sleep(3600)
    await tell(bus, 3, at=start + timedelta(minutes=30))  # late: the bus was away
    between = pb.EventFilter()
    between.since.FromDatetime(start + timedelta(minutes=10))
    between.until.FromDatetime(start + timedelta(minutes=90))
    for oldest_first in (False, True):
        found = await all_pages(history_of(bus), filter=between, oldest_first=oldest_first)
        assert sorted(said(found)) == [1, 3]


async def test_what_does_not_match_is_searched_in_bounded_steps(monkeypatch):
    monkeypatch.setattr("whaleflux_inventory.event_history.READ_AT_ONCE", 10)
    bus = MemoryBus(LoopClock())
    for n in range(100):
        await tell(bus, n, what="PREEMPTED" if n in (3, 97) else "RUNNING")
    history = history_of(bus)
    only = pb.EventFilter(what=["PREEMPTED"])
    first = await history.ListEvents(pb.ListEventsRequest(filter=only), None)
    assert (said(first.events), bool(first.next_page_token)) == ([97], True)
    assert said(await all_pages(history, filter=only)) == [97, 3]
    assert said(await all_pages(history, filter=only, oldest_first=True)) == [3, 97]


async def test_a_bus_that_is_away_is_no_empty_history():
    bus = MemoryBus(LoopClock())
    bus.reachable = False
    for history in (history_of(bus), history_of(None)):
        with pytest.raises(Unavailable):
            await history.ListEvents(pb.ListEventsRequest(), None)


@pytest.mark.parametrize(
    "wrong",
    [{"kinds": ["pod"]}, {"resource": "jobs/x"}, {"resource": "queues/Q/jobs/j"}, {"what": ["x"] * 33}, {"until": {}, "since": {"seconds": 1}}],
)  # fmt: skip
async def test_wrong_questions_are_refused(wrong):
    with pytest.raises(InvalidArgument) as refused:
        await history_of(MemoryBus(LoopClock())).ListEvents(pb.ListEventsRequest(filter=wrong), None)
    assert refused.value.violations[0].field.startswith("filter.")


async def test_a_watch_goes_on_behind_what_was_listed():
    bus = MemoryBus(LoopClock())
    history = history_of(bus)
    await tell(bus, 0)
    listed = await history.ListEvents(pb.ListEventsRequest(), None)
    await tell(bus, 1)
    await tell(bus, 2, N)
    asked = pb.WatchEventsRequest(filter=pb.EventFilter(resource=J), after_sequence=listed.last_sequence)
    async with contextlib.aclosing(history.WatchEvents(asked, None)) as answers:
        first = (await anext(answers)).event
        later = asyncio.create_task(anext(answers))
        await asyncio.sleep(1)
        await tell(bus, 3)
        assert said([first, (await later).event]) == [1, 3]
        assert first.sequence == 2


async def story(world, name):
    """What is told of a job, oldest first."""
    found = await all_pages(history_of(world.bus), filter=pb.EventFilter(resource=name), oldest_first=True)
    return [(event.what, event.cause.actor) for event in found], found


async def test_each_step_of_a_job_is_told_with_its_time_and_who_decided():
    async with World(bus=MemoryBus(LoopClock())) as world:
        (a, _) = await world.add(node("s/a"), node("s/b"))
        low = await world.submit(8, job_id="low")
        await world.reaches(low, "RUNNING")
        await asyncio.sleep(60)
        a.exit(code=3, task="default.low.1.0", message="boom")
        await world.reaches(low, "QUEUED")
        high = await world.submit(8, job_id="high", priority=10)
        await world.reaches(high, "RUNNING")
        with auth.acting_as(auth.Identity("operator", "bob")):
            await world.scheduler.HoldJob(sched.HoldJobRequest(name=low, reason="later"), None)
            await world.scheduler.CancelJob(sched.CancelJobRequest(name=high, reason="wrong data"), None)
            await world.scheduler.CancelJob(sched.CancelJobRequest(name=low), None)
            await until(lambda: not any(agent.reports for agent in world.agents.values()), "nothing is left")
            await world.caught_up()
            await world.scheduler.DeleteJob(sched.DeleteJobRequest(name=low), None)
        await asyncio.sleep(5)
        steps, events = await story(world, low)
        assert steps == [
            ("QUEUED", "user/ada"),
            ("STARTING", "scheduler/placement"),
            ("RUNNING", "scheduler/start"),
            ("RECOVERING", "scheduler/exit"),
            ("QUEUED", "scheduler/retry"),
            ("HELD", "operator/bob"),
            ("CANCELLED", "operator/bob"),
            ("DELETED", "operator/bob"),
        ]
        recovering = events[3]
        assert (recovering.attributes["exit_code"], recovering.attributes["attempt"]) == ("3", "1")
        assert recovering.time.seconds - events[2].time.seconds >= 59
        assert [e.time.ToNanoseconds() for e in events] == sorted(e.time.ToNanoseconds() for e in events)
        (cancelled,) = [e for e in (await story(world, high))[1] if e.what == "CANCELLED"]
        assert (cancelled.cause.message, cancelled.cause.actor) == ("wrong data", "operator/bob")


async def test_news_that_come_late_bear_the_time_at_which_it_happened():
    async with World(bus=MemoryBus(LoopClock())) as world:
        await world.add(node("s/a"))
        world.bus.reachable = False
        name = await world.submit(1)
        running = await world.reaches(name, "RUNNING")
        await asyncio.sleep(600)
        world.bus.reachable = True
        await asyncio.sleep(10)
        steps, events = await story(world, name)
        assert [what for what, _ in steps] == ["QUEUED", "STARTING", "RUNNING"]
        assert events[0].time == running.create_time
        assert events[2].time.seconds - running.attempt.run_time.seconds <= 1
        assert all(e.publish_time.seconds - e.time.seconds > 500 for e in events[1:])


async def test_who_is_stopped_for_whom_and_who_drains_is_told():
    async with World(bus=MemoryBus(LoopClock())) as world:
        await world.add(node("s/a"))
        low = await world.submit(4, job_id="low")
        await world.reaches(low, "RUNNING")
        high = await world.submit(4, job_id="high", priority=10)
        await world.reaches(high, "RUNNING")
        await world.add(node("s/b"))
        world.intend("sites/s/nodes/a", inventory_pb2.NODE_INTENT_DRAINING, "new disks")
        await world.reaches(high, "RUNNING")
        await asyncio.sleep(30)
        _, events = await story(world, low)
        stopped, *_ = [e for e in events if e.what == "SUSPENDING"]
        assert (stopped.cause.resource, stopped.cause.actor) == (high, "scheduler/preemption")
        (moved,) = [e for e in (await story(world, high))[1] if e.what == "RECOVERING"]
        assert (moved.cause.actor, "new disks" in moved.message) == ("scheduler/drain", True)
