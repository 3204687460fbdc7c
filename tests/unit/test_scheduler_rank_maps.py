"""Ranks of a job that says how its model is split run on the GPUs that a map gives them: from the job to the environment of each process."""

from dataclasses import replace

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import InvalidArgument
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import health_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.convert import work_from_proto
from whaleflux_agent.core.environment import LaunchContext, rank_environment
from whaleflux_agent.core.reconcile import rejection_reason
from whaleflux_agent.core.work import Work
from whaleflux_scheduler.core.request import place_request

SPLIT = {"parallelism": pb.Parallelism(tensor=2, pipeline=2)}
ODD = (node("s/a", 5), node("s/b", 6), node("s/c", 5))


def processes(world: World) -> dict[int, dict[str, str]]:
    """The environment of each rank, as agents make it, by rank."""
    found = {}
    for agent in world.agents.values():
        for desired in agent.tasks.values():
            work = work_from_proto(desired)
            context = LaunchContext(agent.node, "token", "/socket", work.gpu_uuids, traceparent="")
            assert rejection_reason(work, work.gpu_uuids, ["process"]) == ""
            for local in range(len(work.ranks)):
                made = rank_environment(work, context, local, inherited={}, error_file="/e.json")
                found[int(made["RANK"])] = made
    return found


def islands(found: dict[int, dict[str, str]], size: int) -> list[set[str]]:
    """Nodes of each run of `size` ranks."""
    return [{found[rank]["WHALEFLUX_NODE"] for rank in range(at, at + size)} for at in range(0, len(found), size)]


async def test_each_rank_runs_on_the_gpu_that_the_map_says():
    """Node by node two of eight tensor-parallel groups would be torn between nodes of 5, 6 and 5; the map tears one, since it has to."""
    async with World() as world:
        await world.add(*ODD)
        name = await world.submit(16, **SPLIT)
        job = await world.reaches(name, "RUNNING")
        found = processes(world)
        assert sorted(found) == list(range(16))
        assert sorted(len(nodes) for nodes in islands(found, 2)) == [1] * 7 + [2]
        gpus = {env["CUDA_VISIBLE_DEVICES"].split(",")[int(env["LOCAL_RANK"])] for env in found.values()}
        assert len(gpus) == 16 and {env["WORLD_SIZE"] for env in found.values()} == {"16"}
        for rank, env in found.items():
            assert env["WHALEFLUX_GPU_UUID"] == env["CUDA_VISIBLE_DEVICES"].split(",")[int(env["LOCAL_RANK"])], rank
        assert found[0]["GROUP_RANK"] == "0", "the others meet where rank 0 is"
        assert any("ranks lie along the links" in reason for reason in job.decision.reasons)


async def test_ranks_that_do_not_follow_one_another_are_no_ranks_to_agents_that_know_only_the_first():
    """They refuse the task, rather than start other ranks than the rest of the gang."""
    async with World() as world:
        await world.add(*ODD)
        await world.reaches(await world.submit(16, **SPLIT), "RUNNING")
        tasks = [desired.task for agent in world.agents.values() for desired in agent.tasks.values()]
        scattered = [task for task in tasks if task.global_ranks]
        assert scattered and all(task.first_rank == -1 for task in scattered)
        assert all(list(task.global_ranks) == sorted(task.global_ranks) for task in scattered)
        assert all(task.first_rank >= 0 for task in tasks if not task.global_ranks)


async def test_after_a_lost_node_the_map_is_made_again_for_what_was_placed():
    async with World() as world:
        await world.add(node("s/a", 4), node("s/b", 4), node("s/c", 6), node("s/d", 6))
        name = await world.submit(8, **SPLIT)
        before = await world.reaches(name, "RUNNING")
        lost = before.attempt.tasks[0].node
        await world.agents[lost].disconnect()
        world.phase(lost, health_pb2.NODE_PHASE_UNREACHABLE)

        async def again() -> bool:
            job = await world.job(name)
            return job.state == pb.JOB_STATE_RUNNING and job.epoch > before.epoch

        await until(again, "it runs elsewhere")
        job = await world.job(name)
        assert lost not in {task.node for task in job.attempt.tasks}
        ranks = sorted(
            rank
            for task in job.attempt.tasks
            for rank in (task.global_ranks or range(task.first_rank, task.first_rank + len(task.gpu_uuids)))
        )
        assert ranks == list(range(8))
        world.agents.pop(lost)
        assert [len(nodes) for nodes in islands(processes(world), 2)] == [1] * 4


async def test_a_record_that_was_stored_has_the_same_ranks_after_a_change_of_leader():
    async with World() as world:
        await world.add(*ODD)
        name = await world.submit(16, **SPLIT)
        await world.reaches(name, "RUNNING")
        before = {rank: env["WHALEFLUX_GPU_UUID"] for rank, env in processes(world).items()}
        await world.restart()
        await world.caught_up()
        assert {rank: env["WHALEFLUX_GPU_UUID"] for rank, env in processes(world).items()} == before


async def test_jobs_that_say_nothing_are_numbered_node_by_node():
    async with World() as world:
        await world.add(*ODD)
        job = await world.reaches(await world.submit(16), "RUNNING")
        firsts = [(task.first_rank, len(task.gpu_uuids), list(task.global_ranks)) for task in job.attempt.tasks]
        assert firsts == [
            (0, firsts[0][1], []),
            (firsts[0][1], firsts[1][1], []),
            (16 - firsts[2][1], firsts[2][1], []),
        ]


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"parallelism": pb.Parallelism(tensor=3)}, "job.spec.parallelism", "does not divide the 16 GPUs"),
        ({"parallelism": pb.Parallelism(tensor=8, expert=3)}, "job.spec.parallelism.expert", "does not divide context x data, which is 2"),
        ({"parallelism": pb.Parallelism(tensor=-1)}, "job.spec.parallelism.tensor", "0 to 1024"),
        ({"parallelism": pb.Parallelism(tensor=8, model="nobody-7b")}, "job.spec.parallelism.model", "fits --list"),
        ({"parallelism": pb.Parallelism(model="llama-3.1-8b")}, "job.spec.parallelism.model", "none is given"),
        ({"parallelism": pb.Parallelism(tensor=8), "launch_once": True}, "job.spec.parallelism", "numbers its ranks itself"),
        ({"parallelism": pb.Parallelism(tensor=8), "gpu": pb.GpuRequirement(share_memory_bytes=10**9)}, "job.spec.parallelism", "parts of GPUs"),
        ({"parallelism": pb.Parallelism(tensor=8), "elastic": pb.Elastic(min=4, step=4, resumes=True)}, "job.spec.elastic.step", "no multiple of"),
    ],
)  # fmt: skip
async def test_splits_that_cannot_be_are_refused_by_their_field(more, field, words):
    async with World() as world:
        with pytest.raises(InvalidArgument) as refused:
            await world.create(16, dry=True, wait_for_capacity=True, **more)
    told = {one.field: one.description for one in refused.value.violations}
    assert field in told and words in told[field]


def test_tensor_parallel_ranks_are_wished_together_unless_the_job_says_more():
    asked = Spec(command=("x",), gpus=16, tensor_parallel=4)
    (wish,) = place_request("j", asked).group.subgroups
    assert (wish.size, wish.level, wish.required) == (4, types_pb2.TOPOLOGY_LEVEL_NVLINK, False)


@pytest.mark.parametrize("ranks", [(0, 2, 2), (2, 0, 3), (0, 1), (0, 1, 4)])
def test_an_agent_refuses_ranks_that_cannot_be(ranks):
    work = Work("t", "queues/q/jobs/j", 1, ("a", "b", "c"), world_size=4, spec=Spec(command=("x",)))
    assert rejection_reason(work, "abc", ["process"]) == ""
    assert (
        "must name a rank" in (why := rejection_reason(replace(work, global_ranks=ranks), "abc", ["process"]))
        or "do not fit" in why
    )
