"""Names of jobs: given ones that come again, made ones that never do, and requests that are delivered twice."""

import asyncio

import pytest

from tests.support.scheduler_world import World, node
from tests.support.virtual_time import LoopClock
from whaleflux import names
from whaleflux.errors import AlreadyExists, InvalidArgument, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Put, Unknown
from whaleflux.store.cache import Cache
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.convert import QUEUES
from whaleflux_scheduler.job_access import JobAccess
from whaleflux_scheduler.job_secrets import JobSecrets
from whaleflux_scheduler.submit import Submissions


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def run_and_delete(world, agent, **more):
    name = await world.submit(1, **more)
    await world.reaches(name, "RUNNING")
    agent.exit()
    await world.reaches(name, "SUCCEEDED")
    await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
    return name


@pytest.mark.parametrize("length", [1, 25, 26, 27, 63])
async def test_the_epochs_of_a_given_name_go_on_whatever_its_length(world, length):
    (agent,) = await world.add(node("s/a"))
    name = await run_and_delete(world, agent, job_id="x" * length)
    again = await world.submit(1, job_id="x" * length)
    assert again == name
    assert (await world.reaches(name, "RUNNING")).epoch == 2
    (task,) = agent.tasks.values()
    assert task.epoch == 2, "the agent remembers epoch 1 of this name and refuses it"


async def test_a_made_name_leaves_nothing_behind(world):
    (agent,) = await world.add(node("s/a"))
    await run_and_delete(world, agent)
    await run_and_delete(world, agent, request_id="r-1")
    for prefix in (keys.JOBS, keys.JOB_FENCES, keys.JOB_REQUESTS):
        assert (await world.store.list(prefix)).entries == ()


async def test_a_made_name_cannot_be_given(world):
    name = await world.submit(1)
    with pytest.raises(InvalidArgument) as refused:
        await world.submit(1, job_id=names.split(name, "queues", "jobs")[1])
    assert refused.value.violations[0].field == "job_id"
    assert names.is_ulid(names.ulid(0.0))
    assert names.is_ulid(names.ulid(2e9))


def job():
    return pb.Job(name=names.job("default", names.ulid()), spec=pb.JobSpec(command=["true"], gpus=1), uid=names.ulid())


def access_to(store):
    return JobAccess(store, Cache(store, keys.QUEUES, QUEUES.decode))


async def test_who_comes_before_the_first_leader_waits_for_it():
    clock = LoopClock()
    store = MemoryStore(clock)
    submissions = Submissions(store, clock, None, access_to(store), JobSecrets(None, None, None))
    stored = asyncio.create_task(submissions.store(job(), named=False))
    await asyncio.sleep(1.0)
    await store.commit(Put(keys.QUEUES + "default", b""))
    made, revision = await stored
    assert (await store.get(keys.of_name(keys.JOBS, made.name))).revision == revision


async def test_a_fleet_that_nobody_leads_says_so_in_seconds():
    clock = LoopClock()
    store, began_s = MemoryStore(clock), clock.monotonic()
    submissions = Submissions(store, clock, None, access_to(store), JobSecrets(None, None, None))
    with pytest.raises(Unavailable, match="no scheduler has led yet"):
        await submissions.store(job(), named=False)
    assert 3.0 < clock.monotonic() - began_s < 8.0


async def test_a_request_that_is_delivered_twice_makes_one_job(world):
    first = await world.create(1, request_id="r-1")
    assert (await world.create(1, request_id="r-1")).name == first.name
    assert (await world.create(1, request_id="r-2")).name != first.name
    with pytest.raises(AlreadyExists):
        await world.create(2, request_id="r-1")
    named = await world.create(1, request_id="r-1", job_id="mine")
    assert (await world.create(1, request_id="r-1", job_id="mine")).name == named.name


async def test_a_request_repeated_after_its_job_was_deleted_does_not_bring_the_name_back(world):
    (agent,) = await world.add(node("s/a"))
    name = await run_and_delete(world, agent, request_id="r-1")
    assert await world.submit(1, request_id="r-1") != name


async def test_a_name_that_comes_again_is_another_job_to_its_agents(world):
    """What belongs to a job, its checkpoints for instance, goes by its uid."""
    (agent,) = await world.add(node("s/a"))
    name = await world.submit(1, job_id="train")
    first = (await world.reaches(name, "RUNNING")).uid
    agent.exit()
    await world.reaches(name, "SUCCEEDED")
    await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
    await world.submit(1, job_id="train")
    job = await world.reaches(name, "RUNNING")
    (task,) = agent.tasks.values()
    assert task.job_uid == job.uid
    assert job.uid not in ("", first)


async def test_a_request_that_is_repeated_finds_the_job_with_the_uid_that_it_has(world):
    first = await world.create(1, request_id="r-1")
    assert first.uid
    assert (await world.create(1, request_id="r-1")).uid == first.uid
    assert (await world.create(1, request_id="r-2")).uid != first.uid


async def test_only_what_is_called_after_an_array_is_a_member_of_it(world):
    """Else anybody's jobs would take the places of another's array, of which only so many run at a time."""
    array = {"name": "sweep", "index": 0, "size": 2, "max_running": 1}
    await world.submit(1, job_id="sweep-0", array=array)
    for job_id in ("other", "sweep-1", ""):
        with pytest.raises(InvalidArgument, match="job_id: member 0 of an array is called 'sweep-0'"):
            await world.submit(1, job_id=job_id, array=array)


async def test_one_whose_answer_was_lost_is_the_job_that_was_made_though_it_has_changed_since(world, monkeypatch):
    await world.add(node("s/a"))
    commit, lost = world.store.commit, []

    async def loses(*writes, when=()):
        revision = await commit(*writes, when=when)
        if not lost and any(write.key.startswith(keys.JOBS) for write in writes):
            lost.append(writes)
            raise Unknown("its answer was lost")
        return revision

    monkeypatch.setattr(world.store, "commit", loses)
    made = await world.create(1)
    assert lost
    assert made.attempt.tasks, "it was placed before it was asked for again"
    assert len((await world.store.list(keys.JOBS)).entries) == 1
