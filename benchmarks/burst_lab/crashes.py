"""The keeper of leases over a failing cloud, killed at any step and started again, in virtual time.

Real: the keeper, its rules, its records over the store's model in memory, join tokens. Simulated: the cloud, nodes, time.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from benchmarks.burst_lab.cloud import NOTICE_S, Asked, Cloud, CloudKind, Faults, Real
from whaleflux.clock import Clock
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store import keys
from whaleflux.store.api import Condition, ConditionFailed, Put, Store, Unchanged, Write
from whaleflux.store.election import Leader, lead
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_inventory.core.lease_rules import State
from whaleflux_inventory.lease_keeper import LeaseKeeper, Pace
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.lease_records import core_lease
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.rented_nodes import node_of

FOUND_S = 60.0  # within which a machine that nobody accounts for is told to end
SETTLE_S = 900.0  # after the last end: zombies need several words
LEASES = 3
DOWN_S = 20.0  # at most, until another process goes on after a kill
SAVE_S = 15.0  # at most, until the work of a node that drains has left it: the jobs' own part, drawn


@dataclass
class Steps:
    """Counts every call that leaves the process, and ends the process before or after one of them."""

    at: Sequence[int] = ()
    count: int = 0
    kinds: list[str] = field(default_factory=list)
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def around(self, kind: str, call: Any) -> Any:
        """2 steps: before the call, and after it before its answer is used."""
        self._step(f"before {kind}", call)
        answer = await call
        self._step(f"after {kind}", None)
        return answer

    def _step(self, kind: str, call: Any) -> None:
        self.count += 1
        self.kinds.append(kind)
        if self.count in self.at:
            if call is not None:
                call.close()
            self.dead.set()
            raise asyncio.CancelledError  # ends the whole keeper, as a killed process


class CrashingStore:
    """The store as one process sees it: commits are steps, what is read is not."""

    def __init__(self, store: Store, steps: Steps) -> None:
        self._store, self._steps = store, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, *writes: Write, when: Sequence[Condition] = ()) -> int:
        ours = any(write.key.startswith(keys.LEASES) for write in writes)
        call = self._store.commit(*writes, when=when)
        return int(await self._steps.around("commit", call)) if ours else await call


class CrashingCloud:
    """The cloud as one process sees it."""

    def __init__(self, cloud: Cloud, steps: Steps) -> None:
        self._cloud, self._steps, self.lag_s = cloud, steps, cloud.lag_s

    async def launch(self, request: Any) -> Any:
        return await self._steps.around("launch", self._cloud.launch(request))

    async def machines(self, fleet: str) -> Any:
        return await self._cloud.machines(fleet)

    async def terminate(self, machine: str) -> Any:
        return await self._steps.around("terminate", self._cloud.terminate(machine))


class Nodes:
    """Nodes of machines that have joined; jobs leave a draining one within a drawn time."""

    def __init__(self, clock: Clock, rng: random.Random) -> None:
        self._clock, self._rng = clock, rng
        self.there: set[str] = set()
        self._empty_s: dict[str, float] = {}
        self.retired: set[str] = set()

    async def joined(self, node: str) -> bool:
        return node in self.there and node not in self.retired

    async def held(self, node: str) -> int | None:
        return 0 if self._clock.monotonic() >= self._empty_s.get(node, float("inf")) else 8

    async def announced(self, node: str) -> tuple[float, str] | None:
        return None

    async def drain(self, node: str, why: str) -> None:
        self._empty_s.setdefault(node, self._clock.monotonic() + self._rng.uniform(2, SAVE_S))

    async def retire(self, node: str, why: str) -> None:
        self.retired.add(node)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one seed.

    `leaked`: machines alive at the end; `double`: machines that joined where another of the same lease's attempt had; `late`: strays that
    were told to end later than FOUND_S after a list could show them; `unended`: leases that are not GONE.
    """

    leaked: int
    double: int
    late: int
    unended: int
    machines: int
    strays: int
    crashes: int
    steps: int
    failover_s: tuple[float, ...]
    notice_s: tuple[float, ...]
    worst_found_s: float


class World:
    """One fleet, its offers, and a keeper that is killed at the given steps."""

    def __init__(self, clock: Clock, seed: int, faults: Faults, crash_at: Sequence[int]) -> None:
        self.clock, self.rng = clock, random.Random(seed)
        self.store = MemoryStore(clock)
        self.nodes = Nodes(clock, self.rng)
        self.cloud = Cloud(clock, random.Random(seed + 1), faults, self._joins)
        self.authority = authority()
        self.crash_at, self.crashes, self.steps = list(crash_at), 0, Steps()
        self._used: dict[str, str] = {}
        self.owned: set[str] = set()  # machines that were a lease's own at some time
        self.double = 0
        self.killed_s: list[float] = []
        self.states: dict[str, list[tuple[float, State]]] = {}

    def _joins(self, real: Real) -> bool:
        """As inventory admits: a token admits one machine, under the name that it is bound to."""
        token = real.request.environment["WHALEFLUX_JOIN_TOKEN"].partition(".")[0]
        entry = self.store._entries.get(keys.JOIN_TOKENS + token)
        if entry is None or token in self._used:
            return False
        self._used[token] = real.id
        node = pb.JoinTokenRecord.FromString(entry.value).token.node
        self.double += node in self.nodes.there
        self.nodes.there.add(node)
        return True

    async def setup(self) -> None:
        for number, price in enumerate((10.0, 12.0, 20.0), 1):
            offer = pb.Offer(name=f"offers/o{number}", provider="cloud", machine_type="m", site="sites/cloud", gpus=8)
            offer.usd_per_hour, offer.boot_s, offer.max_machines = price, 90.0, LEASES
            offer.market = types_pb2.PRICE_KIND_SPOT if number == 1 else types_pb2.PRICE_KIND_ON_DEMAND
            await self.store.commit(Put(keys.of_name(keys.OFFERS, offer.name), offer.SerializeToString()))

    async def rent(self, number: int, ttl_s: float) -> None:
        lease = pb.Lease(name=f"leases/l{number}", state=pb.LEASE_STATE_INTENT, attempt=1, cost_cap_usd=60.0)
        lease.offers[:] = ["offers/o1", "offers/o2", "offers/o3"]
        entry = await self.store.get(keys.OFFERS + "o1")
        assert entry is not None
        lease.offer.MergeFromString(entry.value)
        lease.node = node_of("sites/cloud", lease.name, 1)
        lease.create_time.FromDatetime(self.clock.now())
        lease.hard_end_time.FromSeconds(int(self.clock.now().timestamp() + ttl_s))
        await self.store.commit(Put(keys.of_name(keys.LEASES, lease.name), lease.SerializeToString()))

    async def give_back(self, number: int) -> None:
        key = f"{keys.LEASES}l{number}"
        while True:
            entry = await self.store.get(key)
            if entry is None:  # it is over
                return
            lease = pb.Lease.FromString(entry.value)
            lease.end_reason = lease.end_reason or "given back"
            try:
                await self.store.commit(Put(key, lease.SerializeToString()), when=[Unchanged(entry)])
            except ConditionFailed:
                continue
            return

    async def keep(self) -> None:
        """The keeper, again and again: each crash is a new process after a while."""
        while True:
            self.steps = Steps(at=self.crash_at[:1])
            running = asyncio.ensure_future(
                lead(CrashingStore(self.store, self.steps), "inventory", "a", self._work, ttl_s=120.0)
            )
            dead = asyncio.ensure_future(self.steps.dead.wait())
            try:
                await asyncio.wait({running, dead}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                running.cancel()
                dead.cancel()
                await asyncio.gather(running, dead, return_exceptions=True)
            self.crashes += 1
            self.killed_s.append(self.clock.monotonic())
            self.crash_at = self.crash_at[1:]
            await self.clock.sleep(self.rng.uniform(0.5, DOWN_S))

    async def _work(self, leader: Leader) -> None:
        store: Any = CrashingStore(self.store, self.steps)
        cloud: Any = CrashingCloud(self.cloud, self.steps)
        accounts = Accounts({"cloud": CloudKind(cloud)}, _no_keys, self.clock)
        launching = Launching(FrontDoor("fleet:7443"), self.authority, 1800.0)
        await LeaseKeeper(store, self.clock, leader, accounts, self.nodes, launching, Pace()).run()

    async def observe(self) -> None:
        """When each lease came into each state."""
        async for batch in self.store.watch(keys.ALL_LEASES, after=0):
            for event in batch.events:
                if event.entry is None:
                    continue
                lease = core_lease(pb.Lease.FromString(event.entry.value))
                self.owned.add(lease.provider_id)
                seen = self.states.setdefault(lease.name, [])
                if not seen or seen[-1][1] is not lease.state:
                    seen.append((self.clock.monotonic(), lease.state))


_AUTHORITY: list[CertificateAuthority] = []


def authority() -> CertificateAuthority:
    """One for all seeds: making keys takes time and proves nothing here."""
    if not _AUTHORITY:
        _AUTHORITY.append(CertificateAuthority.create(datetime(2026, 1, 1, tzinfo=UTC)))
    return _AUTHORITY[0]


async def _no_keys(secret: str, owner: str) -> Mapping[str, str]:
    return {}


async def run(clock: Clock, seed: int, faults: Faults, crash_at: Sequence[int]) -> Outcome:
    """Rents, lives for an hour or two of virtual time, gives back, and looks at what is left."""
    world = World(clock, seed, faults, crash_at)
    await world.setup()
    tasks = [asyncio.ensure_future(world.keep()), asyncio.ensure_future(world.observe())]
    for number in range(LEASES):
        await world.rent(number, world.rng.uniform(900, 2400))
        await clock.sleep(world.rng.uniform(0, 120))
    for number in range(LEASES):
        await clock.sleep(world.rng.uniform(0, 600))
        if world.rng.random() < 0.7:
            await world.give_back(number)
    await clock.sleep(2400 + SETTLE_S)
    outcome = await _outcome(world)
    world.cloud.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcome


async def _outcome(world: World) -> Outcome:
    leases = [
        core_lease(pb.Lease.FromString(entry.value)) for entry in (await world.store.list(keys.ALL_LEASES)).entries
    ]
    strays = [real for real in world.cloud.there.values() if real.id not in world.owned and not real.joined]
    found = [_found_s(real) for real in strays]
    return Outcome(
        leaked=len(world.cloud.alive()),
        double=world.double,
        late=sum(one > FOUND_S for one in found),
        unended=sum(lease.live for lease in leases),
        machines=len(world.cloud.there),
        strays=len(strays),
        crashes=world.crashes,
        steps=world.steps.count,
        failover_s=_failovers_s(world),
        notice_s=_notices_s(world),
        worst_found_s=max(found, default=0.0),
    )


def _found_s(real: Real) -> float:
    """Seconds from when a list could show it to the word that ends it, or to its own end."""
    return max(0.0, min(real.told_s, real.taken_s, real.dies_s) - real.listed_s)


def _failovers_s(world: World) -> tuple[float, ...]:
    """From a provider's word that it has no stock to the call by the next offer, where nobody was killed shortly before or in between."""
    of_lease = defaultdict[str, list[Asked]](list)
    for asked in world.cloud.asked:
        of_lease[asked.lease].append(asked)
    both = [pair for calls in of_lease.values() for pair in pairwise(calls) if pair[0].refused_s]
    return tuple(
        after.at_s - before.refused_s for before, after in both if not _killed(world, before.refused_s, after.at_s)
    )


def _notices_s(world: World) -> tuple[float, ...]:
    """From the word that a machine is taken away until its work has left it."""
    found = []
    for real in world.cloud.there.values():
        noticed_s = real.taken_s - NOTICE_S
        times = {state: at for at, state in world.states.get(real.request.lease, [])}
        began_s, ended_s = times.get(State.DRAINING, 0.0), times.get(State.RELEASING, 0.0)
        if real.joined and noticed_s <= began_s < real.taken_s and not _killed(world, noticed_s, ended_s):
            found.append(ended_s - noticed_s)
    return tuple(found)


def _killed(world: World, began_s: float, ended_s: float) -> bool:
    """Or so shortly before that the next process may not have been there yet."""
    return any(began_s - DOWN_S <= at <= ended_s + 1 for at in world.killed_s)
