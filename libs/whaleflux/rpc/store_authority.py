"""Who the store's authority signs for: etcd, NATS, a client's certificate per service, and one for backups. Nobody else gets one.

Used by `whaleflux up` and `whaleflux.bootstrap`; another certificate manager issues the same (docs/guide/wires.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux.rpc import roles
from whaleflux.rpc.pki import STORE_TRUST_DOMAIN, CertificateAuthority, Purpose, server_name
from whaleflux.rpc.tls_files import Tls
from whaleflux.services import ROLES

ETCD_MEMBER = server_name(roles.ETCD, trust_domain=STORE_TRUST_DOMAIN)  # what members ask of one another
# nats-server takes renewed files up when it is told to (SIGHUP), which nobody does for it in some deployments: its certificate
# lasts as long as public ones may, and dials nothing.
NATS_LIFETIME = timedelta(days=397)


@dataclass(frozen=True, slots=True)
class StoreHosts:
    """Names and addresses by which etcd's members and NATS are dialled."""

    etcd: Sequence[str]
    nats: Sequence[str]


def new_authority(now: datetime) -> CertificateAuthority:
    """A new root of the store's trust domain."""
    return CertificateAuthority.create(now, STORE_TRUST_DOMAIN)


def identities(
    authority: CertificateAuthority, name: str, now: datetime, life: timedelta, hosts: StoreHosts
) -> Iterator[tuple[str, Tls]]:
    """Role and identity of everybody; `name` is the name of each. A member of etcd dials its peers, NATS nobody."""
    for role in (*ROLES, roles.BACKUP):
        yield role, authority.issue(role, name, now, lifetime=life, purpose=Purpose.CLIENT)
    yield roles.ETCD, authority.issue(roles.ETCD, name, now, hosts=hosts.etcd, lifetime=life)
    nats = authority.issue(
        roles.NATS, name, now, hosts=hosts.nats, lifetime=max(life, NATS_LIFETIME), purpose=Purpose.SERVER
    )
    yield roles.NATS, nats
