"""An agent dies alone, or is stopped in order, under a job that has its node to itself: the work goes on and counts."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.suite import RunningSuite, ready_nodes, until
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import health_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(300)]

LONE = Machine("lone", "a", "rtx4090x1")
AWAY_S = 8.0  # longer than the silence after which a node that died is fenced: real time is the point
JOB = "queues/default/jobs/alone"


@pytest.fixture
async def lone(suite: RunningSuite) -> AsyncIterator[DemoFleet]:
    """A site of one node, whose agent a test may stop."""
    fleet = DemoFleet(suite.state / "lone", suite.context)
    async with suite.client() as client:
        try:
            await fleet.join(client, [LONE])
            await until(lambda: ready_nodes(client, {LONE.name}), "the node is READY", 60)
            yield fleet
        finally:
            fleet.stop()


async def job(client: AsyncClient, name: str) -> scheduler_pb2.Job:
    return await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=5)


async def begin(client: AsyncClient, name: str, go: Path) -> None:
    """A job that ends well once the file `go` is there."""
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)"
    spec = scheduler_pb2.JobSpec(command=[sys.executable, "-c", code], gpus=1, sites=["lone"])
    await client.scheduler.CreateJob(
        scheduler_pb2.CreateJobRequest(
            parent="queues/default", job_id=name.rpartition("/")[2], job=scheduler_pb2.Job(spec=spec)
        ),
        timeout=5,
    )

    async def runs() -> bool:
        return (await job(client, name)).state == scheduler_pb2.JOB_STATE_RUNNING

    await until(runs, "it runs", 60)


async def phases_for(client: AsyncClient, seconds: float) -> set[str]:
    """Every phase that the lone node is seen in."""
    seen, loop = set[str](), asyncio.get_running_loop()
    ends = loop.time() + seconds
    while loop.time() < ends:
        health = await client.health.GetNodeHealth(health_pb2.GetNodeHealthRequest(name=LONE.name), timeout=5)
        seen.add(health_pb2.NodePhase.Name(health.phase).removeprefix("NODE_PHASE_"))
        await asyncio.sleep(0.1)
    return seen


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_work_that_ends_well_while_its_agent_is_away_counts(suite: RunningSuite, lone: DemoFleet, how, tmp_path):
    name, go = f"{JOB}-{how.name.lower()}", tmp_path / "go"
    async with suite.client() as client:
        await begin(client, name, go)
        agent = lone.agents[LONE.name]
        agent.send_signal(how)
        agent.wait()
        seen = await phases_for(client, AWAY_S)
        go.touch()
        lone.restart(LONE)

        async def ended() -> bool:
            return (await job(client, name)).state == scheduler_pb2.JOB_STATE_SUCCEEDED

        await until(ended, "it SUCCEEDED", 60)
        await until(lambda: ready_nodes(client, {LONE.name}), "the node is READY again", 60)
        done = await job(client, name)
    assert "SUSPECT" in seen and "UNREACHABLE" not in seen
    assert (done.epoch, done.recoveries, done.restarts) == (1, 0, 0)
