"""The elastic demo's first half: a Ray cluster's queue grows, a training lends it GPUs and has them back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux import names
from whaleflux.demo.suite import within
from whaleflux.demo.training import Say, until
from whaleflux.errors import Unavailable
from whaleflux.manifests.ray_file import ray_from_yaml
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import scheduler_pb2 as pb

LENT_GPUS = 2


@dataclass(slots=True)
class Sizes:
    """How many GPUs the training had, and since when; seconds on this process's clock."""

    job: pb.Job
    seen: list[tuple[float, int]] = field(default_factory=list)

    @property
    def now(self) -> int:
        """GPUs of the attempt that runs; 0 between attempts."""
        return self.seen[-1][1] if self.seen else 0


async def watch_sizes(client: AsyncClient, sizes: Sizes, say: Say) -> None:
    """Follows the training for ever, and says each change of its size."""
    said = 0
    async for job in client.follow_job(sizes.job.name):
        gpus = sum(len(task.gpu_uuids) for task in job.attempt.tasks) if job.state == pb.JOB_STATE_RUNNING else 0
        sizes.job = job
        if gpus == sizes.now:
            continue
        sizes.seen.append((time.monotonic(), gpus))
        if gpus and gpus != said:
            say(f"      the training runs with {gpus} GPUs" + f", {said} before" * bool(said))
            said = gpus


@dataclass(slots=True)
class Lent:
    """What was seen of the Ray cluster; seconds after its program had queued its tasks, -1: never."""

    tasks: int
    asked_at: float = 0.0
    first_worker_s: float = -1.0
    training_shrank_s: float = -1.0
    program_done_s: float = -1.0
    workers_gone_s: float = -1.0
    most_worker_gpus: int = 0
    program_said: str = ""


async def lend(client: AsyncClient, ray_python: Path, example: Path, sizes: Sizes, tasks: int, say: Say) -> Lent:
    """A cluster without a worker, an ordinary program on it, and what follows until the cluster is idle again."""
    cluster = await _up(client, ray_python, example, say)
    lent = Lent(tasks)
    async with _program(ray_python, example, cluster, tasks) as process:
        assert process.stdout is not None
        if (await within(process.stdout.readline(), 90, "the Ray program to queue its tasks")).strip() != b"queued":
            raise Unavailable("the Ray program did not reach its cluster; see what it printed above")
        lent.asked_at = time.monotonic()
        say(f"RAY   an unmodified program queues {tasks} tasks, each for a whole H200; the cluster has no worker")
        watching = asyncio.create_task(_watch(client, cluster.name, sizes, lent, say))
        try:
            lent.program_said = (
                (await within(process.stdout.read(), 180, "the end of the Ray program")).decode().strip()
            )
            lent.program_done_s = time.monotonic() - lent.asked_at
            say(f"      the program has ended: {lent.program_said or 'it said nothing; see above'}")
            await until(lambda: lent.workers_gone_s >= 0 or watching.done(), "the idle workers to leave", 90)
            if watching.done():
                watching.result()
        finally:
            watching.cancel()
    say("      its workers were idle and have left; their GPUs are everybody's")
    return lent


async def _up(client: AsyncClient, ray_python: Path, example: Path, say: Say) -> pb.RayCluster:
    manifest = ray_from_yaml((example / "ray.yaml").read_text())
    manifest.cluster.python = str(ray_python)
    request = pb.CreateRayClusterRequest(
        ray_cluster_id=manifest.cluster_id, ray_cluster=manifest.cluster, request_id=names.ulid()
    )
    found: pb.RayCluster = await client.scheduler.CreateRayCluster(request, timeout=20)

    async def heard() -> None:
        while not found.status.address or found.status.stale:
            await asyncio.sleep(0.2)
            found.CopyFrom(await client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=found.name), timeout=10))

    await within(heard(), 120, f"the head of {found.name}")
    say(f"UP    {found.name}: its head runs at {found.status.address}, without a worker")
    return found


@contextlib.asynccontextmanager
async def _program(
    ray_python: Path, example: Path, cluster: pb.RayCluster, tasks: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Whatever happens, it is ended with all that it started."""
    process = await asyncio.create_subprocess_exec(
        str(ray_python), str(example / "evaluate.py"), "--tasks", str(tasks),
        env={**os.environ, "RAY_ADDRESS": cluster.status.address},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _watch(client: AsyncClient, name: str, sizes: Sizes, lent: Lent, say: Say) -> None:
    before = sizes.now
    while True:
        found = await client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=name), timeout=10)
        passed = time.monotonic() - lent.asked_at
        workers = [part for part in found.status.parts if part.role == pb.RAY_ROLE_WORKER]
        if lent.training_shrank_s < 0 and 0 < sizes.now < before:
            lent.training_shrank_s = passed
        if workers and lent.first_worker_s < 0:
            lent.first_worker_s = passed
            say(f"      {len(workers)} worker(s) are on their way, {passed:.1f} s after the tasks were queued")
        lent.most_worker_gpus = max(lent.most_worker_gpus, found.status.gpus)
        if lent.program_done_s >= 0 and not workers and lent.workers_gone_s < 0:
            lent.workers_gone_s = passed
        await asyncio.sleep(0.2)
