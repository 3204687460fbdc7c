"""Leases that are written anew for machines whose record was lost (with a backup, or by hand): only so that they end, as a notice would end them."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core.lease_rules import Machine, token_of
from whaleflux_inventory.core.rental_cost import paid_usd
from whaleflux_inventory.lease_records import set_seconds, terms_of
from whaleflux_inventory.rented_nodes import node_of

MOST_ATTEMPTS = 64  # of a lease, that its token is looked for among


def record_of_lost(machines: Sequence[Machine], offers: Sequence[pb.Offer], now_s: float) -> pb.Lease:
    """Of the machines that carry a lost lease's tag, and the offers of their account: its last machine is a node perhaps, and is drained.

    Unix seconds. Others of the same lease are strays of it.
    """
    attempt, machine, offer = max(
        (_made_by(machine, offers) for machine in machines), key=lambda made: (made[0], made[1].id)
    )
    grace_s = terms_of(offer).drain_s
    lease = pb.Lease(name=machine.lease, offers=[offer.name], state=pb.LEASE_STATE_JOINED, calls=1)
    lease.offer.CopyFrom(offer)
    lease.offer.ClearField("etag")
    lease.attempt, lease.provider_id = max(attempt, 1), machine.id
    lease.node = node_of(offer.site, machine.lease, lease.attempt)
    lease.end_reason = f"{machine.id} carries this fleet's tag and no lease accounts for it: its work is moved away"
    lease.cost_cap_usd = paid_usd(now_s + grace_s - machine.created_s, terms_of(offer))
    for field in ("create_time", "ask_time", "call_time"):
        set_seconds(lease, field, machine.created_s)
    set_seconds(lease, "hard_end_time", now_s + grace_s)
    set_seconds(lease, "state_time", now_s)
    return lease


def _made_by(machine: Machine, offers: Sequence[pb.Offer]) -> tuple[int, Machine, pb.Offer]:
    """The attempt that asked for it, 0 where its token does not say, and by which offer."""
    likely = sorted(offers, key=lambda offer: offer.name != machine.offer)
    for offer in likely:
        for attempt in range(1, MOST_ATTEMPTS + 1):
            if machine.token == token_of(machine.lease, offer.name, attempt):
                return attempt, machine, offer
    return 0, machine, likely[0]
