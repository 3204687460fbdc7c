"""A Ray cluster of the fleet: up, a program through `ray job submit`, workers for its tasks on simulated GPUs, idle and gone, down. Real Ray, real suite.

Needs Ray in an environment of its own (`make ray`); skipped without.
"""

import os
import subprocess
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.errors import NotFound
from whaleflux.v1 import scheduler_pb2 as pb

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-ray" / "bin" / "python"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed: make ray"),
]
WITHIN_S = 240.0  # Ray's own start takes half a minute on a busy host
NAME = "rayClusters/rl"
PROGRAM = """
import ray
ray.init()
@ray.remote(num_cpus=1, resources={"gpu_memory": 15000})
def where(): import time; time.sleep(2); return ray.get_runtime_context().get_node_id()
print("nodes", len(set(ray.get([where.remote() for _ in range(4)], timeout=200))))
"""


async def cluster(client):
    return await client.scheduler.GetRayCluster(pb.GetRayClusterRequest(name=NAME), timeout=5)


async def is_up(client):
    """Once the head is read; fails with all that was said of it until then."""
    said = dict[str, None]()

    async def there():
        status = (await cluster(client)).status
        said[status.message] = None
        return status.nodes == 1 and not status.stale and status.dashboard

    try:
        await until(there, "the head answers", WITHIN_S, 0.5)
    except AssertionError as late:
        raise AssertionError(f"{late}: {list(said)}") from None


async def workers(client):
    return [part for part in (await cluster(client)).status.parts if part.role == pb.RAY_ROLE_WORKER]


def ray(*words, **environment):
    """The output of Ray's own command line, unmodified."""
    done = subprocess.run(
        [PYTHON.with_name("ray"), *words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(folder, dashboard):
    """The program through `ray job submit`."""
    return subprocess.Popen(
        [PYTHON.with_name("ray"), "job", "submit", "--working-dir", folder, "--", PYTHON, "program.py"],
        env={**os.environ, "RAY_API_SERVER_ADDRESS": f"http://{dashboard}"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


async def test_a_cluster_follows_a_program_and_leaves_nothing(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with running_suite() as suite:
        await suite.join([Machine("edge", f"rtx-{n}", "rtx4090x2") for n in ("a", "b")])
        async with suite.client() as client:
            asked = pb.RayCluster(max_gpus=4, python=str(PYTHON), head_cpu_millicores=1000)
            asked.idle.CopyFrom(Duration(seconds=8))
            request = pb.CreateRayClusterRequest(ray_cluster_id="rl", ray_cluster=asked, request_id="once")
            await client.scheduler.CreateRayCluster(request, timeout=10)

            await is_up(client)
            status = (await cluster(client)).status
            submitted = submit(tmp_path, status.dashboard)
            try:
                await until(lambda: workers(client), "workers are started", WITHIN_S, 0.5)
                first = {part.job for part in await workers(client)}
                assert (
                    "launching" in ray("status", "--address", status.address)
                    or (await cluster(client)).status.nodes > 1
                )
                output, _ = submitted.communicate(timeout=WITHIN_S)
            finally:
                submitted.kill()
                submitted.wait()
            assert submitted.returncode == 0 and "nodes 4" in output, output[-3000:]
            seen = {part.job for part in await workers(client)} | first
            assert len(seen) <= 4, "a task for each GPU: no worker twice"

            async def all_left():
                found = await cluster(client)
                return (
                    not [part for part in found.status.parts if part.role == pb.RAY_ROLE_WORKER]
                    and found.status.nodes == 1
                )

            await until(all_left, "idle workers leave", WITHIN_S, 0.5)
            await client.scheduler.DeleteRayCluster(pb.DeleteRayClusterRequest(name=NAME), timeout=10)

            async def gone():
                try:
                    await cluster(client)
                except NotFound:
                    return True
                return False

            await until(gone, "it is gone", WITHIN_S, 0.5)
            jobs = await client.scheduler.ListJobs(pb.ListJobsRequest(parent="queues/default"), timeout=5)
            assert not jobs.jobs, "no job of it is left"
