"""Where leases are in the store: live ones under one prefix, those that are over under another.

A lease moves from one to the other once, in the transaction that makes it GONE: who looks for it at the first place and then at the second
finds it, and whoever lists live ones reads nothing of what was rented in the last month.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from whaleflux import names
from whaleflux.errors import FailedPrecondition, NotFound
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, Delete, Entry, NoneCreated, Put, Store, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records
from whaleflux_inventory.lease_records import leases_in, offer_of


async def find(store: Store, name: str) -> Entry:
    """The record of a lease, live or over. Raises NotFound."""
    try:
        return await records.read(store, keys.LEASES, name, "lease")
    except NotFound:
        return await records.read(store, keys.LEASES_OVER, name, "lease")


async def without_keys(store: Store, secret: str) -> list[Condition]:
    """What has to hold for the secret to go: nothing is rented by it now, or in the meantime.

    Raises FailedPrecondition where something is: its machines could not be ended any more, and are paid for.
    """
    there = await store.list(keys.LEASES)
    by_it = {
        offer.name for entry in (await store.list(keys.OFFERS)).entries if (offer := offer_of(entry)).secret == secret
    }
    rented = [one for one in leases_in(there.entries) if one.offer.secret == secret or by_it & set(one.offers)]
    if rented:
        raise FailedPrecondition(
            f"{secret} has the keys by which {', '.join(one.name for one in rented[:5])} can be ended; end that first: "
            f"whaleflux leases end {names.last(rented[0].name)}",
            metadata={"name": secret, "leases": str(len(rented))},
        )
    return [NoneCreated(keys.LEASES, there.revision)]


def unused(name: str) -> list[Absent]:
    """No lease has the name, or had it."""
    return [Absent(keys.of_name(prefix, name)) for prefix in (keys.LEASES, keys.LEASES_OVER)]


def put_away(entry: Entry, value: bytes) -> list[Write]:
    """Moves a record to those that are over, as `value`."""
    kept = Put(keys.LEASES_OVER + entry.key.removeprefix(keys.LEASES), value)
    return [Delete(entry.key), kept]


def request_key(owner: str, fingerprint: str) -> str:
    """Where the name of the lease is that a request of that owner made."""
    return keys.LEASE_REQUESTS + hashlib.sha256(f"{owner}\n{fingerprint}".encode()).hexdigest()


def forgotten(entry: Entry, record: pb.Lease) -> list[Write]:
    """Takes away all that is kept of a lease."""
    request = [Delete(request_key(record.owner, record.request_fingerprint))] if record.request_fingerprint else []
    return [Delete(entry.key), *request]


def made_before(moment: datetime) -> str:
    """A key behind those of leases that are over and were wanted before the moment: names begin with the time."""
    return keys.LEASES_OVER + names.ulid(moment.timestamp())[:10]
