"""Leases that are written anew for machines whose record was lost (with a backup, or by hand): only so that they end, as a notice would end them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from whaleflux.clock import Clock
from whaleflux.errors import Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Condition, ConditionFailed, Entry, Fenced, Put, Store
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.core.lease_rules import Machine, token_of
from whaleflux_inventory.core.rental_cost import paid_usd
from whaleflux_inventory.lease_records import core_offer, set_seconds, terms_of
from whaleflux_inventory.lease_sight import Account, KnownLease, Lists, is_lease, known_lease
from whaleflux_inventory.offer_book import OfferBook
from whaleflux_inventory.rented_nodes import node_of

log = logging.getLogger(__name__)
MOST_ATTEMPTS = 64  # of a lease, that its token is looked for among


class LostLeases:
    """Finds and writes them. `held`: the condition of whoever leads."""

    def __init__(self, store: Store, clock: Clock, held: Condition, offers: OfferBook) -> None:
        self._store, self._clock, self._held, self._offers = store, clock, held, offers

    async def found(self, listed: Lists, known: Mapping[str, KnownLease]) -> dict[str, KnownLease]:
        """Leases for machines that name one which is not there (its record was lost with a backup): only to be ended."""
        found = dict[str, KnownLease]()
        for account, machines in listed.items():
            lost = defaultdict[str, list[Machine]](list)
            for machine in machines or ():
                if not machine.ended and machine.lease not in known and machine.lease not in found:
                    lost[machine.lease].append(machine)
            for lease, theirs in lost.items():
                if (made := await self._of_nobody(account, lease, theirs)) is not None:
                    found[lease] = made
        return found

    async def _of_nobody(self, account: Account, lease: str, machines: Sequence[Machine]) -> KnownLease | None:
        """The lease as it is written anew; None: these machines are left alone."""
        offers = [record for record in self._offers.records() if core_offer(record).account == account]
        if not offers or not is_lease(lease):
            log.warning("%s carries the fleet's tag and names no lease; it is left alone", machines[0].id)
            return None
        try:
            record = record_of_lost(machines, offers, self._clock.now().timestamp())
            key, value = keys.of_name(keys.LEASES, lease), record.SerializeToString(deterministic=True)
            revision = await self._store.commit(Put(key, value), when=[*lease_book.unused(lease), self._held])
            return known_lease(Entry(key, value, revision, revision))
        except (Fenced, Unavailable):
            raise
        except ConditionFailed:  # there is one that this version cannot read: that is not none
            log.warning("%s is of %s, which cannot be read; it is left alone", machines[0].id, lease)
        except Exception:  # what is listed of one machine is in no other's way
            log.exception("%s of %s is left alone now", machines[0].id, lease)
        return None


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
