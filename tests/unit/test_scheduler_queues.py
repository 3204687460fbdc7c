"""Queues come and go beside the jobs that are submitted to them."""

import asyncio

import pytest

from tests.support.held_commits import HeldCommits
from tests.support.scheduler_world import USER, World, node, until
from whaleflux.errors import FailedPrecondition, NotFound, StatusError
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.v1 import scheduler_pb2 as pb


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def create_queue(world, queue_id):
    return await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id=queue_id), None)


async def delete_queue(world, queue_id):
    await world.scheduler.DeleteQueue(pb.DeleteQueueRequest(name=f"queues/{queue_id}"), None)


@pytest.mark.parametrize("first", ["job", "deletion"])
async def test_a_queue_that_is_deleted_while_a_job_is_submitted_to_it(world, first):
    """Whoever comes first, no job is left in a queue that is gone."""
    await create_queue(world, "q")
    held = HeldCommits(world.store)
    before = asyncio.create_task(world.submit(1))
    await until(lambda: held.waiting, "the store is busy")
    calls = {"job": lambda: world.submit(1, queue="q"), "deletion": lambda: delete_queue(world, "q")}
    tasks = []
    for name in sorted(calls, key=lambda name: name != first):
        tasks.append(asyncio.create_task(calls[name]()))
        for _ in range(20):
            await asyncio.sleep(0)  # it waits for the store
    held.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await before
    refused = [result for result in results if isinstance(result, Exception)]
    assert len(refused) == 1
    gone = await world.store.get(keys.QUEUES + "q") is None
    assert isinstance(refused[0], NotFound if gone else FailedPrecondition)  # a deletion says first that it is one


@pytest.mark.parametrize("first", ["job", "deletion"])
async def test_a_queue_that_is_deleted_while_an_ended_job_of_it_is_replaced(world, first):
    """The record is written again, not made: that counts as a job that came, too."""
    await create_queue(world, "q")
    name = await world.submit(1, queue="q", job_id="again")
    ended = await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
    job = pb.Job(spec=pb.JobSpec(command=["other"], gpus=1))
    replacing = pb.CreateJobRequest(parent="queues/q", job_id="again", job=job, replaces=ended.etag)

    async def replace():
        with auth.acting_as(USER):
            await world.scheduler.CreateJob(replacing, None)

    held = HeldCommits(world.store)
    before = asyncio.create_task(world.submit(1))
    await until(lambda: held.waiting, "the store is busy")
    calls = {"job": replace, "deletion": lambda: delete_queue(world, "q")}
    tasks = []
    for call in sorted(calls, key=lambda call: call != first):
        tasks.append(asyncio.create_task(calls[call]()))
        for _ in range(20):
            await asyncio.sleep(0)  # it waits for the store
    held.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await before
    (refused,) = (result for result in results if isinstance(result, Exception))
    assert isinstance(refused, NotFound | FailedPrecondition)
    gone = await world.store.get(keys.QUEUES + "q") is None
    assert gone is ((await world.job(name)).state == pb.JOB_STATE_CANCELLED)


async def test_a_queue_with_ended_jobs_only_is_deleted(world):
    await create_queue(world, "q")
    name = await world.submit(1, queue="q")
    with pytest.raises(FailedPrecondition, match="1 unfinished jobs"):
        await delete_queue(world, "q")
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
    await delete_queue(world, "q")
    with pytest.raises(NotFound):
        await world.scheduler.GetQueue(pb.GetQueueRequest(name="queues/q"), None)


async def update_queue(world, name="default", paths=("max_gpus",), etag="", **fields):
    request = pb.UpdateQueueRequest(queue=pb.Queue(name=f"queues/{name}", etag=etag, **fields))
    request.update_mask.paths.extend(paths)
    return await world.scheduler.UpdateQueue(request, None)


async def test_a_limit_is_changed_while_jobs_wait_for_it(world):
    await world.add(node("a/n1"))
    await update_queue(world, max_gpus=2)
    first, second = await world.submit(2), await world.submit(2)
    await world.reaches(first, "RUNNING")
    await world.caught_up()
    waiting = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=second), None)
    assert waiting.decision.summary == "waits: queue default holds 2 of at most 2 GPUs"
    assert "whaleflux queue set default --max-gpus" in waiting.decision.smallest_change
    await update_queue(world, max_gpus=4)
    await world.reaches(second, "RUNNING")
    lower = await update_queue(world, max_gpus=1)
    await world.caught_up()
    assert lower.weight == 1.0  # what the mask does not name stays
    assert (await world.job(first)).state == pb.JOB_STATE_RUNNING


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paths": ()}, "update_mask"),
        ({"paths": ("name",)}, "cannot be changed"),
        ({"max_gpus": -1}, "queue.max_gpus"),
        ({"etag": '"1"', "max_gpus": 1}, "ETAG_MISMATCH|etag"),
        ({"name": "nobody"}, "whaleflux queue ls"),
    ],
)
async def test_what_cannot_be_changed_is_refused_and_nothing_moves(world, change, said):
    before = (await world.store.list("", limit=1)).revision
    with pytest.raises(StatusError, match=said):
        await update_queue(world, **change)
    assert (await world.store.list("", limit=1)).revision == before
