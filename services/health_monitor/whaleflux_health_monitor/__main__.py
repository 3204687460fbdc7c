"""`python -m whaleflux_health_monitor`: the only place that knows concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.events.publisher import Change, News, Publisher
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.v1 import inventory_pb2
from whaleflux.v1.health_pb2_grpc import add_HealthServiceServicer_to_server
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_health_monitor import news
from whaleflux_health_monitor.config import HealthSettings
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.leading import NAME, Leading, Tools
from whaleflux_health_monitor.prober import Prober
from whaleflux_health_monitor.servicer import HealthServicer

Context = ServiceContext[HealthSettings]


async def build(ctx: Context) -> Parts:
    """Every replica answers reads; the leader hears agents and judges; one at a time publishes."""
    settings = ctx.settings
    inventory = InventoryServiceStub(ctx.channel("inventory"))

    def watch_nodes(since: int) -> AsyncIterator[inventory_pb2.WatchNodesResponse]:
        stream: AsyncIterator[inventory_pb2.WatchNodesResponse] = inventory.WatchNodes(
            inventory_pb2.WatchNodesRequest(resource_version=since)
        )
        return stream

    timing = Timing(
        probe_s=min(Timing().probe_s, 0.7 * settings.suspect_s),
        suspect_s=settings.suspect_s,
        fence_s=settings.fence_s,
        restart_s=settings.restart_s,
        breaker_share=settings.breaker_share,
    )
    prober = Prober(ctx.tls, settings.trust_domain)
    tools = Tools(ctx.store, ctx.clock, prober.probe, watch_nodes, timing, telemetry.emit_span)
    leading = Leading(tools, ctx.address)
    servicer = HealthServicer(ctx.store, leading, ctx.clock, ctx.stopping)
    return Parts(
        servicers=[(add_HealthServiceServicer_to_server, servicer, "whaleflux.v1.HealthService")],
        loops=[leading.run, *([lambda: _publish(ctx)] if settings.nats else [])],
    )


async def _publish(ctx: Context) -> None:
    async def work(leader: Leader) -> None:
        async with asyncio.TaskGroup() as group:
            for name, prefix, describe in (
                ("health-nodes", keys.NODE_HEALTH, news.of_health),
                ("health-incidents", keys.INCIDENTS, news.of_incident),
            ):
                told = partial(_described, describe, ctx.clock)
                publisher = Publisher(ctx.store, ctx.bus, prefix, told, name=name, leader=leader, clock=ctx.clock)
                group.create_task(publisher.run())

    await lead(ctx.store, f"{NAME}-news", ctx.address, work)


def _described(describe: Callable[[Change, datetime], News | None], clock: Clock, change: Change) -> News | None:
    return describe(change, clock.now())


if __name__ == "__main__":
    main(NAME, HealthSettings, build)
