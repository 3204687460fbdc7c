"""etcd with the store's authority: who is let in, who is not, and certificates that are renewed while all runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.relay import Relay
from whaleflux.embedded import readiness
from whaleflux.embedded.etcd import EtcdTls
from whaleflux.errors import Unavailable
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.rpc.store_authority import ETCD_MEMBER, StoreHosts, identities, new_authority
from whaleflux.rpc.tls_files import TlsFiles, client_context
from whaleflux.store import Put
from whaleflux.store.etcd import EtcdStore

pytestmark = pytest.mark.integration
NOW, LIFE = datetime.now(UTC), timedelta(hours=1)


@dataclass
class World:
    """A server, and the files of everybody."""

    folder: Path
    server: EtcdServer
    authority: CertificateAuthority

    def files(self, role: str) -> TlsFiles:
        return TlsFiles.under(self.folder, role)

    def store(self, files: TlsFiles | None, endpoint: str = "", timeout_s: float = 3.0) -> EtcdStore:
        return EtcdStore([endpoint or self.server.endpoint], tls=files, timeout_s=timeout_s)

    def issue(self, *, etcd_hosts: tuple[str, ...] = ("127.0.0.1",)) -> None:
        for role, tls in identities(self.authority, "1", NOW, LIFE, StoreHosts(etcd_hosts, ["127.0.0.1"])):
            self.files(role).save(tls)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    tls = EtcdTls(TlsFiles.under(tmp_path, "etcd"), ETCD_MEMBER)
    world = World(tmp_path, EtcdServer(tmp_path, tls), new_authority(NOW))
    world.issue()
    async with world.server:
        yield world


async def test_services_are_let_in_and_nobody_else(world: World) -> None:
    inventory = world.store(world.files("inventory"))
    revision = await inventory.commit(Put("/t/a", b"1"))
    async with aclosing(inventory.watch("/t/", after=revision - 1)) as batches:
        assert (await anext(batches)).revision == revision
    await inventory.close()
    fleet = CertificateAuthority.create(NOW)
    strangers: dict[str, TlsFiles | None] = {"without TLS": None, "of NATS, which dials nobody": world.files("nats")}
    for role, name in (("inventory", "1"), ("agent", "a/n1"), ("user", "ann"), ("admin", "ann"), ("frontdoor", "1")):
        strangers[role] = TlsFiles.under(world.folder / "fleet", role)
        tls = fleet.issue(role, name, NOW)
        strangers[role].save(tls)
        # They believe the server: it is the server that must not believe them.
        strangers[role] = TlsFiles(strangers[role].key, strangers[role].chain, world.files("etcd").roots)
    for who, files in strangers.items():
        stranger = world.store(files, timeout_s=0.3)
        with pytest.raises(Unavailable):
            await stranger.get("/t/a")
            pytest.fail(f"etcd answered one with the certificate {who}")
        await stranger.close()


async def test_a_service_is_no_member(world: World) -> None:
    peers = f"127.0.0.1:{world.server.peer_port}"
    member, service = (client_context(world.files(role)) for role in ("etcd", "scheduler"))
    assert readiness.is_ok(await readiness.get(peers, "/version", 3, member))
    assert await readiness.get(peers, "/version", 3, service) == b""


async def test_renewed_certificates_are_taken_up_by_both_sides_while_they_run(world: World) -> None:
    mine, good = world.files("scheduler"), world.files("scheduler").load()
    async with Relay(world.server.client_port) as relay:
        store = world.store(mine, relay.endpoint, timeout_s=0.5)
        await _until_it_answers(store)
        mine.save(CertificateAuthority.create(NOW).issue("scheduler", "1", NOW))
        relay.cut()  # what is open stays open: certificates are looked at when a connection begins
        assert not await _answers(store)
        relay.heal()
        assert not await _answers(store), "the client showed what it had read at its start"
        mine.save(good)
        await _until_it_answers(store)  # what was opened before has to fail first
        await store.close()
    world.issue(etcd_hosts=("elsewhere",))
    store = world.store(mine, timeout_s=0.5)
    assert not await _answers(store), "the server showed what it had read at its start"
    await store.close()
    world.issue()
    store = world.store(mine, timeout_s=0.5)
    await _until_it_answers(store)
    await store.close()


async def _until_it_answers(store: EtcdStore) -> None:
    async with asyncio.timeout(30):  # a busy machine may need more than one of the store's short attempts
        while not await _answers(store):
            pass


async def _answers(store: EtcdStore) -> bool:
    try:
        await store.get("/t/a")
    except Unavailable:
        return False
    return True
