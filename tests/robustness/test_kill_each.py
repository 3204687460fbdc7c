"""Every part of the control plane is killed in turn while a job trains and others are submitted.

One run, recorded; the tests look at its record. Training must not notice, what was acknowledged must stay, and all
must be well soon after the part is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace

import pytest

from tests.robustness import validate
from tests.robustness.conftest import MACHINES
from tests.robustness.history import History, JobRecord, Outage
from tests.robustness.recording import Traffic, state_of, truth_of
from tests.robustness.training import EVERY, Training
from tests.support.suite import RunningSuite, ready_nodes, until
from whaleflux.embedded import etcd
from whaleflux.sdk.client import AsyncClient
from whaleflux.services import ROLES
from whaleflux.v1 import checkpoint_pb2, inventory_pb2, router_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(400)]  # the first test waits for the whole run

KILLED = (*ROLES, "etcd", "nats", "envoy")
STOPPED = ("scheduler", "etcd")
STOPPED_S = 5.0
CONVERGED_WITHIN_S = 10.0
LONGEST_GAP_S = 4.0  # between steps of 50 ms: machines that are busy schedule late
BURST = 5  # submissions that are under way when a part is killed
SUCCEEDED = scheduler_pb2.JOB_STATE_SUCCEEDED


@dataclass
class Run:
    """What the tests below look at."""

    history: History = field(default_factory=History)
    ended: scheduler_pb2.Job = field(default_factory=scheduler_pb2.Job)
    checkpoints: list[checkpoint_pb2.Checkpoint] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # of each committed checkpoint's files
    unfinished: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(suite) -> Run:
    return asyncio.run(_run(suite))


async def _run(suite: RunningSuite) -> Run:
    run = Run()
    began, _ = await state_of(suite.store())
    async with suite.client() as client:
        traffic = Traffic(client, run.history, "small")
        async with traffic.flowing():
            training = await Training.start(suite, client, "train")
            for part in KILLED:
                run.history.outages.append(await _outage(suite, client, traffic, part, _killed(suite, part)))
            for part in STOPPED:
                run.history.outages.append(await _outage(suite, client, traffic, part, _stopped(suite, part)))
            run.history.steps = training.steps()
            run.checkpoints = await training.restorable()
            run.ended = await training.finish()
            run.faults = await training.faults()
            await traffic.stop_submitting()
            run.unfinished = await _unfinished(client, run.history)
            run.history.truth = await truth_of(suite.store(), began)
            await _caught_up(run.history, began)
    return run


async def _outage(
    suite: RunningSuite, client: AsyncClient, traffic: Traffic, part: str, outage: Awaitable[Outage]
) -> Outage:
    """One part goes away with submissions under way and comes back; then all must converge."""
    burst = [asyncio.create_task(traffic.submit()) for _ in range(BURST)]
    await asyncio.sleep(0)  # they are on their way
    outage_seen = await outage
    await asyncio.gather(*burst)
    missing = await _converge(client, traffic, outage_seen.back_s + 3 * CONVERGED_WITHIN_S)
    return replace(outage_seen, converged_s=time.monotonic(), missing=missing)


async def _killed(suite: RunningSuite, part: str) -> Outage:
    """SIGKILL; back is when its successor accepts connections."""
    gently = part == "etcd" and not etcd.sound(etcd.version(etcd.find()))  # such a one may lose acknowledged writes
    began, old = time.monotonic(), suite.send(part, signal.SIGTERM if gently else signal.SIGKILL)
    await until(lambda: suite.pid(part) != old and suite.listens(part), f"{part} is started again", 90)
    return Outage(part, began, time.monotonic())


async def _stopped(suite: RunningSuite, part: str) -> Outage:
    """SIGSTOP for a while: its connections stay open and nothing answers."""
    began = time.monotonic()
    suite.send(part, signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_S)
    finally:
        suite.send(part, signal.SIGCONT)
    return Outage(f"{part} (stopped)", began, time.monotonic())


async def _converge(client: AsyncClient, traffic: Traffic, deadline_s: float) -> str:
    """Waits until everything answers, all nodes are READY and a new job has run; what is missing at the deadline."""
    try:
        await until(lambda: _answers(client), "every service answers", deadline_s - time.monotonic())
        nodes = {machine.name for machine in MACHINES}
        await until(lambda: ready_nodes(client, nodes), "all nodes READY", deadline_s - time.monotonic())
        new = ""
        while not new:
            assert time.monotonic() < deadline_s, "a new job is taken"
            new = await traffic.submit()
        await until(lambda: _state(client, new, SUCCEEDED), f"{new} ran", deadline_s - time.monotonic())
    except AssertionError as never:
        return str(never)
    return ""


async def _answers(client: AsyncClient) -> bool:
    """What `whaleflux status` asks."""
    await client.inventory.ListNodes(inventory_pb2.ListNodesRequest(), timeout=2)
    await client.scheduler.ListJobs(scheduler_pb2.ListJobsRequest(), timeout=2)
    await client.checkpoint.ListCheckpoints(checkpoint_pb2.ListCheckpointsRequest(parent="queues/-/jobs/-"), timeout=2)
    await client.router.ListModels(router_pb2.ListModelsRequest(), timeout=2)
    return True


async def _state(client: AsyncClient, name: str, state: int) -> bool:
    job = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=2)
    return bool(job.state == state)


async def _unfinished(client: AsyncClient, history: History) -> list[str]:
    """Acknowledged jobs that do not end, though each only runs `true`."""
    waiting = {made.name for made in history.submissions if made.acknowledged}

    async def all_over() -> bool:
        for name in sorted(waiting):
            if not await _state(client, name, SUCCEEDED):
                return False
            waiting.discard(name)
        return True

    try:
        await until(all_over, "all small jobs end", 60)
    except AssertionError:
        return sorted(waiting)
    return []


async def _caught_up(history: History, began: int) -> None:
    """Gives the watch time to show what the store has; what it never shows is for the validation to say."""
    due = {(c.name, c.revision) for c in history.truth if isinstance(c.value, JobRecord)}
    with contextlib.suppress(AssertionError):
        await until(lambda: due <= {(seen.name, seen.revision) for seen in history.watched}, "the watch shows all", 60)
    last = max((change.revision for change in history.truth), default=0)
    history.watched = [seen for seen in history.watched if began < seen.revision <= last]


def test_every_part_was_broken(run):
    assert [outage.part.split()[0] for outage in run.history.outages] == [*KILLED, *STOPPED]


def test_training_never_stops_and_is_never_restarted(run):
    assert {step.rank for step in run.history.steps} == {0, 1}
    assert validate.training_went_on(run.history.steps, LONGEST_GAP_S) == []
    last_outage = max(outage.back_s for outage in run.history.outages)
    assert max(step.at_s for step in run.history.steps) > last_outage


def test_the_training_job_ends_well_in_its_first_attempt(run):
    assert run.ended.state == SUCCEEDED, run.ended.state_message
    assert (run.ended.epoch, run.ended.restarts, run.ended.recoveries) == (1, 0, 0)


def test_its_checkpoints_were_committed_through_all_of_it(run):
    assert len(run.checkpoints) >= 3
    newest = max(step.step for step in run.history.steps)
    assert run.checkpoints[0].step >= newest - 4 * EVERY - EVERY * int(CONVERGED_WITHIN_S)
    assert run.faults
    assert validate.restorable(run.faults) == []


def test_all_is_well_within_ten_seconds_of_each_return(run):
    """Twice as long on a machine that is busy with other tests."""
    assert validate.converged(run.history.outages, 2 * CONVERGED_WITHIN_S) == []


def test_no_acknowledged_job_is_lost(run):
    acknowledged = [made for made in run.history.submissions if made.acknowledged]
    assert len(acknowledged) > len(KILLED)
    assert validate.acknowledged_kept(run.history.submissions, run.history.truth) == []
    assert run.unfinished == []


def test_no_gpu_is_given_twice_and_no_old_epoch_changes_anything(run):
    assert any(listing.held for listing in run.history.listings)
    assert len(run.history.truth) > len(run.history.submissions)
    assert validate.listed_once(run.history.listings) == []
    assert validate.replay(run.history.truth) == []


def test_the_watch_misses_nothing_and_repeats_nothing(run):
    assert run.history.watched
    assert validate.watch_whole(run.history.watched, run.history.truth) == []
