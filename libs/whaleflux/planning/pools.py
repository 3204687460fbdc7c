"""Pools of GPUs of one kind each, and the links between them, as the cost model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from whaleflux.planning.arrays import Array, Flags
from whaleflux.planning.machine import Fabric, Links, Machine, Tier
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import Groups

SITE_HOP_S = 14e-6  # NCCL's network hop; between sites whoever knows the distance says more


@dataclass(frozen=True, slots=True)
class Pool:
    """`gpus` of one kind with a fabric of their own. `uplink_bytes_per_s` is each GPU's share of the way to other pools, one direction (0: its NIC).

    A link between sites of 100 Gb/s for 16 GPUs: 12.5e9 / 16, and its `uplink_hop_s`.
    """

    machine: Machine
    gpus: int
    uplink_bytes_per_s: float = 0.0
    uplink_hop_s: float = SITE_HOP_S

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def island(self) -> int:
        return int(np.asarray(self.machine.fabric.island))

    @property
    def way_out_bytes_per_s(self) -> float:
        """Each GPU's share of it."""
        tiers = self.machine.fabric.tiers
        return self.uplink_bytes_per_s or min(float(np.asarray(tier.bytes_per_s)) for tier in tiers)

    def linked(self) -> Fabric:
        """Its fabric with the way out as the outermost tier."""
        fabric = self.machine.fabric
        return replace(fabric, tiers=(*fabric.tiers, Tier(self.gpus, self.way_out_bytes_per_s, self.uplink_hop_s)))


def joined(pools: Sequence[Pool], own: Sequence[Array], stride: Array) -> Links:
    """Of a group that has `own` ranks in each pool, `stride` apart there: as fast as its slowest part, and no faster than the ways out."""
    parts = [pool.machine.fabric.links(count, stride) for pool, count in zip(pools, own, strict=True)]
    outer = np.array([pool.uplink_hop_s for pool in pools]).max()

    def over(name: str, pick: np.ufunc) -> Array:
        return np.asarray(pick.reduce(np.broadcast_arrays(*(getattr(part, name) for part in parts))), dtype=np.float64)

    ways_out = [count * pool.way_out_bytes_per_s for pool, count in zip(pools, own, strict=True)]
    nodes = over("nodes", np.add)
    return Links(
        size=np.asarray(sum(own), dtype=np.float64),
        island_bytes_per_s=over("island_bytes_per_s", np.minimum),
        network_bytes_per_s=np.minimum(over("network_bytes_per_s", np.minimum), np.minimum.reduce(ways_out)),
        switch_bytes_per_s=np.zeros(nodes.shape),
        nodes=nodes,
        inner_hop_s=over("inner_hop_s", np.maximum),
        outer_hop_s=np.maximum(over("outer_hop_s", np.maximum), outer),
    )


def replica_groups(number: int, pools: Sequence[Pool], plans: Plans, own_dp: Sequence[Array]) -> Groups:
    """What a rank of that pool communicates over, where `own_dp` replicas lie in each of the pools, each replica within one.

    ZeRO-3's shards lie within a pool where there are replicas of them (HSDP).
    """
    fabric = pools[number].machine.fabric
    own = Groups.in_order(fabric, replace(plans, dp=own_dp[number], replicas=np.ones(())))
    whole = joined(pools, own_dp, plans.tp)
    shards = _either(plans.replicas > 1, fabric.links(plans.shards, plans.tp), whole)
    copies = joined(pools, [np.maximum(np.floor(one / plans.shards), 1.0) for one in own_dp], plans.tp * plans.shards)
    alone = joined(pools[:1], [np.ones(())], plans.tp)  # one copy: nothing is exchanged
    return replace(own, dp=whole, experts=whole, shards=shards, replicas=_either(plans.replicas > 1, copies, alone))


def stage_groups(pool: Pool, pools: Sequence[Pool], plans: Plans, stages: Sequence[int]) -> Groups:
    """What a rank of a stage in `pool` communicates over, where a pipeline has `stages` in each of the pools and all else stays within one."""
    own = Groups.in_order(pool.machine.fabric, plans)
    counts = [np.asarray(float(count)) for count in stages]
    return replace(own, pp=joined(pools, counts, plans.tp * plans.dp))


def _either(flag: Flags, yes: Links, no: Links) -> Links:
    names = Links.__slots__
    return Links(**{name: np.where(flag, getattr(yes, name), getattr(no, name)) for name in names})


def slowest(pools: Sequence[Pool]) -> Machine:
    """What an even split over all pools makes of each GPU: the least of each rate and size, behind the links of the slowest kind."""
    machines = [pool.machine for pool in pools]
    slow = min(pools, key=lambda pool: float(np.asarray(pool.machine.flops)))
    tightest = min(machines, key=lambda one: float(one.usable_bytes))
    return replace(
        slow.machine,
        attention_flops=min(float(np.asarray(one.attention_flops)) for one in machines),
        memory_bytes_per_s=min(float(np.asarray(one.memory_bytes_per_s)) for one in machines),
        memory_bytes=tightest.memory_bytes,
        reserved_bytes=tightest.reserved_bytes,
        fabric=slow.linked(),
    )
