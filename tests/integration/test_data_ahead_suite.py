"""Data comes before its job starts, and stays away beyond a queue's quota: the real suite, and agents that pull."""

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STUBBORN = ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"]  # leaves when its grace is over
READS = ["/bin/sh", "-c", 'test "$(cat "$WHALEFLUX_DATASET_CORPUS/part-0")" = abc']


async def submit(client, job_id, command, queue="default", **spec):
    asked = pb.JobSpec(command=command, gpus=2, **spec)
    request = pb.CreateJobRequest(parent=f"queues/{queue}", job_id=job_id, job=pb.Job(spec=asked))
    return (await client.scheduler.CreateJob(request, timeout=10)).name


async def job(client, name):
    return await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)


async def is_in(client, name, state):
    wanted = pb.JobState.Value(f"JOB_STATE_{state}")

    async def there():
        return (await job(client, name)).state == wanted

    await until(there, f"{name} is {state}", 120)


async def copies(client):
    found = await client.inventory.GetDataset(ipb.GetDatasetRequest(name="datasets/corpus"), timeout=5)
    return [copy.node for copy in found.copies if copy.state == ipb.DATASET_COPY_STATE_READY]


async def test_it_is_there_while_others_still_leave_and_is_not_pulled_beyond_a_quota(tmp_path):
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "part-0").write_text("abc")
    with running_suite() as suite:
        await suite.join([Machine("onprem", "a", "rtx4090x2")])
        async with suite.client() as client:
            dataset = ipb.Dataset(uri=str(source), size_bytes=3)
            await client.inventory.CreateDataset(
                ipb.CreateDatasetRequest(dataset_id="corpus", dataset=dataset), timeout=10
            )
            small = pb.Queue(data_quota_bytes=1)
            await client.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="small", queue=small), timeout=10)
            beyond = await submit(client, "beyond", READS, "small", datasets=["corpus"])
            await is_in(client, beyond, "SUCCEEDED")
            assert any(
                "queue small holds 0 B of at most 1 B" in text for text in (await job(client, beyond)).decision.reasons
            )
            assert await copies(client) == [], "it was read where it is"
            low = pb.JobSpec(stop_grace={"seconds": 600})
            running = await submit(client, "low", STUBBORN, stop_grace=low.stop_grace)
            await is_in(client, running, "RUNNING")
            high = await submit(client, "high", READS, priority=50, datasets=["corpus"])

            async def ahead():
                found = await job(client, high)
                return (
                    found.state == pb.JOB_STATE_QUEUED and "its data is there: datasets/corpus" in found.state_message
                )

            await until(ahead, "its data is there while the other still leaves", 90)
            assert await copies(client) == ["sites/onprem/nodes/a"]
            await client.scheduler.CancelJob(pb.CancelJobRequest(name=running), timeout=10)
            await client.scheduler.CancelJob(pb.CancelJobRequest(name=high), timeout=10)
