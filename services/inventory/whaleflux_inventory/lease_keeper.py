"""Carries leases on: one leader asks providers, stores each step before it is taken, and finds again what a crash left.

A round lists the machines of every account with something under way, decides for each lease (`core/lease_rules.py`), and each
`sweep_s` looks at all accounts: a machine with this fleet's tag that no lease accounts for is ended and what it cost is written down.
Leases that are over are read where a machine names them, and to be forgotten: a round costs what live ones take (`lease_book.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Compacted, InvalidArgument, StatusError, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Fenced, Put, Store, Unchanged, Write
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.core import lease_rules as rules
from whaleflux_inventory.core.lease_rules import Lease, Machine, Seen, State, Step
from whaleflux_inventory.core.offers import Offer, choose
from whaleflux_inventory.lease_launch import Launching, no_admission
from whaleflux_inventory.lease_records import core_lease, core_offer, lease_of, store_lease
from whaleflux_inventory.lost_leases import record_of_lost
from whaleflux_inventory.offer_book import OfferBook
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.providers.api import NoCapacity, ProviderError, Throttled
from whaleflux_inventory.rented_nodes import RentedNodes, node_of
from whaleflux_inventory.sites import Sites

log = logging.getLogger(__name__)
SIDE_BY_SIDE = 8  # leases that are carried on at a time
STEPS_OF_ROUND = 24  # of one lease: more than its offers times the steps to a refusal
LAG_S = 60.0  # of lists of an account that cannot be opened
KEPT_S = 30 * 86_400.0  # a lease that is over is shown for so long
LOOKED_AT_ONCE = 100  # leases that are over, each sweep
_ON_NODE = frozenset({State.JOINED, State.DRAINING})


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between rounds while something is rented, and between looks at everything.

    Notices of an end are two minutes long at best, whatever the market: whoever has machines is asked often. Two sweeps in the minute in which a
    forgotten machine is to be found, since a crash may take one of them.
    """

    poll_s: float = 5.0
    sweep_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Known:
    """A lease with its record and entry."""

    entry: Entry
    record: pb.Lease
    lease: Lease

    @property
    def offer(self) -> Offer:
        return core_offer(self.record.offer)


class LeaseKeeper:
    """Lives as long as its leadership, and remembers nothing that is not in the store but what providers listed in this round."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        leader: Leader,
        accounts: Accounts,
        nodes: RentedNodes,
        launching: Launching,
        pace: Pace = Pace(),
    ) -> None:
        self._store, self._clock, self._held = store, clock, leader.held
        self._accounts, self._nodes, self._launching, self._pace = accounts, nodes, launching, pace
        self._sites = Sites(store, clock)
        self._offers = OfferBook(store, clock, leader.held)
        self._rented = Counter[str]()
        self._asked: dict[tuple[str, str, str], Offer] = {}  # an offer of each account that was listed in this round
        self._fleet = ""
        self._swept_s = float("-inf")
        self._unheard = frozenset[tuple[str, str, str]]()  # accounts that did not answer when they were asked last
        self._looked_to = ""  # the key up to which leases that are over were looked at

    async def run(self) -> None:
        """For ever; raises Fenced when another leads."""
        changed = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear(changed))
            while True:
                changed.clear()
                pause_s = self._pace.sweep_s
                try:
                    pause_s = self._pace.poll_s if await self.round() else self._pace.sweep_s
                except Fenced:
                    raise
                except (ConditionFailed, StatusError) as error:
                    log.warning("a round of leases is cut short: %s", error)
                    pause_s = self._pace.poll_s
                except (
                    Exception
                ):  # nothing that is wrong with one of them ends the keeping of all, and inventory with it
                    log.exception("a round of leases is cut short")
                    pause_s = self._pace.poll_s
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await changed.wait()

    async def round(self) -> bool:
        """One look at everything that needs one; whether something is under way that needs another soon."""
        self._fleet = self._fleet or await self._fleet_id()
        await self._offers.read()
        sweep = self._clock.monotonic() - self._swept_s >= self._pace.sweep_s
        listed = await self._listed(await self._leases(), sweep=sweep)
        known = await self._leases()  # read after the lists: what is listed has its lease here, or none
        self._rented = Counter(one.lease.offer for one in known.values() if one.lease.live)
        known |= await self._over(listed, known)
        known |= await self._found(listed, known)
        limit = asyncio.Semaphore(SIDE_BY_SIDE)
        tagged = {machine.lease for machines in listed.values() for machine in machines or () if not machine.ended}
        due = [one for one in known.values() if one.lease.live or one.lease.name in tagged]
        ends = await asyncio.gather(*(self._carried_on(one, listed, limit) for one in due), return_exceptions=True)
        _raise_first(ends)
        if sweep:
            self._swept_s = self._clock.monotonic()
            await self._put_away(known.values())
            await self._forget_old()
        return bool((await self._store.list(keys.LEASES, limit=1)).entries)

    async def _hear(self, changed: asyncio.Event) -> None:
        """Wakes the keeper when somebody rents or gives back."""
        while True:
            from_here = (await self._store.list(keys.LEASES)).revision
            changed.set()  # whatever happened before
            with contextlib.suppress(Compacted):
                async with contextlib.aclosing(self._store.watch(keys.LEASES, after=from_here)) as batches:
                    async for batch in batches:
                        if any(event.entry is not None and _is_asked(event.entry) for event in batch.events):
                            changed.set()
            await self._clock.sleep(1.0)

    # reading

    async def _fleet_id(self) -> str:
        """By which tag this fleet's machines are told from others'. Made once."""
        entry = await self._store.get(keys.RENTAL_FLEET)
        if entry is None:
            made = names.ulid(self._clock.now().timestamp())
            with contextlib.suppress(ConditionFailed):
                await self._commit([Put(keys.RENTAL_FLEET, made.encode())], [Absent(keys.RENTAL_FLEET)])
            entry = await self._store.get(keys.RENTAL_FLEET)
        if entry is None:
            raise Unavailable("the fleet's tag could not be stored; it is tried again")
        return entry.value.decode()

    async def _leases(self) -> dict[str, _Known]:
        """Those that are not over."""
        read = read_all((await self._store.list(keys.LEASES)).entries, _known)
        return {one.lease.name: one for _, one in read.values}

    async def _over(
        self, listed: Mapping[tuple[str, str, str], Sequence[Machine] | None], known: Mapping[str, _Known]
    ) -> dict[str, _Known]:
        """Leases that are over and of which a machine is there."""
        tagged = {one.lease for machines in listed.values() for one in machines or () if not one.ended}
        wanted = [keys.of_name(keys.LEASES_OVER, name) for name in tagged - set(known) if _is_lease(name)]
        entries = [entry for key in wanted if (entry := await self._store.get(key)) is not None]
        return {one.lease.name: one for _, one in read_all(entries, _known).values}

    async def _listed(
        self, leases: Mapping[str, _Known], *, sweep: bool
    ) -> dict[tuple[str, str, str], Sequence[Machine] | None]:
        """The machines of each account with something rented; of every account that is known, in a sweep."""
        offers: dict[tuple[str, str, str], Offer] = {}
        for one in leases.values():
            if one.lease.calls and one.lease.live:
                offers.setdefault(one.offer.account, one.offer)
        for offer in map(core_offer, self._offers.records()):
            if sweep or offer.account in self._unheard:
                offers[offer.account] = offer
        self._asked = offers
        lists = await asyncio.gather(*(self._accounts.machines(one, self._fleet) for one in offers.values()))
        listed = dict(zip(offers, lists, strict=True))
        self._unheard = frozenset(account for account, machines in listed.items() if machines is None)
        return listed

    async def _found(
        self, listed: Mapping[tuple[str, str, str], Sequence[Machine] | None], known: Mapping[str, _Known]
    ) -> dict[str, _Known]:
        """Leases for machines that name one which is not there (its record was lost with a backup): only to be ended."""
        found = dict[str, _Known]()
        for account, machines in listed.items():
            lost = defaultdict[str, list[Machine]](list)
            for machine in machines or ():
                if not machine.ended and machine.lease not in known and machine.lease not in found:
                    lost[machine.lease].append(machine)
            for lease, theirs in lost.items():
                if (made := await self._of_nobody(account, lease, theirs)) is not None:
                    found[lease] = made
        return found

    async def _of_nobody(self, account: tuple[str, str, str], lease: str, machines: Sequence[Machine]) -> _Known | None:
        """The lease as it is written anew; None: these machines are left alone."""
        offers = [record for record in self._offers.records() if core_offer(record).account == account]
        if not offers or not _is_lease(lease):
            log.warning("%s carries the fleet's tag and names no lease; it is left alone", machines[0].id)
            return None
        try:
            record = record_of_lost(machines, offers, self._now_s())
            key, value = keys.of_name(keys.LEASES, lease), record.SerializeToString(deterministic=True)
            revision = await self._commit([Put(key, value)], lease_book.unused(lease))
            return _known(Entry(key, value, revision, revision))
        except (Fenced, Unavailable):
            raise
        except ConditionFailed:  # there is one that this version cannot read: that is not none
            log.warning("%s is of %s, which cannot be read; it is left alone", machines[0].id, lease)
        except Exception:  # what is listed of one machine is in no other's way
            log.exception("%s of %s is left alone now", machines[0].id, lease)
        return None

    # carrying on

    async def _carried_on(
        self,
        one: _Known,
        listed: Mapping[tuple[str, str, str], Sequence[Machine] | None],
        limit: asyncio.Semaphore,
    ) -> None:
        async with limit:
            try:
                await self._steps(one, listed)
            except (Fenced, Unavailable):
                raise
            except ConditionFailed:
                log.info("%s changed meanwhile; it is looked at again", one.lease.name)
            except Exception:  # whatever is wrong with this one, the others go on, and so does all of inventory
                log.exception("%s is not carried on now; it is looked at again", one.lease.name)

    async def _steps(self, one: _Known, listed: Mapping[tuple[str, str, str], Sequence[Machine] | None]) -> None:
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
                await self._accounts.terminate(self._where(machine, before.name, offer, listed), machine)
            if done.launch:
                one = await self._launched(one)
                if one.lease.state is not State.INTENT:
                    return
            elif one.lease.state is before.state:
                return

    def _where(
        self,
        machine: str,
        lease: str,
        offer: Offer,
        listed: Mapping[tuple[str, str, str], Sequence[Machine] | None],
    ) -> Offer:
        """An offer of the account that has the machine: the lease's own, unless only another one lists it."""
        there = [account for account, machines in listed.items() if machine in {one.id for one in _of(lease, machines)}]
        return offer if not there or offer.account in there else self._asked[there[0]]

    async def _seen(self, one: _Known, listed: Mapping[tuple[str, str, str], Sequence[Machine] | None]) -> Seen:
        machines = listed.get(one.offer.account)
        own = None if machines is None else _of(one.lease.name, machines)
        others = (there for account, there in listed.items() if account != one.offer.account)
        state = one.lease.state
        try:
            lag_s = await self._accounts.lag_s(one.offer)
        except ProviderError:
            lag_s, own = LAG_S, None
        return Seen(
            machines=own,
            elsewhere=[
                machine for there in others for machine in _of(one.lease.name, there) if not _is_own(one, machine)
            ],
            joined=state is State.BOOTING and await self._nodes.joined(one.record.node),
            held=await self._nodes.held(one.record.node) if state is State.DRAINING else None,
            lag_s=lag_s,
            notice=await self._nodes.announced(one.record.node) if state in _ON_NODE else None,
        )

    async def _launched(self, one: _Known) -> _Known:
        """Makes the call that the record has announced, and writes down what came of it."""
        request = self._launching.request(one.lease, one.offer, self._fleet)
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

    async def _after_busy(self, one: _Known, busy: Throttled) -> _Known:
        now_s = self._now_s()
        if rules.is_busy_too_long(one.lease, now_s):
            after = self._elsewhere(one, one.lease, f"{names.last(one.offer.name)}: too busy", now_s)
        else:
            after = rules.busy(one.lease, now_s, busy.pause_s)
        return await self._stored(one, Step(after))

    def _elsewhere(self, one: _Known, lease: Lease, why: str, now_s: float) -> Lease:
        """The next of its offers that is believed to have a machine; none: the lease is over."""
        wanted = self._offers.among(one.record.offers)
        rented = self._rented.copy()
        rented[lease.offer] -= 1  # its own place
        chosen = choose((offer for offer in wanted if offer.name != lease.offer or lease.provider_id), rented, now_s)
        if chosen is None or lease.end_reason:
            return rules.no_offer(lease, f"no offer has a machine; the last said: {why}", now_s)
        self._rented[lease.offer] -= 1
        self._rented[chosen.name] += 1
        return rules.other_offer(lease, chosen.name, chosen.terms, now_s)

    # writing

    async def _stored(self, one: _Known, done: Step) -> _Known:
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
        revision = await self._commit([*record_writes, *writes], [Unchanged(one.entry), *when])
        if ends:
            await self._nodes.retire(record.node, f"{one.lease.name} is over")  # it may have joined in that moment
            return _known(Entry(record_writes[-1].key, value, revision, revision))
        return _known(Entry(one.entry.key, value, revision, one.entry.created, one.entry.version + 1))

    async def _beside(self, one: _Known, done: Step, offer: Offer) -> tuple[list[Write], list[Condition]]:
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

    async def _put_away(self, known: Iterable[_Known]) -> None:
        """Those that were over before such leases had a place of their own."""
        old = (one for one in known if not one.lease.live and one.entry.key.startswith(keys.LEASES))
        for one in itertools.islice(old, LOOKED_AT_ONCE):
            with contextlib.suppress(ConditionFailed):
                await self._commit(lease_book.put_away(one.entry, one.entry.value), [Unchanged(one.entry)])

    async def _forget_old(self) -> None:
        """Looks at some of those that are over, after those of the last sweep."""
        some = await self._store.list(keys.LEASES_OVER, after=self._looked_to, limit=LOOKED_AT_ONCE)
        self._looked_to = some.after
        for entry, one in read_all(some.entries, _known).values:
            if self._now_s() - one.lease.state_s > KEPT_S:
                with contextlib.suppress(ConditionFailed):
                    await self._commit(lease_book.forgotten(entry, one.record), [Unchanged(entry)])

    async def _commit(self, writes: Sequence[Write], when: Sequence[Condition]) -> int:
        return await self._store.commit(*writes, when=[*when, self._held])

    def _now_s(self) -> float:
        return self._clock.now().timestamp()


def _known(entry: Entry) -> _Known:
    record = lease_of(entry)
    record.etag = ""
    return _Known(entry, record, core_lease(record))


def _of(lease: str, machines: Sequence[Machine] | None) -> list[Machine]:
    """Those that carry its tag."""
    return [machine for machine in machines or () if machine.lease == lease]


def _is_own(one: _Known, machine: Machine) -> bool:
    """Whether it is of the present request: two accounts by name may be one, and list the same machines."""
    return one.lease.live and machine.token == one.lease.token


def _raise_first(ends: Sequence[BaseException | None]) -> None:
    """The loss of leadership before all else; one lease that fails holds up no other."""
    failed = [one for one in ends if one is not None]
    for error in sorted(failed, key=lambda one: not isinstance(one, Fenced)):
        raise error


def _is_lease(name: str) -> bool:
    try:
        names.split(name, "leases")
    except InvalidArgument:
        return False
    return True


def _is_asked(entry: Entry) -> bool:
    """Whether somebody but the keeper wrote it: rented, or to be given back."""
    try:
        record = pb.Lease.FromString(entry.value)
    except DecodeError:  # nobody whom this version knows
        return False
    ending = bool(record.end_reason) and record.state != pb.LEASE_STATE_GONE and not record.HasField("end_time")
    return record.state == pb.LEASE_STATE_INTENT or ending


def _kind_of(refusal: ProviderError) -> str:
    return "no stock" if isinstance(refusal, NoCapacity) else type(refusal).__name__
