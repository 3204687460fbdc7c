"""Hold, release, requeue and another priority: each once, under the job's revision, whatever its state."""

import asyncio
from datetime import timedelta

import pytest

from tests.support.scheduler_world import USER, World, node, until
from whaleflux.errors import Aborted, FailedPrecondition, InvalidArgument
from whaleflux.rpc import auth
from whaleflux.v1 import scheduler_pb2 as pb


@pytest.fixture
async def world():
    async with World() as world:
        await world.add(node("a/n1"))
        yield world


async def call(world, verb, name, **more):
    with auth.acting_as(USER):
        request = getattr(pb, f"{verb}JobRequest" if verb != "SetJobPriority" else "SetJobPriorityRequest")
        method = getattr(world.scheduler, verb if verb == "SetJobPriority" else f"{verb}Job")
        return await method(request(name=name, **more), None)


async def test_what_is_held_waits_until_it_is_released(world):
    full = await world.submit(4)
    waiting = await world.submit(4)
    held = await call(world, "Hold", waiting, reason="wait for Bob")
    assert (held.hold.by, held.hold.reason, held.state) == ("user/ada", "wait for Bob", pb.JOB_STATE_QUEUED)
    assert (await call(world, "Hold", waiting)).etag == held.etag  # once is enough
    await call(world, "Cancel", full)
    await world.caught_up()
    shown = await world.job(waiting)
    assert shown.state_message == "waits: held by user/ada: wait for Bob"
    explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=waiting), None)
    assert explained.decision.smallest_change == f"whaleflux release {waiting}"
    await world.restart()
    await world.caught_up()
    assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
    released = await call(world, "Release", waiting)
    assert not released.HasField("hold")
    await world.reaches(waiting, "RUNNING")


async def test_a_running_job_is_not_held_and_the_way_is_named(world):
    name = await world.submit(1)
    await world.reaches(name, "RUNNING")
    with pytest.raises(FailedPrecondition, match=f"whaleflux requeue --hold {name}"):
        await call(world, "Hold", name)


async def test_what_makes_others_stop_gives_that_up_when_it_is_held(world):
    [agent] = world.agents.values()
    agent.slow_to_die = True
    low = await world.submit(4)
    await world.reaches(low, "RUNNING")
    high = await world.submit(4, priority=10)
    await world.reaches(low, "SUSPENDING")
    assert (await world.job(high)).HasField("claim")
    assert not (await call(world, "Hold", high)).HasField("claim")
    agent.exit()
    await world.reaches(low, "RUNNING")


async def test_a_requeued_job_stops_with_its_grace_in_its_epoch_and_starts_again(world):
    [agent] = world.agents.values()
    name = await world.submit(2, stop_grace=timedelta(seconds=30))
    await world.reaches(name, "RUNNING")
    agent.slow_to_die = True
    stopping = await call(world, "Requeue", name, reason="new data")
    assert (stopping.state, stopping.epoch) == (pb.JOB_STATE_SUSPENDING, 1)  # what it saves now is committed
    assert stopping.state_message == "requeued by user/ada: new data"
    assert stopping.attempt.end_reason == "requeued: requeued by user/ada: new data"
    assert (await call(world, "Requeue", name)).etag == stopping.etag
    await until(lambda: not agent.tasks, "its agent stops it")
    for task in list(agent.reports):
        agent.report(task, pb.TASK_PHASE_KILLED, -15)
    agent.slow_to_die = False
    again = await world.reaches(name, "RUNNING")
    assert (again.epoch, again.restarts, again.recoveries) == (2, 0, 0)


async def test_requeue_with_hold_waits_for_its_release(world):
    name = await world.submit(2)
    await world.reaches(name, "RUNNING")
    await call(world, "Requeue", name, hold=True)
    queued = await world.reaches(name, "QUEUED")
    assert queued.hold.by == "user/ada"
    await world.caught_up()
    assert not await world.held()
    await call(world, "Release", name)
    await world.reaches(name, "RUNNING")


async def test_a_job_that_starts_is_requeued_too_and_its_fence_moves_with_it(world):
    [agent] = world.agents.values()
    agent.obey = False
    name = await world.submit(2)
    await world.reaches(name, "STARTING")
    after = await call(world, "Requeue", name, hold=True)
    assert (after.state, after.epoch) == (pb.JOB_STATE_RECOVERING, 2)
    assert (await world.store.get("/whaleflux/v1/fences/jobs/" + "/".join(name.split("/")[1::2]))).value == b"2"
    queued = await world.reaches(name, "QUEUED")
    assert queued.hold.by and not world.health.asked  # nothing failed
    assert (queued.restarts, queued.recoveries) == (0, 0)


async def test_hold_while_it_recovers_keeps_it_in_the_queue(world):
    [agent] = world.agents.values()
    name = await world.submit(2)
    await world.reaches(name, "RUNNING")
    asked, world.health.answer = world.health.answer, None  # no answer yet
    agent.exit(1)
    await world.reaches(name, "RECOVERING")
    await call(world, "Hold", name)
    world.health.answer = asked
    await world.restart()
    queued = await world.reaches(name, "QUEUED")
    assert queued.hold.by == "user/ada"


async def test_a_higher_priority_goes_first_at_once(world):
    full = await world.submit(4, priority=90)
    first, second = await world.submit(4), await world.submit(4)
    await world.reaches(full, "RUNNING")
    changed = await call(world, "SetJobPriority", second, priority=5)
    assert (changed.priority, changed.spec.priority) == (5, 0)  # what was asked for stays known
    await call(world, "Cancel", full)
    await world.reaches(second, "RUNNING")
    assert (await world.job(first)).state == pb.JOB_STATE_QUEUED
    await call(world, "SetJobPriority", first, priority=6)
    await world.reaches(first, "RUNNING")
    assert (await world.job(second)).state == pb.JOB_STATE_QUEUED  # it made room


async def test_a_lower_priority_of_what_runs_lets_others_have_it_stopped(world):
    running = await world.submit(4, priority=9)
    await world.reaches(running, "RUNNING")
    waiting = await world.submit(4, priority=5)
    await world.caught_up()
    assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
    await call(world, "SetJobPriority", running, priority=1)
    await world.reaches(waiting, "RUNNING")


@pytest.mark.parametrize(
    ("verb", "more"), [("Hold", {}), ("Release", {}), ("Requeue", {}), ("SetJobPriority", {"priority": 3})]
)
async def test_ended_jobs_and_old_etags_are_refused_and_nothing_changes(world, verb, more):
    name = await world.submit(4)
    with pytest.raises(Aborted):
        await call(world, verb, name, etag='"1"', **more)
    await call(world, "Cancel", name)
    before = (await world.job(name)).etag
    with pytest.raises(FailedPrecondition, match="has ended") as refused:
        await call(world, verb, name, **more)
    assert ("--replace" in str(refused.value)) == (verb == "Requeue")
    assert (await world.job(name)).etag == before


async def test_a_priority_out_of_range_is_refused(world):
    name = await world.submit(4)
    for wrong in (-1, 1001):
        with pytest.raises(InvalidArgument, match="priority"):
            await call(world, "SetJobPriority", name, priority=wrong)


async def test_two_verbs_at_once_both_hold(world):
    blocker = await world.submit(4)
    name = await world.submit(4)
    await asyncio.gather(call(world, "Hold", name), call(world, "SetJobPriority", name, priority=7))
    both = await world.job(name)
    assert (both.hold.by, both.priority) == ("user/ada", 7)
    assert (await world.job(blocker)).spec.priority == 0
