"""What the console learns of models: which replica's job serves which, and what their engines have served, as router and scheduler say it."""

import asyncio
from types import SimpleNamespace

from whaleflux.clock import VirtualClock
from whaleflux.v1 import router_pb2, scheduler_pb2
from whaleflux_console.core.chronicle import Chronicle
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.owners import Owners

JOB = "queues/serving/jobs/m-0"


async def _silent(request):
    await asyncio.Event().wait()
    yield


class Fleet:
    """A job that serves, and a replica whose engine counts."""

    def __init__(self, began):
        self.replica = router_pb2.Replica(name="models/m/replicas/m-0", job=JOB, input_tokens=0, output_tokens=0)
        self.job = scheduler_pb2.Job(name=JOB, uid="u", state=scheduler_pb2.JOB_STATE_RUNNING, submitter="user/ann")
        self.job.spec.kind = scheduler_pb2.JOB_KIND_SERVICE
        self.job.attempt.number, self.job.attempt.epoch = 1, 1
        self.job.attempt.allocate_time.FromDatetime(began)
        self.WatchNodes = self.WatchNodeHealth = _silent

    async def WatchJobs(self, request):
        yield scheduler_pb2.WatchJobsResponse(added=self.job, resource_version=1)
        await asyncio.Event().wait()

    async def ListReplicas(self, request, timeout):
        assert request.with_served_tokens
        return router_pb2.ListReplicasResponse(replicas=[self.replica])


async def test_what_engines_served_is_told_of_the_hour_with_the_model_of_the_job():
    clock, chronicle = VirtualClock(), Chronicle()
    fleet = Fleet(clock.now())
    peers = SimpleNamespace(inventory=fleet, health=fleet, scheduler=fleet, router=fleet, checkpoint=None)
    owners = Owners(peers, SimpleNamespace(known=lambda facts: facts, look_up=_nothing), chronicle, clock)
    running = asyncio.create_task(owners.run())
    for tokens in (0, 100, 300):
        fleet.replica.input_tokens, fleet.replica.output_tokens = tokens, 2 * tokens
        await clock.advance(61)
    now_ms = owners.now_ms()
    told = chronicle.whole_hour(now_ms // HOUR_MS * HOUR_MS, now_ms)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [(one.uid, one.attempt, one.input_tokens, one.output_tokens) for one in told.served] == [("u", 1, 300, 600)]
    assert [one.model for one in told.attempts] == ["models/m"]


async def _nothing():
    return []
