"""An elastic job of the real suite: it grows into GPUs that come free, and shrinks for another while the scheduler is killed; its steps go on."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

NODE = Machine("edge", "rtx-a", "rtx4090x2")
SCRIPT = Path(__file__).parents[1] / "support" / "elastic_steps.py"


class Trained:
    """A suite with one machine of two GPUs, and what its jobs and their ranks say."""

    def __init__(self, suite, client, folder):
        self.suite, self.client, self.folder = suite, client, folder

    async def submit(self, job_id, command, gpus=1, **spec):
        asked = pb.JobSpec(command=command, gpus=gpus, **spec)
        asked.stop_grace.FromSeconds(60)
        request = pb.CreateJobRequest(parent="queues/default", job_id=job_id, job=pb.Job(spec=asked))
        return (await self.client.scheduler.CreateJob(request, timeout=10)).name

    async def job(self, name):
        return await self.client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)

    async def is_in(self, name, state):
        wanted = pb.JobState.Value(f"JOB_STATE_{state}")

        async def there():
            return (await self.job(name)).state == wanted

        await until(there, f"{name} is {state}", 60)
        return await self.job(name)

    async def steps(self, epoch, ranks):
        """When this attempt has made some steps with as many ranks."""
        await until(lambda: len([at for at in self.made(0) if at[1] == epoch]) >= 5, f"steps of epoch {epoch}", 60)
        assert [line.split()[2:] for line in self.lines(0) if line.startswith("restored")][-1] == [
            str(epoch),
            str(ranks),
        ]

    def lines(self, rank):
        return (self.folder / f"rank-{rank}.record").read_text().splitlines() if self.began(rank) else []

    def began(self, rank):
        return (self.folder / f"rank-{rank}.record").exists()

    def made(self, rank):
        """(step, epoch) of each step of the rank, as it made them."""
        lines = (line.split() for line in self.lines(rank) if not line.startswith("restored"))
        return [(int(words[0]), int(words[1])) for words in lines if len(words) == 2]

    async def shown(self, *words):
        argv = [sys.executable, "-m", "whaleflux.cli", "--context", str(self.suite.context_file), *words]
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0].decode()


def gpus_of(job):
    return {uuid for task in job.attempt.tasks for uuid in task.gpu_uuids}


async def test_it_grows_and_shrinks_through_its_checkpoints_though_the_scheduler_is_killed_meanwhile():
    with running_suite() as suite:
        await suite.join([NODE])
        folder = suite.state / "trained"
        folder.mkdir()
        async with suite.client() as client:
            trained = Trained(suite, client, folder)
            elastic = await grows_when_another_leaves(trained)
            await shrinks_for_another(trained, elastic)
            await ends(trained, elastic)


async def grows_when_another_leaves(trained):
    other = await trained.submit("other", ["sleep", "3600"])
    await trained.is_in(other, "RUNNING")
    sizes = pb.Elastic(min=1, max=2)
    spec = {"elastic": sizes, "checkpoint": pb.CheckpointPolicy(every_steps=10**6, keep=3)}
    command = [sys.executable, str(SCRIPT), str(trained.folder)]
    spec["expected"] = {"seconds": 36_000}
    elastic = await trained.submit("trains", command, 2, **spec)
    await trained.is_in(elastic, "RUNNING")
    await trained.steps(1, 1)
    (trained.folder / "leave").touch()  # nothing is broken here
    await trained.client.scheduler.CancelJob(pb.CancelJobRequest(name=other), timeout=5)
    await trained.steps(2, 2)
    (trained.folder / "leave").unlink()
    job = await trained.is_in(elastic, "RUNNING")
    assert len(gpus_of(job)) == 2
    assert job.past_attempts[0].end_reason.startswith("resized: grows from 1 to 2 GPUs that are idle")
    return elastic


async def shrinks_for_another(trained, elastic):
    high = await trained.submit("high", ["sleep", "3600"], priority=9)
    stopping = await trained.is_in(elastic, "SUSPENDING")
    assert stopping.attempt.end_reason == f"resized: shrinks from 2 to 1 GPUs for {high}"
    told, waits = await asyncio.gather(trained.shown("job", "trains"), trained.shown("explain", "high"))
    assert "shrinks from 2 to 1 GPUs" in told
    assert elastic in waits, "the one who waits is told for whom"
    killed = trained.suite.send("scheduler", signal.SIGKILL)
    await until(lambda: trained.suite.pid("scheduler") != killed, "a new scheduler", 60)
    (trained.folder / "leave").touch()
    await trained.steps(3, 1)
    job, other = await trained.is_in(elastic, "RUNNING"), await trained.is_in(high, "RUNNING")
    assert (len(gpus_of(job)), gpus_of(job) & gpus_of(other)) == (1, set())
    listed = await trained.shown("jobs")
    assert "1 (1-2)" in listed


async def ends(trained, elastic):
    """Every attempt went on where the one before it stopped, and each began once."""
    (trained.folder / "finish").touch()
    job = await trained.is_in(elastic, "SUCCEEDED")
    assert (job.attempt.number, job.restarts, job.recoveries) == (3, 0, 0)
    assert [attempt.epoch for attempt in job.past_attempts] == [1, 2]
    restored = [line.split()[1:] for line in trained.lines(0) if line.startswith("restored")]
    assert [words[1:] for words in restored] == [["1", "1"], ["2", "2"], ["3", "1"]]
    made = [step for step, _ in trained.made(0)]
    assert made == list(range(1, len(made) + 1)), "no step is made twice, and none is left out"
    assert [epoch for _, epoch in trained.made(1)] == [2] * len(trained.made(1))
