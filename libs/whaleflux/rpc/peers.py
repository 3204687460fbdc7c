"""Who is at the other end of a TLS connection of Python's own (`ssl`); gRPC's calls are `auth`'s business."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from whaleflux.errors import StatusError, Unauthenticated
from whaleflux.rpc import roles
from whaleflux.rpc.auth import DEFAULT_TRUST_DOMAIN, Identity, Principal


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Identity:
    """The identity in the verified certificate of the peer; Unauthenticated where it showed none, or another domain's."""
    shown: dict[str, Any] = connection.getpeercert() or {}
    uris = [value for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
    identity = Identity.parse(uris[0] if len(uris) == 1 else "")
    if identity.trust_domain != trust_domain:
        raise Unauthenticated(f"trust domain {identity.trust_domain!r} is not ours ({trust_domain!r})")
    return identity


def who_reads_figures(admit: Callable[[Identity], Principal], trust_domain: str) -> Callable[[ssl.SSLSocket], bool]:
    """Whether a peer may read metrics: by its role, and while it is admitted."""

    def may_read(peer: ssl.SSLSocket) -> bool:
        try:
            return admit(peer_of(peer, trust_domain)).role in roles.READS_METRICS
        except StatusError:
            return False

    return may_read
