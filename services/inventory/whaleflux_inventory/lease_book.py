"""Where leases are in the store: live ones under one prefix, those that are over under another.

A lease moves from one to the other once, in the transaction that makes it GONE: who looks for it at the first place and then at the second
finds it, and whoever lists live ones reads nothing of what was rented in the last month.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from whaleflux import names
from whaleflux.errors import NotFound
from whaleflux.store import keys
from whaleflux.store.api import Absent, Delete, Entry, Put, Store, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records


async def find(store: Store, name: str) -> Entry:
    """The record of a lease, live or over. Raises NotFound."""
    try:
        return await records.read(store, keys.LEASES, name, "lease")
    except NotFound:
        return await records.read(store, keys.LEASES_OVER, name, "lease")


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
