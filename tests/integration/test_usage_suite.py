"""What GPUs do comes from agents to the event bus, also around a console that is killed: the real suite, a machine that is played."""

import signal
import sys
import textwrap

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.embedded.layout import Layout
from whaleflux.events.nats import NatsBus, NatsOptions
from whaleflux.events.permissions import inbox
from whaleflux.rpc.tls_files import client_context
from whaleflux.v1 import console_pb2, usage_pb2
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(480)]

TRAINING = textwrap.dedent(
    """
    import time
    import torch
    from whaleflux.sdk import Checkpointer

    model = torch.nn.Linear(3, 3)
    with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as saved:
        for step, batch in saved.steps(lambda step: step, total=60):
            time.sleep(0.01)
            saved.report(1.0, tokens=50)
    """
)
PLAYED = Machine("onprem", "a", "h200x8:usage=45%@1h", settings=(("usage_every_s", "1"),))


async def console_bus(suite):
    """The bus as the console sees it."""
    options = NatsOptions(
        servers=(f"tls://127.0.0.1:{suite.port('nats')}",),
        tls=client_context(Layout(suite.state).store_tls("console")),
        inbox=inbox("console"),
    )
    return await NatsBus.connect(options)


async def batches(bus):
    found = await bus.read(["wf.usage.onprem.a.>"])
    return [usage_pb2.UsageBatch.FromString(event.data) for event in found.events]


def worked(batch, job):
    """The devices that worked, and for whom."""
    return {gpu.device for gpu in batch.gpus if gpu.tensor_ppm == 450_000 and [h.job for h in gpu.holders] == [job]}


async def train(client, folder):
    program = folder / "train.py"
    program.write_text(TRAINING)
    spec = pb.JobSpec(command=[sys.executable, str(program)], gpus=1)
    request = pb.CreateJobRequest(parent="queues/default", job_id="steps", job=pb.Job(spec=spec))
    return (await client.scheduler.CreateJob(request, timeout=10)).name


async def test_samples_of_a_job_arrive_and_a_killed_console_loses_none():
    with running_suite() as suite:
        await suite.join([PLAYED])
        bus = await console_bus(suite)
        async with suite.client() as client:
            spec = pb.JobSpec(command=["sleep", "600"], gpus=2)
            request = pb.CreateJobRequest(parent="queues/default", job_id="train", job=pb.Job(spec=spec))
            job = (await client.scheduler.CreateJob(request, timeout=10)).name

            async def seen():
                return any(len(worked(batch, job)) == 2 for batch in await batches(bus))

            await until(seen, "two GPUs are seen at work for the job", 120)
            newest = (await batches(bus))[-1]
            assert newest.simulated
            assert {gpu.source for gpu in newest.gpus} == {"simulated"}
            assert sum(gpu.tensor_ppm == 0 for gpu in newest.gpus) == 6, "the others idle"

            ended = await train(client, suite.state)

            async def told():
                return (
                    max((s.times.last_step for b in await batches(bus) for s in b.steps if s.job == ended), default=0)
                    == 60
                )

            await until(told, "all steps of a training are told of", 60)
            steps = [one for batch in await batches(bus) for one in batch.steps if one.job == ended]
            assert [a.times.last_step + 1 for a in steps[:-1]] == [b.times.first_step for b in steps[1:]]
            assert sum(one.times.tokens for one in steps) == 60 * 50
            assert all(one.device.startswith("GPU-simulated") and one.epoch == 1 for one in steps)

            async def points_of():
                asked = console_pb2.GetStepHistoryRequest(job=ended)
                return (await client.console.GetStepHistory(asked, timeout=20)).points

            async def went():
                return max((point.last_step for point in await points_of()), default=0) == 60

            await until(went, "the ledger shows how the training went", 200)
            points = await points_of()
            assert {(point.loss.mean, point.loss.max, point.ranks) for point in points} == {(1.0, 1.0, 1)}
            assert all(point.HasField("data_s") and point.tokens_per_s > 0 for point in points)

            suite.send("console", signal.SIGKILL)
            before = newest.sequence

            async def caught_up():
                return (await batches(bus))[-1].sequence >= before + 8

            await until(caught_up, "batches come again", 120)
            sequences = [batch.sequence for batch in await batches(bus)]
            assert sequences == list(range(1, len(sequences) + 1)), "each once, in order"
        await bus.close()
