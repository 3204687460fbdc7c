"""Work without GPUs: placed by CPU and memory, beside work with GPUs, and never on more than there is."""

from dataclasses import replace

import pytest

from tests.support.scheduler_world import GB, World, node, until
from whaleflux.errors import FailedPrecondition, InvalidArgument
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb


def plain(name, cores=8, memory_gb=64):
    """A node without GPUs."""
    return replace(node(name, 0), cpu_millicores=1000 * cores, memory_bytes=memory_gb * GB)


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def submit(world, ranks=1, **spec):
    return await world.submit(0, ranks=ranks, **spec)


def nodes_of(job):
    return {task.node.rpartition("/")[2]: task.ranks for task in job.attempt.tasks}


async def test_it_goes_to_a_node_without_gpus_and_holds_none(world):
    await world.add(node("a/gpu"), plain("a/cpu"))
    name = await submit(world, cpu_millicores_per_rank=2000)
    job = await world.reaches(name, "RUNNING")
    assert nodes_of(job) == {"cpu": 1}
    [task] = job.attempt.tasks
    assert not task.gpu_uuids
    assert job.decision.summary == "1 rank without GPUs on 1 node, site a"
    assert job.attempt.usd_per_hour == 0
    [agent] = (agent for agent in world.agents.values() if agent.node.endswith("cpu"))
    [wanted] = agent.tasks.values()
    assert (wanted.world_size, wanted.task.ranks) == (1, 1)
    listed = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
    assert [(found.job, found.task.ranks) for found in listed.allocations] == [(name, 1)]


async def test_declared_cpu_and_memory_are_not_given_twice(world):
    await world.add(plain("a/n1", cores=8, memory_gb=64))
    first = await submit(world, 2, cpu_millicores_per_rank=3000, memory_bytes_per_rank=8 * GB)
    await world.reaches(first, "RUNNING")
    second = await submit(world, cpu_millicores_per_rank=3000)
    third = await submit(world, memory_bytes_per_rank=60 * GB)
    await world.caught_up()
    waiting = await world.job(second)
    assert waiting.state_message == "waits: 0 of 1 ranks have room; free CPU < 3 cores per rank: 1 node"
    assert (await world.job(third)).state == pb.JOB_STATE_QUEUED
    for agent in world.agents.values():
        agent.exit(0)
    await world.reaches(first, "SUCCEEDED")
    await world.reaches(second, "RUNNING")


async def test_ranks_that_say_nothing_count_as_a_core_each(world):
    await world.add(plain("a/n1", cores=2))
    names = [await submit(world) for _ in range(3)]
    for name in names[:2]:
        await world.reaches(name, "RUNNING")
    await world.caught_up()
    assert (await world.job(names[2])).state == pb.JOB_STATE_QUEUED


async def test_gpu_work_sees_the_cpu_that_is_taken(world):
    await world.add(node("a/gpu"))  # 64 cores
    name = await submit(world, 6, cpu_millicores_per_rank=10_000)
    job = await world.reaches(name, "RUNNING")
    assert "have GPUs" in job.decision.reasons[0]
    waiting = await world.submit(1, cpu_millicores_per_rank=8_000)
    fits = await world.submit(4, cpu_millicores_per_rank=1_000)
    await world.reaches(fits, "RUNNING")
    await world.caught_up()
    assert "free CPU" in (await world.job(waiting)).state_message


async def test_ranks_spread_as_asked_and_are_numbered_through(world):
    await world.add(plain("a/n1"), plain("a/n2"), plain("a/n3"))
    job = await world.reaches(await submit(world, 5, nodes={"min": 3}), "RUNNING")
    assert sorted(nodes_of(job).values()) == [1, 2, 2]
    numbers = [range(task.first_rank, task.first_rank + task.ranks) for task in job.attempt.tasks]
    assert [rank for ranks in numbers for rank in ranks] == [0, 1, 2, 3, 4]
    packed = await world.reaches(await submit(world, 6), "RUNNING")
    assert len(packed.attempt.tasks) == 1
    with_most = await submit(world, 20, nodes={"max": 1})
    await world.caught_up()
    assert (await world.job(with_most)).state == pb.JOB_STATE_QUEUED


async def test_a_lost_node_moves_it_and_a_new_leader_knows_what_it_holds(world):
    await world.add(plain("a/n1", cores=1), plain("a/n2", cores=1))
    name = await submit(world)
    before = nodes_of(await world.reaches(name, "RUNNING"))
    await world.restart()
    second, third = await submit(world), await submit(world)
    await world.reaches(second, "RUNNING")
    await world.caught_up()
    assert (await world.job(third)).state == pb.JOB_STATE_QUEUED
    [lost] = before
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=second), None)
    await world.reaches(third, "RUNNING")
    await world.planner.ask(lambda planner: planner.check())
    assert nodes_of(await world.job(name)) == before == {lost: 1}


async def test_it_goes_where_its_data_is_when_it_says_so(world):
    world.inventory.datasets["datasets/c4"] = inventory_pb2.Dataset(
        name="datasets/c4", size_bytes=5, copies=[{"node": "sites/a/nodes/n2", "present_bytes": 5}]
    )
    await world.restart()
    await world.add(plain("a/n1"), plain("a/n2", cores=1))
    near = {"datasets": ["c4"], "require_local_data": True}
    job = await world.reaches(await submit(world, **near), "RUNNING")
    assert nodes_of(job) == {"n2": 1}
    second = await submit(world, **near)
    await world.caught_up()
    assert "without the datasets: 1 node" in (await world.job(second)).state_message


async def test_a_queues_limit_is_of_gpus(world):
    await world.add(node("a/gpu"), plain("a/cpu"))
    await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=pb.Queue(max_gpus=2)), None)
    await world.reaches(await submit(world, 4, queue="q"), "RUNNING")
    await world.reaches(await world.submit(2, queue="q"), "RUNNING")
    await world.reaches(await submit(world, 1, queue="q"), "RUNNING")


async def test_more_ranks_than_the_fleet_has_room_for_are_refused():
    world = World()
    world.inventory.complete = True
    async with world:
        await until(lambda: world.node_view.complete, "inventory has told")
        await world.add(plain("a/n1", cores=8))
        with pytest.raises(FailedPrecondition, match="8 of 9 ranks have room; it would fit with 8 ranks"):
            await world.create(0, ranks=9)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"ranks": 0}, "job.spec.gpus"),
        ({"ranks": 2, "gpus": 1}, "job.spec.ranks"),
        ({"ranks": 1, "gpu": {"any_of": ["H200"]}}, "job.spec.gpu"),
        ({"ranks": 1, "placement": [{"group": "tensor", "level": 6}]}, "job.spec.placement"),
        ({"ranks": 2, "nodes": {"min": 3}}, "job.spec.nodes.min"),
    ],
)
async def test_what_makes_no_sense_is_refused(world, spec, field):
    with pytest.raises(InvalidArgument) as refused:
        await world.create(**({"gpus": 0} | spec))
    assert field in [violation.field for violation in refused.value.violations]


def test_a_file_says_gpus_0_and_has_one_rank_unless_it_says_more(tmp_path):
    spec = job_from_yaml("run: x\ngpus: 0\n", tmp_path).spec
    assert (spec.gpus, spec.ranks) == (0, 1)
    assert job_from_yaml("run: x\ngpus: 0\nranks: 4\n", tmp_path).spec.ranks == 4
    with pytest.raises(InvalidArgument, match="gpus"):
        job_from_yaml("run: x\n", tmp_path)
