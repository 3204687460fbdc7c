"""The request that a provider is sent for a lease: the same each time it is made, so that repeating it makes no second machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core import tokens
from whaleflux_inventory.core.lease_rules import Lease
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import LaunchRequest
from whaleflux_inventory.rented_nodes import node_of

_SLACK_S = 600.0  # beyond the time in which a machine has to join


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where rented machines find the fleet: host:port, and the name in its certificate where it is another."""

    server: str
    server_name: str = ""


class Launching:
    """Requests and join tokens. A join token is made of the authority's key and the lease's token: nothing secret is stored for it."""

    def __init__(self, door: FrontDoor, authority: CertificateAuthority, silent_s: float) -> None:
        self._door, self._authority, self._silent_s = door, authority, silent_s

    def request(self, lease: Lease, offer: Offer, fleet: str) -> LaunchRequest:
        """Everything that the machine is told."""
        environment = {
            "WHALEFLUX_SERVER": self._door.server,
            "WHALEFLUX_SERVER_NAME": self._door.server_name,
            "WHALEFLUX_JOIN_TOKEN": tokens.text_of(lease.token, self._secret(lease)),
            "WHALEFLUX_SITE": names.last(offer.site),
            "WHALEFLUX_NODE_ID": names.last(node_of(offer.site, lease.name, lease.attempt)),
            "WHALEFLUX_ZONE": offer.zone,
            "WHALEFLUX_PRICE_KIND": offer.market,
            "WHALEFLUX_USD_PER_GPU_HOUR": f"{offer.usd_per_gpu_hour:.6f}",
            "WHALEFLUX_LABELS": json.dumps({"rented": names.last(offer.name)}),
        }
        return LaunchRequest(
            fleet=fleet,
            lease=lease.name,
            token=lease.token,
            offer=offer,
            hard_end_s=lease.hard_end_s,
            silent_s=self._silent_s,
            environment={key: value for key, value in environment.items() if value},
            authority_pem=self._authority.certificate_pem.decode(),
        )

    def admission(self, lease: Lease, offer: Offer) -> Put:
        """The join token of the lease's present attempt: for one machine, under the lease's name."""
        begun = datetime.fromtimestamp(lease.asked_s, UTC)
        record = pb.JoinTokenRecord(secret_sha256=tokens.digest(self._secret(lease)))
        record.token.name, record.token.site = f"joinTokens/{lease.token}", offer.site
        record.token.node = node_of(offer.site, lease.name, lease.attempt)
        record.token.create_time.FromDatetime(begun)
        record.token.expire_time.FromDatetime(begun + timedelta(seconds=lease.terms.boot_within_s + _SLACK_S))
        return Put(keys.JOIN_TOKENS + lease.token, record.SerializeToString(deterministic=True))

    def _secret(self, lease: Lease) -> str:
        made = hmac.digest(self._authority.key_pem, f"join token of {lease.token}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(made).decode().rstrip("=")


def no_admission(lease: Lease) -> Delete:
    """What takes the token back when nobody is to join by it any more."""
    return Delete(keys.JOIN_TOKENS + lease.token)
