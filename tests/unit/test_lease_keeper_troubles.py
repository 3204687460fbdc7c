"""The keeper of leases and the trouble of others: what a provider says, whose keys fail, what was lost, which cannot be read."""

import asyncio
from datetime import timedelta

from tests.unit.test_lease_keeper import Account, kept
from whaleflux.errors import PermissionDenied, ResourceExhausted
from whaleflux.store import Delete, Put, keys
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.core.lease_rules import Lease, Machine, Terms, token_of
from whaleflux_inventory.lease_keeper import KEPT_S
from whaleflux_inventory.providers.api import NoCapacity


async def joined(world, keeper):
    """Both leases have their machines, which are nodes."""
    await keeper.round()
    world.nodes.there |= {(await world.lease(region)).node for region in ("north", "south")}
    await keeper.round()
    assert (await world.lease("north")).state == pb.LEASE_STATE_JOINED


async def offer(world, name):
    return pb.Offer.FromString((await world.store.get(keys.OFFERS + name)).value)


def announced(world, monkeypatch, region, in_s=100.0):
    node = f"sites/s/nodes/{region}"

    async def says(asked):
        return (world.clock.now().timestamp() + in_s, "SPOT_TAKEN") if asked == node else None

    monkeypatch.setattr(world.nodes, "announced", says)


def test_an_offer_that_takes_a_machine_away_is_not_believed_for_a_while(monkeypatch):
    async def test(world, keeper):
        await joined(world, keeper)
        announced(world, monkeypatch, "north")
        await keeper.round()
        assert (await world.lease("north")).state == pb.LEASE_STATE_DRAINING
        north, south = await offer(world, "north"), await offer(world, "south")
        assert (north.refusals, south.refusals) == (1, 0) and "SPOT_TAKEN" in north.refusal
        assert north.refused_time.ToSeconds() == int(world.clock.now().timestamp())

    kept(test)


def test_an_offer_whose_machine_vanishes_is_not_asked_again_at_once():
    async def test(world, keeper):
        await keeper.round()
        world.regions.accounts["north"].there.clear()  # before it has joined
        await keeper.round()
        await world.clock.sleep(70)
        await keeper.round()
        assert (await offer(world, "north")).refusals == 1
        assert not world.regions.accounts["north"].there  # its only offer
        world.nodes.there.add((await world.lease("south")).node)
        await keeper.round()
        world.regions.accounts["south"].there.clear()  # as a node
        await keeper.round()
        await world.clock.sleep(70)
        await keeper.round()
        assert (await offer(world, "south")).refusals == 1

    kept(test)


def test_what_many_leases_hear_in_one_moment_is_one_refusal(monkeypatch):
    async def test(world, keeper):
        first = await world.lease("north")
        for number in range(30):
            first.name = f"leases/n{number}"
            await world.store.commit(Put(keys.LEASES + f"n{number}", first.SerializeToString()))

        async def refuses(request):
            await asyncio.sleep(0.01)
            raise NoCapacity("none")

        monkeypatch.setattr(world.regions.accounts["north"], "launch", refuses)
        await keeper.round()
        assert (await offer(world, "north")).refusals == 1

    kept(test)


def test_a_machine_whose_lease_was_lost_is_drained_under_its_name_before_it_ends():
    async def test(world, keeper):
        await joined(world, keeper)
        lost = await world.lease("north")
        await world.store.commit(Delete(keys.LEASES + "north"))
        await world.clock.sleep(40)
        await keeper.round()
        found, north = await world.lease("north"), world.regions.accounts["north"]
        assert (found.state, found.node, found.provider_id) == (pb.LEASE_STATE_DRAINING, lost.node, "north-m")
        assert not north.ended and "north-m" in found.end_reason and "its work is moved away" in found.end_reason
        grace_s = found.drain_end_time.ToSeconds() - world.clock.now().timestamp()
        assert 110 < grace_s <= 120
        await world.clock.sleep(20)  # its work has left it
        await keeper.round()
        assert north.ended == ["north-m"]

    kept(test)


def test_the_attempt_of_a_lost_lease_is_known_by_its_token():
    async def test(world, keeper):
        north = world.regions.accounts["north"]
        for attempt in (1, 3):
            token = token_of("leases/lost", "offers/north", attempt)
            north.there.append(Machine(f"m{attempt}", "leases/lost", token, 0.0))
        world.nodes.there.add("sites/s/nodes/lost-3")
        await keeper.round()
        found = pb.Lease.FromString((await world.store.get(keys.LEASES + "lost")).value)
        assert (found.node, found.attempt, found.provider_id) == ("sites/s/nodes/lost-3", 3, "m3")
        assert set(north.ended) == {"m1"}

    kept(test)


def test_token_of_a_lease_is_that_of_its_parts():
    lease = Lease("leases/l", "offers/o", Terms(1.0), 0.0, 0.0, 0.0, attempt=2)
    assert lease.token == token_of("leases/l", "offers/o", 2)


def test_a_machine_that_a_list_tells_nonsense_of_holds_up_no_other_account():
    async def test(world, keeper):
        north, south = world.regions.accounts["north"], world.regions.accounts["south"]
        north.there.append(Machine("odd", "leases/lost", "t", 1e300, "offers/north"))
        await keeper.round()
        assert south.there and (await world.lease("south")).state == pb.LEASE_STATE_BOOTING

    kept(test)


def test_the_keeper_outlives_a_damaged_record_and_an_answer_that_it_does_not_know(monkeypatch):
    async def test(world, keeper):
        running = asyncio.ensure_future(keeper.run())
        await world.clock.sleep(2)
        await world.store.commit(Put(keys.LEASES + "damaged", b"\xff\xff\xff"))
        await world.clock.sleep(10)
        lists = world.store.list

        async def full(prefix, **more):
            raise ResourceExhausted("etcd has no space")

        monkeypatch.setattr(world.store, "list", full, raising=False)
        await world.clock.sleep(60)
        monkeypatch.setattr(world.store, "list", lists, raising=False)
        world.nodes.there.add((await world.lease("south")).node)
        await world.clock.sleep(60)
        assert not running.done() and (await world.lease("south")).state == pb.LEASE_STATE_JOINED
        running.cancel()

    kept(test)


class Deaf(Account):
    """It answers nobody, and counts who asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    async def machines(self, fleet):
        self.asked += 1
        raise OSError("no route")


def test_an_account_that_does_not_answer_keeps_the_others_no_busier_and_nothing_from_being_forgotten():
    async def test(world, keeper):
        world.regions.accounts["west"] = Deaf()
        west = pb.Offer(name="offers/west", provider="p", region="west", site="sites/s", gpus=8, usd_per_hour=1.0)
        await world.store.commit(Put(keys.OFFERS + "west", west.SerializeToString()))
        old = pb.Lease(name="leases/old", state=pb.LEASE_STATE_GONE, attempt=1)
        old.state_time.FromDatetime(world.clock.now() - timedelta(seconds=KEPT_S + 1))
        await world.store.commit(Put(keys.LEASES_OVER + "old", old.SerializeToString()))
        for region in ("north", "south"):
            await world.store.commit(Delete(keys.LEASES + region))
        asked, north = [0], world.regions.accounts["north"]
        lists = north.machines

        async def counted(fleet):
            asked[0] += 1
            return await lists(fleet)

        north.machines = counted
        for _ in range(12):
            await keeper.round()
            await world.clock.sleep(5)
        assert asked[0] <= 3 and world.regions.accounts["west"].asked >= 10
        assert await world.store.get(keys.LEASES_OVER + "old") is None

    kept(test)


def test_what_was_rented_is_ended_whoever_has_left_and_nothing_more_is_rented_for_them():
    async def test(world, keeper):
        async def opened(secret, owner):
            if owner not in ("operator/olga", ""):
                raise PermissionDenied(f"{owner} may not use {secret}")
            return {"KEY": "k"}

        world.keys.append(opened)
        for name, owner in (("north", "operator/olga"), ("zz-old", "operator/gone"), ("aa-old", "operator/gone")):
            made = await offer(world, "north")
            made.name, made.secret, made.owner = f"offers/{name}", "secrets/s", owner
            await world.store.commit(Put(keys.OFFERS + name, made.SerializeToString()))
        lease = await world.lease("north")
        lease.offer.CopyFrom(await offer(world, "north"))
        await world.store.commit(Put(keys.LEASES + "north", lease.SerializeToString()))
        await keeper.round()
        theirs = pb.Lease(name="leases/theirs", state=pb.LEASE_STATE_INTENT, attempt=1, cost_cap_usd=9.0)
        theirs.offers[:], theirs.node = ["offers/zz-old"], "sites/s/nodes/theirs"
        theirs.offer.CopyFrom(await offer(world, "zz-old"))
        theirs.create_time.FromDatetime(world.clock.now())
        theirs.hard_end_time.FromSeconds(int(world.clock.now().timestamp()) + 600)
        await world.store.commit(Put(keys.LEASES + "theirs", theirs.SerializeToString()))
        await world.clock.sleep(70)
        north = world.regions.accounts["north"]
        north.there.append(Machine("forgotten", "leases/north", "old", 0.0, "offers/north"))
        await keeper.round()
        assert north.ended == ["forgotten"]
        assert [one.id for one in north.there] == ["north-m"], "none for who may not use the keys"
        assert (
            "may not use" in pb.Lease.FromString((await world.store.get(keys.LEASES_OVER + "theirs")).value).end_reason
        )

    kept(test)
