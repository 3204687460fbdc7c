"""The keeper of leases over a cloud that fails, killed at every step: nothing is left running, nothing is rented twice."""

import itertools
import random
from dataclasses import replace
from datetime import timedelta

import pytest

from benchmarks.burst_lab import crashes
from benchmarks.burst_lab.cloud import HARSH, Faults
from tests.support import virtual_time
from tests.support.virtual_time import LoopClock
from whaleflux.store import Put, keys
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.lease_keeper import KEPT_S, LeaseKeeper
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.rented_nodes import node_of


def outcome(seed, faults, crash_at=()):
    async def go():
        return await crashes.run(LoopClock(), seed, faults, crash_at)

    return virtual_time.run(go())


def check(seen, *, restarts=None):
    assert (seen.leaked, seen.double, seen.late, seen.unended) == (0, 0, 0, 0), seen
    assert restarts is None or seen.crashes == restarts, seen


def test_without_faults_three_leases_are_three_machines():
    seen = outcome(0, Faults())
    check(seen, restarts=0)
    assert (seen.machines, seen.strays) == (3, 0)
    assert seen.worst_found_s == 0.0


@pytest.mark.parametrize("first", [1, 2])
def test_killed_at_every_step_of_a_lease(first):
    """Each process gets further than the one before: together they are killed before and after each call and commit."""
    check(outcome(first, Faults(), list(itertools.chain.from_iterable((n, n) for n in range(first, 24, 2)))))


def test_killed_anywhere_over_a_cloud_with_every_fault():
    faults = replace(HARSH, no_stock=0.05, lost_after=0.3, duplicate=0.4, late=0.2, zombie=0.6)
    strays = 0
    for seed in range(4):
        draw = random.Random(seed)
        crash_at = [draw.randint(1, 25) for _ in range(draw.randint(2, 8))]
        seen = outcome(seed, replace(faults, keeps_tokens=seed % 2 == 0), crash_at)
        check(seen)
        strays += seen.strays
    assert strays


def test_a_lost_answer_makes_no_second_machine_where_tokens_are_not_kept():
    seen = outcome(5, Faults(lost_after=0.7, lag_s=29.0, keeps_tokens=False))
    check(seen)
    assert (seen.machines, seen.strays) == (3, 0)


def test_a_stock_out_costs_seconds():
    seen = outcome(3, Faults(no_stock=0.4))
    check(seen)
    assert seen.failover_s and max(seen.failover_s) <= 10.0


class Account:
    """One region's machines, as its list says."""

    lag_s = 5.0

    def __init__(self):
        self.there, self.ended = [], []

    async def launch(self, request):
        machine = Machine(f"{request.offer.region}-m", request.lease, request.token, 0.0, request.offer.name)
        self.there.append(machine)
        return machine.id

    async def machines(self, fleet):
        return self.there

    async def terminate(self, machine):
        self.ended.append(machine)
        self.there = [one for one in self.there if one.id != machine]


class Regions:
    """A provider with an account in each region."""

    def __init__(self):
        self.accounts = {"north": Account(), "south": Account()}

    def problems(self, offer):
        return {}

    def open(self, offer, keys):
        return self.accounts[offer.region]


class Counting:
    """The store, and how many entries were read of it."""

    def __init__(self, store):
        self._store, self.read = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def list(self, prefix, **more):
        found = await self._store.list(prefix, **more)
        self.read += len(found.entries)
        return found


class Kept:
    """Two leases by offers in two regions, and a keeper that is asked for rounds."""

    def __init__(self):
        self.clock = LoopClock()
        self.store, self.regions = Counting(MemoryStore(self.clock)), Regions()
        self.nodes = crashes.Nodes(self.clock, random.Random(0))
        self.keys = [no_keys]  # the last one says who may use which

    async def keeper(self, leader):
        for region in ("north", "south"):
            offer = pb.Offer(name=f"offers/{region}", provider="p", region=region, site="sites/s", gpus=8)
            offer.usd_per_hour, offer.max_machines = 1.0, 8
            await self.store.commit(Put(keys.OFFERS + region, offer.SerializeToString()))
            lease = pb.Lease(name=f"leases/{region}", state=pb.LEASE_STATE_INTENT, attempt=1, cost_cap_usd=100.0)
            lease.offers[:], lease.node = [offer.name], node_of("sites/s", f"leases/{region}", 1)
            lease.offer.CopyFrom(offer)
            lease.create_time.FromDatetime(self.clock.now())
            lease.hard_end_time.FromSeconds(int(self.clock.now().timestamp()) + 7200)
            await self.store.commit(Put(keys.LEASES + region, lease.SerializeToString()))
        accounts = Accounts({"p": self.regions}, self.opened, self.clock)
        launching = Launching(FrontDoor("fleet:7443"), crashes.authority(), 1800.0)
        return LeaseKeeper(self.store, self.clock, leader, accounts, self.nodes, launching)

    async def opened(self, secret, owner):
        return await self.keys[-1](secret, owner)

    async def lease(self, region):
        return pb.Lease.FromString((await self.store.get(keys.LEASES + region)).value)


async def no_keys(secret, owner):
    return {}


def kept(test):
    async def go():
        world = Kept()
        async with elect(world.store, "leases", "a") as leader:
            await test(world, await world.keeper(leader))

    virtual_time.run(go())


def test_what_an_earlier_offer_made_in_another_account_is_ended_there():
    async def test(world, keeper):
        await keeper.round()
        late = Machine("late", "leases/south", "of its first attempt", 0.0, "offers/north")
        north, south = world.regions.accounts["north"], world.regions.accounts["south"]
        north.there.append(late)
        await keeper.round()
        assert (north.ended, south.ended) == (["late"], [])
        stray = await world.lease("south")
        assert (stray.strays, stray.provider_id) == (["late"], "south-m") and stray.stray_usd > 0

    kept(test)


def test_a_lease_that_cannot_be_read_is_neither_ended_nor_in_the_way_of_others():
    async def test(world, keeper):
        await world.store.commit(
            Put(keys.LEASES + "newer", pb.Lease(name="leases/newer", state=99).SerializeToString())
        )
        north = world.regions.accounts["north"]
        north.there.append(Machine("its", "leases/newer", "t", 0.0, "offers/north"))
        await keeper.round()
        assert not north.ended
        assert (await world.lease("north")).state == pb.LEASE_STATE_BOOTING

    kept(test)


def test_one_lease_that_fails_holds_up_no_other(monkeypatch):
    async def test(world, keeper):
        await keeper.round()

        async def joined(node):
            if "north" in node:
                raise KeyError(node)
            return True

        monkeypatch.setattr(world.nodes, "joined", joined)
        await keeper.round()
        states = [(await world.lease(region)).state for region in ("north", "south")]
        assert states == [pb.LEASE_STATE_BOOTING, pb.LEASE_STATE_JOINED]

    kept(test)


def test_two_accounts_by_name_that_list_the_same_machines_end_none_of_them():
    async def test(world, keeper):
        north, south = world.regions.accounts["north"], world.regions.accounts["south"]
        south.there = north.there  # one command, or one set of keys, behind both
        for _ in range(3):
            await keeper.round()
        assert not north.ended and not south.ended
        assert [(await world.lease(region)).state for region in ("north", "south")] == [pb.LEASE_STATE_BOOTING] * 2

    kept(test)


async def _over(world, keeper, region):
    """Gives a lease back, and waits until its machine is not listed any more."""
    lease = await world.lease(region)
    lease.end_reason = "given back"
    await world.store.commit(Put(keys.LEASES + region, lease.SerializeToString()))
    for _ in range(4):
        await keeper.round()
        await world.clock.sleep(10)
    assert await world.store.get(keys.LEASES + region) is None
    return pb.Lease.FromString((await world.store.get(keys.LEASES_OVER + region)).value)


def test_a_lease_that_is_over_is_put_away_and_its_machine_that_lives_on_is_found():
    async def test(world, keeper):
        await keeper.round()
        gone = await _over(world, keeper, "north")
        assert gone.state == pb.LEASE_STATE_GONE
        north = world.regions.accounts["north"]
        north.there.append(Machine("zombie", gone.name, "t", 0.0, "offers/north"))
        await world.clock.sleep(60)
        await keeper.round()
        assert "zombie" in north.ended
        stray = pb.Lease.FromString((await world.store.get(keys.LEASES_OVER + "north")).value)
        assert list(stray.strays) == ["zombie"] and stray.stray_usd > 0
        assert await world.store.get(keys.LEASES + "north") is None

    kept(test)


def test_a_machine_of_a_lease_that_is_over_and_cannot_be_read_is_left_alone():
    async def test(world, keeper):
        await world.store.commit(Put(keys.LEASES_OVER + "newer", b"\xff\xff\xff"))
        north = world.regions.accounts["north"]
        north.there.append(Machine("its", "leases/newer", "t", 0.0, "offers/north"))
        await keeper.round()
        assert not north.ended and await world.store.get(keys.LEASES + "newer") is None

    kept(test)


def test_leases_that_are_over_are_forgotten_after_a_month_with_the_requests_that_made_them():
    async def test(world, keeper):
        old = pb.Lease(name="leases/old", state=pb.LEASE_STATE_GONE, attempt=1, owner="user/o", request_fingerprint="f")
        old.state_time.FromDatetime(world.clock.now() - timedelta(seconds=KEPT_S - 30))
        request = lease_book.request_key("user/o", "f")
        await world.store.commit(
            Put(keys.LEASES + "old", old.SerializeToString()), Put(request, b"leases/old")
        )  # under the place that such leases had before
        await keeper.round()
        assert await world.store.get(keys.LEASES + "old") is None
        assert await world.store.get(keys.LEASES_OVER + "old") is not None
        await world.clock.sleep(90)
        await keeper.round()
        assert await world.store.get(keys.LEASES_OVER + "old") is None and await world.store.get(request) is None

    kept(test)


def test_a_round_reads_nothing_of_what_is_over():
    async def test(world, keeper):
        await keeper.round()
        world.store.read = 0
        await keeper.round()
        read = world.store.read
        gone = pb.Lease(state=pb.LEASE_STATE_GONE, attempt=1)
        for number in range(300):
            gone.name = f"leases/old{number}"
            await world.store.commit(Put(keys.of_name(keys.LEASES_OVER, gone.name), gone.SerializeToString()))
        world.store.read = 0
        await keeper.round()
        assert world.store.read == read

    kept(test)


def test_a_node_that_joins_in_the_moment_in_which_its_lease_ends_is_retired(monkeypatch):
    async def test(world, keeper):
        await keeper.round()
        retire, node = world.nodes.retire, (await world.lease("north")).node

        async def retired(name, why):
            there = name in world.nodes.there
            world.nodes.there.add(name)  # just after the first look
            await retire(name, why) if there else None

        monkeypatch.setattr(world.nodes, "retire", retired)
        await _over(world, keeper, "north")
        assert not await world.nodes.joined(node)

    kept(test)
