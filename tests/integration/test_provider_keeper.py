"""The keeper of leases over real adapters, with faults at random and killed at random: nothing leaks, nothing is rented twice.

Real: keeper, rules, records, adapters, their libraries, HTTP. Simulated: EC2 (moto behind our shim), Lambda (a server of ours), nodes, and time,
which only counts.
"""

import asyncio
import os
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from benchmarks.burst_lab import crashes
from tests.support import ec2_shim, lambda_service
from whaleflux.clock import SystemClock, VirtualClock
from whaleflux.store import Put, keys
from whaleflux.store.api import Unchanged
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_inventory.lease_keeper import LeaseKeeper, Pace
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.provider_accounts import Accounts
from whaleflux_inventory.providers import rest, rest_services
from whaleflux_inventory.providers.api import TOKEN_TAG
from whaleflux_inventory.providers.aws import AwsKind
from whaleflux_inventory.providers.rest import RestKind
from whaleflux_inventory.rented_nodes import node_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SEEDS = range(int(os.environ.get("WHALEFLUX_TEST_RENTAL_SEEDS", "5")))
LEASES, STEP_S, LAG_S = 3, 10.0, 40.0
LAUNCH = {"no_capacity": 0.1, "throttled": 0.1, "lost_before": 0.08, "lost_reply": 0.15, "broken": 0.04}
END = {"throttled": 0.1, "zombie": 0.15, "lost_reply": 0.08}
LIST = {"throttled": 0.08, "broken": 0.04}


class Ec2:
    """moto behind our shim."""

    def __init__(self, shim):
        self.served, self.kind, self.provider, self.keys = shim, AwsKind(), "aws", ec2_shim.KEYS
        self.markets = (types_pb2.PRICE_KIND_SPOT, types_pb2.PRICE_KIND_ON_DEMAND)
        self.offer = {
            "machine_type": "p4d.24xlarge", "region": ec2_shim.REGION, "options": {"image": ec2_shim.image()},
        }  # fmt: skip
        self.faults = {
            "RunInstances": {**LAUNCH, "duplicate": 0.08}, "TerminateInstances": END, "DescribeInstances": LIST,
            "DescribeInstanceStatus": LIST,
        }  # fmt: skip

    def alive(self):
        """Machines that are paid for, with their tokens."""
        there = self.served.alive()
        return {one["InstanceId"]: {tag["Key"]: tag["Value"] for tag in one["Tags"]}[TOKEN_TAG] for one in there}

    def announce(self, machine, at_s):
        self.served.events[machine] = "instance-retirement", at_s


class Lambda:
    """A server of ours that speaks as Lambda does, which makes two machines of a launch that is sent twice."""

    def __init__(self, service):
        self.served, self.kind, self.provider = service, RestKind(), "rest"
        self.keys, self.markets = {"LAMBDA_API_KEY": lambda_service.KEY}, (types_pb2.PRICE_KIND_ON_DEMAND,) * 2
        self.offer = {
            "machine_type": "gpu_8x_a100", "region": "us-east-1", "options": {"service": "lambda", "key": "k", "url": service.url},
        }  # fmt: skip
        self.faults = {
            "/instance-operations/launch": LAUNCH, "/instance-operations/terminate": END, "/instances": LIST,
        }  # fmt: skip

    def alive(self):
        named = self.served.alive().items()
        return {
            id_: rest_services.machine_of(name[:10], id_, name, ended=False, now_s=0.0).token for id_, name in named
        }

    def announce(self, machine, at_s):
        """It announces nothing."""


class CrashingKind:
    """A provider as one process sees it."""

    def __init__(self, kind, steps):
        self.kind, self.steps = kind, steps

    def open(self, offer, known):
        return crashes.CrashingCloud(self.kind.open(offer, known), self.steps)


class World:
    """A fleet whose keeper is killed again and again."""

    def __init__(self, seed, cloud):
        self.rng, self.cloud = random.Random(seed), cloud
        self.clock, self.store = VirtualClock(datetime.now(UTC)), MemoryStore(SystemClock())
        self.nodes = crashes.Nodes(self.clock, self.rng)
        self.used, self.double, self.crashes, self.met = dict[str, str](), 0, 0, Counter[str]()
        served = cloud.served
        served.now_s, served.lag_s, served.fault = self.clock.monotonic, LAG_S, self.fault

    def fault(self, action):
        drawn = self.rng.random()
        for fault, share in self.cloud.faults.get(action, {}).items():
            if drawn < share:
                self.met[fault] += 1
                return fault
            drawn -= share
        return ""

    async def declare(self):
        for number, market in enumerate(self.cloud.markets, 1):
            offer = pb.Offer(
                name=f"offers/o{number}", provider=self.cloud.provider, site="sites/cloud", gpus=8, secret="secrets/cloud", market=market,
                usd_per_hour=10.0 * number, boot_s=60.0, max_machines=LEASES, **self.cloud.offer,
            )  # fmt: skip
            await self.store.commit(Put(keys.of_name(keys.OFFERS, offer.name), offer.SerializeToString()))
        for number in range(LEASES):
            lease = pb.Lease(name=f"leases/l{number}", state=pb.LEASE_STATE_INTENT, attempt=1, cost_cap_usd=60.0)
            lease.offers[:] = ["offers/o1", "offers/o2"]
            lease.offer.MergeFromString((await self.store.get(keys.OFFERS + "o1")).value)
            lease.node = node_of("sites/cloud", lease.name, 1)
            lease.create_time.FromDatetime(self.clock.now())
            lease.hard_end_time.FromSeconds(int(self.clock.now().timestamp() + self.rng.uniform(600, 1200)))
            await self.store.commit(Put(keys.of_name(keys.LEASES, lease.name), lease.SerializeToString()))

    def keeper(self, leader):
        """A new process, which dies at a drawn step."""
        self.steps = crashes.Steps(at=[self.rng.randint(1, 12)])
        store = crashes.CrashingStore(self.store, self.steps)
        accounts = Accounts({self.cloud.provider: CrashingKind(self.cloud.kind, self.steps)}, self.keys_of, self.clock)
        launching = Launching(FrontDoor("fleet:7443"), crashes.authority(), 1800.0)
        return LeaseKeeper(store, self.clock, leader, accounts, self.nodes, launching, Pace())

    async def round(self, keeper, leader, *, crashing):
        """One look; whoever dies in it is followed by another."""
        self.steps.at = self.steps.at if crashing else ()
        running = asyncio.ensure_future(keeper.round())
        dead = asyncio.ensure_future(self.steps.dead.wait())
        await asyncio.wait({running, dead}, return_when=asyncio.FIRST_COMPLETED)
        if not self.steps.dead.is_set():
            dead.cancel()
            await running
            return keeper
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        self.crashes += 1
        return self.keeper(leader)

    async def live(self):
        """What machines do by themselves: boot and join, end without a word, are announced to be taken."""
        for machine, token in (await asyncio.to_thread(self.cloud.alive)).items():
            if self.rng.random() < 0.3:
                await self.join(machine, token)
            if self.rng.random() < 0.004:
                await asyncio.to_thread(self.cloud.served.kill, machine)
            if self.rng.random() < 0.004:
                self.cloud.announce(machine, self.clock.now().timestamp() + 120)

    async def keys_of(self, secret, owner):
        return self.cloud.keys

    async def join(self, machine, token):
        """As inventory admits: a token admits one machine, under the name that it is bound to."""
        entry = await self.store.get(keys.JOIN_TOKENS + token)
        if entry is None or token in self.used:
            return
        self.used[token] = machine
        node = pb.JoinTokenRecord.FromString(entry.value).token.node
        self.double += node in self.nodes.there
        self.nodes.there.add(node)

    async def leases(self):
        return [pb.Lease.FromString(entry.value) for entry in (await self.store.list(keys.ALL_LEASES)).entries]

    async def give_back(self, number):
        if (entry := await self.store.get(f"{keys.LEASES}l{number}")) is None:
            return  # it is over by itself
        lease = pb.Lease.FromString(entry.value)
        lease.end_reason = lease.end_reason or "given back"
        await self.store.commit(Put(entry.key, lease.SerializeToString()), when=[Unchanged(entry)])


async def outcome(seed, cloud):
    """An hour of fleet time: rented, killed, given back; then until nothing is left or time is over."""
    world = World(seed, cloud)
    await world.declare()
    async with elect(world.store, "inventory", "a", ttl_s=600.0) as leader:
        keeper = world.keeper(leader)
        for step in range(360):
            keeper = await world.round(keeper, leader, crashing=step < 150)
            await world.live()
            await world.clock.advance(STEP_S)
            if step == 40:
                await world.give_back(0)
            over = all(one.state == pb.LEASE_STATE_GONE for one in await world.leases())
            if step > 150 and over and not await asyncio.to_thread(cloud.alive):
                break
    return world, await world.leases(), await asyncio.to_thread(cloud.alive)


@pytest.fixture(params=["aws", "rest"])
def cloud(request, monkeypatch):
    if request.param == "rest":
        monkeypatch.setitem(rest.SERVICES, "lambda", replace(rest_services.LAMBDA, pause_s=0.0))
        with lambda_service.running(lambda_service.Service()) as service:
            yield Lambda(service)
    else:
        with ec2_shim.running(ec2_shim.Shim()) as shim:
            monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", shim.url)
            yield Ec2(shim)


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_leaks_and_nothing_is_rented_twice(cloud, seed):
    world, leases, alive = await outcome(seed, cloud)
    launches = len(cloud.served.launches)
    print(f"seed {seed}: {world.crashes} crashes, {launches} launches, {dict(world.met)}, {len(world.used)} joined")
    assert (alive, world.double) == ({}, 0)
    assert [one.state for one in leases] == [pb.LEASE_STATE_GONE] * LEASES
    assert world.crashes and world.met
