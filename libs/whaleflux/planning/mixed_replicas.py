"""Data parallelism over pools: each replica within one pool, with as many samples as it is fast.

Without ZeRO-3 replicas take different numbers of micro-batches; with it, where all gather the same weights at the same time, as many micro-batches of
different sizes. Both are units of which each pool's step takes a fixed part and a part for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from whaleflux.planning.arrays import Array, Flags
from whaleflux.planning.constants import Constants
from whaleflux.planning.memory import memory
from whaleflux.planning.mixed_plan import REPLICAS, MixedPlan, PoolPart
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.pools import Pool, replica_groups
from whaleflux.planning.space import divisors
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training
from whaleflux.planning.whole_shares import dealt

_SHAPES = 24  # of which shares are dealt in whole numbers
_MOST_STAGES = 16
_MICRO = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class _Ways:
    """Shapes as arrays. `units` of `unit` samples make a batch: micro-batches, or (ZeRO-3) one more sample in each of so many micro-batches."""

    plans: Plans
    own_dp: tuple[Array, ...]  # of each pool
    unit: Array
    units: Array

    def take(self, chosen: NDArray[np.intp] | Flags) -> _Ways:
        return _Ways(
            self.plans.take(chosen), tuple(one[chosen] for one in self.own_dp), self.unit[chosen], self.units[chosen]
        )

    def with_units(self, units: Array) -> Plans:
        """Where every replica took so many."""
        sharded = self.plans.zero > 2
        micro = np.where(sharded, units, self.unit)
        count = np.where(sharded, self.unit, units)
        return replace(self.plans, micro_batch=micro, global_batch=self.plans.dp * micro * count)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of each pool (rows) and shape: seconds of a step without units and of each, and how many a replica's memory holds."""

    fixed_s: Array
    unit_s: Array
    most: Array


def best_replicas(
    shape: ModelShape,
    pools: Sequence[Pool],
    batch: int,
    sequence: int,
    how: Training,
    constants: Constants,
    *,
    runnable: bool = False,
) -> MixedPlan | None:
    """The fastest that fits, on all of these pools; None where nothing does. `runnable`: what `emit.mixed.cannot_run` says nothing of."""
    ways = _ways(shape, pools, batch, sequence)
    if runnable and len(ways.units):
        ways = ways.take((ways.plans.pp == 1) & ((ways.plans.zero < 2) | ((ways.plans.zero > 2) & (ways.unit == 1))))
    if not len(ways.units):
        return None
    costs = _costs(shape, pools, ways, how, constants)
    level_s = _level_s(ways, costs)
    order = np.argsort(level_s, kind="stable")
    order = order[np.isfinite(level_s[order])][:_SHAPES]
    found = [_dealt(shape, pools, ways, costs, int(one), how, constants) for one in order]
    return min((plan for plan in found if plan is not None), key=lambda plan: plan.step_s, default=None)


def _ways(shape: ModelShape, pools: Sequence[Pool], batch: int, sequence: int) -> _Ways:
    """Every shape of which each pool has room for a replica and each replica gets a unit."""
    island = min(pool.island for pool in pools)
    tps = [one for one in divisors(shape.heads) if one <= island and island % one == 0]
    pps = [one for one in divisors(shape.layers) if one <= _MOST_STAGES]
    kinds = [(zero, 1) for zero in (0, 1, 2)] + [(3, copies) for copies in _copies(pools)]
    micro = [one for one in _MICRO if batch % one == 0]
    rows = [
        (tp, pp, zero, copies, size, again)
        for tp in tps for pp in pps for zero, copies in kinds if zero < 2 or pp == 1 for size in micro
        for again in (Recompute.NONE, Recompute.FULL)
    ]  # fmt: skip
    tp, pp, zero, copies, size, again = np.array(rows, dtype=np.float64).reshape(-1, 6).T
    own = tuple(np.floor(pool.gpus / (tp * pp)) for pool in pools)
    plans = Plans.of(
        tp=tp, pp=pp, dp=sum(own), zero=zero, replicas=copies, recompute=again, micro_batch=size, global_batch=size, sequence=sequence,
        sequence_parallel=tp > 1,
    )  # fmt: skip
    ways = _Ways(plans, own, size, batch / size)
    possible = (np.min(own, axis=0) >= 1) & (ways.units >= plans.dp) & _shards_stay(pools, plans, own)
    ways = ways.take(possible)
    return ways.take(ways.with_units(np.ones(ways.units.shape)).valid(shape)) if len(ways.units) else ways


def _copies(pools: Sequence[Pool]) -> list[int]:
    """Numbers of HSDP's replicas."""
    total = sum(pool.gpus for pool in pools)
    return [one for one in divisors(total) if one <= 16]


def _shards_stay(pools: Sequence[Pool], plans: Plans, own: tuple[Array, ...]) -> Flags:
    """Whether HSDP's shards are whole within each pool."""
    shards = plans.dp / plans.replicas
    whole = (shards % 1 == 0) & np.all([one % np.maximum(shards, 1) == 0 for one in own], axis=0)
    return np.asarray((plans.replicas == 1) | whole)


def _costs(shape: ModelShape, pools: Sequence[Pool], ways: _Ways, how: Training, constants: Constants) -> _Costs:
    """By the step at the mean number of units and at twice as many: what is between is straight but for what hides communication."""
    mean = np.maximum(np.floor(ways.units / ways.plans.dp), 1.0)
    fixed, each, most = [], [], []
    for number, pool in enumerate(pools):
        groups = replica_groups(number, pools, ways.plans, ways.own_dp)
        one, two = (
            step_time(shape, pool.machine, ways.with_units(units), how, constants, groups).total_s
            for units in (mean, 2 * mean)
        )
        unit_s = np.maximum((two - one) / mean, 1e-12)
        each.append(unit_s)
        fixed.append(np.maximum(one - mean * unit_s, 0.0))
        most.append(_most(shape, pool, ways, how))
    return _Costs(np.array(fixed), np.array(each), np.array(most))


def _most(shape: ModelShape, pool: Pool, ways: _Ways, how: Training) -> Array:
    """Units that fit: of ZeRO-3's micro-batches by size; else any number or none (a pipeline holds as many micro-batches as it has stages)."""
    many = ways.units
    usable = float(pool.machine.usable_bytes)
    one, two = (
        memory(shape, ways.with_units(units), how).total_bytes
        for units in (np.ones(many.shape), np.full(many.shape, 2.0))
    )
    growth = np.maximum(two - one, 1.0)
    by_size = np.floor(1 + (usable - one) / growth)
    full = memory(shape, ways.with_units(np.maximum(many, ways.plans.pp)), how).total_bytes
    return np.asarray(np.where(ways.plans.zero > 2, np.clip(by_size, 0.0, many), np.where(full <= usable, many, 0.0)))


def _level_s(ways: _Ways, costs: _Costs) -> Array:
    """The step where units could be cut; infinite where not all fit, or a replica gets none."""
    own = np.array(ways.own_dp)
    low, high = np.zeros(ways.units.shape), np.max(costs.fixed_s + costs.unit_s * ways.units, axis=0)
    for _ in range(50):
        middle = (low + high) / 2
        units = np.clip((middle - costs.fixed_s) / costs.unit_s, 1.0, np.maximum(costs.most, 1.0))
        enough = np.sum(own * units, axis=0) >= ways.units
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    possible = (np.min(costs.most, axis=0) >= 1) & (np.sum(own * costs.most, axis=0) >= ways.units)
    return np.asarray(np.where(possible, high, np.inf))


def _dealt(
    shape: ModelShape,
    pools: Sequence[Pool],
    ways: _Ways,
    costs: _Costs,
    number: int,
    how: Training,
    constants: Constants,
) -> MixedPlan | None:
    """With whole units, and what it really takes then."""
    one = ways.take(np.array([number]))
    own = [int(count[0]) for count in one.own_dp]

    def each(values: Array) -> list[float]:
        return [float(value) for value, count in zip(values[:, number], own, strict=True) for _ in range(count)]

    most = [int(value) for value in each(costs.most)]
    shares = dealt(int(one.units[0]), each(costs.unit_s), [1] * len(most), most, each(costs.fixed_s))
    parts, begin = [], 0
    for place, count in enumerate(own):
        parts.append(_part(shape, place, pools, one, shares[begin : begin + count], how, constants))
        begin += count
    if any(part.needed_bytes > part.usable_bytes for part in parts):
        return None
    plan, sharded = one.plans, float(one.plans.zero[0]) > 2
    return MixedPlan(
        REPLICAS, tuple(parts), max(part.busy_s for part in parts), int(one.units[0] * one.unit[0]), int(plan.sequence[0]),
        0 if sharded else int(one.unit[0]), int(one.unit[0]) if sharded else max(shares), int(plan.zero[0]), int(plan.replicas[0]),
        Recompute(int(plan.recompute[0])).name.lower(),
    )  # fmt: skip


def _part(
    shape: ModelShape,
    place: int,
    pools: Sequence[Pool],
    one: _Ways,
    shares: tuple[int, ...],
    how: Training,
    constants: Constants,
) -> PoolPart:
    slowest = one.with_units(np.array([float(max(shares))]))
    pool, groups = pools[place], replica_groups(place, pools, one.plans, one.own_dp)
    busy_s = float(step_time(shape, pool.machine, slowest, how, constants, groups).total_s[0])
    needed = float(np.ravel(memory(shape, slowest, how).total_bytes)[0])
    tp, pp = int(one.plans.tp[0]), int(one.plans.pp[0])
    samples = tuple(share * int(one.unit[0]) for share in shares)
    return PoolPart(
        pool.name,
        tp * pp * len(shares),
        tp,
        samples,
        (shape.layers // pp,) * pp,
        busy_s,
        needed,
        float(pool.machine.usable_bytes),
    )
