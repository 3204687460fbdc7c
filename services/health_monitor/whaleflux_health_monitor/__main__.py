"""`python -m whaleflux_health_monitor`: the only place that knows concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.telemetry import Metric
from whaleflux.v1 import inventory_pb2
from whaleflux.v1.health_pb2_grpc import add_HealthServiceServicer_to_server
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_health_monitor import news
from whaleflux_health_monitor.campaign import Campaign
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.figures import show_no_gpu_faults
from whaleflux_health_monitor.leader_session import NAME, Dependencies
from whaleflux_health_monitor.prober import Prober
from whaleflux_health_monitor.servicer import HealthServicer
from whaleflux_health_monitor.settings import Settings

Context = ServiceContext[Settings]


async def build(ctx: Context) -> Parts:
    """Every replica answers reads; the leader hears agents and judges; one at a time publishes."""
    settings = ctx.settings
    telemetry.from_zero(Metric.CLAIMS_REFUSED, "heartbeat")
    show_no_gpu_faults()
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
    dependencies = Dependencies(ctx.store, ctx.clock, prober.probe, watch_nodes, timing, telemetry.emit_span)
    campaign = Campaign(dependencies, ctx.address)
    servicer = HealthServicer(ctx.store, campaign, ctx.clock, ctx.stopping, ctx.trust.queue_access, ctx.trail)
    return Parts(
        servicers=[(add_HealthServiceServicer_to_server, servicer, "whaleflux.v1.HealthService")],
        loops=[campaign.run, *([lambda: _publish(ctx)] if settings.nats else [])],
    )


async def _publish(ctx: Context) -> None:
    async def work(leader: Leader) -> None:
        async with asyncio.TaskGroup() as group:
            for name, prefix, describe in (
                ("health-nodes", keys.NODE_HEALTH, news.of_health),
                ("health-incidents", keys.INCIDENTS, news.of_incident),
            ):
                described = partial(_described, describe, ctx.clock)
                publisher = Publisher(ctx.store, ctx.bus, prefix, described, name=name, leader=leader, clock=ctx.clock)
                group.create_task(publisher.run())

    await lead(ctx.store, f"{NAME}-news", ctx.address, work)


def _described(
    describe: Callable[[EntryChange, datetime], OutgoingEvent | None], clock: Clock, change: EntryChange
) -> OutgoingEvent | None:
    return describe(change, clock.now())


if __name__ == "__main__":
    main(NAME, Settings, build)
