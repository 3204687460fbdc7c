"""Rank maps that are made, not searched: GPUs in the order of the tree, cut into groups dimension by dimension so that few are torn apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.group_links import Split

_MOST_ORDERS = 48
_Unit = tuple[int, ...]  # GPUs, in the order of the dimensions that are cut already


def dimensions(split: Split) -> dict[str, int]:
    """What is more than one, in the order of ranks, innermost first. Expert groups are runs of the data dimension, so they divide it."""
    inner, outer = split.cp, split.dp
    if split.ep > 1:
        inner, outer = split.ep, split.data // split.ep
    names = ("tp", "ep" if split.ep > 1 else "cp", "dp", "pp")
    return {name: size for name, size in zip(names, (split.tp, inner, outer, split.pp), strict=True) if size > 1}


def orders(split: Split) -> list[tuple[str, ...]]:
    """All orders in which the dimensions can be laid along the tree, the ranks' own first."""
    return list(permutations(dimensions(split)))[:_MOST_ORDERS]


def lay(cluster: Cluster, split: Split, order: Sequence[str]) -> Ints:
    """The map (GPU of each rank) whose dimensions lie along the tree in `order`, innermost first."""
    sizes = dimensions(split)
    units: list[_Unit] = [(gpu,) for gpu in range(split.ranks)]
    for name in order:
        units = _cut(cluster, units, sizes[name])
    along = np.array(units[0] if units else (), dtype=np.intp).reshape([sizes[name] for name in reversed(order)] or [1])
    names = tuple(sizes)
    axes = [len(order) - 1 - order.index(name) for name in reversed(names)]
    return along.transpose(axes).reshape(-1) if order else along.reshape(-1)


def _cut(cluster: Cluster, units: list[_Unit], size: int) -> list[_Unit]:
    """Runs of `size` units, in the smallest domains that have as many; what is left of one goes on to the next larger."""
    made, left = list[_Unit](), units
    for level in _levels(cluster):
        left = _cut_in(level, made, left, size) if level is not None else left
    rest = [tuple(gpu for unit in left[at : at + size] for gpu in unit) for at in range(0, len(left), size)]
    return sorted(made + rest)


def _levels(cluster: Cluster) -> Iterator[Ints]:
    yield cluster.island
    yield cluster.node
    yield from cluster.domains


def _cut_in(domain: Ints, made: list[_Unit], units: list[_Unit], size: int) -> list[_Unit]:
    """Cuts what lies in one domain each, and returns the rest in its order."""
    inside, torn = dict[int, list[_Unit]](), list[_Unit]()
    for unit in units:
        first = int(domain[min(unit)])
        if first == int(domain[max(unit)]):
            inside.setdefault(first, []).append(unit)
        else:
            torn.append(unit)
    for here in inside.values():
        whole = len(here) - len(here) % size
        made += [tuple(gpu for unit in here[at : at + size] for gpu in unit) for at in range(0, whole, size)]
        torn += here[whole:]
    return sorted(torn)
