"""Job records that this version cannot read: a state of a newer one, a phase of a newer one, bytes that are no message.

Such a job is neither gone nor ended: its tasks go on, its GPUs stay its own, nothing is concluded from it, and it goes on by
itself once its record can be read again.
"""

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import AlreadyExists, StatusError
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert


@pytest.fixture
async def world():
    async with World() as made:
        yield made


def newer_state(message):
    message.state = 99
    return message.SerializeToString()


def newer_phase(message):
    message.attempt.tasks[0].phase = 99
    return message.SerializeToString()


def no_message(_):
    return b"\xff\xff\xff"


async def spoil(world, name, how):
    """Writes the record as `how` makes it; returns what was there and what is."""
    entry = await world.store.get(keys.of_name(keys.JOBS, name))
    message = pb.Job()
    message.CopyFrom(convert.JOBS.decode(entry).message)
    await world.store.commit(Put(entry.key, spoiled := how(message)))
    return entry.value, spoiled


@pytest.mark.parametrize("how", [newer_state, newer_phase, no_message])
@pytest.mark.parametrize("leader", ["same", "next"])
async def test_its_tasks_run_on_and_its_gpus_are_not_given_away(world, how, leader):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    (task,) = a.tasks
    good, _ = await spoil(world, name, how)
    other = await world.submit(4)
    if leader == "next":
        await world.restart()
    await world.caught_up()
    assert [line for line in a.history if "KILLED" in line] == []
    assert (await world.job(other)).state == pb.JOB_STATE_QUEUED
    assert await world.held_on(a.node) or await world.closed_reason(a.node)
    await world.store.commit(Put(keys.of_name(keys.JOBS, name), good))
    await world.caught_up()
    assert list(a.tasks) == [task] and "KILLED" not in " ".join(a.history)
    a.exit()
    await world.reaches(name, "SUCCEEDED")
    await world.reaches(other, "RUNNING")


@pytest.mark.parametrize("how", [newer_state, newer_phase, no_message])
async def test_what_its_agent_reports_meanwhile_counts_when_it_can_be_read_again(world, how):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    good, spoiled = await spoil(world, name, how)
    await world.caught_up()
    a.exit()
    await until(lambda: a.heard, "the report arrived")
    await world.caught_up()
    kept = (await world.store.get(keys.of_name(keys.JOBS, name))).value
    assert kept == spoiled, "nothing is written over what cannot be read"
    await world.store.commit(Put(keys.of_name(keys.JOBS, name), good))
    await world.reaches(name, "SUCCEEDED")


async def test_it_is_shown_and_cannot_be_changed(world):
    await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    await spoil(world, name, no_message)
    await world.caught_up()
    (shown,) = (await world.scheduler.ListJobs(pb.ListJobsRequest(), None)).jobs
    assert shown.name == name
    assert "cannot be read" in shown.state_message
    with pytest.raises(StatusError):
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)


async def test_its_name_is_taken(world):
    name = await world.submit(1, job_id="mine")
    await spoil(world, name, no_message)
    with pytest.raises(AlreadyExists):
        await world.submit(1, job_id="mine")


async def test_a_job_of_which_nothing_is_known_is_named_beside_what_is_held(world):
    await world.add(node("s/a"))
    known, lost = await world.submit(2), await world.submit(1)
    for name in (known, lost):
        await world.reaches(name, "RUNNING")
    await spoil(world, known, newer_state)
    await spoil(world, lost, no_message)
    await world.caught_up()
    await world.restart()
    await world.caught_up()
    listed = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
    assert ([held.job for held in listed.allocations], list(listed.unreadable)) == ([known], [lost])


async def test_an_intent_or_a_phase_of_a_newer_version_closes_the_node_and_ends_nothing(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    world.phase(a.node, 99)
    await world.caught_up()
    assert "99" in await world.closed_reason(a.node)
    world.intend(a.node, 98)
    await world.caught_up()
    assert "98" in await world.closed_reason(a.node)
    assert (await world.job(name)).state == pb.JOB_STATE_RUNNING
    world.intend(a.node, inventory_pb2.NODE_INTENT_ACTIVE)
