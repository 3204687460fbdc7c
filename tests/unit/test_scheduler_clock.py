"""The leader's wall clock jumps: nothing ends by a time that is not believed, and nobody waits for the time that a clock lost."""

from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration

from tests.support.scheduler_world import World, node
from tests.support.virtual_time import LoopClock
from whaleflux.rpc import auth
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.steady_time import BELIEVED_AFTER_S

USER = auth.Identity("user", "ada")
DAY = timedelta(days=1)


class Jumping(LoopClock):
    """The loop's time, with a wall clock that is set."""

    ahead = timedelta()

    def now(self):
        return super().now() + self.ahead


@pytest.fixture
async def world():
    async with World(clock=Jumping()) as world:
        await world.add(node("a/n1"))
        yield world


async def requeue(world, name):
    with auth.acting_as(USER):
        await world.scheduler.RequeueJob(pb.RequeueJobRequest(name=name), None)


async def test_a_clock_that_is_ahead_for_a_while_ends_no_job(world):
    """Neither its time limit nor its budget counts the day that never was; what is said of it does not either."""
    limited = await world.submit(1, time_limit=Duration(seconds=1800))
    paid = await world.submit(1, budget_usd=20.0)
    for name in (limited, paid):
        await world.reaches(name, "RUNNING")
    world.clock.ahead = DAY
    other = await world.submit(1)
    await world.reaches(other, "RUNNING")
    await world.clock.sleep(120.0)
    assert (await world.job(paid)).cost_usd < 1.0
    world.clock.ahead = timedelta()
    await world.clock.sleep(120.0)
    assert [(await world.job(name)).state for name in (limited, paid)] == [pb.JOB_STATE_RUNNING] * 2
    await world.clock.sleep(1600.0)
    await world.reaches(limited, "FAILED")


@pytest.mark.parametrize("after_s", [-1.0, BELIEVED_AFTER_S - 5.0])
async def test_a_clock_that_is_set_back_keeps_nobody_waiting(world, after_s):
    """A task that does not say that it ended is given up after its grace, though the clock is set back meanwhile, or believed to be."""
    [agent] = world.agents.values()
    agent.slow_to_die, name = True, await world.submit(4)
    await world.reaches(name, "RUNNING")
    if after_s < 0:
        await requeue(world, name)
        await world.reaches(name, "SUSPENDING")
        await world.clock.sleep(5.0)
    world.clock.ahead = -DAY
    await world.submit(1)  # somebody looks at the time
    await world.caught_up()
    if after_s > 0:
        await world.clock.sleep(after_s)
        await requeue(world, name)
    await world.clock.sleep(60.0)
    assert (await world.job(name)).state != pb.JOB_STATE_SUSPENDING


async def test_what_pauses_after_a_failure_does_not_wait_for_the_day_that_a_clock_was_ahead(world):
    """The last leader's clock was a day ahead: its record says to pause until tomorrow."""
    [agent] = world.agents.values()
    name = await world.submit(1, retry={"max_restarts": 3, "backoff": {"seconds": 120}})
    await world.reaches(name, "RUNNING")
    await world.stop()
    world.clock.ahead = DAY
    await world.restart()
    agent.exit(1)
    await world.reaches(name, "QUEUED")
    await world.stop()
    world.clock.ahead = timedelta()
    await world.restart()
    await world.reaches(name, "RUNNING", timeout_s=180.0)
