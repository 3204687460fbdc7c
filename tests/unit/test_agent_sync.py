"""The stream between an agent and a scheduler of another version: what one of them does not know ends nothing."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from tests.support.scheduler_world import World, node
from tests.support.virtual_time import LoopClock
from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Work
from whaleflux_agent.ray_readings import RayReadings
from whaleflux_agent.sync import SyncLoop

NODE = "sites/s/nodes/a"


class Scheduler:
    """The other end of the stream, which says at first what the test says."""

    def __init__(self, *says):
        self._says, self.heard = says, []

    def stream_stream(self, path, **_):
        return self._sync if path.endswith("/Sync") else None

    def unary_unary(self, path, **_):
        return None

    @contextlib.asynccontextmanager
    async def _sync(self, requests):
        async def listen():
            async for request in requests:
                self.heard.append(request.WhichOneof("message"))

        listening = asyncio.create_task(listen())
        try:
            yield self._answers()
        finally:
            listening.cancel()

    async def _answers(self):
        yield agent_pb2.SyncResponse(desired=agent_pb2.DesiredTasks())
        for response in self._says:
            yield response
        await asyncio.Event().wait()


async def heard_by(scheduler):
    """What it hears within a few seconds from an agent with a task that reads a Ray cluster."""

    async def desire(desired):
        pass

    supervisor = SimpleNamespace(reports=list, take_progress=list, with_logs=lambda *_: None, desire=desire)
    reports = SimpleNamespace(after=lambda _: [], on_change=None)
    ray = RayReadings(LoopClock())
    loop = SyncLoop(scheduler, NODE, "boot", supervisor, reports, LoopClock(), ray=ray)
    running = asyncio.create_task(loop.run())
    try:
        for _ in range(3):
            ray.report(Work("t", "queues/q/jobs/head", 1, ()), agent_pb2.ReportRayRequest(number=1, demand=b"x"))
            await asyncio.sleep(1.0)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return scheduler.heard


@pytest.mark.parametrize("takes_readings", [False, True])
async def test_readings_of_ray_go_to_schedulers_that_take_them(takes_readings):
    asks = [agent_pb2.SyncResponse(ray=agent_pb2.RayDecision())] if takes_readings else []
    assert ("ray" in await heard_by(Scheduler(*asks))) is takes_readings


async def test_a_scheduler_asks_for_readings_and_goes_on_when_it_hears_what_it_does_not_know():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        newer = agent_pb2.SyncRequest.FromString(b"\xf2\x3f\x02hi")  # field 1022
        agent.say(newer)
        job = await world.submit(1)
        await world.reaches(job, "RUNNING")
        assert agent.error is None
        agent.say(agent_pb2.SyncRequest())
        await asyncio.sleep(1.0)
        assert "is not set" in str(agent.error)
