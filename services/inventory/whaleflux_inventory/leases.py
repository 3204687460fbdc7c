"""Leases as people and the scheduler ask for them: stored intents, which the keeper carries out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, timedelta

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, FailedPrecondition, NotFound
from whaleflux.quantities import shown_duration
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.paging import Page, list_page, page_size, page_token, parse_token
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, NoneCreated, Present, Put, Store, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, lease_book, records
from whaleflux_inventory.core.facts import MAX_REASON, Findings
from whaleflux_inventory.core.offer_facts import MAX_LEASE_S, MAX_OFFERS_OF_LEASE, MIN_LEASE_S
from whaleflux_inventory.core.offers import choose
from whaleflux_inventory.core.rental_cost import paid_usd
from whaleflux_inventory.lease_records import core_offer, is_over, leases_in, offer_of, shown_lease, terms_of
from whaleflux_inventory.rented_nodes import node_of

MAX_USD = 10_000_000.0
_TRIES = 5  # to make a lease while others are made


class Leases:
    """`why_not`: why this fleet cannot rent at all, in words; "" where it can."""

    def __init__(self, store: Store, clock: Clock, why_not: str = "") -> None:
        self._store, self._clock, self._why_not = store, clock, why_not

    async def create(self, request: pb.CreateLeaseRequest) -> pb.Lease:
        """Stores the intent to rent; the same request again (by its request_id) answers with what it made."""
        self._check(request)
        if self._why_not:
            raise FailedPrecondition(self._why_not)
        for _ in range(_TRIES):
            try:
                return await self._created(request)
            except ConditionFailed:  # another lease was made meanwhile: perhaps by this very request
                continue
        raise Aborted("others rent, or an offer was forgotten, in this moment; look again: whaleflux offers ls")

    async def _created(self, request: pb.CreateLeaseRequest) -> pb.Lease:
        """One try. Raises ConditionFailed when there are other leases by now than were looked at."""
        fingerprint = convert.fingerprint(request.request_id, request)
        requested = lease_book.request_key(auth.caller().subject, fingerprint) if fingerprint else ""
        if requested and (before := await self._made_before(requested)) is not None:
            return before
        there = await self._store.list(keys.LEASES)
        offers = [await self._offer(name, at) for at, name in enumerate(request.offers)]
        now = self._clock.now()
        chosen = self._chosen(offers, there.entries)
        lease = pb.Lease(
            name=names.lease(names.ulid(now.timestamp())),
            state=pb.LEASE_STATE_INTENT,
            attempt=1,
            queue=request.queue,
            reason=request.reason,
            owner=auth.caller().subject,
            request_fingerprint=fingerprint,
            cost_cap_usd=request.cost_cap_usd or max(paid_usd(request.ttl_s, terms_of(one)) for one in offers),
        )
        lease.offers[:] = request.offers
        lease.offer.CopyFrom(chosen)
        lease.offer.ClearField("etag")
        lease.node = node_of(chosen.site, lease.name, 1)
        lease.create_time.FromDatetime(now)
        lease.state_time.FromDatetime(now)
        lease.hard_end_time.FromDatetime(now + timedelta(seconds=request.ttl_s))
        lease.last_change.CopyFrom(changes.asked(What.CREATED, now, request.reason))
        key, value = keys.of_name(keys.LEASES, lease.name), lease.SerializeToString(deterministic=True)
        known: list[Condition] = [Present(keys.of_name(keys.OFFERS, name)) for name in dict.fromkeys(request.offers)]
        alone: list[Condition] = [*lease_book.unused(lease.name), NoneCreated(keys.LEASES, there.revision)]
        writes: list[Write] = [Put(key, value)]
        if requested:
            writes.append(Put(requested, lease.name.encode()))
            alone.append(Absent(requested))
        revision = await self._store.commit(*writes, when=[*alone, *known])
        return shown_lease(Entry(key, value, revision, revision), now.timestamp())

    async def get(self, name: str) -> pb.Lease:
        """One lease, also one that is over."""
        names.split(name, "leases")
        return shown_lease(await lease_book.find(self._store, name), self._now_s())

    async def page(self, request: pb.ListLeasesRequest) -> Page[pb.Lease]:
        """One page of leases: live ones first, then those that are over."""
        size, token = page_size(request.page_size), request.page_token
        last, _ = parse_token(token, keys.ALL_LEASES)
        if last.startswith(keys.LEASES_OVER):
            return await self._listed(keys.LEASES_OVER, request, size, token)
        live = await self._listed(keys.LEASES, request, size, token)
        if live.next_page_token or not request.show_gone:
            return live
        first = page_token(self._first_over(request), live.revision)
        if len(live.items) == size:
            return replace(live, next_page_token=first)
        over = await self._listed(keys.LEASES_OVER, request, size - len(live.items), first)
        both = (*live.unreadable, *over.unreadable)
        return replace(over, items=(*live.items, *over.items), unreadable=both)

    async def _listed(self, prefix: str, request: pb.ListLeasesRequest, size: int, token: str) -> Page[pb.Lease]:
        return await list_page(
            self._store,
            prefix,
            lambda entry: shown_lease(entry, self._now_s()),
            size=size,
            token=token,
            keep=lambda lease: request.show_gone or not is_over(lease),
        )

    def _first_over(self, request: pb.ListLeasesRequest) -> str:
        if not request.HasField("gone_since"):
            return keys.LEASES_OVER
        return lease_book.made_before(request.gone_since.ToDatetime(UTC))

    async def end(self, request: pb.EndLeaseRequest) -> pb.Lease:
        """Asks for its end; asked again, nothing changes."""
        names.split(request.name, "leases")
        found = Findings()
        found.text("reason", request.reason, MAX_REASON)
        found.raise_if_any()

        def ends(lease: pb.Lease) -> None:
            if not lease.end_reason and not is_over(lease):
                lease.end_reason = request.reason or f"given back by {changes.actor()}"
                lease.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), lease.end_reason))

        try:
            entry = await records.change(
                self._store, keys.LEASES, request.name, pb.Lease, ends, kind="lease", etag=request.etag
            )
        except NotFound:  # or it is over already
            entry = await lease_book.find(self._store, request.name)
        return shown_lease(entry, self._now_s())

    def _check(self, request: pb.CreateLeaseRequest) -> None:
        found = Findings()
        if not 0 < len(request.offers) <= MAX_OFFERS_OF_LEASE:
            found.add("offers", f"are {len(request.offers)}; name 1 to {MAX_OFFERS_OF_LEASE}, see: whaleflux offers ls")
        if not MIN_LEASE_S <= request.ttl_s <= MAX_LEASE_S:
            bounds = f"a lease lasts {shown_duration(MIN_LEASE_S)} to {shown_duration(MAX_LEASE_S)}; rent again later for more"
            found.add("ttl_s", f"is {request.ttl_s} s; {bounds}")
        if request.HasField("cost_cap_usd") and not 0 < request.cost_cap_usd <= MAX_USD:
            said = f"is {request.cost_cap_usd:.12g}; a cap is above 0 and at most {MAX_USD:.12g} USD, and left out it is all of that time"
            found.add("cost_cap_usd", said)
        found.text("reason", request.reason, MAX_REASON)
        found.text("request_id", request.request_id, 128)
        found.raise_if_any()
        for at, name in enumerate(request.offers):
            names.split(name, "offers", field=f"offers[{at}]")
        if request.queue:
            names.split(request.queue, "queues", field="queue")

    async def _offer(self, name: str, at: int) -> pb.Offer:
        try:
            return offer_of(await records.read(self._store, keys.OFFERS, name, "offer"))
        except NotFound:
            raise NotFound("offer", name, f"offers[{at}]; see: whaleflux offers ls") from None

    def _chosen(self, offers: list[pb.Offer], leases: Sequence[Entry]) -> pb.Offer:
        """Where it begins. Raises FailedPrecondition where none of them may be asked now."""
        live = leases_in(leases)
        rented = {one.name: sum(lease.offer.name == one.name for lease in live) for one in offers}
        seen = [core_offer(one) for one in offers]
        best = choose(seen, rented, self._now_s())
        if best is None:
            said = "; ".join(
                f"{names.last(one.name)}: {rented[one.name]} of {one.max_machines} rented"
                if rented[one.name] >= one.max_machines
                else f"{names.last(one.name)}: refused {math.floor(self._now_s() - one.refused_s)} s ago"
                for one in seen
            )
            raise FailedPrecondition(f"none of these offers can be asked for a machine now ({said})")
        return next(one for one in offers if one.name == best.name)

    async def _made_before(self, requested: str) -> pb.Lease | None:
        named = await self._store.get(requested)
        if named is None:
            return None
        return shown_lease(await lease_book.find(self._store, named.value.decode()), self._now_s())

    def _now_s(self) -> float:
        return self._clock.now().timestamp()
