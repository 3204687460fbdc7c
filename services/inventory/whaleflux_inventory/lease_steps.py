"""Carries one lease on: each step is stored before it is taken, what came of a call is written down, and the next offer is tried."""

from __future__ import annotations

import logging
from collections import Counter

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.store.api import Condition, Entry, Put, Store, Unchanged, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.core import lease_rules as rules
from whaleflux_inventory.core.lease_rules import Lease, Machine, Seen, State, Step
from whaleflux_inventory.core.offers import Offer, choose
from whaleflux_inventory.lease_launch import Launching, no_admission
from whaleflux_inventory.lease_records import core_offer, store_lease
from whaleflux_inventory.lease_sight import KnownLease, LeaseSight, Lists, known_lease, of_lease
from whaleflux_inventory.offer_book import OfferBook
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.providers.api import NoCapacity, ProviderError, Throttled
from whaleflux_inventory.rented_nodes import RentedNodes, node_of
from whaleflux_inventory.sites import Sites

log = logging.getLogger(__name__)
STEPS_OF_ROUND = 24  # of one lease: more than its offers times the steps to a refusal
LAG_S = 60.0  # of lists of an account that cannot be opened
_ON_NODE = frozenset({State.JOINED, State.DRAINING})


class LeaseSteps:
    """`rented` counts the leases of each offer, in a round; `held`: the condition of whoever leads."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        held: Condition,
        accounts: Accounts,
        nodes: RentedNodes,
        launching: Launching,
        offers: OfferBook,
        sight: LeaseSight,
    ) -> None:
        self._store, self._clock, self._held = store, clock, held
        self._accounts, self._nodes, self._launching, self._offers, self._sight = (
            accounts,
            nodes,
            launching,
            offers,
            sight,
        )
        self._sites = Sites(store, clock)
        self.rented = Counter[str]()

    async def take(self, one: KnownLease, listed: Lists, fleet: str) -> None:
        """Steps until nothing is left to do now."""
        for _ in range(STEPS_OF_ROUND):
            seen = await self._seen(one, listed)
            now_s = self._now_s()
            done = rules.step(one.lease, seen, now_s)
            if done.taken:
                await self._offers.distrust(one.offer.name, f"taken away: {done.taken}")
            if done.next_offer:
                done = Step(self._elsewhere(one, done.lease, done.next_offer, now_s), end=done.end)
            before, offer = one.lease, one.offer
            one = await self._stored(one, done)
            if done.drain:
                await self._nodes.drain(one.record.node, f"{one.lease.name} ends: {one.lease.end_reason}")
            for machine in done.end:
                await self._accounts.terminate(self._sight.where(machine, before.name, offer, listed), machine)
            if done.launch:
                one = await self._launched(one, fleet)
                if one.lease.state is not State.INTENT:
                    return
            elif one.lease.state is before.state:
                return

    async def _seen(self, one: KnownLease, listed: Lists) -> Seen:
        machines = listed.get(one.offer.account)
        own = None if machines is None else of_lease(one.lease.name, machines)
        others = (there for account, there in listed.items() if account != one.offer.account)
        state = one.lease.state
        try:
            lag_s = await self._accounts.lag_s(one.offer)
        except ProviderError:
            lag_s, own = LAG_S, None
        return Seen(
            machines=own,
            elsewhere=[
                machine for there in others for machine in of_lease(one.lease.name, there) if not _is_own(one, machine)
            ],
            joined=state is State.BOOTING and await self._nodes.joined(one.record.node),
            held=await self._nodes.held(one.record.node) if state is State.DRAINING else None,
            lag_s=lag_s,
            notice=await self._nodes.announced(one.record.node) if state in _ON_NODE else None,
        )

    async def _launched(self, one: KnownLease, fleet: str) -> KnownLease:
        """Makes the call that the record has announced, and writes down what came of it."""
        request = self._launching.request(one.lease, one.offer, fleet)
        try:
            machine = await self._accounts.launch(one.offer, request)
        except Throttled as busy:
            return await self._after_busy(one, busy)
        except ProviderError as refusal:
            await self._offers.distrust(one.offer.name, f"{_kind_of(refusal)}: {refusal}")
            why = f"{names.last(one.offer.name)}: {refusal}"
            return await self._stored(one, Step(self._elsewhere(one, one.lease, why, self._now_s())))
        except Exception as error:  # whatever it is: there may be a machine
            log.warning("%s: the call to %s had no answer: %r", one.lease.name, one.offer.provider, error)
            lag_s = await self._accounts.lag_s(one.offer)
            return await self._stored(one, Step(rules.no_answer(one.lease, self._now_s(), lag_s)))
        made = await self._stored(one, Step(rules.launched(one.lease, machine, self._now_s())))
        await self._offers.believe(one.offer.name)
        return made

    async def _after_busy(self, one: KnownLease, busy: Throttled) -> KnownLease:
        now_s = self._now_s()
        if rules.is_busy_too_long(one.lease, now_s):
            after = self._elsewhere(one, one.lease, f"{names.last(one.offer.name)}: too busy", now_s)
        else:
            after = rules.busy(one.lease, now_s, busy.pause_s)
        return await self._stored(one, Step(after))

    def _elsewhere(self, one: KnownLease, lease: Lease, why: str, now_s: float) -> Lease:
        """The next of its offers that is believed to have a machine; none: the lease is over."""
        wanted = self._offers.among(one.record.offers)
        rented = self.rented.copy()
        rented[lease.offer] -= 1  # its own place
        chosen = choose((offer for offer in wanted if offer.name != lease.offer or lease.provider_id), rented, now_s)
        if chosen is None or lease.end_reason:
            return rules.no_offer(lease, f"no offer has a machine; the last said: {why}", now_s)
        self.rented[lease.offer] -= 1
        self.rented[chosen.name] += 1
        return rules.other_offer(lease, chosen.name, chosen.terms, now_s)

    async def _stored(self, one: KnownLease, done: Step) -> KnownLease:
        """The record as the step says, before anything of it is done. Raises ConditionFailed where somebody changed it."""
        if done.lease == one.lease:
            return one
        record = pb.Lease()
        record.CopyFrom(one.record)
        offer = one.record.offer
        if done.lease.offer != one.lease.offer:
            offer = self._offers.record(done.lease.offer)
        store_lease(done.lease, offer, record)
        record.offer.ClearField("etag")
        record.node = node_of(offer.site, record.name, done.lease.attempt)
        writes, when = await self._beside(one, done, core_offer(offer))
        value = record.SerializeToString(deterministic=True)
        ends = not done.lease.live and one.lease.live
        record_writes = lease_book.put_away(one.entry, value) if ends else [Put(one.entry.key, value)]
        revision = await self._store.commit(*record_writes, *writes, when=[Unchanged(one.entry), *when, self._held])
        if ends:
            await self._nodes.retire(record.node, f"{one.lease.name} is over")  # it may have joined in that moment
            return known_lease(Entry(record_writes[-1].key, value, revision, revision))
        return known_lease(Entry(one.entry.key, value, revision, one.entry.created, one.entry.version + 1))

    async def _beside(self, one: KnownLease, done: Step, offer: Offer) -> tuple[list[Write], list[Condition]]:
        """What goes with the record: the token by which its machine joins, and its end."""
        if done.launch:
            site, when = await self._sites.implied(offer.site)
            return [self._launching.admission(done.lease, offer), *site], when
        if done.lease.state is State.GONE or done.lease.attempt != one.lease.attempt:
            await self._nodes.retire(
                one.record.node, f"{one.lease.name} is over: {done.lease.end_reason or 'begun anew'}"
            )
            return [no_admission(one.lease)], []
        return [], []

    def _now_s(self) -> float:
        return self._clock.now().timestamp()


def _is_own(one: KnownLease, machine: Machine) -> bool:
    """Whether it is of the present request: two accounts by name may be one, and list the same machines."""
    return one.lease.live and machine.token == one.lease.token


def _kind_of(refusal: ProviderError) -> str:
    return "no stock" if isinstance(refusal, NoCapacity) else type(refusal).__name__
