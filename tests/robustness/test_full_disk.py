"""An agent whose disk is full keeps what runs, stays alive, and tells everything once there is room again."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small file system"),
]

SMALL = Machine("edge", "small-disk", "rtx4090x2")
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
    with small_file_system(suite.fleet.folder(SMALL.name)):
        await suite.join([SMALL])
        try:
            async with suite.client() as client:
                await _through_a_full_disk(suite, client)
        finally:
            suite.fleet.kill_node(SMALL.name)


async def _through_a_full_disk(suite: RunningSuite, client: AsyncClient) -> None:
    """One task only steps, the other saves as well; both end while the disk is full."""
    steady = await _submit(suite, client, "full-disk-steady", every=10**6)
    saver = await _submit(suite, client, "full-disk-saver", every=20)
    await until(lambda: steps_of(steady) and steps_of(saver), "both ranks step", 60)
    agent = suite.fleet.agents[SMALL.name]
    filler = fill(suite.fleet.folder(SMALL.name))
    full_at = time.monotonic()
    await asyncio.sleep(FULL_S)  # reports of saves meet the full disk
    for folder in (steady, saver):
        (folder / "finish").touch()  # and so do the results
    await until(lambda: _quiet(steady), "the steady rank has ended", 60)
    assert agent.poll() is None, "the agent ended"
    assert await ready_nodes(client, {SMALL.name}), "the node is not READY any more"
    steps = steps_of(steady)
    assert max(b.at_s - a.at_s for a, b in itertools.pairwise(steps)) < FULL_S - 1, "the steady task stood still"
    assert steps[-1].at_s > full_at + FULL_S - 1
    filler.unlink()
    for folder in (steady, saver):
        await until(partial(_ended_well, client, folder.name), "the result arrives once there is room", 60)


async def _ended_well(client: AsyncClient, job: str) -> bool:
    name = f"queues/default/jobs/{job}"
    found = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=5)
    assert found.epoch == 1, found.state_message
    return bool(found.state == scheduler_pb2.JOB_STATE_SUCCEEDED)


async def _submit(suite: RunningSuite, client: AsyncClient, job: str, every: int) -> Path:
    """Returns the folder of the rank's record."""
    folder = suite.state / job
    folder.mkdir()
    spec = scheduler_pb2.JobSpec(
        command=[sys.executable, str(SCRIPT), str(folder), "--every", str(every)],
        gpus=1,
        gpu=scheduler_pb2.GpuRequirement(any_of=["RTX4090"]),
        checkpoint=scheduler_pb2.CheckpointPolicy(keep=2),
    )
    request = scheduler_pb2.CreateJobRequest(
        parent="queues/default", job_id=job, job=scheduler_pb2.Job(spec=spec), request_id=job
    )
    await client.scheduler.CreateJob(request, timeout=20)
    return folder


async def _quiet(folder: Path) -> bool:
    """Whether no step was made for a while."""
    before = len(steps_of(folder))
    await asyncio.sleep(0.5)
    return len(steps_of(folder)) == before
