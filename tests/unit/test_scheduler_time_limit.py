"""A job with a time limit ends when it has run for so long, all attempts together, whoever leads."""

import asyncio
from datetime import timedelta

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import scheduler_pb2 as pb

MINUTE = timedelta(minutes=1)


@pytest.fixture
async def world():
    async with World() as world:
        await world.add(node("a/n1"))
        yield world


async def test_it_ends_as_failed_without_a_retry_and_its_ranks_are_told_to_stop(world):
    name = await world.submit(2, time_limit=MINUTE)
    running = await world.reaches(name, "RUNNING")
    assert running.latest_end_time.ToDatetime() - running.start_time.ToDatetime() == MINUTE
    ended = await world.reaches(name, "FAILED", 120)
    assert ended.state_message == "its time_limit of 1m is over; raise it and submit again"
    assert ended.attempt.end_reason.startswith("time_limit:")
    assert (ended.epoch, ended.restarts) == (1, 0)  # in its epoch, so that a last save is still committed
    assert 60 <= ended.run_s < 61
    assert not ended.HasField("latest_end_time")
    [agent] = world.agents.values()
    await until(lambda: not agent.tasks, "its agent stops it")


async def test_what_earlier_attempts_ran_counts_and_what_it_waited_does_not(world):
    name = await world.submit(2, time_limit=MINUTE, retry={"backoff": timedelta(seconds=30)})
    await world.reaches(name, "RUNNING")
    [agent] = world.agents.values()
    await asyncio.sleep(40)
    agent.exit(1)
    await world.reaches(name, "QUEUED")
    running = await world.reaches(name, "RUNNING")
    assert 40 <= running.run_s < 41
    left = running.latest_end_time.ToDatetime() - running.attempt.run_time.ToDatetime()
    assert timedelta(seconds=19) < left <= timedelta(seconds=20)
    ended = await world.reaches(name, "FAILED", 30)
    assert 60 <= ended.run_s < 61


async def test_a_new_leader_goes_on_counting(world):
    name = await world.submit(2, time_limit=MINUTE)
    await world.reaches(name, "RUNNING")
    await asyncio.sleep(30)
    await world.stop()
    await asyncio.sleep(60)  # nobody leads when its time is over
    await world.start()
    ended = await world.reaches(name, "FAILED", 1)
    assert ended.attempt.end_reason.startswith("time_limit:")


async def test_a_limit_below_a_second_is_refused(world):
    with pytest.raises(InvalidArgument, match="time_limit"):
        await world.create(1, time_limit=timedelta(0))
    assert not world.service.jobs.cache.values
    assert pb.JobSpec.DESCRIPTOR.fields_by_name["time_limit"].number == 38  # for ever
