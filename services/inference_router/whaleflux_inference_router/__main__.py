"""The inference router: python -m whaleflux_inference_router --help."""

from __future__ import annotations

import asyncio
import contextlib

from envoy.service.accesslog.v3.als_pb2_grpc import add_AccessLogServiceServicer_to_server
from envoy.service.endpoint.v3.eds_pb2_grpc import add_EndpointDiscoveryServiceServicer_to_server

from whaleflux import hostport, telemetry
from whaleflux.events.publisher import Publisher
from whaleflux.hostport import HostPort
from whaleflux.rpc.limits import CallLimits
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.telemetry import Metric
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub
from whaleflux_inference_router.core import allowed_networks
from whaleflux_inference_router.deployments import Deployments
from whaleflux_inference_router.endpoints import Endpoints
from whaleflux_inference_router.feedback import Feedback
from whaleflux_inference_router.news import of_api_key, of_model, of_replica
from whaleflux_inference_router.policy_server import serving
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.replica_manager import ReplicaManager
from whaleflux_inference_router.request_authorizer import RequestAuthorizer
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.rights import ModelRights
from whaleflux_inference_router.router_views import RouterViews
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router
from whaleflux_inference_router.settings import Settings


async def build(ctx: ServiceContext[Settings]) -> Parts:
    """Any replica decides and answers; one at a time manages the models' replicas and publishes."""
    telemetry.from_zero(Metric.ENDPOINTS_REFUSED)
    stack = contextlib.AsyncExitStack()
    rights = ModelRights(ctx.trust.queue_access, ctx.trust.known)
    current = await stack.enter_async_context(routing(ctx.store, ctx.clock, rights))
    authorizer = RequestAuthorizer(current, open_access=ctx.settings.open_access, trail=ctx.trail)
    policy = serving(authorizer, ctx.settings.policy_listen, ctx.tls, ctx.settings.trust_domain)
    port = await stack.enter_async_context(policy)
    resolver = _resolver(ctx, port)

    views = RouterViews(ctx.store, ctx.clock, current, ctx.address)

    async def manage(leader: Leader) -> None:
        stubs = SchedulerServiceStub(ctx.channel("scheduler")), InventoryServiceStub(ctx.channel("inventory"))
        manager = ReplicaManager(
            ctx.store, ctx.clock, current, ReplicaJobs(*stubs, ctx.clock), leader, resolver=resolver, views=views
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.run())
            if ctx.settings.nats:
                for prefix in _TOLD:
                    group.create_task(_publisher(ctx, leader, prefix).run())

    async def manage_while_leading() -> None:
        await lead(ctx.store, "inference_router", ctx.address, manage)

    secrets = SecretServiceStub(ctx.channel("inventory")) if ctx.settings.inventory else None
    inventory = InventoryServiceStub(ctx.channel("inventory")) if ctx.settings.inventory else None
    scheduler = SchedulerServiceStub(ctx.channel("scheduler")) if ctx.settings.scheduler else None
    router = Router(ctx.store, ctx.clock, current, resolver, secrets, Deployments(inventory, scheduler))
    return Parts(
        servicers=[
            (add_RouterServiceServicer_to_server, router, "whaleflux.v1.RouterService"),
            (add_AccessLogServiceServicer_to_server, Feedback(current, ctx.clock, ctx.trail), "envoy.service.accesslog.v3.AccessLogService"),
            (add_EndpointDiscoveryServiceServicer_to_server, Endpoints(current, resolver), "envoy.service.endpoint.v3.EndpointDiscoveryService"),
        ],
        loops=[current.keep_current, resolver.keep_current, views.run, manage_while_leading],
        on_stop=[stack.aclose],
        ports={"policy": port},
    )  # fmt: skip


def _resolver(ctx: ServiceContext[Settings], policy_port: int) -> Resolver:
    """Refuses a setting that is no network before anything is served."""
    own = (*ctx.settings.own_addresses(), hostport.parse(ctx.address), HostPort("127.0.0.1", policy_port))
    return Resolver(ctx.clock, allowed=allowed_networks.parse(ctx.settings.model_networks), control=own)


_TOLD = {
    keys.MODELS: ("models", of_model),
    keys.REPLICAS: ("replicas", of_replica),
    keys.API_KEYS: ("router-api-keys", of_api_key),
}


def _publisher(ctx: ServiceContext[Settings], leader: Leader, prefix: str) -> Publisher:
    name, describe = _TOLD[prefix]
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
    main("inference_router", Settings, build, limits=CallLimits(request_bytes=16 << 20))
