"""Guaranteed capacity through the plan: what is borrowed makes room, as much as is needed, and nothing comes and goes in circles."""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import FakeCheckpoint, World, node
from tests.support.virtual_time import LoopClock
from whaleflux import names
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import checkpoint_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import saved_checkpoints
from whaleflux_scheduler.core.model import JobState, Queue
from whaleflux_scheduler.core.queue_shares import PastUse, QueueShares
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

DAY_S = 86_400.0


def queues(**guaranteed):
    return {id_: Queue(names.queue(id_), guaranteed_gpus=gpus) for id_, gpus in guaranteed.items()}


def submission(name, queue, at_s, gpus, run_s, priority=0):
    return Submission(names.job(queue, name), Spec(command=("x",), gpus=gpus, priority=priority), at_s, run_s)


def simulated(fleet, jobs, tree):
    """Outcomes by job id; a suspended job saves its work."""
    delays = Delays(start_s=1.0, save_s=1.0, restart_s=0.0)
    result = Simulation(fleet, Workload(sorted(jobs, key=lambda job: job.at_s), tree, delays)).run(50 * DAY_S)
    return {names.last(one.name): one for one in result.outcomes}


def test_a_guarantee_is_taken_back_whatever_the_priority_and_no_more_than_it():
    """Four guests hold all; the owner's gang needs one node, and one guest makes room."""
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission(f"guest{at}", "guests", at, 4, 5000, priority=50) for at in range(4)]
    jobs.append(submission("gang", "owner", 100, 4, 1000))
    jobs.append(submission("second", "owner", 101, 4, 1000))  # beyond the guarantee: it waits
    seen = simulated(fleet, jobs, queues(guests=0, owner=4))
    assert seen["gang"].wait_s < 10
    assert seen["second"].wait_s > 900
    assert sum(seen[f"guest{at}"].suspensions for at in range(4)) == 1
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())


def test_what_is_reclaimed_makes_room_for_the_shape():
    """The owner's eight GPUs have to be two whole nodes: guests of one GPU each leave these, and no others."""
    fleet = [node(f"s/{at}") for at in range(3)]
    guests = [submission(f"guest{at:02}", "guests", 0, 1, 5000) for at in range(12)]
    gang = replace(submission("gang", "owner", 100, 8, 100), spec=Spec(command=("x",), gpus=8, max_nodes=2))
    seen = simulated(fleet, [*guests, gang], queues(guests=0, owner=8))
    assert seen["gang"].wait_s < 10
    assert sum(one.suspensions for one in seen.values()) == 8


def test_who_would_borrow_takes_nothing_guaranteed_in_its_own_queue_either():
    """Else the guest stops the gang by priority, the gang the small one, and the small one the guest by guarantee, for ever."""
    fleet = [node(f"s/{at}") for at in range(4)]
    jobs = [submission("guest", "guests", 0, 8, 4000, priority=2), submission("small", "owner", 5, 2, 1000)]
    jobs += [
        submission("gang", "owner", 10, 8, 4000, priority=1),
        submission("urgent", "owner", 20, 4, 500, priority=1),
    ]
    seen = simulated(fleet, jobs, queues(guests=0, owner=4))
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())
    assert {id_: one.suspensions for id_, one in seen.items()} == {"guest": 0, "small": 0, "gang": 0, "urgent": 0}
    assert seen["gang"].start_s >= seen["small"].end_s


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 3000),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(100, 4000),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_all_jobs_end_and_who_stays_within_its_guarantee_waits_for_nobody(drawn):
    """Jobs of `d` never ask for more than d is guaranteed, and come when all else is full: they start at once, and stay."""
    fleet = [node(f"s/{at}") for at in range(4)]
    tree = queues(a=4, b=4, c=0, d=8)
    jobs = [submission(f"j{at}", *one) for at, one in enumerate(drawn)]
    jobs += [submission(f"d{at}", "d", 1000 + 2500 * at, 4, 2000) for at in range(2)]
    seen = simulated(fleet, jobs, tree)
    assert all(one.state is JobState.SUCCEEDED for one in seen.values())
    mine = [seen[f"d{at}"] for at in range(2)]
    assert [one.suspensions for one in mine] == [0, 0]
    assert max(one.wait_s for one in mine) < 60


def test_a_new_leader_knows_what_queues_are_due():
    old, new = QueueShares(DAY_S), QueueShares(DAY_S)
    past = (PastUse("a", 8, 0.0, DAY_S), PastUse("b", 8, 0.0, DAY_S / 2), PastUse("a", 4, DAY_S, 2 * DAY_S))
    for shares in (old, new):
        shares.set_queues(queues(a=2, b=0))
    new.now_s = 2 * DAY_S
    new.recall(past)
    assert new.now_s == 2 * DAY_S
    assert new.use("a").held == 0
    assert new.use("a").score == pytest.approx((6 * 0.25 + 2 * 0.5) / 2)
    assert new.turn("b", 1, 0) < new.turn("a", 9, 0)


async def test_of_two_victims_the_one_that_saved_last_makes_room():
    async with World() as world:
        await world.add(node("a/n1"), node("a/n2"))
        first = await world.submit(4)
        await world.reaches(first, "RUNNING")
        second = await world.submit(4)
        await world.reaches(second, "RUNNING")
        kept = checkpoint_pb2.Checkpoint(
            name=f"{first}/checkpoints/c1", state=checkpoint_pb2.CHECKPOINT_STATE_COMMITTED
        )
        kept.commit_time.FromDatetime(world.clock.now() + timedelta(seconds=5))
        world.checkpoint.kept.append(kept)
        await world.clock.sleep(90.0)
        urgent = await world.submit(4, priority=5)
        await world.reaches(urgent, "RUNNING")
        assert (await world.job(second)).state == pb.JOB_STATE_RUNNING
        assert (await world.job(first)).state == pb.JOB_STATE_QUEUED


async def test_the_checkpoints_are_asked_for_of_those_alone_that_run_and_may_be_stopped():
    async with World() as world:
        await world.add(node("a/n1"))
        ended = await world.submit(1, job_id="ended")
        await world.reaches(ended, "RUNNING")
        world.agents["sites/a/nodes/n1"].exit()
        await world.reaches(ended, "SUCCEEDED")
        runs = await world.submit(1, job_id="runs")
        await world.reaches(runs, "RUNNING")
        serves = await world.submit(1, job_id="serves", kind=pb.JOB_KIND_SERVICE)
        await world.reaches(serves, "RUNNING")
        waits = await world.submit(4, job_id="waits")
        await world.reaches(waits, "QUEUED")
        world.checkpoint.listed.clear()
        await world.clock.sleep(100.0)
        assert set(world.checkpoint.listed) == {runs}


async def test_of_many_jobs_some_are_asked_about_at_a_time_and_each_in_its_turn():
    jobs = [f"queues/q/jobs/j{n}" for n in range(2 * saved_checkpoints.MOST_ASKED)]
    checkpoint, told, clock = FakeCheckpoint(), [], LoopClock()
    for name in jobs:
        kept = checkpoint_pb2.Checkpoint(name=f"{name}/checkpoints/c", state=checkpoint_pb2.CHECKPOINT_STATE_COMMITTED)
        kept.commit_time.FromDatetime(clock.now())
        checkpoint.kept.append(kept)
    asks = saved_checkpoints.SavedCheckpoints(told.append, checkpoint, lambda: jobs, clock)
    for known in (saved_checkpoints.MOST_ASKED, len(jobs)):
        await clock.sleep(30.0)
        checkpoint.listed.clear()
        await asks.look()
        assert len(checkpoint.listed) == saved_checkpoints.MOST_ASKED and len(told[-1]) == known
    del jobs[1:]
    await asks.look()
    assert told[-1].keys() == {jobs[0]} and len(told) == 3


async def test_a_queue_shows_what_it_holds_and_borrows():
    async with World() as world:
        await world.add(node("a/n1"))
        for id_, queue in {
            "org": pb.Queue(guaranteed_gpus=2),
            "team": pb.Queue(parent="queues/org", weight=2.0),
        }.items():
            await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id=id_, queue=queue), None)
        running = await world.submit(3, queue="team")
        await world.reaches(running, "RUNNING")
        await world.caught_up()
        listed = (await world.scheduler.ListQueues(pb.ListQueuesRequest(), None)).queues
        use = {names.last(queue.name): (queue.use.held_gpus, queue.use.borrowed_gpus) for queue in listed}
        assert use == {"default": (0, 0), "org": (3, 1), "team": (3, 3)}
        shown = await world.scheduler.GetQueue(pb.GetQueueRequest(name="queues/team"), None)
        assert 1.4 < shown.use.fair_share_gpus < 1.6


def elastic(name, queue, at_s, gpus, run_s, least, most, priority=0):
    spec = Spec(
        command=("x",), gpus=gpus, priority=priority, elastic_min=least, elastic_max=most, checkpoint_every_steps=10
    )
    return Submission(names.job(queue, name), spec, at_s, run_s)


class TestElastic:
    """What a job has grown beyond its queue's guarantee is borrowed, and the guarantee stays its own."""

    def test_growth_is_given_back_first_and_by_shrinking(self):
        fleet = [node(f"s/{at}") for at in range(3)]
        jobs = [
            elastic("grown", "guests", 0, 8, 20_000, 2, 8, priority=50),
            submission("fixed", "guests", 0, 4, 20_000),
            submission("gang", "owner", 100, 4, 1000),
        ]
        seen = simulated(fleet, jobs, queues(guests=4, owner=4))
        assert seen["gang"].wait_s < 10
        assert (seen["fixed"].suspensions, seen["grown"].suspensions >= 1) == (0, True)

    def test_what_the_guarantee_covers_is_not_taken_for_anybody(self):
        """The owner is guaranteed more than the growth: a job that is borrowed as a whole has to go, too."""
        fleet = [node(f"s/{at}") for at in range(3)]
        jobs = [
            elastic("grown", "guests", 0, 8, 3000, 2, 8),
            submission("fixed", "others", 0, 4, 3000),
            submission("gang", "owner", 100, 8, 6000),
        ]
        plan = queues(guests=4, owner=8, others=0)
        seen = simulated(fleet, jobs, plan)
        assert seen["gang"].wait_s < 10
        assert seen["fixed"].suspensions == 1
        assert seen["grown"].completion_s < 100 + 2 * 2900 + 100, "it went on with the four GPUs of its guarantee"

    def test_a_higher_priority_does_not_shrink_what_another_queue_is_guaranteed(self):
        fleet = [node("s/0")]
        jobs = [
            elastic("mine", "guests", 0, 4, 1000, 1, 4),
            submission("urgent", "others", 100, 2, 500, priority=99),
        ]
        seen = simulated(fleet, jobs, queues(guests=4, others=0))
        assert seen["mine"].suspensions == 0
        assert seen["urgent"].wait_s > 800

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.integers(0, 3000),
                st.sampled_from([1, 2, 4, 8]),
                st.integers(100, 4000),
                st.booleans(),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=20,
        )
    )
    def test_all_jobs_end_beside_elastic_ones_and_who_stays_within_its_guarantee_waits_for_nobody(self, drawn):
        fleet = [node(f"s/{at}") for at in range(4)]
        jobs = [
            elastic(f"j{at}", queue, at_s, gpus, run_s, max(1, gpus // 2), 16, priority)
            if grows
            else submission(f"j{at}", queue, at_s, gpus, run_s, priority)
            for at, (queue, at_s, gpus, run_s, grows, priority) in enumerate(drawn)
        ]
        jobs += [elastic(f"d{at}", "d", 1000 + 2500 * at, 4, 2000, 4, 4) for at in range(2)]
        seen = simulated(fleet, jobs, queues(a=4, b=4, c=0, d=8))
        assert all(one.state is JobState.SUCCEEDED for one in seen.values())
        mine = [seen[f"d{at}"] for at in range(2)]
        assert [one.suspensions for one in mine] == [0, 0]
        assert max(one.wait_s for one in mine) < 60
