"""Where an attempt is placed is on record beside its fence, and only agents of its nodes speak for it."""

from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from prometheus_client import REGISTRY

from tests.support.scheduler_world import World, node, until
from whaleflux.store import placements
from whaleflux.store.api import Delete
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import task_observations
from whaleflux_scheduler.core.model import TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report
from whaleflux_scheduler.jobs import key_of


@pytest.fixture
async def world():
    async with World() as world:
        yield world


def refused():
    """Claims of agents about what is not placed with them, so far."""
    return REGISTRY.get_sample_value("whaleflux_agent_claims_refused_total", {"what": "progress"}) or 0.0


async def placed(world, name):
    entry = await world.store.get(placements.key_of(name))
    return placements.read(entry.value) if entry else None


async def test_each_attempt_s_nodes_are_on_record_until_its_job_is_deleted(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    name = await world.submit(8, retry={"max_restarts": 2, "backoff": {"nanos": 1}}, checkpoint={"location": "/ck"})
    job = await world.reaches(name, "RUNNING")
    assert await placed(world, name) == placements.Placement(1, job.uid, frozenset({a.node, b.node}), "/ck")
    a.exit(1)
    await until(lambda: b.tasks and next(iter(b.tasks.values())).epoch == 2, "epoch 2 reaches b")
    assert (await placed(world, name)).epoch == 2
    await world.reaches(name, "RUNNING")
    a.exit(), b.exit()
    await world.reaches(name, "SUCCEEDED")
    await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
    assert await placed(world, name) is None


async def test_what_an_earlier_version_did_not_record_the_next_leader_does(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    await world.store.commit(Delete(placements.key_of(name)))
    await world.restart()
    await until(lambda: placed(world, name), "the placement is on record")
    assert (await placed(world, name)).nodes == {a.node}


async def test_an_earlier_attempt_s_placement_does_not_stand_for_a_later_one(world):
    """While a fleet is updated, a leader of the earlier version placed the attempt: its saves must not be refused for ever."""
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    job = await world.reaches(name, "RUNNING")
    await world.store.commit(placements.put(name, 0, job.uid, ["sites/s/nodes/gone"]))
    await world.restart()

    async def mended():
        return (await placed(world, name)).nodes == {a.node}

    await until(mended, "the placement is of the newest attempt")


async def test_a_placement_is_read_once_however_many_of_its_nodes_ask():
    """A gang of 10,000 nodes asks 10,000 times what it restores; to read the names of all takes tens of milliseconds."""
    store, job = MemoryStore(), "queues/q/jobs/j"
    known = placements.Placements(store)
    await store.commit(placements.put(job, 1, "one", ["sites/s/nodes/a", "sites/t/nodes/b"]))
    first = await known.newest(job)
    assert first == placements.Placement(1, "one", frozenset({"sites/s/nodes/a", "sites/t/nodes/b"}))
    assert await known.newest(job) is first and await known.of(job, 1) is first
    await store.commit(placements.put(job, 1, "another", ["sites/s/nodes/a"]))  # a later job of the name
    assert (await known.newest(job)).job_uid == "another"
    await store.commit(Delete(placements.key_of(job)))
    assert await known.newest(job) is None


async def test_the_record_of_a_job_is_not_read_for_each_agent_that_asks_for_code_or_secrets(world):
    await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    jobs = world.service.jobs
    await jobs.cache.at_least((await world.store.get(key_of(name))).revision)
    assert await jobs.placed(name) is jobs.cache.get(key_of(name))


async def test_an_agent_cannot_say_how_far_another_s_task_is(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    own, eve = (a, b) if a.tasks else (b, a)
    moved = agent_pb2.TaskProgress(job=name, epoch=1, step=10**9)
    before = refused()
    eve.say(agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=[moved])))
    await until(lambda: refused() > before, "it is refused, and counted")
    moved.step = 5
    own.say(agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=[moved])))

    async def told():
        return max(0, (await world.job(name)).step)

    assert await until(told, "a step is known") == 5


@pytest.mark.parametrize("behind_s", [299, -299])
async def test_when_a_step_was_done_is_read_by_the_clock_of_its_agent(world, behind_s):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    await a.disconnect()
    await a.connect(clock_behind_s=behind_s)
    done = world.clock.now() - timedelta(seconds=7)
    moved = agent_pb2.TaskProgress(job=name, epoch=1, step=5, time=done - timedelta(seconds=behind_s))
    a.say(agent_pb2.SyncRequest(progress=agent_pb2.ProgressReport(tasks=[moved])))

    async def told():
        job = await world.job(name)
        return job.step == 5 and job.step_time.ToDatetime(UTC)

    assert abs(await until(told, "the step is known") - done) < timedelta(seconds=1)


async def test_a_report_counts_only_from_the_agent_of_the_task_s_node(world):
    """Also one that came while the job's record could not be read, so that nobody knew whose the task was."""
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    job = world.service.jobs.cache.get(key_of(name)).value
    task = job.attempt.tasks[0]
    said = Report(task.id, TaskPhase.EXITED, exit_code=1, rendezvous="10.6.6.6:1", node="sites/s/nodes/eve")
    assert task_observations.observe(job, Observations((said,))) is job
    own = replace(said, node=a.node, phase=TaskPhase.KILLED)
    after = task_observations.observe(job, Observations((said, own)))
    assert after.attempt.tasks[0].phase is TaskPhase.KILLED
