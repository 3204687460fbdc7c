"""Which ended jobs are deleted, and at what cost."""

import asyncio

from tests.support.scheduler_world import World, node, until
from tests.support.virtual_time import LoopClock
from whaleflux.errors import Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.store import keys
from whaleflux.store.api import Delete
from whaleflux.v1 import scheduler_pb2 as pb


async def cancel(world, name):
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)


async def kept(world):
    return {entry.key.rpartition("/")[2] for entry in (await world.store.list(keys.JOBS)).entries}


async def test_old_jobs_that_still_hold_gpus_do_not_keep_others_from_being_deleted(monkeypatch):
    monkeypatch.setattr("whaleflux_scheduler.housekeeping.DELETE_AT_ONCE", 2)
    async with World(keep_ended=1) as world:
        (agent,) = await world.add(node("s/a"))
        agent.slow_to_die = True
        for name in ("h1", "h2"):
            await world.reaches(await world.submit(1, job_id=name), "RUNNING")
        for name in ("h1", "h2"):
            await cancel(world, f"queues/default/jobs/{name}")
        for n in range(6):
            await cancel(world, await world.submit(1, job_id=f"j{n}", gpu={"any_of": ["none"]}))

        async def few():
            left = await kept(world)
            return {"h1", "h2"} <= left and len(left) <= 4

        await until(few, "the ended jobs that hold nothing are deleted")
        assert "j5" in await kept(world)


async def test_many_are_deleted_in_few_transactions():
    async with World(keep_ended=0) as world:
        commit, deletions = world.store.commit, 0

        async def counting(*writes, when=()):
            nonlocal deletions
            deletions += any(isinstance(write, Delete) and write.key.startswith(keys.JOBS) for write in writes)
            await asyncio.sleep(0)  # as a store that is asked through a socket
            return await commit(*writes, when=when)

        world.store.commit = counting
        for _ in range(50):
            await cancel(world, await world.submit(1))

        async def none():
            return not await kept(world)

        await until(none, "all are deleted")
        assert deletions <= 5, f"50 deletions travel together, not in {deletions} transactions"


async def test_a_store_that_is_busy_delays_it_and_does_not_end_the_leadership():
    async with World(keep_ended=0) as world:
        commit, refusals, leader = world.store.commit, [3], world.service.leader_session.current

        async def busy(*writes, when=()):
            if refusals[0] and any(isinstance(write, Delete) and write.key.startswith(keys.JOBS) for write in writes):
                refusals[0] -= 1
                raise Unavailable("etcd: etcdserver: too many requests", reason="STORE_BUSY")
            return await commit(*writes, when=when)

        world.store.commit = busy
        for _ in range(50):
            await cancel(world, await world.submit(1))

        async def none():
            return not await kept(world)

        await until(none, "all are deleted")
        assert refusals == [0]
        assert world.service.leader_session.current is leader


async def test_a_job_is_deleted_when_its_end_is_published_and_not_before():
    async with World(keep_ended=0, bus=MemoryBus(LoopClock())) as world:
        world.bus.reachable = False
        for n in range(50):
            await cancel(world, await world.submit(1, job_id=f"j{n}"))
        await asyncio.sleep(600)
        assert len(await kept(world)) == 50
        world.bus.reachable = True

        async def none():
            return not await kept(world)

        await until(none, "all are deleted")
        request = pb.ListJobHistoryRequest(page_size=100)
        assert len((await world.scheduler.ListJobHistory(request, None)).records) == 50


async def test_a_bus_that_stays_away_does_not_fill_the_store(monkeypatch):
    monkeypatch.setattr("whaleflux_scheduler.housekeeping.MOST_UNTOLD", 60, raising=False)
    async with World(keep_ended=0, bus=MemoryBus(LoopClock())) as world:
        world.bus.reachable = False
        for n in range(100):
            await cancel(world, await world.submit(1, job_id=f"j{n}"))
        await asyncio.sleep(600)
        assert len(await kept(world)) < 60
