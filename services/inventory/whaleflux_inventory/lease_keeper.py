"""Carries leases on: one leader asks providers, stores each step before it is taken, and finds again what a crash left.

A round lists the machines of every account with something under way (`lease_sight.py`), decides for each lease (`core/lease_rules.py`,
`lease_steps.py`), and each `sweep_s` looks at all accounts: a machine with this fleet's tag that no lease accounts for is ended and what it cost is
written down (`lost_leases.py`). Leases that are over are read where a machine names them, and to be forgotten: a round costs what live ones take
(`lease_book.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Compacted, StatusError, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Fenced, Put, Store, Unchanged, Write
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.lease_launch import Launching
from whaleflux_inventory.lease_sight import KnownLease, LeaseSight, Lists, known_lease, tagged_with
from whaleflux_inventory.lease_steps import LeaseSteps
from whaleflux_inventory.lost_leases import LostLeases
from whaleflux_inventory.offer_book import OfferBook
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.rented_nodes import RentedNodes

log = logging.getLogger(__name__)
SIDE_BY_SIDE = 8  # leases that are carried on at a time
KEPT_S = 30 * 86_400.0  # a lease that is over is shown for so long
LOOKED_AT_ONCE = 100  # leases that are over, each sweep


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between rounds while something is rented, and between looks at everything.

    Notices of an end are two minutes long at best, whatever the market: whoever has machines is asked often. Two sweeps in the minute in which a
    forgotten machine is to be found, since a crash may take one of them.
    """

    poll_s: float = 5.0
    sweep_s: float = 30.0


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
        self._store, self._clock, self._held, self._pace = store, clock, leader.held, pace
        self._offers = OfferBook(store, clock, leader.held)
        self._sight = LeaseSight(store, accounts, self._offers)
        self._lost = LostLeases(store, clock, leader.held, self._offers)
        self._steps = LeaseSteps(store, clock, leader.held, accounts, nodes, launching, self._offers, self._sight)
        self._fleet = ""
        self._swept_s = float("-inf")
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
        listed = await self._sight.listed(await self._sight.leases(), self._fleet, sweep=sweep)
        known = await self._sight.leases()  # read after the lists: what is listed has its lease here, or none
        self._steps.rented = Counter(one.lease.offer for one in known.values() if one.lease.live)
        known |= await self._sight.over(listed, known)
        known |= await self._lost.found(listed, known)
        limit = asyncio.Semaphore(SIDE_BY_SIDE)
        tagged = tagged_with(listed)
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

    async def _carried_on(
        self,
        one: KnownLease,
        listed: Lists,
        limit: asyncio.Semaphore,
    ) -> None:
        async with limit:
            try:
                await self._steps.take(one, listed, self._fleet)
            except (Fenced, Unavailable):
                raise
            except ConditionFailed:
                log.info("%s changed meanwhile; it is looked at again", one.lease.name)
            except Exception:  # whatever is wrong with this one, the others go on, and so does all of inventory
                log.exception("%s is not carried on now; it is looked at again", one.lease.name)

    async def _put_away(self, known: Iterable[KnownLease]) -> None:
        """Those that were over before such leases had a place of their own."""
        old = (one for one in known if not one.lease.live and one.entry.key.startswith(keys.LEASES))
        for one in itertools.islice(old, LOOKED_AT_ONCE):
            with contextlib.suppress(ConditionFailed):
                await self._commit(lease_book.put_away(one.entry, one.entry.value), [Unchanged(one.entry)])

    async def _forget_old(self) -> None:
        """Looks at some of those that are over, after those of the last sweep."""
        some = await self._store.list(keys.LEASES_OVER, after=self._looked_to, limit=LOOKED_AT_ONCE)
        self._looked_to = some.after
        for entry, one in read_all(some.entries, known_lease).values:
            if self._clock.now().timestamp() - one.lease.state_s > KEPT_S:
                with contextlib.suppress(ConditionFailed):
                    await self._commit(lease_book.forgotten(entry, one.record), [Unchanged(entry)])

    async def _commit(self, writes: Sequence[Write], when: Sequence[Condition]) -> int:
        return await self._store.commit(*writes, when=[*when, self._held])


def _raise_first(ends: Sequence[BaseException | None]) -> None:
    """The loss of leadership before all else; one lease that fails holds up no other."""
    failed = [one for one in ends if one is not None]
    for error in sorted(failed, key=lambda one: not isinstance(one, Fenced)):
        raise error


def _is_asked(entry: Entry) -> bool:
    """Whether somebody but the keeper wrote it: rented, or to be given back."""
    try:
        record = pb.Lease.FromString(entry.value)
    except DecodeError:  # nobody whom this version knows
        return False
    ending = bool(record.end_reason) and record.state != pb.LEASE_STATE_GONE and not record.HasField("end_time")
    return record.state == pb.LEASE_STATE_INTENT or ending
