"""What a round of the keeper of leases costs, by how many leases are over.

Real: the keeper, its records, the store's model in memory. Simulated: a cloud without faults. CPU time of this process.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from benchmarks.burst_lab import crashes
from benchmarks.burst_lab.cloud import Cloud, CloudKind, Faults
from tests.support.virtual_time import LoopClock
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.election import elect
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.lease_keeper import LeaseKeeper, Pace
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.provider_accounts import Accounts

ROUNDS, IN_COMMIT = 40, 100


async def round_ms(old: int) -> float:
    """Milliseconds of CPU of a round with three live leases beside `old` ones that are over: the median."""
    world = crashes.World(LoopClock(), 1, Faults(), ())
    await world.setup()
    for number in range(crashes.LEASES):
        await world.rent(number, 86_400.0)
    await _with_old(world, old)
    async with elect(world.store, "inventory", "a", ttl_s=1e6) as leader:
        cloud: Any = Cloud(world.clock, random.Random(2), Faults(), world._joins)
        accounts = Accounts({"cloud": CloudKind(cloud)}, crashes._no_keys, world.clock)
        launching = Launching(FrontDoor("fleet:7443"), world.authority, 1800.0)
        keeper = LeaseKeeper(world.store, world.clock, leader, accounts, world.nodes, launching, Pace())
        taken = list[float]()
        for _ in range(ROUNDS):
            begun = time.process_time()
            await keeper.round()
            taken.append(time.process_time() - begun)
            await world.clock.sleep(5.0)
        cloud.close()
    world.cloud.close()
    return statistics.median(taken) * 1000


async def _with_old(world: crashes.World, count: int) -> None:
    record = pb.Lease(state=pb.LEASE_STATE_GONE, attempt=1, calls=1, cost_cap_usd=60.0, offers=["offers/o1"])
    record.offer.name, record.offer.provider, record.offer.site = "offers/o1", "cloud", "sites/cloud"
    for field in ("create_time", "state_time", "hard_end_time"):
        getattr(record, field).FromDatetime(world.clock.now())
    for first in range(0, count, IN_COMMIT):
        puts = []
        for number in range(first, min(first + IN_COMMIT, count)):
            record.name = f"leases/old{number:06}"
            puts.append(Put(keys.of_name(keys.LEASES_OVER, record.name), record.SerializeToString()))
        await world.store.commit(*puts)
