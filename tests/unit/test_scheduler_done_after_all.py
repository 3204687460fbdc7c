"""Work that ended well counts, though its attempt was given up before anybody knew: it is not done twice."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux.v1 import health_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Cause, Job, JobState, SchedulingDecision, TaskPhase
from whaleflux_scheduler.core.observed import Diagnosis, NodeCondition, Observations, Report, Timeouts

NOW = datetime(2026, 5, 1, tzinfo=UTC)
TIMEOUTS = Timeouts()
A, B, C = (f"sites/s/nodes/{name}" for name in "abc")


@pytest.fixture
async def world():
    async with World() as world:
        yield world


def step(job, *reports, now=NOW, nodes=None, diagnosis=None):
    return lifecycle.advance(job, Observations(reports, nodes or {}, diagnosis), now, TIMEOUTS)


def say(job, phase, *, attempt=-1, **more):
    return [Report(task.id, phase, **more) for task in tuple(job.attempts())[attempt].tasks]


def placed(job, *nodes):
    where = lifecycle.GpuAssignment(tuple((name, (0, 1)) for name in nodes), usd_per_hour=3600.0)
    return lifecycle.place(job, where, SchedulingDecision(NOW, placed=True, summary="here"), NOW)


def started(job, *nodes):
    job = placed(job, *nodes)
    return step(job, *say(job, TaskPhase.ACCEPTED, rendezvous="h:1"))


def running(*nodes, **spec):
    job = Job("queues/q/jobs/j", Spec(command=("x",), gpus=2 * len(nodes), **spec), JobState.QUEUED, create_time=NOW)
    job = started(job, *nodes)
    return step(job, *say(job, TaskPhase.RUNNING))


def given_up(state):
    """A job of two nodes whose first attempt was given up, in `state`."""
    job = running(A, B)
    if state is JobState.SUSPENDING:
        return lifecycle.suspend(job, "queues/q/jobs/other", NOW)
    job = step(job, nodes={A: NodeCondition(unreachable="HEARTBEAT_LOST")})
    job = job if state is JobState.RECOVERING else lifecycle.requeue(job, "no room")
    return placed(job, C, B) if state is JobState.STARTING else job


GIVEN_UP = [JobState.RECOVERING, JobState.QUEUED, JobState.STARTING, JobState.SUSPENDING]


@pytest.mark.parametrize("state", GIVEN_UP)
def test_all_ranks_ended_well(state):
    before = given_up(state)
    assert before.state is state
    attempt = -2 if state is JobState.STARTING else -1
    first, second = say(before, TaskPhase.EXITED, attempt=attempt)
    half = step(before, first)
    assert half.state is state, "one node alone is not all ranks"
    done = step(half, second, now=NOW + timedelta(seconds=1))
    assert done.state is JobState.SUCCEEDED
    assert done.state_message == "all ranks ended well in attempt 1, which had been given up"
    record = next(done.attempts())
    assert record.end_reason.startswith("done: all ranks ended well, though it was given up (")
    assert done.end_time == NOW + timedelta(seconds=1)
    assert all(attempt.end_time is not None for attempt in done.attempts())


def test_a_second_attempt_costs_what_it_held_until_the_first_had_done_it_all():
    first, second = say(given_up(JobState.STARTING), TaskPhase.EXITED, attempt=-2)
    done = step(given_up(JobState.STARTING), first, second, now=NOW + timedelta(seconds=1))
    assert done.state is JobState.SUCCEEDED
    assert done.cost_usd == pytest.approx(1.0), "the second attempt held its GPUs for a second"


@pytest.mark.parametrize("state", GIVEN_UP)
@pytest.mark.parametrize("end", [{"phase": TaskPhase.KILLED}, {"phase": TaskPhase.EXITED, "exit_code": 1}])
def test_what_was_stopped_or_failed_is_done_again(state, end):
    before = given_up(state)
    attempt = next(before.attempts())
    reports = [Report(attempt.tasks[0].id, TaskPhase.EXITED), Report(attempt.tasks[1].id, **end)]
    assert step(before, *reports).state is not JobState.SUCCEEDED


def test_a_later_attempt_that_has_started_counts_alone():
    job = given_up(JobState.STARTING)
    job = step(job, *say(job, TaskPhase.ACCEPTED, rendezvous="h:2"))
    assert job.attempt.started
    assert step(job, *say(job, TaskPhase.EXITED, attempt=-2)).state is JobState.STARTING
    job = step(job, *say(job, TaskPhase.RUNNING))
    assert step(job, *say(job, TaskPhase.EXITED, attempt=-2)).state is JobState.RUNNING


def test_attempts_that_never_started_do_not_hide_the_last_that_did():
    job = given_up(JobState.STARTING)
    job = step(job, Report(job.attempt.tasks[0].id, TaskPhase.REFUSED, message="no room on its disk"))
    assert job.state is JobState.RECOVERING
    job = step(job, diagnosis=Diagnosis(job.epoch))
    assert step(job, *say(job, TaskPhase.EXITED, attempt=-2)).state is JobState.SUCCEEDED


def test_a_service_never_is_done():
    job = step(running(A, kind=JobKind.SERVICE), nodes={A: NodeCondition(unreachable="HEARTBEAT_LOST")})
    assert step(job, *say(job, TaskPhase.EXITED)).state is JobState.RECOVERING


def test_a_cancelled_job_stays_cancelled():
    job = lifecycle.cancel(given_up(JobState.QUEUED), Cause("request", "", "not needed"), NOW)
    assert step(job, *say(job, TaskPhase.EXITED)).state is JobState.CANCELLED


def test_a_large_attempt_of_which_only_some_tasks_are_kept_is_not_taken_for_whole():
    job = given_up(JobState.STARTING)
    (past,) = job.past_attempts
    job = replace(job, past_attempts=(replace(past, tasks=past.tasks[:1]),))
    assert step(job, Report(past.tasks[0].id, TaskPhase.EXITED)).state is JobState.STARTING


def test_how_a_rank_ended_is_still_known_when_its_node_is_retired():
    job = running(A, B)
    first, second = say(job, TaskPhase.EXITED)
    job = step(job, first)
    job = step(job, nodes={A: NodeCondition(retired=True)})
    assert job.state is JobState.RUNNING
    assert step(job, second).state is JobState.SUCCEEDED


@pytest.mark.parametrize("another", [False, True], ids=["no other node", "placed elsewhere, not started"])
async def test_an_agent_that_was_away_while_its_work_ended_well(world, another):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    (task,) = a.tasks
    await a.disconnect()
    world.phase(a.node, health_pb2.NODE_PHASE_UNREACHABLE, "HEARTBEAT_LOST")
    await world.reaches(name, "QUEUED")
    if another:
        (b,) = await world.add(node("s/b"))
        b.obey = False  # it never accepts
        await world.reaches(name, "STARTING")
        await until(lambda: b.tasks, "it is asked")
    a.report(task, pb.TASK_PHASE_EXITED, 0)  # nobody hears it: it is said again when the agent is back
    await a.connect()
    job = await world.reaches(name, "SUCCEEDED")
    assert job.end_time.ToSeconds() > 0
    if another:
        await until(lambda: not b.tasks, "the second attempt is called off")

    async def free():
        return not [
            x
            for x in (await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)).allocations
            if x.task.node == a.node
        ]

    await until(free, "its GPUs are free")
