"""The least GPU memory that any plan for a Ray cluster could strand: by a bound that needs no search, and by an exact solve of small demands.

What a plan that lays everything strands is the memory of the GPUs that it pays for, less what was asked for; so it follows from how many GPUs of each
type it takes. Bundles of whole GPUs share them with nobody: no plan strands less than the one in which each lies on the type with the least
memory that it fits on (`least_of_whole`), at whatever price. Bundles that share GPUs are packed: for a dozen of them the best of all packings is
found by dynamic programming over subsets (`best_of_few`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from whaleflux_scheduler.core.ray_demand import UNIT, Demand, Shape
from whaleflux_scheduler.core.ray_kinds import Kind


@dataclass(frozen=True, slots=True)
class Best:
    """US dollars per hour and MiB that nobody asked for; of plans that cost as little, the least."""

    usd_per_hour: float
    stranded_mib: float


def least_of_whole(demand: Demand, kinds: Sequence[Kind]) -> Best:
    """A bound for bundles of whole GPUs; no plan may be as good. Each of both is the least by itself."""
    usd = stranded = 0.0
    for shape, count in _bundles(demand):
        fitting = [kind for kind in kinds if shape.memory_per_device <= kind.full]
        least_mib = min(kind.device_memory_mib for kind in fitting)
        usd += count * shape.devices * min(kind.usd_per_gpu_hour for kind in fitting)
        stranded += count * (shape.devices * least_mib - shape.gpu_memory / UNIT)
    return Best(usd, stranded)


def best_of_few(demand: Demand, kinds: Sequence[Kind]) -> Best:
    """The cheapest plan for singles that each fit on one GPU, and what it strands: the least of all that are as cheap.

    Takes 3^n steps for n bundles. GPUs are paid for one by one, and nodes have room for whatever lies on their GPUs.
    """
    bundles = [shape for shape, count in demand.singles for _ in range(count)]
    of_set = [_cheapest(one, bundles, kinds) for one in range(1 << len(bundles))]
    best = [(0.0, 0.0)] * len(of_set)
    for wanted in range(1, len(of_set)):
        best[wanted] = min(_plans(wanted, of_set, best))
    usd, memory_mib = best[-1]
    return Best(usd, memory_mib - sum(shape.gpu_memory for shape in bundles) / UNIT)


def _plans(
    wanted: int, of_set: Sequence[tuple[float, float]], best: Sequence[tuple[float, float]]
) -> Iterable[tuple[float, float]]:
    """Price and memory, for each set of bundles on one GPU that holds the first of those wanted."""
    first = wanted & -wanted
    rest = others = wanted ^ first
    while True:
        usd, memory = of_set[first | others]
        if usd < math.inf:
            left = best[rest ^ others]
            yield round(usd + left[0], 9), memory + left[1]
        if not others:
            return
        others = (others - 1) & rest


def _cheapest(set_: int, bundles: Sequence[Shape], kinds: Sequence[Kind]) -> tuple[float, float]:
    """Price and memory of the cheapest GPU that holds these bundles together; infinite: none does."""
    mine = [shape for at, shape in enumerate(bundles) if set_ >> at & 1]
    whole = any(shape.devices for shape in mine)
    if whole and len(mine) > 1:
        return math.inf, math.inf
    share, memory = sum(shape.gpu for shape in mine), sum(shape.gpu_memory for shape in mine)
    fits = [
        (kind.usd_per_gpu_hour, float(kind.device_memory_mib))
        for kind in kinds
        if memory <= kind.full and share <= UNIT
    ]
    return min(fits, default=(math.inf, math.inf))


def _bundles(demand: Demand) -> Iterable[tuple[Shape, int]]:
    yield from demand.singles
    for gang in demand.gangs:
        yield from ((shape, n * gang.count) for shape, n in gang.bundles)
