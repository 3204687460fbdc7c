"""Renting for jobs that wait, as the leader does it: a look every few seconds at who waits, what is offered and what is rented.

What is worth it says `core.burst`; inventory carries leases out. How long rented machines were not needed before is one record of the leader's
(`idle_memory`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import DeadlineExceeded, FailedPrecondition, StatusError, Unavailable
from whaleflux.reasons import What
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import burst, give_back
from whaleflux_scheduler.core.burst import BurstPlan, BurstRules, Rent
from whaleflux_scheduler.core.give_back import End
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.offered import BurstFacts, Offered, Rented
from whaleflux_scheduler.idle_memory import IdleMemory, Times
from whaleflux_scheduler.inventory_lists import ASK_WITHIN_S, all_of
from whaleflux_scheduler.news_beside import NewsBeside
from whaleflux_scheduler.planner_thread import PlannerThread

log = logging.getLogger(__name__)
EVERY_S = 10.0
DAY_S = 86_400.0
SETTLES_S = 120.0  # from when a machine joins until its node is looked for work here
_MOST_TOLD = 256
_BEFORE_JOINED = frozenset({ipb.LEASE_STATE_INTENT, ipb.LEASE_STATE_REQUESTED, ipb.LEASE_STATE_BOOTING})
Mode = Literal["off", "plan", "on"]


@dataclass(frozen=True, slots=True)
class BurstSettings:
    """What the scheduler does by itself, and its bounds."""

    mode: Mode = "plan"
    rules: BurstRules = field(default_factory=BurstRules)
    every_s: float = EVERY_S


class Bursts:
    """Lives as long as its leadership. `caught_up` returns when the planner knows what has come so far."""

    def __init__(
        self,
        settings: BurstSettings,
        planner: PlannerThread,
        caught_up: Callable[[], Awaitable[None]],
        inventory: InventoryServiceStub | None,
        news: NewsBeside,
        clock: Clock,
        memory: IdleMemory,
    ) -> None:
        self._mode, self._rules, self._every_s = settings.mode, settings.rules, settings.every_s
        self._planner, self._caught_up, self._inventory = planner, caught_up, inventory
        self._news, self._clock, self._memory = news, clock, memory
        self._idle_since: dict[str, float] = {}  # monotonic seconds, by lease
        self._closed_since: dict[str, float] = {}
        self._told: dict[str, None] = {}

    async def plan(self) -> pb.BurstPlan:
        """What would be rented and given back now, whatever the mode; changes nothing."""
        if self._inventory is None:
            raise FailedPrecondition("this scheduler knows no inventory, which has the offers")
        plan, _, _ = await self._look(self._inventory)
        return self._message(plan)

    async def admits(self, job: Job, short: FailedPrecondition) -> str:
        """What is rented, or could be, for a job that the fleet's own nodes can never hold, in words. Raises `short`, or it with what limits that."""
        if self._inventory is None or self._mode == "off":
            raise short
        try:
            offers, _ = await all_of(self._inventory.ListOffers, ipb.ListOffersRequest(page_size=1000), "offers")
            now = self._clock.now()
            waiting = await self._planner.ask(lambda planner: planner.would_wait(job, now))
        except StatusError as error:
            log.info("nobody knows now what could be rented for %s: %s", job.name, error)
            raise short from None
        if waiting is None or not offers:
            raise short
        found = burst.ever(waiting, [_offered(one, ()) for one in offers], self._rules)
        if isinstance(found, str):
            said = f"{short}; nor is a machine rented for it: {found}"
            raise FailedPrecondition(said, reason=short.reason, metadata=short.metadata)
        return self._admitted(found)

    def _admitted(self, rent: Rent) -> str:
        machines = f"{rent.machines} machine{'s' * (rent.machines != 1)} by {rent.offers[0]}, about {rent.usd:.2f} USD"
        if self._mode == "on":
            return f"no node of the fleet's own could hold it: it waits for {machines}, rented by the scheduler"
        by_hand = f"whaleflux leases add {names.last(rent.offers[0])}"
        return f"no node of the fleet's own could hold it, and {machines}, could: none is rented by itself (burst: plan); operators do: {by_hand}"

    async def run(self) -> None:
        """For ever: what is worth it is told, or done; what was rented is given back, also by who rents no more."""
        while self._inventory is not None:
            await self._clock.sleep(self._every_s)
            try:
                await self._once(self._inventory)
            except StatusError as error:  # in a moment again
                log.info("nothing is rented in this look: %s", error)
            except Exception:  # whatever is wrong with an offer or a lease, jobs are placed
                log.exception("nothing is rented in this look")

    async def _once(self, inventory: InventoryServiceStub) -> None:
        plan, leases, times = await self._look(inventory)
        await self._memory.keep(times)
        for end in plan.ends:  # first: whatever becomes of the others, this is paid for nothing
            await self._end(inventory, end)
        for rent in plan.rents if self._mode != "off" else ():
            if self._mode == "plan":
                self._propose(rent)
            else:
                await self._rent(inventory, rent, leases)

    async def _look(self, inventory: InventoryServiceStub) -> tuple[BurstPlan, Sequence[ipb.Lease], Times]:
        times = await self._memory.times()
        offers, _ = await all_of(inventory.ListOffers, ipb.ListOffersRequest(page_size=1000), "offers")
        wanted = ipb.ListLeasesRequest(page_size=1000, show_gone=True)
        longest_s = DAY_S + self._rules.lease_s  # those that were wanted before are over for more than a day
        wanted.gone_since.FromDatetime(self._clock.now() - timedelta(seconds=longest_s))
        leases, unreadable = await all_of(inventory.ListLeases, wanted, "leases")
        _refuse_unread(unreadable)
        live = [lease for lease in leases if lease.state != ipb.LEASE_STATE_GONE]
        if not offers and not live:
            return BurstPlan(), leases, times
        await self._caught_up()
        now = self._clock.now()
        nodes = tuple(lease.node for lease in live)
        facts = await self._planner.ask(lambda planner: planner.burst_facts(nodes, now))
        self._note(live, facts, now)
        offered = [_offered(one, live) for one in offers]
        rented = [self._rented(lease, facts.known, now) for lease in live if _counts(lease, facts.known, now)]
        times = give_back.seen(rented, times, facts.free, now.timestamp())
        spent_usd = _spent_usd(leases, {one.name: one.site for one in offers}, now)
        plan = burst.decide(facts.waiting, offered, rented, spent_usd, self._rules, times, now.timestamp())
        return plan, leases, times

    def _note(self, live: Sequence[ipb.Lease], facts: BurstFacts, now: datetime) -> None:
        """Since when nothing runs on a machine, and since when it takes no work either."""
        now_s = self._clock.monotonic()
        without = [one for one in live if one.node not in facts.busy]
        idle = [one.name for one in without if one.node in facts.known]
        closed = [one.name for one in without if one.name not in idle and not _comes(one, facts.known, now)]
        self._idle_since = {name: self._idle_since.get(name, now_s) for name in idle}
        self._closed_since = {name: self._closed_since.get(name, now_s) for name in closed}

    def _rented(self, lease: ipb.Lease, known: frozenset[str], now: datetime) -> Rented:
        now_s = self._clock.monotonic()
        idle, closed = self._idle_since.get(lease.name), self._closed_since.get(lease.name)
        return Rented(
            lease=lease.name,
            offer=_offered(lease.offer, ()),
            queue=names.last(lease.queue),
            begun_s=max(0.0, (now - _begun(lease)).total_seconds()),
            coming=_comes(lease, known, now),
            idle_s=None if idle is None else now_s - idle,
            ending=_ends(lease),
            closed_s=None if closed is None else now_s - closed,
        )

    async def _rent(self, inventory: InventoryServiceStub, rent: Rent, leases: Sequence[ipb.Lease]) -> None:
        """One lease for each machine; the same look, done again, rents nothing more."""
        for number in range(rent.machines):
            view = "\n".join([rent.job, str(number), *sorted(lease.name for lease in leases)])
            request = ipb.CreateLeaseRequest(
                offers=rent.offers,
                ttl_s=int(self._rules.lease_s),
                cost_cap_usd=rent.cap_usd,
                queue=names.queue(rent.queue),
                reason=f"for {rent.job}",
                request_id=hashlib.sha256(view.encode()).hexdigest()[:32],
            )
            try:
                await inventory.CreateLease(request, timeout=ASK_WITHIN_S)
            except (Unavailable, DeadlineExceeded):  # nor would the others be answered
                raise
            except StatusError as refused:  # which is no other job's trouble
                log.warning("no machine is rented for %s: %s", rent.job, refused)
                return

    async def _end(self, inventory: InventoryServiceStub, end: End) -> None:
        """One that cannot be given back now holds up no other."""
        try:
            await inventory.EndLease(ipb.EndLeaseRequest(name=end.lease, reason=end.why[:500]), timeout=ASK_WITHIN_S)
        except StatusError as error:
            log.warning("%s is not given back in this look: %s", end.lease, error)

    def _propose(self, rent: Rent) -> None:
        """Once for each job."""
        if rent.job in self._told:
            return
        self._told[rent.job] = None
        while len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        machines = f"{rent.machines} machine{'s' * (rent.machines != 1)} by {rent.offers[0]}"
        self._news.tell(
            events_pb2.Event(
                id=f"burst/{rent.job}/{self._clock.now():%Y%m%dT%H%M%S}",
                resource=rent.job,
                what=What.RENT_PROPOSED,
                cause=types_pb2.Cause(actor="scheduler/burst"),
                message=f"renting {machines} is worth it: {rent.why}; see: whaleflux burst plan"[:2000],
                source="scheduler",
                attributes={"usd": f"{rent.usd:.2f}", "worth_usd": f"{rent.worth_usd:.2f}"},
            )
        )

    def _message(self, plan: BurstPlan) -> pb.BurstPlan:
        return pb.BurstPlan(
            time=convert.timestamp(self._clock.now()),
            mode=self._mode,
            rents=[
                pb.BurstRent(
                    job=one.job,
                    queue=names.queue(one.queue),
                    offers=one.offers,
                    machines=one.machines,
                    usd=one.usd,
                    worth_usd=one.worth_usd,
                    cap_usd=one.cap_usd,
                    why=one.why,
                )
                for one in plan.rents
            ],
            ends=[pb.BurstEnd(lease=one.lease, why=one.why) for one in plan.ends],
            waits=[pb.BurstWait(job=one.job, why=one.why) for one in plan.waits],
            left_usd={scope or "all": max(0.0, usd) for scope, usd in plan.left_usd.items()},
        )


def _refuse_unread(unreadable: Sequence[str]) -> None:
    """Raises FailedPrecondition where leases cannot be read, which are not none."""
    if unreadable:
        raise FailedPrecondition(
            f"{', '.join(unreadable[:5])} cannot be read, so nobody knows what is rented and spent: nothing is rented or given "
            "back; run the newest version of inventory, or remove these records"
        )


def _ours(lease: ipb.Lease) -> bool:
    return lease.owner.startswith("scheduler/")


def _ends(lease: ipb.Lease) -> bool:
    return bool(lease.end_reason) or lease.state in (ipb.LEASE_STATE_DRAINING, ipb.LEASE_STATE_RELEASING)


def _counts(lease: ipb.Lease, known: frozenset[str], now: datetime) -> bool:
    """Machines that operators rented are theirs to give back; on their way they count for who waits."""
    return _ours(lease) or _comes(lease, known, now)


def _comes(lease: ipb.Lease, known: frozenset[str], now: datetime) -> bool:
    """On its way, or joined a moment ago; one that joined and takes no work (cordoned, sick) is waited for by nobody."""
    if lease.node in known:
        return False
    return not lease.HasField("join_time") or (now - lease.join_time.ToDatetime(UTC)).total_seconds() < SETTLES_S


def _offered(offer: ipb.Offer, live: Sequence[ipb.Lease]) -> Offered:
    taken = sum(lease.offer.name == offer.name for lease in live)
    return Offered(
        name=offer.name,
        gpu_type=offer.gpu_type,
        gpus=max(offer.gpus, 1),
        site=names.last(offer.site),
        usd_per_hour=offer.usd_per_hour,
        boot_s=offer.boot_s or 180.0,
        billing_unit_s=offer.billing_unit_s or 60.0,
        left=max(0, (offer.max_machines or 1) - taken),
        trust=offer.trust,
        spot=offer.market == types_pb2.PRICE_KIND_SPOT,
        gpu_memory_bytes=offer.gpu_memory_bytes,
    )


def _spent_usd(leases: Sequence[ipb.Lease], sites: Mapping[str, str], now: datetime) -> dict[str, float]:
    """Of the last 24 hours, by budget; what still runs counts with its cap, so that budgets are kept whatever happens.

    `sites` of offers: until a machine has joined, each offer of its lease may be the one that gives it.
    """
    spent: dict[str, float] = {}
    for lease in leases:
        live = lease.state != ipb.LEASE_STATE_GONE
        if not _ours(lease):
            continue
        usd = max(lease.cost_usd, lease.cost_cap_usd) if live and not _ends(lease) else lease.cost_usd
        usd *= 1.0 if live else _share_of_day(lease, now)
        may_be = {sites[one] for one in lease.offers if one in sites} if lease.state in _BEFORE_JOINED else set[str]()
        for scope in {burst.FLEET, lease.queue, lease.offer.site} | may_be:
            spent[scope] = spent.get(scope, 0.0) + usd
    return spent


def _share_of_day(lease: ipb.Lease, now: datetime) -> float:
    """Of the time for which a lease that is over was paid for: which part of it is in the last 24 hours."""
    begun_s = (now - _begun(lease)).total_seconds()
    ended_s = (now - lease.state_time.ToDatetime(UTC)).total_seconds()
    if begun_s <= max(ended_s, 0.0):  # clocks went back: all of it counts
        return float(ended_s < DAY_S)
    return max(0.0, min(begun_s, DAY_S) - max(ended_s, 0.0)) / (begun_s - max(ended_s, 0.0))


def _begun(lease: ipb.Lease) -> datetime:
    """Since when it is paid for, or wanted."""
    begun = lease.ask_time if lease.HasField("ask_time") else lease.create_time
    return begun.ToDatetime(UTC)
