"""One suite, two nodes: a plain torchrun under `launch: once` makes one world; what no node can run ends at once."""

import asyncio
import contextlib
import sys
import time

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.errors import FailedPrecondition
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import scheduler_pb2

pytestmark = pytest.mark.integration
MACHINES = (Machine("lab", "a", "rtx4090x2"), Machine("lab", "b", "rtx4090x2"))
TRAIN = """
import torch, torch.distributed as dist
from whaleflux.sdk import Checkpointer
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", total.item(), "setup", open("made").read().strip(), flush=True)
model = torch.nn.Linear(1, 1)
with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as saved:
    for step, batch in saved.steps(lambda step: torch.ones(1, 1), total=3):
        saved.report(0.5 + step)
dist.destroy_process_group()
"""
JOB = f"""
gpus: 3
nodes: {{min: 2, max: 2}}
retry: {{max_restarts: 0}}
launch: once
setup: |
  cat > train.py <<'END'
  {TRAIN.strip().replace(chr(10), chr(10) + "  ")}
  END
  echo $WHALEFLUX_NODE_RANK >> made
run: |
  echo once
  {sys.executable} -m torch.distributed.run train.py
"""


@pytest.fixture(scope="module")
def suite():
    with running_suite() as started:
        asyncio.run(started.join(MACHINES))
        yield started


async def submitted(client, text, folder, name):
    spec = job_from_yaml(text, folder).spec
    request = scheduler_pb2.CreateJobRequest(
        parent="queues/default", job_id=name, job=scheduler_pb2.Job(spec=spec), request_id=name
    )
    made = []

    async def taken():
        """Until the scheduler has heard of both nodes it says that the job could never run."""
        with contextlib.suppress(FailedPrecondition):
            made[:] = [await client.scheduler.CreateJob(request, timeout=10)]
        return bool(made)

    await until(taken, f"{name} was taken", 30)
    return made[0].name


async def ended(client, name, timeout_s):
    found = []

    async def over():
        job = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=5)
        found[:] = [job]
        return job.state in (scheduler_pb2.JOB_STATE_SUCCEEDED, scheduler_pb2.JOB_STATE_FAILED)

    await until(over, f"{name} ended", timeout_s)
    return found[0]


async def test_a_plain_torchrun_makes_one_world_of_two_nodes(suite, tmp_path):
    async with suite.client() as client:
        name = await submitted(client, JOB, tmp_path, "once")
        job = await ended(client, name, 120)
        logs = [
            log.read_text()
            for machine in MACHINES
            for log in (suite.fleet.folder(machine.name) / "tasks").glob("*/rank-*.log")
        ]
    text = "\n".join(logs)
    assert job.state == scheduler_pb2.JOB_STATE_SUCCEEDED, f"{job.state_message}\n{text}"
    said = sorted(line.partition(" setup ") for line in text.splitlines() if line.startswith("rank "))
    assert [line for line, _, _ in said] == [f"rank {rank} of 3 sum 6.0" for rank in range(3)]
    assert sorted(node for _, _, node in said) in (["0", "0", "1"], ["0", "1", "1"])
    assert len(logs) == 2, "one process per node"
    assert text.count("\nonce\n") == 2
    assert (job.step, job.loss) == (3, 2.5), "what torchrun starts speaks with the agent"
    assert text.count("whaleflux: setup ended well") == 2


async def test_a_directory_that_no_node_has_ends_the_job_in_seconds(suite, tmp_path):
    text = f"run: echo hello\ngpus: 1\nretry: {{max_restarts: 5}}\ndirectory: {tmp_path}/nowhere\n"
    async with suite.client() as client:
        began = time.monotonic()
        job = await ended(client, await submitted(client, text, tmp_path, "nowhere"), 60)
    assert job.state == scheduler_pb2.JOB_STATE_FAILED
    assert "is not a folder on this node" in job.state_message
    assert time.monotonic() - began < 45
