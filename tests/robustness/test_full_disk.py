"""An agent whose disk is full keeps what runs, stays alive, and tells everything once there is room again."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.robustness.recording import steps_of
from tests.robustness.training import SCRIPT
from tests.support.suite import RunningSuite, ready_nodes, until
from whaleflux.demo.fleet import Machine
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import scheduler_pb2

pytestmark = [
    pytest.mark.robustness,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small file system"),
]

SMALL = Machine("edge", "small-disk", "rtx4090x1")
FULL_S = 4.0


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as opened:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    opened.write(b"\0" * size)
            except OSError:
                continue
    return file


async def test_a_full_disk_stops_no_task_and_loses_no_result(suite):
    with small_file_system(suite.fleet._folder(SMALL.name)):
        await suite.join([SMALL])
        try:
            async with suite.client() as client:
                await _through_a_full_disk(suite, client)
        finally:
            suite.fleet.kill_node(SMALL.name)


async def _through_a_full_disk(suite: RunningSuite, client: AsyncClient) -> None:
    folder = suite.state / "full-disk"
    folder.mkdir()
    job = await _submit(client, folder)
    await until(lambda: steps_of(folder), "the rank steps", 30)
    agent = suite.fleet.agents[SMALL.name]
    filler = fill(suite.fleet._folder(SMALL.name))
    full_at = time.monotonic()
    await asyncio.sleep(FULL_S)  # saves, reports and logs meet the full disk
    (folder / "finish").touch()  # and the result too
    await until(lambda: _quiet(folder), "the rank has ended", 10)
    assert agent.poll() is None, "the agent ended"
    assert await ready_nodes(client, {SMALL.name}), "the node is not READY any more"
    steps = steps_of(folder)
    assert max(b.at_s - a.at_s for a, b in itertools.pairwise(steps)) < 2, "the task stood still"
    assert steps[-1].at_s > full_at + FULL_S - 1
    filler.unlink()

    async def ended_well() -> bool:
        found = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job), timeout=5)
        assert found.epoch == 1, found.state_message
        return bool(found.state == scheduler_pb2.JOB_STATE_SUCCEEDED)

    await until(ended_well, "the result arrives once there is room", 30)


async def _submit(client: AsyncClient, folder: Path) -> str:
    import sys

    spec = scheduler_pb2.JobSpec(
        command=[sys.executable, str(SCRIPT), str(folder), "--every", "20"],
        gpus=1,
        gpu=scheduler_pb2.GpuRequirement(any_of=["RTX4090"]),
        checkpoint=scheduler_pb2.CheckpointPolicy(every_steps=20, keep=2),
    )
    request = scheduler_pb2.CreateJobRequest(
        parent="queues/default", job_id="full-disk", job=scheduler_pb2.Job(spec=spec), request_id="full-disk"
    )
    return (await client.scheduler.CreateJob(request, timeout=20)).name


async def _quiet(folder: Path) -> bool:
    """Whether no step was made for a while."""
    before = len(steps_of(folder))
    await asyncio.sleep(0.5)
    return len(steps_of(folder)) == before
