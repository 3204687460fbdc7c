"""`python -m whaleflux_inventory`: the only place that knows concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.events.api import Bus
from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.events.stream_links import StreamLinks
from whaleflux.names import check_id
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.v1.audit_pb2_grpc import add_AuditServiceServicer_to_server
from whaleflux.v1.events_pb2_grpc import add_EventServiceServicer_to_server
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.identity_pb2_grpc import add_IdentityServiceServicer_to_server
from whaleflux.v1.inventory_pb2_grpc import add_InventoryServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux.v1.secrets_pb2_grpc import add_SecretServiceServicer_to_server
from whaleflux_inventory import audit_heads, news
from whaleflux_inventory.audit_reading import AuditReading
from whaleflux_inventory.dependencies import Peers
from whaleflux_inventory.event_history import EventHistory
from whaleflux_inventory.identity_parts import assemble_identity
from whaleflux_inventory.key_wrapping import wrapper_of
from whaleflux_inventory.people import People
from whaleflux_inventory.renting import keeper_of, renting_of
from whaleflux_inventory.secret_servicer import SecretServicer
from whaleflux_inventory.service import assemble
from whaleflux_inventory.settings import Settings

ROLE = "inventory"
Context = ServiceContext[Settings]


async def build(ctx: Context) -> Parts:
    """Every replica serves everything; one at a time publishes."""
    authority = _authority(ctx.settings)
    secrets = SecretServicer(ctx.store, ctx.clock, wrapper_of(ctx.settings), ctx.trust)
    peers = _peers(ctx)
    servicer = assemble(
        ctx.store,
        ctx.clock,
        authority,
        peers,
        secrets.problem,
        renting_of(ctx.settings, authority),
        queue_access=ctx.trust.queue_access,
        data_held=peers.data_held_bytes,
    )
    identity = assemble_identity(ctx.store, ctx.clock, authority, ctx.settings, ctx.tls.load().roots)
    history = EventHistory(ctx.bus if ctx.settings.nats else None, ctx.trust.queue_access)
    told = ctx.settings
    bus = ctx.bus if told.nats else None
    audit = AuditReading(bus, ctx.store, ctx.clock, told.audit_days, told.audit_max_bytes)
    return Parts(
        servicers=[
            (add_InventoryServiceServicer_to_server, servicer, "whaleflux.v1.InventoryService"),
            (add_EventServiceServicer_to_server, history, "whaleflux.v1.EventService"),
            (add_IdentityServiceServicer_to_server, identity, "whaleflux.v1.IdentityService"),
            (add_SecretServiceServicer_to_server, secrets, "whaleflux.v1.SecretService"),
            (add_AuditServiceServicer_to_server, audit, "whaleflux.v1.AuditService"),
        ],
        loops=[
            lambda: _know_the_first_admin(ctx),
            *([lambda: _publish(ctx)] if ctx.settings.nats else []),
            *([lambda: _rent(ctx, authority, peers, secrets)] if ctx.settings.rent_server else []),
        ],
    )


async def _rent(ctx: Context, authority: CertificateAuthority | None, peers: Peers, secrets: SecretServicer) -> None:
    """One replica at a time carries leases on; also where there is no bus."""

    async def work(leader: Leader) -> None:
        keeper = keeper_of(ctx.store, ctx.clock, leader, ctx.settings, authority, peers, secrets.credentials)
        await (keeper.run() if keeper is not None else asyncio.Event().wait())

    await lead(ctx.store, f"{ROLE}-leases", ctx.address, work)


def _authority(settings: Settings) -> CertificateAuthority | None:
    if settings.ca_cert is None or settings.ca_key is None:
        return None
    try:
        certificate, key = settings.ca_cert.read_bytes(), settings.ca_key.read_bytes()
    except OSError as error:
        raise InvalidArgument(FieldViolation("ca_cert", f"cannot read the CA: {error}")) from None
    return CertificateAuthority.load(certificate, key)


async def _know_the_first_admin(ctx: Context) -> None:
    """So that the last admin can be told from one among others; each replica may, once its store answers."""
    while ctx.settings.first_admin:
        try:
            await People(ctx.store, ctx.clock).ensure_admin(ctx.settings.first_admin)
            break
        except Unavailable:
            await ctx.clock.sleep(1.0)
    await asyncio.Event().wait()


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
                ("inventory-sites", keys.SITES, news.of_site),
                ("inventory-offers", keys.OFFERS, news.of_offer),
                ("inventory-leases", keys.ALL_LEASES, news.of_lease),
                ("inventory-join-tokens", keys.JOIN_TOKENS, news.of_join_token),
            ):
                told = partial(_described, describe, ctx.clock)
                publisher = Publisher(ctx.store, ctx.bus, prefix, told, name=name, leader=leader, clock=ctx.clock)
                group.create_task(publisher.run())
            group.create_task(audit_heads.forget_old(ctx.store, ctx.clock, ctx.settings.audit_days))
            sites = [site.strip() for site in ctx.settings.leaf_sites.split(",") if site.strip()]
            if (links := _stream_links(ctx.bus, sites, ctx.settings, ctx.clock)) is not None:
                group.create_task(links.run())

    await lead(ctx.store, ROLE, ctx.address, work)


def _stream_links(bus: Bus, sites: list[str], settings: Settings, clock: Clock) -> StreamLinks | None:
    """The streams as the settings say, those of the sites' own servers too, and a nudge for a link that came back."""
    from whaleflux.events.nats import NatsBus

    for site in sites:
        check_id("leaf_sites", site)
    if isinstance(bus, NatsBus):
        events, accounts, trail, samples = settings.kept()
        return StreamLinks(bus, sites, hub_limits=events, accounts=accounts, trail=trail, samples=samples, clock=clock)
    if sites:
        raise InvalidArgument(FieldViolation("leaf_sites", "needs a NATS server as the bus (--nats nats://host:4222)"))
    return None


def _described(
    describe: Callable[[EntryChange, datetime], OutgoingEvent | None], clock: Clock, change: EntryChange
) -> OutgoingEvent | None:
    return describe(change, clock.now())


if __name__ == "__main__":
    main(ROLE, Settings, build)
