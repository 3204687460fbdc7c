"""The whole suite, three played machines: `whaleflux rebalance apply` moves trainings so that a gang starts, and they go on from their checkpoints."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not os.environ.get("WHALEFLUX_TEST_MOVES"),
        reason="takes minutes on a busy machine and did not always end in its time there: `make soak` runs it",
    ),
]
STEPS = Path(__file__).parents[1] / "support" / "slow_steps.py"
TRAINING = f"""
run: {sys.executable} {STEPS} {{folder}} --every 5
gpus: 1
gpu: [H200, RTX4090]
checkpoint: {{{{every: 5}}}}
"""
FILLER = "run: sleep 600\ngpus: 3\n"
GANG = "run: sleep 600\ngpus: 8\ngpu: H200\nnodes: {max: 2}\n"


@pytest.fixture(scope="module")
def suite():
    with running_suite() as started:
        asyncio.run(started.join([Machine("s", "a", "h200x4"), Machine("s", "b", "h200x4")]))
        yield started


async def whaleflux(suite, *words):
    """The command's code, and what it says."""
    environment = {**os.environ, "WHALEFLUX_CONTEXT": str(suite.context_file)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "whaleflux.cli",
        *words,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


class Jobs:
    """What the test submits, and how it is."""

    def __init__(self, client, folder):
        self._client, self._folder = client, folder

    async def submit(self, name, text, state=pb.JOB_STATE_RUNNING):
        spec = job_from_yaml(text, self._folder).spec
        request = pb.CreateJobRequest(parent="queues/default", job_id=name, job=pb.Job(spec=spec))
        await self._client.scheduler.CreateJob(request, timeout=10)
        return await self.reaches(name, state)

    async def job(self, name):
        return await self._client.scheduler.GetJob(pb.GetJobRequest(name=f"queues/default/jobs/{name}"), timeout=5)

    async def reaches(self, name, state, attempt=0):
        async def there():
            job = await self.job(name)
            return job.state == state and job.attempt.number >= attempt

        await until(there, f"{name} is {pb.JobState.Name(state)}", 60)
        return await self.job(name)

    async def cancel(self, name):
        await self._client.scheduler.CancelJob(pb.CancelJobRequest(name=f"queues/default/jobs/{name}"), timeout=10)
        await self.reaches(name, pb.JOB_STATE_CANCELLED)


def nodes(job):
    return {task.node.rpartition("/")[2] for task in job.attempt.tasks}


def record(folder):
    return [line.split() for line in (folder / "rank-0.record").read_text().splitlines()]


async def test_trainings_move_and_go_on_from_their_checkpoints_so_that_a_gang_starts(suite, tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two")}
    async with suite.client() as client:
        jobs = Jobs(client, tmp_path)
        for name, folder in folders.items():
            folder.mkdir()
            await jobs.submit(name, TRAINING.format(folder=folder))
            if name == "one":
                await jobs.submit("filler", FILLER)
        assert nodes(await jobs.job("one")) != nodes(await jobs.job("two"))
        await jobs.cancel("filler")
        await suite.join([Machine("s", "c", "rtx4090x2")])
        await jobs.submit("gang", GANG, pb.JOB_STATE_QUEUED)
        for folder in folders.values():
            await until(lambda f=folder: len(record(f)) > 12, "two checkpoints", 60)
        etag = await shown(suite)
        await refused(suite)
        code, said, error = await whaleflux(suite, "rebalance", "apply", etag, "--yes", "-o", "json")
        assert code == 0, error
        assert len(json.loads(said)["proposals"][0]["moves"]) == 2
        assert "2 jobs will go on elsewhere" in error
        assert nodes(await jobs.reaches("gang", pb.JOB_STATE_RUNNING)) == {"a", "b"}
        for name, folder in folders.items():
            moved = await jobs.reaches(name, pb.JOB_STATE_RUNNING, attempt=2)
            assert (nodes(moved), moved.restarts) == ({"c"}, 0)
            await went_on(folder, moved.attempt.restore_checkpoint)
        code, _, error = await whaleflux(suite, "rebalance", "apply", etag, "--yes")
        assert code != 0
        assert "does not hold any more" in error


async def shown(suite):
    """The plan, for people and for programs; its etag."""
    found = []

    async def planned():
        found[:] = [await whaleflux(suite, "rebalance", "plan", "-o", "json")]
        return found[0][0] == 0 and json.loads(found[0][1]).get("proposals")

    await until(planned, "moves are worth it", 120)
    plan = json.loads(found[0][1])
    code, table, _ = await whaleflux(suite, "rebalance", "plan")
    assert code == 0
    for word in ("queues/default/jobs/one", "queues/default/jobs/two", "queues/default/jobs/gang", plan["etag"]):
        assert word in table
    return plan["etag"]


async def refused(suite):
    """Bad input moves nothing, and says what to do instead."""
    for words, why in (
        (("apply", "0123456789abcdef", "--yes"), "whaleflux rebalance plan"),
        (("apply",), "repeat with -y"),
        (("plan", "-o", "name"), "use table or json"),
    ):
        code, _, error = await whaleflux(suite, "rebalance", *words)
        assert code != 0
        assert why in error, error


async def went_on(folder, checkpoint):
    """The second attempt began where a checkpoint of the first was, and goes on."""
    await until(lambda: any(line[0] == "restored" for line in record(folder)[1:]), "it has restored", 60)
    (_, first, _, _), *steps = record(folder)
    assert first == "0"
    at = next(at for at, line in enumerate(steps) if line[0] == "restored")
    _, step, _, name = steps[at]
    assert (int(step) > 0, int(step) % 5, int(step) <= int(steps[at - 1][1])) == (True, 0, True)
    assert name.endswith(checkpoint.rpartition("/")[2])
    await until(lambda: len(record(folder)) > at + 5, "it steps on", 60)
