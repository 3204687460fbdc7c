"""The leader's wall clock jumps: nothing ends by a time that is not believed, and nobody waits for the time that a clock lost."""

from datetime import UTC, timedelta

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


@pytest.mark.parametrize("ahead", [DAY, -DAY])
async def test_a_clock_that_is_believed_in_the_end_counts_no_more_than_the_time_that_passed(world, ahead):
    """It stays wrong, or was wrong before: who began by the old time is neither ended by the new nor let run for longer."""
    limited = await world.submit(1, time_limit=Duration(seconds=1800))
    paid = await world.submit(1, budget_usd=20.0)
    for name in (limited, paid):
        await world.reaches(name, "RUNNING")
    world.clock.ahead = ahead
    await world.clock.sleep(BELIEVED_AFTER_S + 60.0)
    late = await world.submit(1, time_limit=Duration(seconds=600))
    await world.reaches(late, "RUNNING")
    made = (await world.job(late)).create_time.ToDatetime(UTC)
    assert abs(world.clock.now() - made) < timedelta(minutes=1), "the new time is believed"
    assert [(await world.job(name)).state for name in (limited, paid)] == [pb.JOB_STATE_RUNNING] * 2
    shown = await world.job(limited)
    assert abs(shown.latest_end_time.ToDatetime(UTC) - world.clock.now() - timedelta(seconds=1440)) < timedelta(
        minutes=1
    )
    assert 0.1 < (await world.job(paid)).cost_usd < 1.0
    await world.clock.sleep(1500.0)
    await world.reaches(limited, "FAILED")
    await world.reaches(late, "FAILED")
    assert "time_limit of 30m" in (await world.job(limited)).state_message
    assert (await world.job(paid)).state == pb.JOB_STATE_RUNNING


async def test_a_new_leader_whose_clock_is_a_day_ahead_of_its_agents_ends_nobody_by_it(world):
    [agent] = world.agents.values()
    limited = await world.submit(1, time_limit=Duration(seconds=1800))
    paid = await world.submit(1, budget_usd=20.0)
    for name in (limited, paid):
        await world.reaches(name, "RUNNING")
    await world.stop()
    world.clock.ahead = DAY
    await world.start()
    await agent.connect(clock_behind_s=DAY.total_seconds())
    await world.clock.sleep(400.0)
    assert [(await world.job(name)).state for name in (limited, paid)] == [pb.JOB_STATE_RUNNING] * 2
    await world.clock.sleep(1500.0)
    await world.reaches(limited, "FAILED")
    assert (await world.job(paid)).state == pb.JOB_STATE_RUNNING


async def test_a_time_that_was_up_when_nobody_led_is_up(world):
    """Agents bear out the new leader's clock; where none is there, it is believed after a minute."""
    limited = await world.submit(1, time_limit=Duration(seconds=600))
    await world.reaches(limited, "RUNNING")
    await world.stop()
    await world.clock.sleep(700.0)
    await world.restart()
    await world.reaches(limited, "FAILED", timeout_s=90.0)


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
