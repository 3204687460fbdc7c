"""The scheduler as a process on a real etcd, agents over mTLS: what is acknowledged survives kills of either."""

import asyncio
import time

import pytest
from google.protobuf import timestamp_pb2

from benchmarks.control_plane_suite import Suite, machine, request, until
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.agent_pb2_grpc import TaskServiceStub

pytestmark = pytest.mark.integration


@pytest.fixture
async def suite(tmp_path):
    async with Suite(tmp_path, [machine("s/n-0", 4), machine("s/n-1", 4)]) as suite:
        yield suite


async def reaches(stub, name, state, timeout_s=60.0):
    """The job once it is in that state."""
    wanted = pb.JobState.Value(f"JOB_STATE_{state}")
    job = await stub.GetJob(pb.GetJobRequest(name=name))
    async with asyncio.timeout(timeout_s):
        while job.state != wanted:
            await asyncio.sleep(0.02)
            job = await stub.GetJob(pb.GetJobRequest(name=name))
    return job


async def test_a_gang_runs_fails_recovers_and_ends(suite):
    stub = suite.stub()
    name = (await stub.CreateJob(request(8, retry={"max_restarts": 1, "backoff": {"nanos": 1}}))).name
    await reaches(stub, name, "RUNNING")
    first = suite.agents["sites/s/nodes/n-0"]
    first.end(next(iter(first.tasks)), 3)
    await until(lambda: any(task.epoch == 2 and task.start for task in first.tasks.values()))
    job = await reaches(stub, name, "RUNNING")
    assert (job.epoch, job.restarts) == (2, 1)
    assert suite.played.failures[0].exit_code == 3
    for agent in suite.agents.values():
        agent.end(next(iter(agent.tasks)))
    await reaches(stub, name, "SUCCEEDED")
    assert not (await stub.ListAllocations(pb.ListAllocationsRequest())).allocations


async def test_kills_of_scheduler_and_etcd_lose_nothing_and_stop_nothing(suite):
    stub = suite.stub()
    running = (await stub.CreateJob(request(8))).name
    await reaches(stub, running, "RUNNING")
    waiting = [(await stub.CreateJob(request(4))).name for _ in range(5)]
    started = [list(agent.started) for agent in suite.agents.values()]
    suite.process.kill()
    await suite.start_scheduler()
    suite.etcd.kill()
    await suite.start_etcd()
    suite.process.kill()
    suite.etcd.kill()
    await suite.start_etcd()
    await suite.start_scheduler()
    for agent in suite.agents.values():
        await until(lambda: agent.acknowledged == agent.sequence)  # noqa: B023
    stub = suite.stub()
    assert (await reaches(stub, running, "RUNNING")).epoch == 1
    assert [list(agent.started) for agent in suite.agents.values()] == started
    listed = (await stub.ListJobs(pb.ListJobsRequest())).jobs
    assert {job.name for job in listed} == {running, *waiting}
    for agent in suite.agents.values():
        agent.run_s = 0.01
        agent.end(next(iter(agent.tasks)))
    for name in waiting:
        await reaches(stub, name, "SUCCEEDED")


async def test_what_callers_may_do(suite):
    stub, admin = suite.stub(), suite.stub("admin", "root")
    with pytest.raises(PermissionDenied):
        await stub.CreateQueue(pb.CreateQueueRequest(queue_id="x"))
    queue = await admin.CreateQueue(pb.CreateQueueRequest(queue_id="x", queue=pb.Queue(max_gpus=2)))
    with pytest.raises(Aborted):
        await admin.DeleteQueue(pb.DeleteQueueRequest(name=queue.name, etag='"1"'))
    one = request(4)
    one.parent = queue.name
    name = (await stub.CreateJob(one)).name
    explained = await stub.ExplainJob(pb.ExplainJobRequest(name=name))
    assert "queue x may hold at most 2 at once: it can never start under this limit" in explained.decision.summary
    with pytest.raises(FailedPrecondition):
        await admin.DeleteQueue(pb.DeleteQueueRequest(name=queue.name))
    with pytest.raises(FailedPrecondition):
        await stub.DeleteJob(pb.DeleteJobRequest(name=name))
    await stub.CancelJob(pb.CancelJobRequest(name=name))
    await stub.DeleteJob(pb.DeleteJobRequest(name=name))
    with pytest.raises(NotFound):
        await stub.GetJob(pb.GetJobRequest(name=name))
    await admin.DeleteQueue(pb.DeleteQueueRequest(name=queue.name))
    with pytest.raises(NotFound):
        await stub.CreateJob(one)


async def test_an_agent_speaks_for_its_own_node_only(suite):
    channel = suite.channel("agent", "s/n-0")

    async def hello():
        yield agent_pb2.SyncRequest(hello=agent_pb2.SyncHello(node="sites/s/nodes/n-1"))

    with pytest.raises(PermissionDenied):
        async for _ in TaskServiceStub(channel).Sync(hello()):
            pass


async def test_repeated_requests_make_one_job(suite):
    stub = suite.stub()
    one = request(1)
    one.request_id = "r-1"
    first, again = await stub.CreateJob(one), await stub.CreateJob(one)
    assert first.name == again.name
    one.job.spec.gpus = 2
    with pytest.raises(AlreadyExists):
        await stub.CreateJob(one)
    named = request(1)
    named.job_id = "mine"
    await stub.CreateJob(named)
    with pytest.raises(AlreadyExists):
        await stub.CreateJob(named)


async def test_bad_jobs_change_nothing(suite):
    stub = suite.stub()
    before = (await stub.ListJobs(pb.ListJobsRequest(show_ended=True))).resource_version
    for bad in (request(10**9), request(-1), request(1, priority=-5), request(1, budget_usd=float("inf"))):
        with pytest.raises(InvalidArgument):
            await stub.CreateJob(bad)
    huge = request(1, working_directory="x" * 300_000)
    with pytest.raises(InvalidArgument) as refused:
        await stub.CreateJob(huge)
    assert refused.value.violations[0].field == "job.spec"
    after = await stub.ListJobs(pb.ListJobsRequest(show_ended=True))
    assert (len(after.jobs), after.resource_version >= before) == (0, True)


async def test_a_dry_run_tells_where_and_stores_nothing(suite):
    stub = suite.stub()
    dry = request(8)
    dry.validate_only = True
    job = await stub.CreateJob(dry)
    async with asyncio.timeout(60):
        while not job.decision.placed:  # the agents are still dialling
            await asyncio.sleep(0.05)
            job = await stub.CreateJob(dry)
    assert {task.node for task in job.decision.tasks} == set(suite.agents)
    dry = request(16)
    dry.validate_only = True
    job = await stub.CreateJob(dry)
    assert not job.decision.placed
    assert not (await stub.ListJobs(pb.ListJobsRequest(show_ended=True))).jobs


async def test_a_reservation_is_kept_by_whoever_leads(suite):
    stub, stamp = suite.stub("admin", "root"), timestamp_pb2.Timestamp
    now = int(time.time())
    kept = await stub.CreateReservation(
        pb.CreateReservationRequest(
            reservation_id="r",
            reservation=pb.Reservation(
                gpus=4, queue="queues/default", start_time=stamp(seconds=now), end_time=stamp(seconds=now + 600)
            ),
        )
    )
    own = {uuid for part in kept.held for uuid in part.gpu_uuids}
    other, more = [(await stub.CreateJob(request(4))).name for _ in range(2)]
    job = await reaches(stub, other, "RUNNING")
    assert own.isdisjoint(uuid for task in job.attempt.tasks for uuid in task.gpu_uuids)
    suite.process.kill()
    await suite.start_scheduler()
    member = (await stub.CreateJob(request(4, reservation=kept.name))).name
    job = await reaches(stub, member, "RUNNING")
    assert {uuid for task in job.attempt.tasks for uuid in task.gpu_uuids} == own
    assert (await stub.GetJob(pb.GetJobRequest(name=more))).state == pb.JOB_STATE_QUEUED
    with pytest.raises(InvalidArgument, match="4 of 8 GPUs can be kept"):
        await stub.CreateReservation(
            pb.CreateReservationRequest(
                reservation_id="s",
                reservation=pb.Reservation(
                    gpus=5, queue="queues/default", start_time=stamp(seconds=now), end_time=stamp(seconds=now + 60)
                ),
            )
        )
    await stub.DeleteReservation(pb.DeleteReservationRequest(name=kept.name))
    for agent in suite.agents.values():
        for task in list(agent.tasks):
            agent.end(task)
    await reaches(stub, more, "RUNNING")
