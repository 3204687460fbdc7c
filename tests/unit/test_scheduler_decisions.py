"""What was decided about a job, over time: kept beside its record, bounded, the same whoever leads, and read with `explain --history`."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from whaleflux.store import keys
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import decision_records
from whaleflux_scheduler.core import decision_history
from whaleflux_scheduler.core.decision_history import MOST, DecisionKind, Noted, kind_of_wait
from whaleflux_scheduler.core.model import SchedulingDecision


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def told(world, name):
    """(kind, message, attempt, position), oldest first."""
    answer = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name, history=True), None)
    times = [one.time.ToNanoseconds() for one in answer.history]
    assert times == sorted(times)
    return [
        (pb.DecisionKind.Name(one.kind).removeprefix("DECISION_KIND_"), one.message, one.attempt, one.position)
        for one in answer.history
    ]


def kinds(history):
    return [kind for kind, *_ in history]


async def decisions_stored(world):
    return (await world.store.list(keys.JOB_DECISIONS)).entries


async def test_each_decision_about_a_job_is_told_with_its_time_and_reason(world):
    (a,) = await world.add(node("s/a"))
    first = await world.submit(4)
    await world.reaches(first, "RUNNING")
    before = await world.submit(4)
    low = await world.submit(4)
    await world.clock.sleep(60)
    a.exit(0)
    await world.reaches(before, "RUNNING")
    a.exit(0)
    await world.reaches(low, "RUNNING")
    high = await world.submit(4, priority=5)
    await world.reaches(high, "RUNNING")
    await world.clock.sleep(60)
    history = await told(world, low)
    assert kinds(history) == ["WAITS", "PLACED", "RUNS", "PREEMPTED", "WAITS"]
    assert history[0][3] == 2, "its position in the queue then"
    assert history[1][1:3] == ("4 x H100-80GB on 1 node, site s", 1)
    assert history[3][1] == f"makes room for {high}"
    made_room = await told(world, high)
    assert kinds(made_room) == ["MAKES_ROOM", "PLACED", "RUNS"]
    assert made_room[0][1] == f"4 GPUs on 1 node, stops {low}"


async def test_holds_and_priorities_are_told(world):
    await world.add(node("s/a"))
    name = (await world.create(8, wait_for_capacity=True)).name
    await world.clock.sleep(1)
    await world.scheduler.HoldJob(pb.HoldJobRequest(name=name, reason="data is wrong"), None)
    await world.clock.sleep(1)
    await world.scheduler.SetJobPriority(pb.SetJobPriorityRequest(name=name, priority=3), None)
    await world.clock.sleep(1)
    await world.scheduler.ReleaseJob(pb.ReleaseJobRequest(name=name), None)
    await world.clock.sleep(10)
    history = [(kind, message) for kind, message, *_ in await told(world, name) if kind != "WAITS"]
    assert [kind for kind, _ in history] == ["HELD", "PRIORITY_CHANGED", "RELEASED"]
    assert history[0][1].endswith(": data is wrong")
    assert history[1][1] == "from 0 to 3"


async def test_a_new_leader_goes_on_where_the_last_one_ended_and_makes_up_for_what_it_did_not_write(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    await world.restart()  # before anything was written down
    assert kinds(await told(world, name)) == ["PLACED", "RUNS"]
    assert not await decisions_stored(world)
    a.exit(1, message="no")
    await until(lambda: decisions_stored(world), "it is written down")
    await world.reaches(name, "RUNNING")
    await world.clock.sleep(3)
    await world.restart()
    a.exit(0)
    await world.reaches(name, "SUCCEEDED")
    await world.clock.sleep(3)
    history = [(kind, attempt) for kind, _, attempt, _ in await told(world, name) if kind != "WAITS"]
    assert history == [
        ("PLACED", 1), ("RUNS", 1), ("INTERRUPTED", 1), ("PLACED", 2), ("RUNS", 2), ("ENDED", 2),
    ]  # fmt: skip


async def test_waiting_jobs_cost_few_writes_and_short_waits_none(world):
    (a,) = await world.add(node("s/a"))
    await world.reaches(await world.submit(4), "RUNNING")
    for _ in range(5):
        await world.submit(4)
    await world.clock.sleep(5)
    assert len(await decisions_stored(world)) == 6, "the one that runs, and five that wait"
    before = (await world.store.list("", limit=1)).revision
    for _ in range(60):  # rounds in which nothing changes for them
        a.step("queues/default/jobs/nobody", 1, 1, 0.0)
        world.phase("sites/s/nodes/a", world.phases["sites/s/nodes/a"].phase)
        await world.clock.sleep(1)
    assert (await world.store.list("", limit=1)).revision == before


async def test_what_was_decided_goes_with_the_job(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4, job_id="mine")
    await world.reaches(name, "RUNNING")
    a.exit(0)
    await world.reaches(name, "SUCCEEDED")
    await until(lambda: decisions_stored(world), "it is written down")
    await world.clock.sleep(3)
    await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
    await world.clock.sleep(5)
    assert not await decisions_stored(world)
    again = await world.submit(4, job_id="mine")
    await world.reaches(again, "RUNNING")
    assert kinds(await told(world, again)) == ["PLACED", "RUNS"]


NOTED = st.builds(
    Noted,
    st.datetimes(),
    st.sampled_from(DecisionKind),
    st.just("m"),
    st.integers(0, 3),
)


class TestJoining:
    @given(st.lists(NOTED, max_size=80), st.lists(NOTED, max_size=80))
    @settings(max_examples=60, deadline=None)
    def test_it_is_bounded_in_order_and_the_same_when_told_twice(self, first, second):
        once = decision_history.joined((), first)
        both = decision_history.joined(once, second)
        assert len(both) <= MOST
        assert list(both) == sorted(both, key=lambda one: one.time)
        assert decision_history.joined(both, both) == both, "a write that was repeated"
        later = [replace(one, message="told otherwise") for one in both if one.kind is DecisionKind.PLACED]
        assert decision_history.joined(both, later) == both, "an attempt is placed once"

    def test_a_reason_is_of_the_same_kind_whatever_its_numbers_and_names(self):
        def kind(summary):
            return kind_of_wait(SchedulingDecision(None, False, summary))  # type: ignore[arg-type]

        one = kind("waits: queue research holds 12 of at most 16 GPUs; and more")
        assert one == kind("waits: queue research holds 9 of at most 16 GPUs")
        assert one != kind("waits: the fleet has no nodes yet")
        assert kind("waits: for queues/a/jobs/b to succeed") == kind("waits: for queues/a/jobs/c to succeed")

    def test_a_kind_of_a_newer_version_is_kept_as_none(self):
        message = pb.JobDecisions(job_uid="u", decisions=[pb.JobDecision(kind=99, message="m")])  # type: ignore[arg-type]
        assert [one.kind for one in decision_records.read(message.SerializeToString(), "u")] == [
            DecisionKind.UNSPECIFIED
        ]
        assert decision_records.read(message.SerializeToString(), "another") == ()
        assert decision_records.read(b"\xff", "u") == ()
