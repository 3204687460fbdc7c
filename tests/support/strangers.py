"""Certificates of a suite's own fleet authority, of every kind, which open neither its etcd nor its NATS."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from tests.support.suite import RunningSuite
from whaleflux.embedded import etcd
from whaleflux.embedded.layout import Layout
from whaleflux.errors import Unavailable
from whaleflux.events.nats import NatsBus, NatsOptions
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.rpc.tls_files import TlsFiles, client_context
from whaleflux.store.etcd import EtcdStore

EVERY_KIND = {
    "agent": "onprem/n1",
    "user": "ann",
    "admin": "ann",
    "app": "ci",
    "frontdoor": "1",
    "site": "onprem",
    "inventory": "1",
}


async def let_in(suite: RunningSuite, folder: Path) -> dict[str, set[str]]:
    """Who reached etcd and who NATS, of all of these, of nobody in particular, and of a service as it really dials."""
    layout = Layout(suite.state)
    authority = CertificateAuthority.load(
        (layout.pki / "ca.crt").read_bytes(), (layout.pki / "authority.key").read_bytes()
    )
    known: dict[str, TlsFiles | None] = {"a service": layout.store_tls("inventory"), "nobody": None}
    for role, name in EVERY_KIND.items():
        files = TlsFiles.under(folder, role)
        files.save(authority.issue(role, name, datetime.now(UTC)))
        # They believe the servers: it is the servers that must not believe them.
        known[role] = TlsFiles(files.key, files.chain, layout.store_tls("inventory").roots)
    etcd_answers = await asyncio.gather(*(_etcd(suite, files) for files in known.values()))
    nats_answers = await asyncio.gather(*(_nats(suite, files) for files in known.values()))
    return {
        "etcd": {who for who, answered in zip(known, etcd_answers, strict=True) if answered},
        "NATS": {who for who, answered in zip(known, nats_answers, strict=True) if answered},
    }


async def _etcd(suite: RunningSuite, files: TlsFiles | None) -> bool:
    port = suite.port("etcd")
    over_http = await etcd.healthy("127.0.0.1", port, tls=client_context(files) if files else None)
    store = EtcdStore([f"127.0.0.1:{port}"], tls=files, timeout_s=1.0)
    try:
        await store.list("/", limit=1)
    except Unavailable:
        return over_http
    finally:
        await store.close()
    return True


async def _nats(suite: RunningSuite, files: TlsFiles | None) -> bool:
    scheme, context = ("tls", client_context(files)) if files else ("nats", None)
    options = NatsOptions(
        (f"{scheme}://127.0.0.1:{suite.port('nats')}",), tls=context, inbox="_INBOX.inventory", create_streams=False
    )
    try:
        bus = await NatsBus.connect(options, timeout_s=1.0)
    except Unavailable:
        return False
    await bus.close()
    return True
