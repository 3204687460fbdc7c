"""Every plan of the planner's space, one after another in plain loops, without a bound: what its search must equal.

Written from the words of `planning/space.py`, not from its code; only the cost and memory of a plan are the same functions. Nothing is shared
of what the search does to be fast: neither the order, nor what it leaves out, nor how it finds how much to recompute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np

from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

Numbers = tuple[float, ...]
_NAMES = (
    "tp", "pp", "dp", "cp", "ep", "vp", "micro_batch", "global_batch", "zero", "replicas", "recompute", "recomputed", "recomputing",
    "sequence_parallel", "first_layers", "last_layers",
)  # fmt: skip
_AT_ONCE = 50_000


def fastest(shape: ModelShape, machine: Machine, gpus: int, batches: Sequence[int], sequence: int) -> tuple[float, int]:
    """(seconds per sample of the best plan that fits, infinite where none does; how many plans there are).

    Of several batches each plan has that which is nearest to the middle one.
    """
    best, count = float("inf"), 0
    island = int(np.asarray(machine.fabric.island))
    middle = (batches[0] + batches[-1]) / 2
    plans: Iterator[Numbers] = chain.from_iterable(every(shape, island, gpus, batch, sequence) for batch in batches)
    plans = (plan for plan in plans if len(batches) == 1 or _is_nearest(plan, middle))
    while some := list(islice(plans, _AT_ONCE)):
        best, count = min(best, _least(shape, machine, sequence, some)), count + len(some)
    return best, count


def _is_nearest(plan: Numbers, wanted: float) -> bool:
    """No other batch that this plan's ranks can share is nearer to what is wanted."""
    one = dict(zip(_NAMES, plan, strict=True))
    return abs(one["global_batch"] - wanted) <= one["dp"] * one["micro_batch"] * (one["pp"] if one["vp"] > 1 else 1) / 2


def _least(shape: ModelShape, machine: Machine, sequence: int, some: list[Numbers]) -> float:
    columns = dict(zip(_NAMES, np.array(some).T, strict=True))
    plans = Plans.of(sequence=float(sequence), **columns)
    plans = plans.take(memory(shape, plans, Training()).total_bytes <= machine.usable_bytes)
    seconds = step_time(shape, machine, plans, Training()).total_s / plans.global_batch
    return float(np.min(seconds, initial=np.inf))


def every(shape: ModelShape, island: int, gpus: int, batch: int, sequence: int) -> Iterator[Numbers]:
    """All plans of at most so many GPUs for exactly this batch."""
    for tp in range(1, min(island, gpus) + 1):
        if shape.heads % tp or shape.common_ffn % tp or (shape.kv_heads % tp and tp % shape.kv_heads):
            continue
        if gpus > island and island % tp:
            continue
        for pp in range(1, gpus // tp + 1):
            if pp > shape.layers:
                continue
            for cp in (1, 2, 4, 8, 16, 32, 64):
                if tp * pp * cp > gpus or sequence % (2 * cp) or (cp > 1 and sequence / cp < 1024):
                    continue
                for dp in range(1, gpus // (tp * pp * cp) + 1):
                    yield from _of_ranks(shape, (tp, pp, cp, dp), batch, sequence)


def _of_ranks(shape: ModelShape, ranks: tuple[int, int, int, int], batch: int, sequence: int) -> Iterator[Numbers]:
    tp, pp, cp, dp = ranks
    for micro in (2**step for step in range(19)):
        if batch % (dp * micro) or (micro > 1 and micro * sequence / cp > 262_144):
            continue
        rounds = batch // (dp * micro)
        for vp in range(1, 17):
            if vp > 1 and (pp == 1 or rounds % pp):
                continue
            for ep in range(1, max(shape.experts, 1) + 1):
                if ep > 1 and (shape.experts % ep or (dp * cp) % ep):
                    continue
                for together in (0, 1):
                    if together and (tp == 1 or (sequence // cp) % tp):
                        continue
                    for first, last, most in _ends(shape.layers, pp, vp):
                        for zero, replicas, again, share, stages in _rest(pp, most // vp, dp * cp):
                            yield (
                                tp, pp, dp, cp, ep, vp, micro, batch, zero, replicas, again, share, stages, together, first, last,
                            )  # fmt: skip


def _ends(layers: int, pp: int, vp: int) -> Iterator[tuple[int, int, int]]:
    """(layers of the first stage, of the last, of the fullest one): 0 where all stages have as many."""
    if layers % (pp * vp) == 0:
        yield 0, 0, layers // pp
    if pp == 1 or layers % vp or (layers % pp and not _is_round(pp)):
        return
    for more in (0, 1):
        between = (-(-(layers // vp) // pp) + more) * vp
        ends = layers - (pp - 2) * between
        every = {(first, ends - first) for first in range(vp, ends, vp) if max(first, ends - first) <= between}
        smallest = min((min(pair) for pair in every), default=0)
        half = -(-ends // vp // 2) * vp
        for first, last in every - {(between, between)}:
            if smallest in (first, last) or first == half:
                yield first, last, max(first, last, between if pp > 2 else 0)


def _is_round(pp: int) -> bool:
    """A power of two, or three of them."""
    return any(pp == factor * 2**step for factor in (1, 3) for step in range(20))


def _rest(pp: int, layers: int, ranks: int) -> Iterator[tuple[int, int, int, float, int]]:
    """`layers` of a virtual stage of the fullest stage."""
    for zero in (0, 1) if pp > 1 else (0, 1, 2, 3):
        for replicas in (2**step for step in range(12)):
            if replicas > 1 and (zero < 3 or replicas >= ranks or ranks % replicas):
                continue
            yield zero, replicas, 0, 1.0, 0
            yield zero, replicas, 1, 1.0, 0
            for some in range(1, layers + 1):
                for stages in range(pp):
                    yield zero, replicas, 2, some / layers, stages
