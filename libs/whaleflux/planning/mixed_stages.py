"""A pipeline through pools: each stage within one, with as many layers as it is fast and its memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from whaleflux.planning.arrays import Array
from whaleflux.planning.constants import Constants
from whaleflux.planning.memory import memory_of_stage
from whaleflux.planning.mixed_plan import STAGES, MixedPlan, PoolPart
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.pools import Pool, stage_groups
from whaleflux.planning.space import divisors
from whaleflux.planning.step import StepTime, step_time
from whaleflux.planning.training import Training
from whaleflux.planning.whole_shares import dealt

_MOST_STAGES, _FRAMES = 16, 96
_MICRO = (1, 2, 4, 8)
_OF_MICRO_BATCHES = ("compute_s", "recompute_s", "host_s", "tp_s", "pp_s")
_OF_STEPS = ("dp_s", "optimizer_s")


@dataclass(frozen=True, slots=True)
class _Frame:
    """Pools in the order of their stages; of each how wide its stages are and how many it has."""

    pools: tuple[Pool, ...]
    tps: tuple[int, ...]
    stages: tuple[int, ...]
    dp: int

    @property
    def depth(self) -> int:
        return sum(self.stages)

    @property
    def flops(self) -> float:
        """Of all GPUs that it uses."""
        parts = zip(self.pools, self.tps, self.stages, strict=True)
        return sum(self.dp * tp * count * float(np.asarray(pool.machine.flops)) for pool, tp, count in parts)

    @property
    def pool_of(self) -> list[int]:
        """Number of each stage's pool."""
        return [number for number, count in enumerate(self.stages) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class _Lines:
    """What stages (rows) take under each way to run them (columns): of a layer and without any, of a micro-batch and of a step; bytes."""

    layer_s: Array
    ends_s: Array
    layer_step_s: Array
    ends_step_s: Array
    layer_bytes: Array
    ends_bytes: Array

    def of_step(self, counts: Array) -> tuple[Array, Array]:
        """(a layer's seconds, those without any) of all micro-batches."""
        return counts * self.layer_s + self.layer_step_s, counts * self.ends_s + self.ends_step_s


def best_stages(
    shape: ModelShape, pools: Sequence[Pool], batch: int, sequence: int, how: Training, constants: Constants
) -> MixedPlan | None:
    """The fastest that fits, through all of these pools; None where nothing does."""
    best: MixedPlan | None = None
    for frame in _frames(shape, pools, batch):
        ways = _ways(frame, batch, sequence)
        lines, counts = _lines(shape, frame, ways, how, constants), batch / (frame.dp * ways.micro_batch)
        each_s, fixed_s = lines.of_step(counts)
        least_s = (shape.layers + np.sum(fixed_s / each_s, axis=0)) / np.sum(
            1 / each_s, axis=0
        )  # if layers could be cut
        for way in np.argsort(least_s):
            if best is not None and least_s[way] >= best.step_s:
                break
            plan = _planned(
                shape, frame, ways.take(slice(way, way + 1)), lines, int(way), each_s[:, way], fixed_s[:, way]
            )
            if plan is not None and (best is None or plan.step_s < best.step_s):
                best = plan
    return best


def _frames(shape: ModelShape, pools: Sequence[Pool], batch: int) -> list[_Frame]:
    """At most 16 stages, as many of each pool as it has GPUs for; the fastest pool first, or last. Those that use most of the GPUs, at most 96."""
    by_speed = sorted(pools, key=lambda pool: float(np.asarray(pool.machine.flops)))
    found = []
    for dp in (one for one in divisors(batch) if one <= min(pool.gpus for pool in pools)):
        for order in (by_speed, by_speed[::-1]):
            for tps in product(*([one for one in divisors(shape.heads) if pool.island % one == 0] for pool in order)):
                stages = tuple(pool.gpus // (dp * tp) for pool, tp in zip(order, tps, strict=True))
                if min(stages) >= 1 and sum(stages) <= min(_MOST_STAGES, shape.layers):
                    found.append(_Frame(tuple(order), tps, stages, dp))
    return sorted(found, key=lambda frame: -frame.flops)[:_FRAMES]


def _ways(frame: _Frame, batch: int, sequence: int) -> Plans:
    """Micro-batches, ZeRO and recomputation; tp is filled in for each pool."""
    sizes = [one for one in _MICRO if batch % (frame.dp * one) == 0]
    size, zero, again = np.array(
        list(product(sizes, (0, 1) if frame.dp > 1 else (0,), (Recompute.NONE, Recompute.FULL))), dtype=np.float64
    ).T
    many = np.ones(size.shape)
    return Plans.of(
        pp=frame.depth * many,
        dp=frame.dp * many,
        micro_batch=size,
        global_batch=batch * many,
        sequence=sequence * many,
        zero=zero,
        recompute=again,
    )


def _lines(shape: ModelShape, frame: _Frame, ways: Plans, how: Training, constants: Constants) -> _Lines:
    """By the cost model on a model whose every stage has all layers, once and twice: everything is straight in them."""
    rows: list[list[Array]] = [[] for _ in range(6)]
    begin = 0
    for pool, tp, count in zip(frame.pools, frame.tps, frame.stages, strict=True):
        wide = {"tp": np.full(ways.pp.shape, float(tp)), "sequence_parallel": np.full(ways.pp.shape, float(tp > 1))}
        plans, stages = replace(ways, **wide), range(begin, begin + count)
        ends = [(stage == 0, stage == frame.depth - 1) for stage in stages]
        known = {end: _timed(shape, frame, pool, plans, end, how, constants) for end in set(ends)}
        sizes = _sized(shape, frame, plans, np.array(stages, dtype=np.float64)[:, None], how)
        for row, values in zip(rows, (*zip(*(known[end] for end in ends), strict=True), *sizes), strict=True):
            row.extend(values)
        begin += count
    return _Lines(*(np.array(row) for row in rows))


def _timed(
    shape: ModelShape,
    frame: _Frame,
    pool: Pool,
    plans: Plans,
    ends: tuple[bool, bool],
    how: Training,
    constants: Constants,
) -> tuple[Array, ...]:
    groups = stage_groups(pool, frame.pools, plans, frame.stages)
    once, twice = (
        step_time(_with_ends(_deep(shape, frame.depth * times), *ends), pool.machine, plans, how, constants, groups)
        for times in (1, 2)
    )
    micro = [_sum(one, _OF_MICRO_BATCHES) / plans.micro_batches for one in (once, twice)]
    step = [_sum(one, _OF_STEPS) for one in (once, twice)]
    return (*_line(micro, shape.layers), *_line(step, shape.layers))


def _sized(shape: ModelShape, frame: _Frame, plans: Plans, stage: Array, how: Training) -> tuple[Array, Array]:
    deep = [_deep(shape, frame.depth * times) for times in (1, 2)]
    return _line([memory_of_stage(one, plans, how, stage).total_bytes for one in deep], shape.layers)


def _line(values: Sequence[Array], layers: int) -> tuple[Array, Array]:
    """(of a layer, without any), from the values at `layers` and twice as many."""
    once, twice = values
    slope = np.maximum((twice - once) / layers, 1e-15)
    return slope, np.maximum(once - slope * layers, 0.0)


def _sum(took: StepTime, names: Sequence[str]) -> Array:
    return np.asarray(sum(getattr(took, name) for name in names), dtype=np.float64)


def _deep(shape: ModelShape, times: int) -> ModelShape:
    """So often as many layers of the same mean."""
    return replace(shape, layers=shape.layers * times, dense_layers=shape.dense_layers * times)


def _with_ends(shape: ModelShape, first: bool, last: bool) -> ModelShape:
    """What a stage computes: the output layer, which the cost model counts for the slowest, in the last alone; the first has an embedding to reduce."""
    if last:
        return shape
    return replace(shape, vocabulary=1, positions=shape.embedding_weights // shape.hidden if first else 0)


def _planned(
    shape: ModelShape, frame: _Frame, way: Plans, lines: _Lines, column: int, each_s: Array, fixed_s: Array
) -> MixedPlan | None:
    usable = np.array([float(frame.pools[number].machine.usable_bytes) for number in frame.pool_of])
    room = np.clip((usable - lines.ends_bytes[:, column]) // lines.layer_bytes[:, column], -1, shape.layers)
    most = [int(one) for one in room]
    if min(most) < 1 or sum(most) < shape.layers:
        return None
    layers = np.array(dealt(shape.layers, each_s.tolist(), [1] * len(most), most, fixed_s.tolist()))
    busy_s = fixed_s + layers * each_s
    passed_s = lines.ends_s[:, column] + layers * lines.layer_s[:, column]
    longest = int(np.argmax(busy_s))
    # 1F1B: the first micro-batch passes all other stages, there and back.
    step_s = float(busy_s[longest] + passed_s.sum() - passed_s[longest])
    needed = lines.ends_bytes[:, column] + layers * lines.layer_bytes[:, column]
    batch, size = int(way.global_batch[0]), int(way.micro_batch[0])
    parts = tuple(_part(frame, number, layers, busy_s, needed, batch) for number in range(len(frame.pools)))
    return MixedPlan(
        STAGES, parts, step_s, batch, int(way.sequence[0]), size, batch // (frame.dp * size), int(way.zero[0]), 1,
        Recompute(int(way.recompute[0])).name.lower(),
    )  # fmt: skip


def _part(frame: _Frame, number: int, layers: Array, busy_s: Array, needed: Array, batch: int) -> PoolPart:
    own = [stage for stage, pool in enumerate(frame.pool_of) if pool == number]
    pool, tp = frame.pools[number], frame.tps[number]
    return PoolPart(
        pool.name, frame.dp * tp * len(own), tp, (batch // frame.dp,) * frame.dp, tuple(int(layers[stage]) for stage in own),
        float(busy_s[own].max()), float(needed[own].max()), float(pool.machine.usable_bytes),
    )  # fmt: skip
