"""Jobs that wait for the end of others: placed when it has come, cancelled when it never can."""

import asyncio

import pytest

from tests.support.scheduler_world import USER, World, node, until
from whaleflux.errors import InvalidArgument
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.model import When

ENDED, FAILED = pb.DEPENDENCY_CONDITION_ENDED, pb.DEPENDENCY_CONDITION_FAILED


@pytest.fixture
async def world():
    async with World() as world:
        await world.add(node("a/n1"))
        yield world


def exit_all(world, code=0):
    [agent] = world.agents.values()
    agent.exit(code)


async def delete(world, name):
    await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)


async def cancel(world, name):
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)


async def test_it_waits_with_that_as_its_reason_and_runs_when_the_other_succeeded(world):
    first = await world.submit(1, job_id="prep")
    second = await world.submit(1, job_id="train", depends_on=[{"job": "prep"}])
    await world.reaches(first, "RUNNING")
    await world.caught_up()
    waiting = await world.job(second)
    assert waiting.state_message == "waits: for queues/default/jobs/prep to succeed"
    explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=second), None)
    assert explained.decision.summary == waiting.state_message
    exit_all(world)
    running = await world.reaches(second, "RUNNING")
    assert not running.awaits


async def test_it_is_cancelled_when_what_it_waits_for_can_never_be(world):
    first = await world.submit(1, job_id="prep")
    second = await world.submit(1, depends_on=[{"job": first}])
    third = await world.submit(1, depends_on=[{"job": second.rpartition("/")[2]}])
    after = await world.submit(1, depends_on=[{"job": "default/prep", "when": FAILED}])
    await cancel(world, first)
    cancelled = await world.reaches(second, "CANCELLED")
    assert cancelled.state_message == f"{first} is CANCELLED, and this job waits for it to succeed"
    assert cancelled.cause.resource == first
    await world.reaches(third, "CANCELLED")  # one after another
    await world.reaches(after, "RUNNING")  # it waits for exactly that


async def test_one_that_was_deleted_counts_by_how_it_ended(world):
    first = await world.submit(1, job_id="prep")
    good = await world.submit(1, depends_on=[{"job": "prep"}], job_id="good")
    bad = await world.submit(1, depends_on=[{"job": "prep", "when": FAILED}])
    await world.reaches(first, "RUNNING")
    exit_all(world)
    await world.reaches(first, "SUCCEEDED")
    await delete(world, first)  # perhaps before the leader has looked
    await world.reaches(good, "RUNNING")
    await world.reaches(bad, "CANCELLED")


async def test_one_whose_record_cannot_be_read_is_waited_for(world):
    first = await world.submit(1, job_id="prep")
    second = await world.submit(1, depends_on=[{"job": "prep"}])
    either = await world.submit(1, depends_on=[{"job": "prep", "when": ENDED}])
    await world.stop()
    await world.store.commit(Put(keys.of_name(keys.JOBS, first), b""), when=[])
    await world.start()
    await world.caught_up()  # its record cannot be read: that is neither an end nor a deletion
    assert {(await world.job(name)).state for name in (second, either)} == {pb.JOB_STATE_QUEUED}


async def test_another_job_of_the_same_name_is_not_the_one_that_it_waits_for(world):
    first = await world.submit(1, job_id="prep")
    second = await world.submit(1, depends_on=[{"job": "prep"}])
    await world.stop()
    await cancel(world, first)
    await delete(world, first)
    third = await world.submit(1, job_id="prep")
    await world.restart()
    await world.reaches(third, "RUNNING")
    exit_all(world)
    cancelled = await world.reaches(second, "CANCELLED")
    assert cancelled.state_message == f"{first} was deleted before it was seen to succeed"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([{"job": "nobody"}], "there is no job queues/default/jobs/nobody"),
        ([{"job": "me"}], "there is no job queues/default/jobs/me"),  # so there are no cycles
        ([{"job": "ended"}], "is CANCELLED"),
        ([{"job": "Not A Name"}], "is not the name of a job"),
        ([{"job": "x"}] * 65, "at most 64"),
    ],
)
async def test_what_can_never_be_is_refused_at_once(world, asked, said):
    await cancel(world, await world.submit(1, job_id="ended"))
    with pytest.raises(InvalidArgument, match=said):
        await world.create(1, job_id="me", depends_on=asked)


async def test_a_dry_run_may_name_jobs_that_are_submitted_before(world):
    job = pb.Job(spec=pb.JobSpec(command=["x"], gpus=1, depends_on=[{"job": "prep"}]))
    request = pb.CreateJobRequest(parent="queues/default", job=job, validate_only=True,
                                  submitted_before=["queues/default/jobs/prep"])  # fmt: skip
    with auth.acting_as(USER):
        planned = await world.scheduler.CreateJob(request, None)
    assert planned.decision.placed
    assert planned.decision.reasons[0] == "first it waits for queues/default/jobs/prep to succeed"
    request.validate_only = False
    with auth.acting_as(USER), pytest.raises(InvalidArgument, match="there is no job"):
        await world.scheduler.CreateJob(request, None)


async def test_a_name_may_be_that_of_an_array_and_means_all_of_its_members(world):
    for index in range(3):
        await world.submit(1, job_id=f"sweep-{index}", array={"name": "sweep", "index": index, "size": 3})
    await world.submit(1, job_id="sweep-other")
    after = await world.submit(4, depends_on=[{"job": "sweep"}])
    assert [one.job.rpartition("/")[2] for one in (await world.job(after)).awaits] == ["sweep-0", "sweep-1", "sweep-2"]
    await world.reaches("queues/default/jobs/sweep-other", "RUNNING")
    exit_all(world)
    await world.reaches(after, "RUNNING")


async def test_of_jobs_that_are_submitted_before_it_the_old_ones_say_nothing(world):
    await cancel(world, await world.submit(1, job_id="prep"))
    job = pb.Job(spec=pb.JobSpec(command=["x"], gpus=1, depends_on=[{"job": "prep"}]))
    request = pb.CreateJobRequest(parent="queues/default", job=job, validate_only=True,
                                  submitted_before=["queues/default/jobs/prep"])  # fmt: skip
    with auth.acting_as(USER):
        assert (await world.scheduler.CreateJob(request, None)).decision.placed


async def test_a_new_leader_knows_who_waits_for_whom(world):
    first = await world.submit(1, job_id="prep")
    second = await world.submit(1, depends_on=[{"job": "prep"}])
    await world.reaches(first, "RUNNING")
    await world.restart()
    exit_all(world)
    await world.reaches(second, "RUNNING")


async def test_many_may_wait_for_one(world):
    first = await world.submit(1, job_id="prep")
    others = [await world.submit(1, depends_on=[{"job": "prep"}]) for _ in range(6)]
    await world.reaches(first, "RUNNING")
    exit_all(world)
    await asyncio.gather(*(world.reaches(name, "RUNNING") for name in others[:4]))
    assert (await world.job(others[5])).state == pb.JOB_STATE_QUEUED  # four GPUs


def test_a_file_names_jobs_with_and_without_a_condition(tmp_path):
    text = "run: x\ngpus: 1\ndepends_on: [prep, {job: research/old, when: ended}]\n"
    spec = job_from_yaml(text, tmp_path).spec
    assert [(one.job, one.when) for one in spec.depends_on] == [("prep", 1), ("research/old", ENDED)]
    for wrong in ("[{jobb: prep}]", "[{job: prep, when: later}]", "[3]", "[A B]"):
        with pytest.raises(InvalidArgument, match="depends_on"):
            job_from_yaml(f"run: x\ngpus: 1\ndepends_on: {wrong}\n", tmp_path)


def test_the_core_has_the_contracts_conditions():
    assert {when.name: when.value for when in When} == {
        name.removeprefix("DEPENDENCY_CONDITION_"): value for name, value in pb.DependencyCondition.items()
    }


async def sweep(world, size, dependents, when):
    """An array of jobs that nothing can run, and jobs that wait for all of them."""
    none = {"any_of": ["none"]}
    members = [
        await world.submit(1, job_id=f"sweep-{n}", array={"name": "sweep", "index": n, "size": size}, gpu=none)
        for n in range(size)
    ]
    asked = [{"job": "sweep", "when": when}]
    return members, [await world.submit(1, depends_on=asked, gpu=none) for _ in range(dependents)]


async def test_the_ends_of_an_arrays_members_are_not_each_written_by_all_who_wait_for_them(world):
    members, waiting = await sweep(world, 40, 10, pb.DEPENDENCY_CONDITION_ENDED)
    commit, written = world.store.commit, 0

    async def counting(*writes, when=()):
        nonlocal written
        written += sum(isinstance(write, Put) and write.key.startswith(keys.JOBS) for write in writes)
        return await commit(*writes, when=when)

    world.store.commit = counting
    for member in members:
        await cancel(world, member)
        await world.caught_up()
    for name in waiting:
        assert not (await until_free(world, name)).awaits
    assert written - len(members) < 10 * 12, "of 400"


@pytest.mark.parametrize("between", ["nothing", "deletion", "leader", "replacement"])
async def test_what_many_members_wait_for_comes_whatever_happens_in_between(world, between):
    members, (waiting,) = await sweep(world, 24, 1, pb.DEPENDENCY_CONDITION_ENDED)
    for number, member in enumerate(members):
        await cancel(world, member)
        await world.caught_up()
        assert (await world.job(waiting)).state == pb.JOB_STATE_QUEUED
        if number % 5 != 3:
            continue
        if between == "deletion":
            await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=members[number - 1]), None)
        elif between == "leader":
            await world.restart()
        elif between == "replacement":
            old = await world.job(members[number - 1])
            job = pb.Job(spec=pb.JobSpec(command=["x"], gpus=1, gpu={"any_of": ["none"]}))
            request = pb.CreateJobRequest(
                parent="queues/default", job_id=f"sweep-{number - 1}", job=job, replaces=old.etag
            )
            request.job.spec.array.name, request.job.spec.array.index = "sweep", number - 1
            with auth.acting_as(USER):
                await world.scheduler.CreateJob(request, None)
        await world.caught_up()
    assert (await until_free(world, waiting)).state == pb.JOB_STATE_QUEUED


async def test_one_failure_among_many_members_cancels_at_once(world):
    members, (waiting,) = await sweep(world, 24, 1, pb.DEPENDENCY_CONDITION_SUCCEEDED)
    await cancel(world, members[7])
    await world.reaches(waiting, "CANCELLED")


async def until_free(world, name):
    async def free():
        job = await world.job(name)
        return job if not job.awaits else None

    return await until(free, f"{name} waits for nothing")
