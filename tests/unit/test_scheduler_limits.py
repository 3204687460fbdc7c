"""Priority under a queue's limit: who is full makes room among its own, as little as will do, and nobody else does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from whaleflux import names
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.model import JobState, Queue
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

DAY_S = 86_400.0


def tree(**queues):
    return {id_: Queue(names.queue(id_), **fields) for id_, fields in queues.items()}


def submission(name, queue, at_s, gpus, run_s, priority=0, **spec):
    return Submission(names.job(queue, name), Spec(command=("x",), gpus=gpus, priority=priority, **spec), at_s, run_s)


def simulated(fleet, jobs, queues):
    """Outcomes by job id; a suspended job saves its work."""
    delays = Delays(start_s=1.0, save_s=1.0, restart_s=0.0)
    result = Simulation(fleet, Workload(sorted(jobs, key=lambda job: job.at_s), queues, delays)).run(50 * DAY_S)
    return {names.last(one.name): one for one in result.outcomes}


def suspensions(seen):
    return {id_: one.suspensions for id_, one in seen.items() if one.suspensions}


def test_a_full_queue_makes_room_for_its_own_higher_priority_while_gpus_idle():
    """Four GPUs idle, and the limit is what counts: one of the two that fill the queue leaves, which has done less, and no guest."""
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission("early", "team", 0, 4, 5000), submission("late", "team", 500, 4, 5000)]
    jobs += [submission("guest", "others", 0, 4, 9000), submission("urgent", "team", 1000, 4, 1000, priority=5)]
    seen = simulated(fleet, jobs, tree(team={"max_gpus": 8}, others={}))
    assert seen["urgent"].wait_s < 10
    assert suspensions(seen) == {"late": 1}
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())


def test_no_more_leave_than_the_limit_asks_for():
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission(f"small{at}", "team", at, 1, 5000) for at in range(8)]
    seen = simulated(fleet, [*jobs, submission("urgent", "team", 1000, 3, 100, priority=1)], tree(team={"max_gpus": 8}))
    assert seen["urgent"].wait_s < 10
    assert suspensions(seen) == {"small5": 1, "small6": 1, "small7": 1}


def test_a_limit_further_up_is_made_room_under_by_all_below_it():
    """The team itself is not full, the department above it is: a cousin leaves; the stranger, who would do too, does not."""
    queues = tree(dept={"max_gpus": 8}, team={"parent": "dept", "max_gpus": 6}, cousins={"parent": "dept"}, others={})
    fleet = [node(f"s/{at}") for at in range(3)]
    jobs = [submission("cousin", "cousins", 0, 4, 5000), submission("own", "team", 0, 4, 5000, priority=5)]
    jobs += [submission("stranger", "others", 500, 4, 5000), submission("urgent", "team", 1000, 2, 1000, priority=5)]
    seen = simulated(fleet, jobs, queues)
    assert seen["urgent"].wait_s < 10
    assert suspensions(seen) == {"cousin": 1}


def test_a_guarantee_under_a_full_limit_is_given_back_whatever_the_priority():
    queues = tree(dept={"max_gpus": 8}, team={"parent": "dept", "guaranteed_gpus": 4}, guests={"parent": "dept"})
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission(f"guest{at}", "guests", at, 4, 5000, priority=50) for at in range(2)]
    seen = simulated(fleet, [*jobs, submission("owner", "team", 1000, 4, 1000)], queues)
    assert seen["owner"].wait_s < 10
    assert sum(suspensions(seen).values()) == 1


def test_what_cannot_help_is_not_stopped():
    """The place that the gang needs is a stranger's: to stop its own would gain nothing. When the place is free, they leave."""
    fleet = [node("s/0"), node("s/1", model="A100-80GB")]
    jobs = [submission("own", "team", 0, 4, 9000, any_of=("A100-80GB",))]
    jobs += [submission("stranger", "others", 0, 4, 3000, any_of=("H100-80GB",))]
    jobs += [submission("urgent", "team", 1000, 4, 1000, priority=5, any_of=("H100-80GB",))]
    seen = simulated(fleet, jobs, tree(team={"max_gpus": 4}, others={}))
    assert 2000 <= seen["urgent"].wait_s < 2010
    assert suspensions(seen) == {"own": 1}


def test_services_and_equals_stay():
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission("serves", "team", 0, 4, 3000, kind=JobKind.SERVICE), submission("equal", "team", 0, 4, 3000, 5)]
    seen = simulated(fleet, [*jobs, submission("urgent", "team", 1000, 4, 100, priority=5)], tree(team={"max_gpus": 8}))
    assert suspensions(seen) == {}
    assert seen["urgent"].wait_s > 1900


def test_several_of_one_queue_ask_at_once_and_their_victims_leave_together():
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission(f"low{at}", "team", at, 2, 5000) for at in range(4)]
    jobs += [submission(f"high{at}", "team", 1000, 2, 500, priority=3) for at in range(3)]
    seen = simulated(fleet, jobs, tree(team={"max_gpus": 8}))
    assert max(seen[f"high{at}"].wait_s for at in range(3)) < 10
    assert suspensions(seen) == {"low1": 1, "low2": 1, "low3": 1}


def test_what_others_do_not_lend_stays_theirs_and_who_borrows_makes_room():
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission("low", "guests", 0, 8, 5000), submission("urgent", "guests", 1000, 8, 1000, priority=1)]
    jobs += [submission("owner", "team", 1500, 8, 1000)]
    seen = simulated(fleet, jobs, tree(team={"guaranteed_gpus": 8, "lending_limit_gpus": 0}, guests={}))
    assert seen["urgent"].wait_s < 10
    assert seen["owner"].wait_s < 10
    assert suspensions(seen) == {"low": 1}


JOBS = st.lists(
    st.tuples(
        st.sampled_from(["top", "a", "b", "c"]),
        st.integers(0, 3000),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(100, 4000),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
)


def limited_at_two_levels(drawn, guaranteed):
    queues = tree(
        top={"max_gpus": 10, "guaranteed_gpus": guaranteed},
        a={"parent": "top", "guaranteed_gpus": guaranteed},
        b={"parent": "top", "max_gpus": 8},
        c={"max_gpus": 8},
    )
    jobs = [submission(f"j{at}", *one) for at, one in enumerate(drawn)]
    return simulated([node(f"s/{at}") for at in range(4)], jobs, queues)


@settings(max_examples=20, deadline=None)
@given(JOBS)
def test_beside_guarantees_all_jobs_end(drawn):
    """Nobody leaves in circles."""
    assert all(one.state is JobState.SUCCEEDED for one in limited_at_two_levels(drawn, 4).values())


@settings(max_examples=20, deadline=None)
@given(JOBS)
def test_without_guarantees_all_jobs_end_and_those_of_the_highest_priority_stay(drawn):
    seen, highest = limited_at_two_levels(drawn, 0), max(one[4] for one in drawn)
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())
    assert not [id_ for id_ in suspensions(seen) if drawn[int(id_[1:])][4] == highest]


@pytest.mark.parametrize("new_leader", [False, True])
async def test_a_full_queue_through_its_doors(new_leader):
    async with World() as world:
        await world.add(node("a/n1"), node("a/n2"))
        request = pb.UpdateQueueRequest(queue=pb.Queue(name="queues/default", max_gpus=4))
        request.update_mask.paths.append("max_gpus")
        await world.scheduler.UpdateQueue(request, None)
        low = await world.submit(4)
        await world.reaches(low, "RUNNING")
        high = await world.submit(4, priority=5)
        if new_leader:
            await world.restart()
        await world.reaches(high, "RUNNING")
        await world.reaches(low, "QUEUED")
        waiting = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=low), None)
        assert waiting.decision.summary == "waits: queue default holds 4 of at most 4 GPUs"


async def limits(world, queue="default", **limits):
    request = pb.UpdateQueueRequest(queue=pb.Queue(name=f"queues/{queue}", **limits))
    request.update_mask.paths.extend(limits)
    await world.scheduler.UpdateQueue(request, None)


async def stuck(world):
    listed = await world.scheduler.ListQueues(pb.ListQueuesRequest(), None)
    return [name for queue in listed.queues for name in queue.use.stuck_jobs]


async def why(world, job):
    return (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=job), None)).decision


@pytest.mark.parametrize("limited", ["own", "above"])
async def test_a_gang_that_a_lowered_limit_can_never_hold_is_told_so_and_so_is_who_lowered_it(limited):
    async with World() as world:
        await world.add(node("a/n1"), node("a/n2"))
        for name, parent in (("top", ""), ("team", "queues/top")):
            await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id=name, queue=pb.Queue(parent=parent)), None)
        for _ in range(2):
            await world.reaches(await world.submit(4), "RUNNING")
        gang, small = await world.submit(8, queue="team"), await world.submit(4, queue="team")
        assert await stuck(world) == []

        async def promised():
            return (await world.job(gang)).HasField("claim")

        await until(promised, "it is promised a start")
        queue = {"own": "team", "above": "top"}[limited]
        await limits(world, queue, max_gpus=4)
        assert await stuck(world) == [gang], "at once"

        async def given_up():
            return not await promised()

        await until(given_up, "what is kept for it is everybody's")
        told = await why(world, gang)
        assert told.summary == (
            f"waits: 8 GPUs are asked for, and queue {queue} may hold at most 4 at once: it can never start under this limit"
        )
        assert told.smallest_change == (
            f"raise the limit: whaleflux queue set {queue} --max-gpus 8, or submit it again with at most 4 GPUs"
        )
        assert "never" not in (await why(world, small)).summary
        await limits(world, queue, max_gpus=0)
        assert await stuck(world) == []
        assert "never" not in (await why(world, gang)).summary


async def test_a_gang_beside_guarantees_that_are_not_lent_is_told_so():
    async with World() as world:
        await world.add(node("a/n1"), node("a/n2"))
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="firm"), None)
        await world.reaches(await world.submit(4), "RUNNING")
        await limits(world, "firm", guaranteed_gpus=2, lending_limit_gpus=0)
        gang = await world.submit(8)
        assert await stuck(world) == [gang]
        told = await why(world, gang)
        assert told.summary == (
            "waits: 8 GPUs are asked for, and of the fleet's 8 other queues are guaranteed 2 that they do not lend: it can never start "
            "under these limits"
        )
        assert "--lend N, or submit it again with at most 6 GPUs" in told.smallest_change
        await limits(world, "firm", guaranteed_gpus=2, lending_limit_gpus=2)
        assert await stuck(world) == []
