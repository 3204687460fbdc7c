"""A node falls silent without dying, its job moves on, and the node wakes up: what it still tries changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from tests.robustness import validate
from tests.robustness.history import History
from tests.robustness.recording import Traffic, state_of, truth_of
from tests.robustness.training import Training
from tests.support.suite import RunningSuite, ready_nodes, until
from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.embedded.layout import Layout
from whaleflux.embedded.processes import with_variables
from whaleflux.errors import StatusError
from whaleflux.rpc import pki, roles
from whaleflux.rpc.channel import connect
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import checkpoint_pb2, health_pb2, scheduler_pb2
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(240)]  # the first test waits for the whole run

RANKS = 2


@dataclass
class Run:
    """What the tests below look at."""

    history: History = field(default_factory=History)
    ended: scheduler_pb2.Job = field(default_factory=scheduler_pb2.Job)
    fenced_within_s: float = 0.0
    lost_while_silent: bool = False
    refused: dict[str, str] = field(default_factory=dict)  # what the old attempt tried, and why it was refused
    restored: list[tuple[int, int, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(suite) -> Run:
    return asyncio.run(_run(suite))


async def _run(suite: RunningSuite) -> Run:
    run = Run()
    began, _ = await state_of(suite.store())
    async with suite.client() as client:
        training = await Training.start(suite, client, "zombie")
        await until(training.restorable, "a checkpoint is committed", 60)
        traffic = Traffic(client, run.history, "beside-zombie")
        async with traffic.flowing():
            node = (await training.job()).attempt.tasks[1].node
            await _silence_and_wake(run, suite, client, training, node)
            run.ended = await training.finish()
            await traffic.stop_submitting()
            run.history.truth = await truth_of(suite.store(), began)
        run.restored = training.restores()
    run.history.watched.clear()  # the watch is another test's business, and this one began late
    return run


async def _silence_and_wake(run: Run, suite: RunningSuite, client: AsyncClient, training: Training, node: str) -> None:
    pids = _pids(suite, node)
    unfinished = await _begun_as_agent(suite, training, node)
    _send(pids, signal.SIGSTOP)
    try:
        run.fenced_within_s = await until(lambda: _is(client, node, health_pb2.NODE_PHASE_UNREACHABLE), "fenced", 60)
        await until(lambda: _moved_on(training), "the next attempt is placed", 60)
        run.refused = await _as_old_attempt(
            suite, training, node, unfinished
        )  # before a save of the next one clears up
        await until(lambda: training.ranks_at(epoch=2) == {0, 1}, "the next attempt steps", 60)
        run.lost_while_silent = any(t.lost for a in (await training.job()).past_attempts for t in a.tasks)
    finally:
        _send(pids, signal.SIGCONT)
    await until(lambda: ready_nodes(client, {node}), "the node is READY again", 60)
    await until(lambda: _committed(training, epoch=2), "the new attempt saves", 60)
    await until(lambda: _released(training), "the old attempt's GPUs are given back", 60)


async def _moved_on(training: Training) -> bool:
    return (await training.job()).attempt.epoch == 2


async def _committed(training: Training, epoch: int) -> bool:
    return any(c.epoch == epoch for c in await training.restorable())


@contextlib.asynccontextmanager
async def _agents_identity(suite: RunningSuite, node: str) -> AsyncIterator[CheckpointServiceStub]:
    """The checkpoint service as the agent of that node reaches it."""
    _, site, _, node_id = node.split("/")
    layout = Layout(suite.state)
    authority = pki.CertificateAuthority.load(
        (layout.pki / "ca.crt").read_bytes(), (layout.pki / "authority.key").read_bytes()
    )
    layout.tls("zombie").save(authority.issue(roles.AGENT, f"{site}/{node_id}", datetime.now(UTC)))
    async with connect(suite.context.server, layout.tls("zombie"), server=suite.context.server_name) as channel:
        yield CheckpointServiceStub(channel)


def _begin(suite: RunningSuite, job: scheduler_pb2.Job, step: int) -> checkpoint_pb2.BeginCheckpointRequest:
    location = f"{job_folder(str(suite.state), job.name, job.uid)}/{names.checkpoint_id(step, 1, 0)}"
    return checkpoint_pb2.BeginCheckpointRequest(
        job=job.name, job_uid=job.uid, epoch=1, step=step, world_size=RANKS, location=location
    )


async def _begun_as_agent(suite: RunningSuite, training: Training, node: str) -> str:
    """A checkpoint that the first attempt has begun, while it was the only one, and not finished."""
    async with _agents_identity(suite, node) as stub:
        begun = await stub.BeginCheckpoint(_begin(suite, await training.job(), 10**6), timeout=5)
    return str(begun.name)


async def _as_old_attempt(suite: RunningSuite, training: Training, node: str, unfinished: str) -> dict[str, str]:
    """What an agent that slept through the fence would still send, with that agent's own identity.

    The report is whole and right in all but its epoch: it would complete the checkpoint that the attempt has begun.
    """
    pieces = [
        checkpoint_pb2.Piece(rank=r, path=f"r{r}", size_bytes=1, checksum=f"xxh3-128:{0:032x}", tier="shared")
        for r in range(RANKS)
    ]
    report = checkpoint_pb2.ReportPiecesRequest(
        checkpoint=unfinished, epoch=1, complete_ranks=range(RANKS), pieces=pieces
    )
    begin = _begin(suite, await training.job(), 10**6 + 1)
    refused = dict[str, str]()
    async with _agents_identity(suite, node) as stub:
        for what, call, request in (("begin", stub.BeginCheckpoint, begin), ("report", stub.ReportPieces, report)):
            try:
                await call(request, timeout=5)
            except StatusError as error:
                refused[what] = error.reason
    return refused


def _pids(suite: RunningSuite, node: str) -> list[int]:
    """The agent of a node and everything that it runs."""
    agent = suite.fleet.agents[node].pid
    below = with_variables(f"WHALEFLUX_NODE={node}", f"WHALEFLUX_AGENT_SOCKET={suite.state}")
    return [agent, *(pid for pid in below if pid != agent)]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def _is(client: AsyncClient, node: str, phase: int) -> bool:
    health = await client.health.GetNodeHealth(health_pb2.GetNodeHealthRequest(name=node), timeout=5)
    return bool(health.phase == phase)


async def _released(training: Training) -> bool:
    request = scheduler_pb2.ListAllocationsRequest(page_size=5000)
    listed = await training.client.scheduler.ListAllocations(request, timeout=5)
    return not any(a.job == training.name and a.epoch == 1 for a in listed.allocations)


def test_the_silent_node_is_fenced_in_time(run):
    assert run.fenced_within_s <= 12  # 5 s of silence, and what a busy machine adds


def test_its_gpus_are_not_given_away_while_it_may_use_them(run):
    assert run.lost_while_silent
    assert validate.listed_once(run.history.listings) == []


def test_the_job_goes_on_from_a_committed_checkpoint_and_ends_well(run):
    assert run.ended.state == scheduler_pb2.JOB_STATE_SUCCEEDED, run.ended.state_message
    assert (run.ended.epoch, run.ended.restarts, run.ended.recoveries) == (2, 0, 1)
    first, second = run.restored
    assert first == (0, 1, "-")
    assert second[0] > 0
    assert second[1] == 2


def test_the_old_attempt_commits_nothing_after_its_fence(run):
    fenced_at = validate.fenced_at(run.history.truth, run.ended.name, epoch=1)
    commits = validate.commits(run.history.truth, run.ended.name)
    assert {commit.epoch for commit in commits} == {1, 2}, "both attempts saved, or this shows nothing"
    assert [commit for commit in commits if commit.epoch == 1 and commit.revision >= fenced_at] == []
    assert validate.replay(run.history.truth) == []


def test_what_the_old_attempt_sends_is_refused(run):
    assert run.refused == {"begin": "EPOCH_FENCED", "report": "EPOCH_FENCED"}


def test_nothing_else_was_harmed(run):
    assert validate.acknowledged_kept(run.history.submissions, run.history.truth) == []
