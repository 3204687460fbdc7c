"""A real etcd and a real NATS for one run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.control_plane_suite import Child, free_ports
from whaleflux.embedded import etcd, nats
from whaleflux.events import nats_config
from whaleflux.events.nats import NatsBus, NatsOptions
from whaleflux.events.topology import hub_streams

_USER, _PASSWORD = "app", "app-secret"


@contextlib.asynccontextmanager
async def an_etcd(folder: Path) -> AsyncIterator[str]:
    """Its endpoint."""
    client, peer = free_ports(2)
    command = etcd.command(etcd.find(), folder / "etcd", client_port=client, peer_port=peer)
    server = Child(command, folder / "etcd.log")
    try:
        await etcd.wait_ready("127.0.0.1", client)
        yield f"127.0.0.1:{client}"
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def a_bus(folder: Path) -> AsyncIterator[NatsBus]:
    """With the hub's streams."""
    address, monitor = (f"127.0.0.1:{port}" for port in free_ports(2))
    hub = nats_config.Hub(folder / "nats", address, monitor, (nats_config.User(_USER, _PASSWORD),), None)
    nats.write_config(folder / "nats.conf", nats_config.hub_config(hub))
    server = Child(nats.command(folder / "nats.conf"), folder / "nats.log")
    try:
        await nats.wait_ready(monitor, 45)
        bus = await NatsBus.connect(
            NatsOptions((f"nats://{address}",), "hub", user=_USER, password=_PASSWORD), timeout_s=45
        )
        for spec in hub_streams():
            await bus.apply(spec)
        yield bus
        await bus.close()
    finally:
        server.kill()
