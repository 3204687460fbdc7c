"""The inference router: python -m whaleflux_inference_router --help."""

from __future__ import annotations

import asyncio
import contextlib

from envoy.service.accesslog.v3.als_pb2_grpc import add_AccessLogServiceServicer_to_server
from envoy.service.endpoint.v3.eds_pb2_grpc import add_EndpointDiscoveryServiceServicer_to_server
from pydantic import Field

from whaleflux.config import ServiceSettings
from whaleflux.events.publisher import Publisher
from whaleflux.rpc.boundary import Limits
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_inference_router.endpoints import Endpoints
from whaleflux_inference_router.feedback import Feedback
from whaleflux_inference_router.fleet import Fleet
from whaleflux_inference_router.http_policy import Gate, serving
from whaleflux_inference_router.manager import Manager
from whaleflux_inference_router.news import of_model, of_replica
from whaleflux_inference_router.routing import routing
from whaleflux_inference_router.servicer import Router


class Settings(ServiceSettings):
    """Where each inference request goes."""

    policy_listen: str = Field(
        "127.0.0.1:0", description="Where the front door asks, host:port; plain HTTP, so keep it private."
    )
    open_access: bool = Field(False, description="Serve requests without an API key.")


async def build(ctx: ServiceContext[Settings]) -> Parts:
    """Any replica decides and answers; one at a time manages the models' replicas and publishes."""
    stack = contextlib.AsyncExitStack()
    current = await stack.enter_async_context(routing(ctx.store, ctx.clock))
    gate = Gate(current, open_access=ctx.settings.open_access)
    port = await stack.enter_async_context(serving(gate, ctx.settings.policy_listen))

    async def manage(leader: Leader) -> None:
        stubs = SchedulerServiceStub(ctx.channel("scheduler")), InventoryServiceStub(ctx.channel("inventory"))
        manager = Manager(ctx.store, ctx.clock, current, Fleet(*stubs, ctx.clock), leader)
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.run())
            if ctx.settings.nats:
                group.create_task(_publisher(ctx, leader, keys.MODELS, "models").run())
                group.create_task(_publisher(ctx, leader, keys.REPLICAS, "replicas").run())

    async def manage_while_leading() -> None:
        await lead(ctx.store, "inference_router", ctx.address, manage)

    return Parts(
        servicers=[
            (add_RouterServiceServicer_to_server, Router(ctx.store, ctx.clock, current), "whaleflux.v1.RouterService"),
            (add_AccessLogServiceServicer_to_server, Feedback(current, ctx.clock), "envoy.service.accesslog.v3.AccessLogService"),
            (add_EndpointDiscoveryServiceServicer_to_server, Endpoints(current), "envoy.service.endpoint.v3.EndpointDiscoveryService"),
        ],
        loops=[current.keep_current, manage_while_leading],
        on_stop=[stack.aclose],
        ports={"policy": port},
    )  # fmt: skip


def _publisher(ctx: ServiceContext[Settings], leader: Leader, prefix: str, name: str) -> Publisher:
    describe = of_model if prefix == keys.MODELS else of_replica
    return Publisher(
        ctx.store,
        ctx.bus,
        prefix,
        lambda change: describe(change, ctx.clock.now()),
        name=name,
        leader=leader,
        clock=ctx.clock,
    )


if __name__ == "__main__":
    main("inference_router", Settings, build, limits=Limits(request_bytes=16 << 20))
