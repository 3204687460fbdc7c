"""A running job that claims another place goes on there from its checkpoint, once nobody else holds any of it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.store.api import Unchanged
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState, SchedulingDecision, Spec, TaskPhase
from whaleflux_scheduler.core.observed import NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.jobs import key_of

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "sites/s/nodes/a", "sites/s/nodes/b"
MOVE = Claim(((B, ("GPU-b",)),), (), NOW + timedelta(seconds=60), ClaimPurpose.MOVE)
FREE = Observations(claim_is_free=True)


def running(claim=MOVE):
    queued = Job("queues/q/jobs/j", Spec(command=("x",), gpus=1), JobState.QUEUED, NOW)
    placed = lifecycle.place(queued, GpuAssignment(((A, ("GPU-a",)),)), SchedulingDecision(NOW, True, "there"), NOW)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        placed = told(placed, phase)
    return lifecycle.claim_while_running(placed, claim)


def told(job, phase, code=0):
    reports = tuple(Report(task.id, phase, code, rendezvous="h:1") for task in job.attempt.tasks)
    return lifecycle.advance(job, Observations(reports), NOW, Timeouts())


def test_it_stops_for_the_place_that_it_claims_only_when_that_is_free():
    job = running()
    assert lifecycle.advance(job, Observations(), NOW, Timeouts()) is job
    going = lifecycle.advance(job, FREE, NOW, Timeouts())
    assert (going.state, going.claim, going.attempt.end_reason) == (JobState.SUSPENDING, MOVE, f"moved: moves to {B}")
    waiting = told(going, TaskPhase.KILLED, -15)
    assert (waiting.state, waiting.claim, waiting.epoch) == (JobState.QUEUED, MOVE, job.epoch + 1)


@pytest.mark.parametrize("why", [{"unreachable": "x"}, {"retired": True}, {"draining": "x"}])
def test_it_stays_where_it_is_when_that_place_is_lost(why):
    stays = lifecycle.advance(running(), replace(FREE, nodes={B: NodeCondition(**why)}), NOW, Timeouts())
    assert (stays.state, stays.claim) == (JobState.RUNNING, None)


def test_it_stays_where_it_is_when_the_place_did_not_come_free_in_time():
    late = NOW + timedelta(seconds=61)
    stays = lifecycle.advance(running(), Observations(), late, Timeouts())
    assert (stays.state, stays.claim) == (JobState.RUNNING, None)


def test_a_failure_ends_the_claim_as_it_ends_the_attempt():
    failed = told(running(), TaskPhase.EXITED, 1)
    assert (failed.state, failed.claim) == (JobState.RECOVERING, None)


def test_one_that_shrinks_for_another_keeps_what_it_goes_on_with():
    part = Claim(((A, ("GPU-a",)),), (), NOW + timedelta(seconds=60), ClaimPurpose.RESIZE)
    shrinks = lifecycle.advance(running(part), Observations(claimed_by="queues/q/jobs/high"), NOW, Timeouts())
    assert (shrinks.state, shrinks.claim) == (JobState.SUSPENDING, part)


def test_the_core_has_the_contracts_purposes_and_keeps_them_in_the_store():
    assert {purpose.name: purpose.value for purpose in ClaimPurpose} == {
        name.removeprefix("CLAIM_PURPOSE_"): value for name, value in pb.ClaimPurpose.items()
    }
    promised = replace(MOVE, purpose=ClaimPurpose.RESERVATION, start_time=NOW + timedelta(hours=1))
    message = pb.Job()
    convert.JOBS.merge(running(promised), message)
    assert convert.job_of(message).claim == promised


async def test_a_claim_in_the_record_of_a_running_job_takes_it_there():
    async with World() as world:
        await world.add(node("s/a"))
        name = await world.submit(4)
        await world.reaches(name, "RUNNING")
        await world.add(node("s/b"))
        entry = await world.store.get(key_of(name))
        stored = convert.JOBS.decode(entry)
        uuids = tuple(gpu.uuid for gpu in node("s/b").gpus[:4])
        claim = Claim(((B, uuids),), (), world.clock.now() + timedelta(seconds=60), ClaimPurpose.MOVE)
        put = convert.JOBS.put(entry.key, replace(stored.value, claim=claim), stored)
        await world.store.commit(put, when=[Unchanged(entry)])

        async def runs_again() -> pb.Job | None:
            known = await world.job(name)
            return known if known.attempt.number == 2 and known.state == pb.JOB_STATE_RUNNING else None

        moved = await until(runs_again, "it runs again")
        assert (moved.restarts, moved.HasField("claim")) == (0, False)
