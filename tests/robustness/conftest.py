"""One suite with three machines for all tests of this folder; what a file's tests leave running is ended after them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.suite import RunningSuite, running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import scheduler_pb2

MACHINES = (
    Machine("onprem", "a", "h200x8"),
    Machine("onprem", "b", "h200x8"),
    Machine("cloud", "c", "h200x8"),
)
ENDED_WITHIN_S = 60.0


@pytest.fixture(scope="session")
def started_suite() -> Iterator[RunningSuite]:
    with running_suite(
        settings={"WHALEFLUX_AVOID_S": "5"}
    ) as started:  # a job waits so long for nodes that all failed it
        asyncio.run(started.join(MACHINES))
        yield started


@pytest.fixture(scope="module")
def suite(started_suite: RunningSuite) -> Iterator[RunningSuite]:
    """The suite, for one file: a test that fails half-way leaves no job that the next file's tests would see."""
    yield started_suite
    asyncio.run(_end_all_jobs(started_suite))


async def _end_all_jobs(suite: RunningSuite) -> None:
    """Returns once no job runs or waits and none of the shared machines' GPUs is held.

    Nodes that a test joined and stopped may hold theirs for ever: no agent is left to say that the last task is gone.
    """
    machines = {machine.name for machine in MACHINES}
    async with suite.client() as client:

        async def all_over() -> bool:
            listed = await client.scheduler.ListJobs(scheduler_pb2.ListJobsRequest(page_size=1000), timeout=5)
            for job in listed.jobs:
                await client.scheduler.CancelJob(scheduler_pb2.CancelJobRequest(name=job.name), timeout=5)
            held = await client.scheduler.ListAllocations(
                scheduler_pb2.ListAllocationsRequest(page_size=1000), timeout=5
            )
            return not listed.jobs and machines.isdisjoint(each.task.node for each in held.allocations)

        await until(all_over, "all jobs end", ENDED_WITHIN_S, every_s=0.2)
