"""Whatever is sent to a service, it answers or refuses with a documented reason; what it refuses changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.acting import Acting, agent
from tests.support.messages import messages
from tests.support.scheduler_world import World as SchedulerWorld
from tests.support.scheduler_world import until
from whaleflux import telemetry
from whaleflux.clock import SystemClock, VirtualClock
from whaleflux.errors import Aborted, InvalidArgument, StatusError
from whaleflux.rpc import auth, pki
from whaleflux.services import ROLES
from whaleflux.store import keys, placements
from whaleflux.store.api import Put, Store
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import OPEN
from whaleflux.v1 import checkpoint_pb2, console_pb2, health_pb2, inventory_pb2, router_pb2, scheduler_pb2
from whaleflux_checkpoint.servicer import Checkpoints
from whaleflux_console.bookkeeper import Progress
from whaleflux_console.budgets import Budgets
from whaleflux_console.costs import Costs
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.recommendations import Recommendations
from whaleflux_console.servicer import CostServicer
from whaleflux_health_monitor.campaign import Campaign
from whaleflux_health_monitor.core.evidence import Probe
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.leader_session import Dependencies
from whaleflux_health_monitor.servicer import HealthServicer
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router
from whaleflux_inventory.service import assemble

pytestmark = pytest.mark.robustness

ADMIN = auth.Identity("admin", "root")
HUGE = "x" * 10_000_000
JOB = "queues/default/jobs/known"
READS = ("Get", "List", "Explain", "Plan", "Find", "Route")


@dataclass
class Service:
    """One servicer over a memory store; `settle` lets its loops come to rest."""

    rpc: Any
    store: Store
    descriptor: Any
    finish: Callable[[asyncio.Task[Any]], Any]

    @property
    def methods(self) -> list[Any]:
        return [m for m in self.descriptor.methods if not (m.client_streaming or m.server_streaming)]

    async def call(self, method: str, request: Message) -> Any:
        with auth.acting_as(ADMIN):
            return await self.finish(asyncio.create_task(getattr(self.rpc, method)(request, None)))

    async def revision(self) -> int:
        """The store's revision once nothing more is being written."""
        while True:
            before = (await self.store.list("", limit=1)).revision
            for _ in range(5):
                await asyncio.sleep(0)
            if (await self.store.list("", limit=1)).revision == before:
                return before


async def _at_once(task: asyncio.Task[Any]) -> Any:
    return await task


class Nobody:
    """Inventory's neighbours, who know of no node."""

    async def unreachable(self, node: str) -> bool:
        return False

    async def gpus_held(self, node: str) -> int:
        return 0

    async def connected_boot(self, node: str) -> str:
        return ""


@contextlib.asynccontextmanager
async def inventory() -> AsyncIterator[Service]:
    store, clock = MemoryStore(), VirtualClock()
    rpc = assemble(store, clock, pki.CertificateAuthority.create(clock.now(), "whaleflux"), Nobody())
    service = Service(rpc, store, inventory_pb2.DESCRIPTOR.services_by_name["InventoryService"], _at_once)
    await service.call("RegisterNode", inventory_pb2.RegisterNodeRequest(name="sites/a/nodes/n1", boot_id="b"))
    await service.call(
        "CreateDataset", inventory_pb2.CreateDatasetRequest(dataset_id="d", dataset={"uri": "file:///d"})
    )
    yield service


@contextlib.asynccontextmanager
async def scheduler() -> AsyncIterator[Service]:
    async with SchedulerWorld() as world:
        await until(lambda: world.store.get(keys.QUEUES + "default"), "the first leader has made the default queue")
        await world.create(1, job_id="known")
        await world.caught_up()
        descriptor = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"]
        yield Service(world.scheduler, world.store, descriptor, _at_once)


@contextlib.asynccontextmanager
async def checkpoint() -> AsyncIterator[Service]:
    store = MemoryStore()
    job = "queues/default/jobs/j"
    placed = placements.put(job, 1, "", ["sites/a/nodes/n1"])
    await store.commit(Put(keys.of_name(keys.JOB_FENCES, job), b"1"), placed)
    rpc = Acting(Checkpoints(store, VirtualClock()), agent("a/n1"))
    yield Service(rpc, store, checkpoint_pb2.DESCRIPTOR.services_by_name["CheckpointService"], _at_once)


async def _no_such_name(host: str, port: int) -> list[str]:
    raise OSError("Name or service not known")


@contextlib.asynccontextmanager
async def inference_router() -> AsyncIterator[Service]:
    store, clock = MemoryStore(), SystemClock()
    async with routing(store, clock) as current:
        keeping = asyncio.create_task(current.keep_current())
        router = Router(store, clock, current, Resolver(clock, _no_such_name))
        service = Service(router, store, router_pb2.DESCRIPTOR.services_by_name["RouterService"], _at_once)
        try:
            yield service
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


@contextlib.asynccontextmanager
async def health_monitor() -> AsyncIterator[Service]:
    clock = VirtualClock()
    store = MemoryStore(VirtualClock())

    async def probe(node: str, address: str) -> Probe:
        return Probe.ANSWERED

    async def watch_nodes(since: int) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async def finish(task: asyncio.Task[Any]) -> Any:
        while not task.done():
            await clock.advance(0.05)
        return await task

    campaign = Campaign(Dependencies(store, clock, probe, watch_nodes, Timing(), telemetry.emit_span), "me:1")
    loop = asyncio.create_task(campaign.run())
    await clock.advance(0.1)
    rpc = HealthServicer(store, campaign, clock, asyncio.Event())
    try:
        yield Service(rpc, store, health_pb2.DESCRIPTOR.services_by_name["HealthService"], finish)
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


@contextlib.asynccontextmanager
async def console() -> AsyncIterator[Service]:
    store, clock = MemoryStore(), SystemClock()
    engine = Engine(memory_bytes=64 << 20, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(LocalFolder(Path(folder)), store, engine)
        costs = Costs(answers, lambda _: OPEN, clock, Progress())
        recommended = Recommendations(store, answers, lambda _: OPEN, clock)
        budgets = Budgets(store, clock, lambda _: OPEN)
        rpc = CostServicer(Prices(store, clock), Adjustments(store, clock), budgets, costs, recommended)
        yield Service(rpc, store, console_pb2.DESCRIPTOR.services_by_name["CostService"], _at_once)
    engine.close()


SERVICES = (inventory, scheduler, checkpoint, inference_router, health_monitor, console)
assert {make.__name__ for make in SERVICES} == set(ROLES)


@contextlib.contextmanager
def standing(make: Callable[[], Any]) -> Iterator[tuple[Service, asyncio.Runner]]:
    """A service in an event loop that lives from call to call."""
    with asyncio.Runner() as runner:
        manager = make()
        service = runner.run(manager.__aenter__())
        try:
            yield service, runner
        finally:
            runner.run(manager.__aexit__(None, None, None))


@pytest.fixture(scope="module", params=SERVICES, ids=lambda make: make.__name__)
def service(request) -> Iterator[tuple[Service, asyncio.Runner]]:
    with standing(request.param) as made:
        yield made


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_that_can_be_sent_breaks_a_service(service, data):
    stands, runner = service
    method = data.draw(st.sampled_from(stands.methods), "method")
    request = data.draw(messages(method.input_type), "request")

    async def send() -> None:
        """The service's own loops write now and then: what writes does so each time."""
        for _ in range(4):
            before = await stands.revision()
            silent = await answered(stands, method.name, request)
            if not silent or await stands.revision() == before:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{method.name} {silent} and wrote")

    runner.run(send())


async def answered(stands: Service, method: str, request: Message) -> str:
    """What was done that must not write; empty when it may."""
    try:
        await stands.call(method, request)
    except StatusError as error:
        assert error.code != "INTERNAL"
        assert error.reason
        assert len(error.message) < 5000
        return "refused"
    return "read" if method.startswith(READS) or getattr(request, "validate_only", False) else ""


def create_job(**spec: Any) -> Callable[[], Message]:
    wanted = {"command": ["true"], "gpus": 1, **spec}
    return lambda: scheduler_pb2.CreateJobRequest(parent="queues/default", job_id="bad", job={"spec": wanted})


ABSURD = [
    (scheduler, "CreateJob", create_job(gpus=10**9), "job.spec.gpus"),
    (scheduler, "CreateJob", create_job(gpus=-1), "job.spec.gpus"),
    (scheduler, "CreateJob", create_job(gpu={"min_memory_bytes": -1}), "job.spec.gpu.min_memory_bytes"),
    (scheduler, "CreateJob", create_job(memory_bytes_per_rank=-1), "job.spec.memory_bytes_per_rank"),
    (scheduler, "CreateJob", create_job(nodes={"min": 10**9}), "job.spec.nodes"),
    (scheduler, "CreateJob", create_job(priority=10**9), "job.spec.priority"),
    (scheduler, "CreateJob", create_job(budget_usd=float("nan")), "job.spec.budget_usd"),
    (scheduler, "CreateJob", lambda: scheduler_pb2.CreateJobRequest(parent="queues/default", job_id=HUGE), "job_id"),
    (scheduler, "CreateQueue", lambda: scheduler_pb2.CreateQueueRequest(queue_id=HUGE), "queue_id"),
    (scheduler, "CreateQueue", lambda: scheduler_pb2.CreateQueueRequest(queue_id="q", queue={"max_gpus": -1}), "queue"),
    (scheduler, "CreateQueue", lambda: scheduler_pb2.CreateQueueRequest(queue_id="q", queue={"data_quota_bytes": -1}), "queue"),
    (inventory, "PinDataset", lambda: inventory_pb2.PinDatasetRequest(name="datasets/d", copies=1, queue=HUGE), "queue"),
    (inventory, "CreateSite", lambda: inventory_pb2.CreateSiteRequest(site_id=HUGE), "site_id"),
    (inventory, "GetNode", lambda: inventory_pb2.GetNodeRequest(name=HUGE), "name"),
    (inventory, "CreateJoinToken", lambda: inventory_pb2.CreateJoinTokenRequest(site="sites/a", ttl_s=-1), "ttl_s"),
    (checkpoint, "GetCheckpoint", lambda: checkpoint_pb2.GetCheckpointRequest(name=HUGE), "name"),
    (
        checkpoint, "BeginCheckpoint",
        lambda: checkpoint_pb2.BeginCheckpointRequest(
            job="queues/default/jobs/j", epoch=1, step=-1, world_size=1, location="/c"
        ), "step",
    ),
    (
        checkpoint, "BeginCheckpoint",
        lambda: checkpoint_pb2.BeginCheckpointRequest(
            job="queues/default/jobs/j", epoch=1, step=1, world_size=10**9, location="/c"
        ), "world_size",
    ),
    (inference_router, "CreateModel", lambda: router_pb2.CreateModelRequest(model_id=HUGE), "model_id"),
    (inference_router, "CreateApiKey", lambda: router_pb2.CreateApiKeyRequest(display_name=HUGE), "display_name"),
    (health_monitor, "GetNodeHealth", lambda: health_pb2.GetNodeHealthRequest(name=HUGE), "name"),
    (console, "CreatePrice", lambda: console_pb2.CreatePriceRequest(price_id=HUGE), "price_id"),
    (console, "CreatePrice", lambda: console_pb2.CreatePriceRequest(price_id="p", price={"source": HUGE}), "price.source"),
    (console, "GetCost", lambda: console_pb2.GetCostRequest(limit=-1), "limit"),
    (health_monitor, "ListNodeHealth", lambda: health_pb2.ListNodeHealthRequest(page_size=-1), "page_size"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "method", "request_of", "field"), ABSURD, ids=[f"{a[1]}-{a[3]}-{i}" for i, a in enumerate(ABSURD)]
)
async def test_absurd_sizes_are_refused_by_field_in_few_words(make, method, request_of, field):
    async with make() as stands:
        before = await stands.revision()
        with pytest.raises(InvalidArgument) as refused:
            await stands.call(method, request_of())
        assert any(v.field.startswith(field) for v in refused.value.violations), refused.value.violations
        assert len(refused.value.message) < 2000
        assert await stands.revision() == before


WRONG_ETAGS = [
    (scheduler, "CancelJob", scheduler_pb2.CancelJobRequest(name=JOB, etag='"999"')),
    (scheduler, "HoldJob", scheduler_pb2.HoldJobRequest(name=JOB, etag='"999"')),
    (scheduler, "ReleaseJob", scheduler_pb2.ReleaseJobRequest(name=JOB, etag='"999"')),
    (scheduler, "RequeueJob", scheduler_pb2.RequeueJobRequest(name=JOB, etag='"999"')),
    (scheduler, "SetJobPriority", scheduler_pb2.SetJobPriorityRequest(name=JOB, etag='"999"')),
    (scheduler, "DeleteJob", scheduler_pb2.DeleteJobRequest(name=JOB, etag='"999"')),
    (scheduler, "DeleteQueue", scheduler_pb2.DeleteQueueRequest(name="queues/default", etag='"999"')),
    (inventory, "CordonNode", inventory_pb2.CordonNodeRequest(name="sites/a/nodes/n1", etag='"999"')),
    (inventory, "DrainNode", inventory_pb2.DrainNodeRequest(name="sites/a/nodes/n1", etag='"999"')),
    (inventory, "DeleteDataset", inventory_pb2.DeleteDatasetRequest(name="datasets/d", etag='"999"')),
]  # fmt: skip


@pytest.mark.parametrize(("make", "method", "request_"), WRONG_ETAGS, ids=[w[1] for w in WRONG_ETAGS])
async def test_a_wrong_etag_is_refused_as_such(make, method, request_):
    async with make() as stands:
        before = await stands.revision()
        with pytest.raises(Aborted) as refused:
            await stands.call(method, request_)
        assert (refused.value.code, refused.value.reason) == ("ABORTED", "ETAG_MISMATCH")
        assert await stands.revision() == before
