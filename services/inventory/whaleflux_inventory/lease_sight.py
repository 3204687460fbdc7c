"""What leases there are, and which machines providers list: what the keeper of leases looks at in a round."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whaleflux import names
from whaleflux.errors import InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.reading import read_all
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core.lease_rules import Lease, Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.lease_records import core_lease, core_offer, lease_of
from whaleflux_inventory.offer_book import OfferBook
from whaleflux_inventory.provider_accounts import Accounts

Account = tuple[str, str, str]
Lists = Mapping[Account, Sequence[Machine] | None]
"""The machines that each account lists; None: it did not answer."""


@dataclass(frozen=True, slots=True)
class KnownLease:
    """A lease with its record and entry."""

    entry: Entry
    record: pb.Lease
    lease: Lease

    @property
    def offer(self) -> Offer:
        return core_offer(self.record.offer)


class LeaseSight:
    """Remembers of the last round which accounts were asked, and which of them did not answer."""

    def __init__(self, store: Store, accounts: Accounts, offers: OfferBook) -> None:
        self._store, self._accounts, self._offers = store, accounts, offers
        self._asked: dict[Account, Offer] = {}  # an offer of each account that was listed
        self._unheard = frozenset[Account]()

    async def leases(self) -> dict[str, KnownLease]:
        """Those that are not over."""
        read = read_all((await self._store.list(keys.LEASES)).entries, known_lease)
        return {one.lease.name: one for _, one in read.values}

    async def over(self, listed: Lists, known: Mapping[str, KnownLease]) -> dict[str, KnownLease]:
        """Leases that are over and of which a machine is there."""
        tagged = tagged_with(listed)
        wanted = [keys.of_name(keys.LEASES_OVER, name) for name in tagged - set(known) if is_lease(name)]
        entries = [entry for key in wanted if (entry := await self._store.get(key)) is not None]
        return {one.lease.name: one for _, one in read_all(entries, known_lease).values}

    async def listed(
        self, leases: Mapping[str, KnownLease], fleet: str, *, sweep: bool
    ) -> dict[Account, Sequence[Machine] | None]:
        """The fleet's machines of each account with something rented; of every account that is known, in a sweep."""
        offers: dict[Account, Offer] = {}
        for one in leases.values():
            if one.lease.calls and one.lease.live:
                offers.setdefault(one.offer.account, one.offer)
        for offer in map(core_offer, self._offers.records()):
            if sweep or offer.account in self._unheard:
                offers[offer.account] = offer
        self._asked = offers
        lists = await asyncio.gather(*(self._accounts.machines(one, fleet) for one in offers.values()))
        listed = dict(zip(offers, lists, strict=True))
        self._unheard = frozenset(account for account, machines in listed.items() if machines is None)
        return listed

    def where(
        self,
        machine: str,
        lease: str,
        offer: Offer,
        listed: Lists,
    ) -> Offer:
        """An offer of the account that has the machine: the lease's own, unless only another one lists it."""
        there = [
            account for account, machines in listed.items() if machine in {one.id for one in of_lease(lease, machines)}
        ]
        return offer if not there or offer.account in there else self._asked[there[0]]


def known_lease(entry: Entry) -> KnownLease:
    """Raises DecodeError for a record that this version cannot read."""
    record = lease_of(entry)
    record.etag = ""
    return KnownLease(entry, record, core_lease(record))


def tagged_with(listed: Lists) -> set[str]:
    """The leases that machines which are there name."""
    return {one.lease for machines in listed.values() for one in machines or () if not one.ended}


def of_lease(lease: str, machines: Sequence[Machine] | None) -> list[Machine]:
    """Those that carry its tag."""
    return [machine for machine in machines or () if machine.lease == lease]


def is_lease(name: str) -> bool:
    """Whether a machine's tag is the name of one."""
    try:
        names.split(name, "leases")
    except InvalidArgument:
        return False
    return True
