"""Offers and leases as records of the store, and as the core sees them."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.errors import FailedPrecondition
from whaleflux.rpc.etags import etag_of
from whaleflux.store.api import Entry
from whaleflux.store.reading import read_all
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_inventory.core.lease_rules import Lease, State, Terms
from whaleflux_inventory.core.offers import Offer, trust

BOOT_S, BILLING_UNIT_S, DRAIN_S = 180.0, 60.0, 120.0
MARKETS = {
    types_pb2.PRICE_KIND_ON_DEMAND: "on_demand",
    types_pb2.PRICE_KIND_RESERVED: "reserved",
    types_pb2.PRICE_KIND_SPOT: "spot",
}
_STATES: dict[pb.LeaseState, State] = {
    pb.LEASE_STATE_INTENT: State.INTENT,
    pb.LEASE_STATE_REQUESTED: State.REQUESTED,
    pb.LEASE_STATE_BOOTING: State.BOOTING,
    pb.LEASE_STATE_JOINED: State.JOINED,
    pb.LEASE_STATE_DRAINING: State.DRAINING,
    pb.LEASE_STATE_RELEASING: State.RELEASING,
    pb.LEASE_STATE_GONE: State.GONE,
}
_NUMBERS = {state: number for number, state in _STATES.items()}
_TIMES = (
    ("state_s", "state_time"),
    ("called_s", "call_time"),
    ("asked_s", "ask_time"),
    ("next_call_s", "next_call_time"),
    ("joined_s", "join_time"),
    ("missing_s", "missing_time"),
    ("drain_end_s", "drain_end_time"),
    ("told_s", "end_time"),
)  # attribute of the core's lease -> field of the record


def offer_of(entry: Entry) -> pb.Offer:
    """A stored offer with its etag."""
    offer = pb.Offer.FromString(entry.value)
    offer.etag = etag_of(entry)
    return offer


def lease_of(entry: Entry) -> pb.Lease:
    """A stored lease with its etag."""
    lease = pb.Lease.FromString(entry.value)
    lease.etag = etag_of(entry)
    return lease


def terms_of(offer: pb.Offer) -> Terms:
    """What of an offer counts once it is chosen; what it leaves out has a default."""
    return Terms(offer.usd_per_hour, offer.billing_unit_s or BILLING_UNIT_S, offer.boot_s or BOOT_S, DRAIN_S)


def core_offer(offer: pb.Offer) -> Offer:
    """The core's view of an offer."""
    return Offer(
        name=offer.name,
        provider=offer.provider,
        machine_type=offer.machine_type,
        site=offer.site,
        terms=terms_of(offer),
        gpu_type=offer.gpu_type,
        gpus=offer.gpus,
        region=offer.region,
        zone=offer.zone,
        market=MARKETS.get(offer.market, "on_demand"),
        max_machines=offer.max_machines or 1,
        secret=offer.secret,
        owner=offer.owner,
        options=dict(offer.options),
        refused_s=seconds_of(offer.refused_time),
        refusals=offer.refusals,
    )


def shown_offer(entry: Entry, now_s: float) -> pb.Offer:
    """An offer as people see it: with how far it is believed to have machines."""
    offer = offer_of(entry)
    offer.trust = trust(core_offer(offer), now_s)
    return offer


def core_lease(record: pb.Lease) -> Lease:
    """The core's view of a lease."""
    lease = Lease(
        name=record.name,
        offer=record.offer.name,
        terms=terms_of(record.offer),
        created_s=seconds_of(record.create_time),
        hard_end_s=seconds_of(record.hard_end_time),
        cost_cap_usd=record.cost_cap_usd,
        state=_STATES[record.state],
        attempt=record.attempt or 1,
        calls=record.calls,
        provider_id=record.provider_id,
        end_reason=record.end_reason,
        spent_usd=record.spent_usd,
        strays=tuple(record.strays),
        stray_usd=record.stray_usd,
        **{attribute: seconds_of(getattr(record, field)) for attribute, field in _TIMES},
    )
    return lease


def store_lease(lease: Lease, offer: pb.Offer, record: pb.Lease) -> None:
    """Writes the core's lease, with the offer that it has now, into its record."""
    record.state = _NUMBERS[lease.state]
    record.offer.CopyFrom(offer)
    record.attempt, record.calls, record.provider_id = lease.attempt, lease.calls, lease.provider_id
    record.end_reason, record.spent_usd, record.stray_usd = lease.end_reason, lease.spent_usd, lease.stray_usd
    record.strays[:] = lease.strays
    for attribute, field in _TIMES:
        set_seconds(record, field, getattr(lease, attribute))


def is_over(record: pb.Lease) -> bool:
    """Whether its machine is gone, or never was."""
    return record.state == pb.LEASE_STATE_GONE


def shown_lease(entry: Entry, now_s: float) -> pb.Lease:
    """A lease as people see it: with what it has cost until now, and without what is kept for its offer's keys."""
    record = lease_of(entry)
    record.cost_usd = core_lease(record).cost_usd(now_s)
    return record


def leases_in(entries: Iterable[Entry]) -> list[pb.Lease]:
    """All that are not over. Raises FailedPrecondition where some cannot be read: nobody knows then what is rented."""
    read = read_all(entries, lease_of)
    if read.unreadable:
        raise FailedPrecondition(
            f"{', '.join(read.unreadable[:5])} cannot be read, so nobody knows what is rented; run the newest version of inventory, or "
            "remove these records"
        )
    return [lease for _, lease in read.values if not is_over(lease)]


def seconds_of(stamp: Timestamp) -> float:
    """Unix seconds; 0.0 of what is not set."""
    return float(stamp.ToMicroseconds() / 1e6)


def set_seconds(record: pb.Lease | pb.Offer, field: str, value_s: float) -> None:
    """Sets a time of a record from Unix seconds; 0.0 takes it away."""
    if value_s:
        getattr(record, field).FromMicroseconds(round(value_s * 1e6))
    else:
        record.ClearField(field)
