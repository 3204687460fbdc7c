"""Upper bounds on what any policy can allocate that places every pod that fits somewhere.

Take one kind of share, the probe (on openb `default`: 0.81 of a GPU, 3.152 cores). Let t be the moment of its first rejection. Before t
each probe that arrives is placed, wanted or not. From t on no node with the probe's CPU and memory left has a device with its share
free, so no request for whole GPUs that needs as much CPU and memory is placed any more. What is left is to cut GPUs into shares: a linear
programme over all ways to fill one device, with as many of each size as ever arrive, all knowledge of the future, and CPU, memory
and gangs ignored. The bound is its maximum over t; between two points of the grid the laxer side of each condition is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import bmat, csr_matrix, diags

from benchmarks.packing_columns import WHOLE_MILLI, Ints, Kinds

GRID = 40  # moments of first rejection that are tried
MOST_CUTS = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class Cuts:
    """The ways to fill one device: `counts[w, s]` shares of `sizes_milli[s]`, none of them able to take one more."""

    sizes_milli: Ints
    counts: Ints


def bound_pct(kinds: Kinds, arrivals: Ints, gpus: int) -> float:
    """The bound in percent of `gpus`; 100 where there is no share to probe with or the cuts are too many to list."""
    probe = choose_probe(kinds, arrivals)
    cuts = cuts_of(np.unique(kinds.gpu_milli[arrivals][is_share(kinds)[arrivals]])) if probe >= 0 else None
    if cuts is None:
        return 100.0
    supply = supply_of(kinds, arrivals, cuts)
    best = 0.0
    for begin, end in pairwise(np.linspace(0, len(arrivals), GRID + 1).astype(np.int64)):
        until_rejection = (arrivals[:begin] == probe).sum()
        forced = np.where(cuts.sizes_milli == kinds.gpu_milli[probe], until_rejection, 0)
        best = max(best, most_milli(cuts, supply, forced, _whole_gpus(kinds, arrivals, probe, int(end)), gpus))
    return min(100.0, 100.0 * best / (gpus * WHOLE_MILLI))


def is_share(kinds: Kinds) -> NDArray[np.bool_]:
    """Which kinds take part of one GPU."""
    return np.asarray((kinds.gpus == 1) & (kinds.gpu_milli < WHOLE_MILLI))


def choose_probe(kinds: Kinds, arrivals: Ints) -> int:
    """The kind, free of any model, whose shares over half a GPU leave most behind in sum; -1 if there is none."""
    counts = np.bincount(arrivals, minlength=len(kinds.gpus))
    eligible = is_share(kinds) & (kinds.gpu_milli * 2 > WHOLE_MILLI) & (kinds.models == 0)
    leaves = np.where(eligible, counts * (WHOLE_MILLI - kinds.gpu_milli), 0)
    return int(leaves.argmax()) if leaves.max() > 0 else -1


def cuts_of(sizes_milli: Ints) -> Cuts | None:
    """All maximal multisets of sizes that fit one device, or None when there are more than `MOST_CUTS`."""
    sizes = sorted((int(s) for s in sizes_milli), reverse=True)
    found: list[list[int]] = []

    def extend(index: int, left: int, counts: list[int]) -> bool:
        if index == len(sizes):
            if left < sizes[-1]:
                found.append(counts)
            return len(found) <= MOST_CUTS
        return all(
            extend(index + 1, left - n * sizes[index], [*counts, n]) for n in range(left // sizes[index], -1, -1)
        )

    complete = extend(0, WHOLE_MILLI, [])
    return Cuts(np.array(sizes), np.array(found)) if complete else None


def most_milli(cuts: Cuts, supply: Ints, forced: Ints, whole_gpus: int, gpus: int) -> float:
    """The most thousandths that fit `gpus` devices, given so many requests per size, of which `forced` must be in.

    Variables: devices per cut, whole GPUs given, and per size the places in cuts that stay empty. 0 if the forced do not fit.
    """
    sizes, ways = len(cuts.sizes_milli), len(cuts.counts)
    places, empty = csr_matrix(cuts.counts.T), diags(np.ones(sizes))
    no_whole = csr_matrix((sizes, 1))
    devices = csr_matrix(np.concatenate([np.ones(ways + 1), np.zeros(sizes)])[None, :])
    found = linprog(
        np.concatenate([-cuts.counts @ cuts.sizes_milli, [-WHOLE_MILLI], cuts.sizes_milli]),
        A_ub=bmat(
            [
                [bmat([[places, no_whole, -empty]])],  # no more than there are
                [bmat([[-places, no_whole, empty]])],  # the forced are in; no more empty places than places
                [devices],
            ],
            format="csr",
        ),
        b_ub=np.concatenate([supply, -forced, [gpus]]),
        bounds=[(0, None)] * ways + [(0, whole_gpus)] + [(0, None)] * sizes,
        method="highs",
    )
    return -float(found.fun) if found.status == 0 else 0.0


def supply_of(kinds: Kinds, pods: Ints, cuts: Cuts) -> Ints:
    """How many shares of each size of `cuts` are among the pods."""
    shares = kinds.gpu_milli[pods[is_share(kinds)[pods]]]
    return np.array([(shares == size).sum() for size in cuts.sizes_milli], dtype=np.int64)


def _whole_gpus(kinds: Kinds, arrivals: Ints, probe: int, end: int) -> int:
    """Whole GPUs asked for until `end`, and later by requests that take less CPU or memory than the probe."""
    small = (kinds.cpu_millicores < kinds.cpu_millicores[probe]) | (kinds.memory_bytes < kinds.memory_bytes[probe])
    whole = np.where(kinds.gpu_milli == WHOLE_MILLI, kinds.gpus, 0)
    return int(whole[arrivals[:end]].sum() + (whole * small)[arrivals[end:]].sum())
