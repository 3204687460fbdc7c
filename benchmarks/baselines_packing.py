"""Published packing policies, re-implemented: random, best-fit and fragmentation gradient descent (FGD, USENIX ATC 2023).

Faithful to the authors' simulator where it matters for the result: scores are whole numbers, so ties are frequent; a tie goes to the
first node in the given order (their smallest name); typical pods are computed once, from the original list, by count.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from benchmarks.packing_columns import WHOLE_MILLI, DeviceArrays, Ints, Kinds
from benchmarks.placement_lab.idle_table import Floats, PartDemand, compiled, fits, take
from benchmarks.placement_lab.sharing_replay import FIRST, Filled

TYPICAL_SHARE = 0.95
LARGEST_CPU_MILLICORES, LARGEST_GPU_MILLI = 128_000, 8_000  # best-fit measures what is left against the largest node


class Policy(IntEnum):
    RANDOM = 0
    BEST_FIT = 1
    FGD = 2
    FGD_BEST_FIT = 3  # FGD, ties by best-fit


RANDOM, BEST_FIT, FGD_BEST_FIT = int(Policy.RANDOM), int(Policy.BEST_FIT), int(Policy.FGD_BEST_FIT)


class Typical(NamedTuple):
    """The most frequent requests, together `TYPICAL_SHARE` of all pods, and the part of pods that each is."""

    cpu_millicores: Ints
    gpus: Ints
    gpu_milli: Ints
    models: Ints
    share: Floats


def typical_pods(kinds: Kinds, pods: Ints, share: float = TYPICAL_SHARE) -> Typical:
    """Distinct (CPU, GPUs, milli, models), pods without GPUs among them, most frequent first until `share` of the pods is covered."""
    columns = (kinds.cpu_millicores[pods], kinds.gpus[pods], kinds.gpu_milli[pods], kinds.models[pods])
    counts = Counter(zip(*(column.tolist() for column in columns), strict=True)).most_common()
    kept, covered = [], 0
    for spec, count in counts:
        kept.append((*spec, count))
        covered += count
        if covered >= share * len(pods):
            break
    specs = np.array(kept, dtype=np.int64).T.copy()
    return Typical(specs[0], specs[1], specs[2], specs[3], specs[4] / specs[4].sum())


def fill_by(
    policy: Policy, fleet: DeviceArrays, kinds: Kinds, arrivals: Ints, typical: Typical, *, tie_seed: int = FIRST
) -> Filled:
    """Places arrivals in order; one that fits nowhere is dropped. Ties: the first node, or drawn with `tie_seed` >= 0."""
    return _fill(int(policy), fleet, kinds, arrivals, typical, tie_seed)


@compiled
def fragmentation_milli(typical: Typical, cpu_left: int, model: int, free_milli: Ints) -> float:
    """FGD's F: the idle thousandths that a random typical pod cannot use."""
    idle = free_milli.sum()
    lost = 0.0
    if idle == 0:
        return float(lost)
    for t in range(len(typical.share)):
        milli = typical.gpu_milli[t]
        models = typical.models[t]
        able = unusable = 0
        for free in free_milli:
            if free >= milli:
                able += 1
            else:
                unusable += free
        reachable = models == 0 or (models >> model) & 1
        usable = typical.gpus[t] > 0 and reachable and cpu_left >= typical.cpu_millicores[t] and able >= typical.gpus[t]
        lost += typical.share[t] * (unusable if usable else idle)
    return float(lost)


@compiled
def _fgd(
    typical: Typical, demand: PartDemand, cpu_left: int, model: int, free_milli: Ints, scratch: Ints
) -> tuple[float, int]:
    """FGD's whole-number score and the first best device."""
    before = fragmentation_milli(typical, cpu_left, model, free_milli)
    cpu = cpu_left - demand.cpu_millicores
    scratch[:] = free_milli
    if demand.gpus != 1 or demand.gpu_milli == WHOLE_MILLI:
        take(demand, -1, scratch)
        return _whole_number(before - fragmentation_milli(typical, cpu, model, scratch)), -1
    best, chosen = -1.0, -1
    for device in range(len(free_milli)):
        if free_milli[device] < demand.gpu_milli or free_milli[device] in free_milli[:device]:
            continue
        scratch[device] -= demand.gpu_milli
        score = _whole_number(before - fragmentation_milli(typical, cpu, model, scratch))
        scratch[device] += demand.gpu_milli
        if score > best:
            best, chosen = score, device
    return best, chosen


@compiled
def _whole_number(gain_milli: float) -> float:
    return float(int(100.0 / (1.0 + math.exp(-gain_milli / 1000.0))))


@compiled
def _fullness(demand: PartDemand, cpu_left: int, free_milli: Ints) -> float:
    """Best-fit: 1 for a node that is full afterwards."""
    cpu = cpu_left - demand.cpu_millicores
    idle = free_milli.sum() - demand.gpus * demand.gpu_milli
    return float(1.0 - 0.5 * cpu / LARGEST_CPU_MILLICORES - 0.5 * idle / LARGEST_GPU_MILLI)


@compiled
def _tightest(demand: PartDemand, free_milli: Ints) -> int:
    chosen, least = -1, WHOLE_MILLI + 1
    for device in range(len(free_milli)):
        if demand.gpu_milli <= free_milli[device] < least:
            chosen, least = device, free_milli[device]
    return chosen


@compiled
def _any(demand: PartDemand, free_milli: Ints) -> int:
    chosen, able = -1, 0
    for device in range(len(free_milli)):
        if free_milli[device] >= demand.gpu_milli:
            able += 1
            if np.random.randint(able) == 0:  # noqa: NPY002  numba's own generator
                chosen = device
    return chosen


@compiled
def _scored(
    policy: int, typical: Typical, demand: PartDemand, cpu_left: int, model: int, free_milli: Ints, scratch: Ints
) -> tuple[float, int]:
    shares = demand.gpus == 1 and demand.gpu_milli < WHOLE_MILLI
    if policy == RANDOM:
        return 0.0, -1  # the device is drawn when the node has been
    if policy == BEST_FIT:
        score = float(int(100 * _fullness(demand, cpu_left, free_milli)))
        return score, _tightest(demand, free_milli) if shares else -1
    score, device = _fgd(typical, demand, cpu_left, model, free_milli, scratch)
    if policy == FGD_BEST_FIT:
        score += 0.1 * _fullness(demand, cpu_left, free_milli)  # scores differ by 1
    return score, device


@compiled
def _fill(policy: int, fleet: DeviceArrays, kinds: Kinds, arrivals: Ints, typical: Typical, tie_seed: int) -> Filled:
    """One loop, read straight down: scores are kept per (kind, node) and computed again only for nodes that changed since."""
    np.random.seed(max(tie_seed, 0))  # noqa: NPY002
    cpu, memory = fleet.cpu_millicores.copy(), fleet.memory_bytes.copy()
    free = fleet.free_milli.copy()
    nodes, slots = free.shape
    changes = np.zeros(nodes, dtype=np.int64)
    known = np.full((len(kinds.gpus), nodes), -1, dtype=np.int64)
    scores = np.empty((len(kinds.gpus), nodes))
    devices = np.empty((len(kinds.gpus), nodes), dtype=np.int64)
    placed = np.full(len(arrivals), -1, dtype=np.int64)
    scratch = np.empty(slots, dtype=np.int64)
    allocated = 0
    random_ties = tie_seed >= 0 or policy == RANDOM
    for arrival in range(len(arrivals)):
        kind = arrivals[arrival]
        demand = PartDemand(
            kinds.cpu_millicores[kind], kinds.memory_bytes[kind], kinds.gpus[kind], kinds.gpu_milli[kind]
        )
        models = kinds.models[kind] if demand.gpus > 0 else 0
        best, chosen, equal = -np.inf, -1, 0
        for n in range(nodes):
            if known[kind, n] != changes[n]:
                known[kind, n] = changes[n]
                scores[kind, n] = -np.inf
                if (models == 0 or (models >> fleet.model[n]) & 1) and fits(demand, cpu[n], memory[n], free[n]):
                    scores[kind, n], devices[kind, n] = _scored(
                        policy, typical, demand, cpu[n], fleet.model[n], free[n], scratch
                    )
            if scores[kind, n] > best:
                best, chosen, equal = scores[kind, n], n, 1
            elif random_ties and chosen >= 0 and scores[kind, n] == best:
                equal += 1
                if np.random.randint(equal) == 0:  # noqa: NPY002
                    chosen = n
        if chosen < 0:
            continue
        device = devices[kind, chosen]
        if policy == RANDOM and demand.gpus == 1 and demand.gpu_milli < WHOLE_MILLI:
            device = _any(demand, free[chosen])
        cpu[chosen] -= demand.cpu_millicores
        memory[chosen] -= demand.memory_bytes
        take(demand, device, free[chosen])
        allocated += demand.gpus * demand.gpu_milli
        changes[chosen] += 1
        placed[arrival] = chosen
    return Filled(placed, cpu, memory, free, allocated)
