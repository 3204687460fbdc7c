"""A small fleet where jobs are preempted and moved through the whole suite: who is submitted, how it is, and what it wrote down."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.recording import restores_of, steps_of
from tests.support.suite import RunningSuite, running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import scheduler_pb2 as pb

STEPS = Path(__file__).parent / "slow_steps.py"
EVERY = 5  # steps between two checkpoints
FULL = (Machine("s", "a", "h100x1"), Machine("s", "b", "h100x1"))  # where trainings begin, and the gang is to run
ROOM = (Machine("s", "c", "rtx4090x1"), Machine("s", "d", "rtx4090x1"))  # where they can go on, and it cannot run
TRAINING = f"""
run: {sys.executable} {STEPS} {{folder}} --every {EVERY} --save-at-end
gpus: 1
gpu: {{gpu}}
checkpoint: {{{{every: {EVERY}}}}}
expected: 8h
"""
FILLER = "run: sleep 600\ngpus: 1\ngpu: RTX4090\n"
GANG = "run: sleep 600\ngpus: 2\ngpu: H100-80GB\nnodes: {max: 2}\n"
PATIENCE_S = 90.0
QUEUE = "queues/default"
OVER = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


@contextmanager
def moving_suite() -> Iterator[RunningSuite]:
    """A suite with these four machines."""
    with running_suite(settings={"WHALEFLUX_AVOID_S": "5"}) as suite:
        asyncio.run(suite.join((*FULL, *ROOM)))
        yield suite


def nodes(job: pb.Job) -> set[str]:
    """Ids of the nodes of its attempt."""
    return {task.node.rpartition("/")[2] for task in job.attempt.tasks}


@dataclass(frozen=True, slots=True)
class Jobs:
    """What a test submits; `folder` has the records of trainings."""

    client: AsyncClient
    folder: Path

    async def submit(self, id_: str, text: str, state: pb.JobState.ValueType | None = pb.JOB_STATE_RUNNING) -> pb.Job:
        """Returns the job when it is in that state; None: as it is then."""
        spec = job_from_yaml(text, self.folder).spec
        request = pb.CreateJobRequest(parent=QUEUE, job_id=id_, request_id=id_, job=pb.Job(spec=spec))
        created: pb.Job = await self.client.scheduler.CreateJob(request, timeout=10)
        return await self.reaches(id_, state) if state is not None else created

    async def train(self, id_: str, gpu: str = "[H100-80GB, RTX4090]") -> pb.Job:
        """Returns it when it has saved twice."""
        (self.folder / id_).mkdir()
        job = await self.submit(id_, TRAINING.format(folder=self.folder / id_, gpu=gpu))
        await until(lambda: self.last_step(id_) > 2 * EVERY, f"{id_} steps", PATIENCE_S)
        return job

    async def fragment(self, *trainings: str) -> None:
        """These trainings on the GPUs that the gang `gang` waits for, though there is room for them elsewhere."""
        fillers = [f"{trainings[0]}-filler-{machine.node}" for machine in ROOM]
        for filler in fillers:
            await self.submit(filler, FILLER)
        for training in trainings:
            await self.train(training)
        await self.cancel(*fillers)

    async def job(self, id_: str) -> pb.Job:
        found: pb.Job = await self.client.scheduler.GetJob(pb.GetJobRequest(name=f"{QUEUE}/jobs/{id_}"), timeout=5)
        return found

    async def reaches(self, id_: str, state: pb.JobState.ValueType, attempt: int = 0) -> pb.Job:
        """Returns the job when it is in that state, in that attempt or a later one; fails with all jobs as they are."""
        return await self.becomes(
            id_, lambda job: job.state == state and job.attempt.number >= attempt, pb.JobState.Name(state)
        )

    async def becomes(self, id_: str, true: Callable[[pb.Job], bool], what: str) -> pb.Job:
        """Returns the job when that is true of it."""
        found = pb.Job()

        async def there() -> bool:
            found.CopyFrom(await self.job(id_))
            return true(found)

        try:
            await until(there, f"{id_}: {what}", PATIENCE_S)
        except AssertionError as never:
            raise AssertionError(f"{never}\n{await self.all_as_they_are()}") from None
        return found

    async def all_as_they_are(self) -> str:
        listed = await self.client.scheduler.ListJobs(pb.ListJobsRequest(page_size=100), timeout=10)
        return "\n".join(map(_in_short, listed.jobs))

    async def plan(self) -> pb.RebalancePlan:
        """Moves for the gang that waits, as soon as they are worth it."""
        found = pb.RebalancePlan()

        async def planned() -> bool:
            found.CopyFrom(await self.client.scheduler.PlanRebalance(pb.PlanRebalanceRequest(), timeout=10))
            return bool(found.proposals)

        try:
            await until(planned, "moves are worth it", PATIENCE_S, every_s=0.2)
        except AssertionError as never:
            raise AssertionError(f"{never}\n{await self.all_as_they_are()}") from None
        return found

    async def apply(self, etag: str) -> None:
        """Carries out that plan."""
        await self.client.scheduler.ApplyRebalance(pb.ApplyRebalanceRequest(etag=etag), timeout=10)

    async def cancel(self, *ids: str) -> None:
        """Returns when nothing of them is left on any node."""
        for id_ in ids:
            await self.client.scheduler.CancelJob(pb.CancelJobRequest(name=f"{QUEUE}/jobs/{id_}"), timeout=10)

        async def gone() -> bool:
            request = pb.ListAllocationsRequest(page_size=1000)
            listed = await self.client.scheduler.ListAllocations(request, timeout=5)
            return {f"{QUEUE}/jobs/{id_}" for id_ in ids}.isdisjoint(one.job for one in listed.allocations)

        await until(gone, f"nothing is left of {', '.join(ids)}", PATIENCE_S)

    async def cancel_all(self) -> None:
        listed = await self.client.scheduler.ListJobs(pb.ListJobsRequest(page_size=100), timeout=10)
        await self.cancel(*(job.name.rpartition("/")[2] for job in listed.jobs if job.state not in OVER))

    def last_step(self, id_: str, epoch: int = 0) -> int:
        """Of an epoch, or of all."""
        folder = self.folder / id_
        steps = [one.step for one in steps_of(folder) if epoch in (0, one.epoch)] if folder.exists() else []
        return max(steps, default=-1)

    def restores(self, id_: str) -> list[tuple[int, int, str]]:
        """(step, epoch, checkpoint) of each start."""
        return restores_of(self.folder / id_)

    async def went_on(self, id_: str, job: pb.Job) -> None:
        """The job's attempt began where its last checkpoint was, each attempt began once, and it steps on."""
        epoch = job.attempt.epoch
        await until(lambda: any(at == epoch for _, at, _ in self.restores(id_)), f"{id_} restores", PATIENCE_S)
        starts = self.restores(id_)
        assert len({at for _, at, _ in starts}) == len(starts), f"an attempt was begun twice: {starts}"
        (step, _, name), before = next(one for one in starts if one[1] == epoch), self.last_step(id_, starts[0][1])
        assert 0 < step <= before, f"restored {step} of {before} steps"
        assert name.endswith(job.attempt.restore_checkpoint.rpartition("/")[2])
        await until(lambda: self.last_step(id_, epoch) > step + EVERY, f"{id_} steps on", PATIENCE_S)


def _in_short(job: pb.Job) -> str:
    claim = f", claims {[part.node for part in job.claim.nodes]}" if job.HasField("claim") else ""
    ends = [attempt.end_reason for attempt in (*job.past_attempts, job.attempt) if attempt.end_reason]
    state = pb.JobState.Name(job.state)
    return (
        f"{job.name}: {state} attempt {job.attempt.number} on {sorted(nodes(job))}{claim}; {job.state_message}; {ends}"
    )


async def whaleflux(suite: RunningSuite, *words: str) -> tuple[int, str, str]:
    """The command's code, and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "whaleflux.cli", *words),
        env={**os.environ, "WHALEFLUX_CONTEXT": str(suite.context_file)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()
