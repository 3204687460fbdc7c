"""Queues come and go beside the jobs that are submitted to them."""

import asyncio

import pytest

from tests.support.held_commits import HeldCommits
from tests.support.scheduler_world import USER, World, node, until
from whaleflux.errors import FailedPrecondition, NotFound, StatusError
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
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


async def test_a_queue_of_the_same_name_has_no_part_in_what_ended_in_the_earlier_one(world):
    """It neither lists it, nor shows it to its members, nor is charged for it; whose it is and operators find it still."""
    await create_queue(world, "q")
    await world.add(node("a/n1"))
    old = await world.submit(4, queue="q")
    await world.reaches(old, "RUNNING")
    again = await world.submit(4, queue="q", job_id="again")
    ended = await world.scheduler.CancelJob(pb.CancelJobRequest(name=again), None)
    await world.clock.sleep(3600)
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=old), None)
    await world.clock.sleep(10)
    await delete_queue(world, "q")
    await world.clock.sleep(10)
    members = ["users/ada", "users/eve"]
    await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=pb.Queue(members=members)), None)
    await until(lambda: "q" in world.service.jobs.access.queues(), "it is known")

    async def listed(parent, who="ada"):
        with auth.acting_as(auth.Identity("user", who)):
            request = pb.ListJobsRequest(parent=parent, show_ended=True)
            return {job.name for job in (await world.scheduler.ListJobs(request, None)).jobs}

    assert await listed("queues/q") == set()
    assert await listed("queues/-") == {old, again}
    assert await listed("queues/-", "eve") == set()
    job = pb.Job(spec=pb.JobSpec(command=["other"], gpus=1))
    replacing = pb.CreateJobRequest(parent="queues/q", job_id="again", job=job, replaces=ended.etag)
    with auth.acting_as(USER):
        await world.scheduler.CreateJob(replacing, None)
    assert await listed("queues/q", "eve") == {again}, "it is one of the new queue, though its record was there"
    await world.scheduler.CancelJob(pb.CancelJobRequest(name=again), None)
    await world.clock.sleep(5)
    await world.restart()
    await world.caught_up()
    queues = (await world.scheduler.ListQueues(pb.ListQueuesRequest(), None)).queues
    (shown,) = (queue for queue in queues if queue.name == "queues/q")
    assert shown.use.fair_share_gpus < 0.01


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
        ({"paths": ("data_quota_bytes",), "data_quota_bytes": -1}, "queue.data_quota_bytes"),
        ({"paths": ("data_quota_bytes",), "data_quota_bytes": 10**18 + 1}, "queue.data_quota_bytes"),
        ({"etag": '"1"', "max_gpus": 1}, "ETAG_MISMATCH|etag"),
        ({"name": "nobody"}, "whaleflux queue ls"),
    ],
)
async def test_what_cannot_be_changed_is_refused_and_nothing_moves(world, change, said):
    before = (await world.store.list("", limit=1)).revision
    with pytest.raises(StatusError, match=said):
        await update_queue(world, **change)
    assert (await world.store.list("", limit=1)).revision == before


async def tree_of(world, **queues):
    """Makes queues: `parent` is an id, the rest are fields of Queue."""
    for queue_id, fields in queues.items():
        parent = fields.pop("parent", "")
        queue = pb.Queue(parent=f"queues/{parent}" if parent else "", **fields)
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id=queue_id, queue=queue), None)


async def test_a_job_counts_in_every_queue_above_its_own(world):
    await world.add(node("a/n1"))
    await tree_of(world, org={"max_gpus": 3}, a={"parent": "org"}, b={"parent": "org"})
    first, second = await world.submit(2, queue="a"), await world.submit(2, queue="b")
    await world.reaches(first, "RUNNING")
    await world.caught_up()
    waiting = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=second), None)
    assert waiting.decision.summary == "waits: queue org holds 2 of at most 3 GPUs"
    await update_queue(world, "b", paths=("parent",))  # right below the fleet
    await world.reaches(second, "RUNNING")


@pytest.mark.parametrize(
    ("queue", "change", "said"),
    [
        ("team", {"parent": "queues/nobody"}, "queues/nobody does not exist"),
        ("team", {"parent": "queues/team"}, "is below queues/team, or the same"),
        ("org", {"parent": "queues/team"}, "is below queues/org, or the same"),
        ("org", {"parent": "teams/org"}, "queue.parent"),
        ("team", {"guaranteed_gpus": 17}, "guaranteed 17 GPUs together, and it is guaranteed 16.*--guaranteed 17"),
        ("org", {"guaranteed_gpus": 7}, "queue.guaranteed_gpus.*8 GPUs together, and it is guaranteed 7"),
        ("org", {"max_gpus": 15}, "is 16, but it may hold at most 15"),
        ("big", {"parent": "queues/org"}, "would be guaranteed 20 GPUs together"),
        ("free", {"max_gpus": 3}, "would be guaranteed 4 GPUs together, and it may hold at most 3"),
        ("team", {"lending_limit_gpus": -1}, "queue.lending_limit_gpus"),
        ("team", {"guaranteed_gpus": 10**9}, "queue.guaranteed_gpus"),
    ],
)
async def test_what_no_tree_can_be_is_refused_and_nothing_moves(world, queue, change, said):
    await tree_of(
        world,
        org={"guaranteed_gpus": 16},
        team={"parent": "org", "guaranteed_gpus": 8},
        big={"guaranteed_gpus": 12},
        free={},
        small={"parent": "free", "guaranteed_gpus": 4},
    )
    before = (await world.store.list("", limit=1)).revision
    with pytest.raises(StatusError, match=said):
        await update_queue(world, queue, paths=tuple(change), **change)
    assert (await world.store.list("", limit=1)).revision == before


async def test_a_tree_has_at_most_eight_levels(world):
    for at in range(8):
        await tree_of(world, **{f"q{at}": {"parent": f"q{at - 1}" if at else ""}})
    with pytest.raises(StatusError, match="9 queues above one another; use at most 8"):
        await tree_of(world, q8={"parent": "q7"})
    await tree_of(world, top={})
    with pytest.raises(StatusError, match="9 queues above one another"):
        await update_queue(world, "q0", paths=("parent",), parent="queues/top")


async def test_a_queue_with_queues_below_it_stays(world):
    await tree_of(world, org={}, team={"parent": "org"}, other={"parent": "org"})
    with pytest.raises(FailedPrecondition, match="queues/other and 1 more are below queues/org"):
        await delete_queue(world, "org")
    await delete_queue(world, "other")
    await update_queue(world, "team", paths=("parent",))
    await delete_queue(world, "org")


@pytest.mark.parametrize("first", ["child", "deletion"])
@pytest.mark.parametrize("made", [True, False])
async def test_a_queue_that_is_deleted_while_another_is_put_below_it(world, first, made):
    """Whoever comes first, no queue is left below one that is gone."""
    await tree_of(world, org={}, **({} if made else {"team": {}}))

    def child():
        if made:
            return tree_of(world, team={"parent": "org"})
        return update_queue(world, "team", paths=("parent",), parent="queues/org")

    held = HeldCommits(world.store)
    before = asyncio.create_task(world.submit(1))
    await until(lambda: held.waiting, "the store is busy")
    calls = {"child": child, "deletion": lambda: delete_queue(world, "org")}
    tasks = []
    for name in sorted(calls, key=lambda name: name != first):
        tasks.append(asyncio.create_task(calls[name]()))
        for _ in range(20):
            await asyncio.sleep(0)  # it waits for the store
    held.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await before
    assert sum(isinstance(result, StatusError) for result in results) == 1
    gone = await world.store.get(keys.QUEUES + "org") is None
    team = await world.store.get(keys.QUEUES + "team")
    assert gone == (team is None or not pb.Queue.FromString(team.value).parent)


async def test_two_that_together_take_more_than_there_is_guaranteed(world):
    """Each fits alone; of the two the later is refused."""
    await tree_of(world, org={"guaranteed_gpus": 8}, a={"parent": "org"}, b={"parent": "org"})
    held = HeldCommits(world.store)
    before = asyncio.create_task(world.submit(1))
    await until(lambda: held.waiting, "the store is busy")
    paths = ("guaranteed_gpus",)
    tasks = [asyncio.create_task(update_queue(world, id_, paths=paths, guaranteed_gpus=5)) for id_ in "ab"]
    for _ in range(20):
        await asyncio.sleep(0)  # both have looked
    held.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await before
    assert sum(isinstance(result, StatusError) for result in results) == 1


async def test_a_request_that_is_repeated_makes_one_queue(world):
    queue = pb.Queue(weight=2.0, guaranteed_gpus=4, lending_limit_gpus=0)
    request = pb.CreateQueueRequest(queue_id="twice", queue=queue, request_id="r1")
    made = await world.scheduler.CreateQueue(request, None)
    assert (await world.scheduler.CreateQueue(request, None)).etag == made.etag
    assert made.HasField("lending_limit_gpus")
    request.queue.ClearField("lending_limit_gpus")
    with pytest.raises(StatusError, match="whaleflux queue set twice"):
        await world.scheduler.CreateQueue(request, None)


@pytest.mark.parametrize("prefix", [keys.RAY_CLUSTERS, keys.RESERVATIONS, keys.QUEUES])
async def test_a_record_that_cannot_be_read_may_be_of_the_queue_which_stays(world, prefix):
    await create_queue(world, "q")
    await world.store.commit(Put(prefix + "newer", b"\xff"))
    with pytest.raises(FailedPrecondition, match=f"{prefix}newer cannot be read") as refused:
        await delete_queue(world, "q")
    assert refused.value.reason == "RECORD_UNREADABLE"
    assert await world.store.get(keys.QUEUES + "q") is not None
