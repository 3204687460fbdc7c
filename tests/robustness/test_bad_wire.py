"""What is wrong before a service sees it: deadlines that have passed, requests without bounds, bytes that are no message."""

from __future__ import annotations

import time

import pytest

from whaleflux.errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted, StatusError
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(180)]  # the first test of a session starts the suite


def submission(job_id: str, **spec: object) -> scheduler_pb2.CreateJobRequest:
    job = scheduler_pb2.Job(spec=scheduler_pb2.JobSpec(command=["true"], gpus=1, **spec))
    return scheduler_pb2.CreateJobRequest(parent="queues/default", job_id=job_id, job=job)


async def missing(client: AsyncClient, job_id: str) -> bool:
    try:
        await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=f"queues/default/jobs/{job_id}"), timeout=10)
    except NotFound:
        return True
    return False


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 1e-9])
async def test_a_deadline_that_has_passed_changes_nothing(suite, timeout_s):
    async with suite.client() as client:
        with pytest.raises(DeadlineExceeded):
            await client.scheduler.CreateJob(submission("too-late"), timeout=timeout_s)
        assert await missing(client, "too-late")


async def test_a_name_of_ten_megabytes_is_refused_at_once_and_the_service_goes_on(suite):
    async with suite.client() as client:
        began = time.monotonic()
        with pytest.raises(StatusError) as refused:
            await client.scheduler.CreateJob(submission("x" * 10_000_000), timeout=20)
        assert isinstance(refused.value, ResourceExhausted | InvalidArgument), refused.value
        assert len(str(refused.value)) < 1000
        assert time.monotonic() - began < 10
        assert (await client.inventory.ListNodes(inventory_pb2.ListNodesRequest(), timeout=10)).nodes


async def test_a_billion_gpus_are_refused_through_the_front_door(suite):
    async with suite.client() as client:
        request = submission("absurd")
        request.job.spec.gpus = 10**9
        with pytest.raises(InvalidArgument) as refused:
            await client.scheduler.CreateJob(request, timeout=10)
        assert [violation.field for violation in refused.value.violations] == ["job.spec.gpus"]
        assert await missing(client, "absurd")


async def test_bytes_that_are_no_message_are_refused_as_such(suite):
    async with suite.client() as client:
        send = client.channel.unary_unary(
            "/whaleflux.v1.SchedulerService/CreateJob", lambda raw: raw, scheduler_pb2.Job.FromString
        )
        with pytest.raises(InvalidArgument):
            await send(b"\xff\xff\xff\xff", timeout=10)
