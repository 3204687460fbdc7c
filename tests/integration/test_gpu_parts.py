"""Parts of GPUs with the whole suite and two played machines: shares side by side on one GPU, MIG instances by UUID."""

import asyncio
import json
import os
import sys

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.errors import FailedPrecondition
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import scheduler_pb2

pytestmark = pytest.mark.integration
RUNNING, SUCCEEDED = scheduler_pb2.JOB_STATE_RUNNING, scheduler_pb2.JOB_STATE_SUCCEEDED
MACHINES = [Machine("edge", "rtx", "rtx4090x1"), Machine("onprem", "cut", "h200x4:mig=3g.71gb,4*1g.18gb")]


@pytest.fixture(scope="module")
def suite():
    with running_suite() as started:
        asyncio.run(started.join(MACHINES))
        yield started


def job_file(name, gpu, command, gpus=1):
    return f"name: {name}\nrun: {command}\ngpus: {gpus}\ngpu: {gpu}\n"


async def submit(client, folder, *what, **more):
    file = job_from_yaml(job_file(*what, **more), folder)
    request = scheduler_pb2.CreateJobRequest(
        parent="queues/default", job_id=file.job_id, job=scheduler_pb2.Job(spec=file.spec)
    )
    return await client.scheduler.CreateJob(request, timeout=10)


async def state_of(client, name):
    return await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=5)


async def test_two_shares_run_on_one_gpu_and_a_third_says_how_much_is_free(suite, tmp_path):
    async with suite.client() as client:
        jobs = [await submit(client, tmp_path, f"share-{at}", "{share: 10 GB}", "sleep 600") for at in (1, 2)]
        for one in jobs:
            await until(lambda n=one.name: _is(client, n, RUNNING), f"{one.name} runs", 60)
        held = {
            uuid for one in jobs for task in (await state_of(client, one.name)).attempt.tasks for uuid in task.gpu_uuids
        }
        assert len(held) == 1
        assert "isolation of shares: none, watched" in str((await state_of(client, jobs[0].name)).decision.reasons)
        third = await submit(client, tmp_path, "share-3", "{share: 10 GB}", "sleep 1")
        explains = scheduler_pb2.ExplainJobRequest(name=third.name)

        async def told():
            explained = await client.scheduler.ExplainJob(explains, timeout=5)
            return "largest free share: 5.77 GB (sites/edge/nodes/rtx)" in explained.decision.summary

        await until(told, "how much is free", 60)
        (row,) = [row for row in await gpus(suite) if row["model"] == "RTX4090"]
        assert (row["held"], row["free"], row["free_in_shares_bytes"]) == (1, 0, 24 * 2**30 - 20 * 10**9)
        await client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=jobs[0].name), timeout=10)
        await until(lambda: _is(client, third.name, SUCCEEDED), "the third has run", 60)


async def test_a_rank_gets_the_mig_instance_that_it_asked_for(suite, tmp_path):
    async with suite.client() as client:
        command = f'sh -c "echo $WHALEFLUX_GPU_UUID > {tmp_path}/rank-$RANK"'
        wanted = await submit(client, tmp_path, "sliced", "{mig: 18 GB}", command, gpus=2)
        await until(lambda: _is(client, wanted.name, SUCCEEDED), "it has run", 60)
        done = await state_of(client, wanted.name)
        (task,) = done.attempt.tasks
        assert [(tmp_path / f"rank-{at}").read_text().strip() for at in (0, 1)] == list(task.gpu_uuids)
        assert all(uuid.startswith("MIG-simulated-") for uuid in task.gpu_uuids)
        assert done.decision.summary.startswith("2 x H200 1g.18gb on 1 node")
        with pytest.raises(FailedPrecondition, match="could never run"):  # no H200 there is whole
            await submit(client, tmp_path, "whole", "{any: [H200]}", "sleep 1")


async def gpus(suite):
    command = (sys.executable, "-m", "whaleflux.cli", "gpus", "-o", "json")
    environment = {**os.environ, "WHALEFLUX_CONTEXT": str(suite.context_file)}
    asked = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    return json.loads((await asked.communicate())[0])


async def _is(client, name, state):
    return (await state_of(client, name)).state == state
