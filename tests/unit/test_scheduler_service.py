"""The scheduler over the memory store with agents that tests play: submit, start, end, fail, recover, drain, restart."""

import asyncio

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.store import keys
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def fence(world, name):
    entry = await world.store.get(keys.of_name(keys.JOB_FENCES, name))
    return int(entry.value) if entry else 0


async def test_a_gang_starts_when_all_have_accepted_and_ends_when_all_have_ended(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    name = await world.submit(8)
    job = await world.reaches(name, "RUNNING")
    assert job.epoch == 1
    assert await fence(world, name) == 1
    assert {t.node for t in job.attempt.tasks} == {a.node, b.node}
    assert [t.first_rank for t in job.attempt.tasks] == [0, 4]
    for agent in (a, b):
        (task,) = agent.tasks.values()
        assert task.rendezvous == "10.0.0.1:29500"
        assert (task.world_size, task.group_world_size, task.start) == (8, 2, True)
        phases = [line.split()[1] for line in agent.history]
        assert phases == ["ACCEPTED", "RUNNING"]
    a.exit()
    await until(lambda: a.acknowledged == 3, "the report is stored")
    assert (await world.job(name)).state == pb.JOB_STATE_RUNNING
    b.exit()
    job = await world.reaches(name, "SUCCEEDED")
    assert job.cost_usd > 0
    await until(lambda: not a.tasks and not b.tasks, "nothing is desired any more")


async def test_a_failed_rank_fences_the_attempt_and_the_job_restarts_from_its_checkpoint(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    world.checkpoint.newest = "queues/default/jobs/j/checkpoints/s10-e1"
    name = await world.submit(8, retry={"max_restarts": 2, "backoff": {"nanos": 1}})
    await world.reaches(name, "RUNNING")
    a.exit(1, message="Traceback\nValueError: bad")
    await until(lambda: b.tasks and next(iter(b.tasks.values())).epoch == 2, "epoch 2 reaches b")
    job = await world.reaches(name, "RUNNING")
    assert (job.epoch, job.restarts, job.recoveries) == (2, 1, 0)
    assert await fence(world, name) == 2
    assert job.attempt.restore_checkpoint == world.checkpoint.newest
    assert job.past_attempts[0].end_reason.startswith("exit: ranks 0-3 on sites/s/nodes/a ended with exit code 1")
    assert world.health.asked[0].exit_code == 1
    assert any("KILLED" in line for line in b.history), "the survivor of epoch 1 was stopped"


async def test_a_lost_node_moves_the_job_and_keeps_its_gpus_until_its_agent_is_back(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    world.health.answer = lambda request: health_pb2.Incident(
        name="incidents/lost", nodes=[request.node], message="a is lost"
    )
    name = await world.submit(4)
    job = await world.reaches(name, "RUNNING")
    first, other = (a, b) if job.attempt.tasks[0].node == a.node else (b, a)
    await first.disconnect()
    assert (await world.job(name)).state == pb.JOB_STATE_RUNNING, "a lost stream ends nothing"
    world.phase(first.node, health_pb2.NODE_PHASE_UNREACHABLE, "HEARTBEAT_LOST")
    await until(lambda: other.tasks, "the job moves")
    job = await world.reaches(name, "RUNNING")
    assert (job.epoch, job.restarts, job.recoveries) == (2, 0, 1)
    assert job.past_attempts[0].tasks[0].lost
    second = await world.submit(4)
    await until(lambda: world.planner.waiting == 1, "the GPUs of the lost node are not given away")
    world.phase(first.node, health_pb2.NODE_PHASE_READY)
    await first.connect()
    await world.reaches(second, "RUNNING")
    assert (await world.job(name)).past_attempts[0].tasks[0].phase in (pb.TASK_PHASE_KILLED, pb.TASK_PHASE_GONE)


async def test_a_retired_node_gives_its_gpus_back(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    await a.disconnect()
    world.phase(a.node, health_pb2.NODE_PHASE_UNREACHABLE)
    await world.reaches(name, "QUEUED")
    assert await world.held()
    world.intend(a.node, inventory_pb2.NODE_INTENT_RETIRED)

    async def free():
        return not await world.held()

    await until(free, "the allocation is released")


async def test_a_drain_moves_jobs_and_counts_as_nothing(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    name = await world.submit(2)
    job = await world.reaches(name, "RUNNING")
    first, other = (a, b) if job.attempt.tasks[0].node == a.node else (b, a)
    world.intend(first.node, inventory_pb2.NODE_INTENT_DRAINING, "new disks")
    await until(lambda: other.tasks, "the job moves")
    job = await world.reaches(name, "RUNNING")
    assert (job.restarts, job.recoveries) == (0, 0)
    assert "new disks" in job.past_attempts[0].end_reason
    assert not world.health.asked


async def test_a_drain_that_is_undone_gives_the_node_back_at_once(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(2)
    await world.reaches(name, "RUNNING")
    world.intend(a.node, inventory_pb2.NODE_INTENT_DRAINING, "new disks")
    job = await world.reaches(name, "QUEUED")
    assert "failure" not in job.state_message
    began = asyncio.get_running_loop().time()
    world.intend(a.node, inventory_pb2.NODE_INTENT_ACTIVE)
    await world.reaches(name, "RUNNING")
    assert asyncio.get_running_loop().time() - began < 10


async def test_one_refusal_releases_all_and_the_node_is_avoided(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    a.refuse = "GPU 0 is gone"
    b.obey = True
    names = [await world.submit(4), await world.submit(4)]
    jobs = [await world.job(n) for n in names]

    async def one_runs():
        jobs[:] = [await world.job(n) for n in names]
        return any(j.state == pb.JOB_STATE_RUNNING for j in jobs)

    await until(one_runs, "the other node takes one")
    running = next(j for j in jobs if j.state == pb.JOB_STATE_RUNNING)
    assert running.attempt.tasks[0].node == b.node
    assert any("REFUSED" in line for line in a.history)


async def test_application_faults_are_limited(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(1, retry={"max_restarts": 1, "backoff": {"nanos": 1}})
    for epoch in (1, 2):
        await until(lambda: any(t.epoch == epoch and t.start for t in a.tasks.values()), f"epoch {epoch}")  # noqa: B023
        a.exit(7)
    job = await world.reaches(name, "FAILED")
    assert "retry.max_restarts is 1" in job.state_message
    assert not await world.held()


async def test_a_service_restarts_for_ever_and_also_when_it_ends_well(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(1, kind=pb.JOB_KIND_SERVICE, retry={"max_restarts": 1, "backoff": {"nanos": 1}})
    for epoch in range(1, 5):
        await until(lambda: any(t.epoch == epoch and t.start for t in a.tasks.values()), f"epoch {epoch}")  # noqa: B023
        a.exit(epoch % 2)
    await until(lambda: any(t.epoch == 5 and t.start for t in a.tasks.values()), "epoch 5")
    assert (await world.job(name)).state in (pb.JOB_STATE_STARTING, pb.JOB_STATE_RUNNING)


async def test_a_new_leader_goes_on_where_the_last_one_stopped(world):
    a, b = await world.add(node("s/a"), node("s/b"))
    running, waiting = await world.submit(8), await world.submit(8)
    await world.reaches(running, "RUNNING")
    await world.restart()
    for agent in (a, b):
        assert [t.job for t in agent.tasks.values()] == [running], "nothing was stopped or started"
        agent.exit()
    await world.reaches(running, "SUCCEEDED")
    await world.reaches(waiting, "RUNNING")


async def test_cancel_ends_it_at_once_and_its_gpus_when_the_agent_says_so(world):
    (a,) = await world.add(node("s/a"))
    a.slow_to_die = True
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    job = await world.scheduler.CancelJob(pb.CancelJobRequest(name=name, reason="enough"), None)
    assert (job.state, job.state_message) == (pb.JOB_STATE_CANCELLED, "enough")
    other = await world.submit(4)
    await until(lambda: not a.tasks, "the task is to stop")
    assert (await world.job(other)).state == pb.JOB_STATE_QUEUED
    a.report(next(iter(a.reports)), pb.TASK_PHASE_KILLED, -15)
    await world.reaches(other, "STARTING")


async def test_higher_priority_suspends_lower(world):
    (a,) = await world.add(node("s/a"))
    low = await world.submit(4, priority=1)
    await world.reaches(low, "RUNNING")
    high = await world.submit(4, priority=9)
    await world.reaches(high, "RUNNING")
    job = await world.job(low)
    assert (job.state, job.epoch) == (pb.JOB_STATE_QUEUED, 2)
    a.exit(0, task=next(t for t, d in a.tasks.items() if d.job == high))
    job = await world.reaches(low, "RUNNING")
    assert (job.epoch, job.restarts) == (2, 0)


async def test_steps_are_live_and_stored_with_the_next_state(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(1)
    await world.reaches(name, "RUNNING")
    a.step(name, 1, 41, 0.5)

    async def seen():
        return (await world.job(name)).step == 41

    await until(seen, "the step is shown")
    a.exit()
    job = await world.reaches(name, "SUCCEEDED")
    assert (job.step, job.loss) == (41, 0.5)
