"""`python -m whaleflux_inventory`: the only place that knows concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, Invalid
from whaleflux.events.api import Bus
from whaleflux.events.backbone import Backbone
from whaleflux.events.publisher import Change, News, Publisher
from whaleflux.names import check_id
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import add_InventoryServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_inventory import news
from whaleflux_inventory.config import InventorySettings
from whaleflux_inventory.service import assemble
from whaleflux_inventory.surroundings import Peers

ROLE = "inventory"
Context = ServiceContext[InventorySettings]


async def build(ctx: Context) -> Parts:
    """Every replica serves everything; one at a time publishes."""
    servicer = assemble(ctx.store, ctx.clock, _authority(ctx.settings), _peers(ctx))
    return Parts(
        servicers=[(add_InventoryServiceServicer_to_server, servicer, "whaleflux.v1.InventoryService")],
        loops=[lambda: _publish(ctx)] if ctx.settings.nats else [],
    )


def _authority(settings: InventorySettings) -> CertificateAuthority | None:
    if settings.ca_cert is None or settings.ca_key is None:
        return None
    try:
        certificate, key = settings.ca_cert.read_bytes(), settings.ca_key.read_bytes()
    except OSError as error:
        raise Invalid(FieldViolation("ca_cert", f"cannot read the CA: {error}")) from None
    return CertificateAuthority.load(certificate, key)


def _peers(ctx: Context) -> Peers:
    health = HealthServiceStub(ctx.channel("health_monitor")) if ctx.settings.health_monitor else None
    scheduler = SchedulerServiceStub(ctx.channel("scheduler")) if ctx.settings.scheduler else None
    return Peers(health, scheduler)


async def _publish(ctx: Context) -> None:
    async def work(leader: Leader) -> None:
        async with asyncio.TaskGroup() as group:
            for name, prefix, describe in (
                ("inventory-nodes", keys.NODES, news.of_node),
                ("inventory-datasets", keys.DATASETS, news.of_dataset),
            ):
                told = partial(_described, describe, ctx.clock)
                publisher = Publisher(ctx.store, ctx.bus, prefix, told, name=name, leader=leader, clock=ctx.clock)
                group.create_task(publisher.run())
            if sites := [site.strip() for site in ctx.settings.leaf_sites.split(",") if site.strip()]:
                group.create_task(_backbone(ctx.bus, sites, ctx.clock).run())

    await lead(ctx.store, ROLE, ctx.address, work)


def _backbone(bus: Bus, sites: list[str], clock: Clock) -> Backbone:
    """Streams of the sites' own servers, and a nudge for a link that came back."""
    from whaleflux.events.nats import NatsBus

    for site in sites:
        check_id("leaf_sites", site)
    if not isinstance(bus, NatsBus):
        raise Invalid(FieldViolation("leaf_sites", "needs a NATS server as the bus (--nats nats://host:4222)"))
    return Backbone(bus, sites, clock=clock)


def _described(describe: Callable[[Change, datetime], News], clock: Clock, change: Change) -> News:
    return describe(change, clock.now())


if __name__ == "__main__":
    main(ROLE, InventorySettings, build)
