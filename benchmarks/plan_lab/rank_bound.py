"""A bound for rank maps: no map of these GPUs can have a faster step, since each of its groups is given the best that it could have alone.

Which groups lie within islands decides most: where those of several dimensions do, so does the block of their product. For every set of
dimensions that fits into the islands, every larger one that fits into nodes, and every larger one that fits into leaves, the others have to cross.
Where all groups cross, all GPUs of a node send at once, so that the groups' parts there share its NICs, and those of a leaf its way out; a part is
at most as large as there is room for beside the blocks that lie whole in the node. Where only some need to cross, one of them has half of its ranks outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np

from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.group_links import Split
from whaleflux.planning.machine import NVLS_FROM_GPUS, Links
from whaleflux.planning.rank_map import Price
from whaleflux.planning.step import Groups

_Names = frozenset[str]


def bound(cluster: Cluster, split: Split, price: Price) -> float:
    """Of dense splits without replicas: the least that `price` can be."""
    assert split.ep == split.replicas == 1, "experts and replicas are not bounded"
    sizes = {name: size for name in ("tp", "cp", "dp", "pp") if (size := int(getattr(split, name))) > 1}
    levels = [np.bincount(one) for one in (cluster.island, cluster.node, cluster.domains[0])]
    fitting = [[one for one in _subsets(sizes) if _room(room, sizes, one, split.ranks)] for room in levels]
    nested = [
        _Inside(island, node, leaf)
        for island in fitting[0]
        for node in fitting[1]
        for leaf in fitting[2]
        if island <= node <= leaf
    ]
    return min(float(np.min(price(_groups(cluster, sizes, inside)))) for inside in nested)


@dataclass(frozen=True, slots=True)
class _Inside:
    """Which dimensions' groups all lie in one island, node, leaf."""

    island: _Names
    node: _Names
    leaf: _Names


def _subsets(names: Iterable[str]) -> list[_Names]:
    every = list(names)
    return [
        frozenset(one) for one in chain.from_iterable(combinations(every, count) for count in range(len(every) + 1))
    ]


def _block(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return int(np.prod([sizes[name] for name in names], dtype=np.int64))


def _room(domains: Ints, sizes: Mapping[str, int], names: _Names, ranks: int) -> bool:
    block = _block(sizes, names)
    return int((domains // block).sum()) * block >= ranks


def _groups(cluster: Cluster, sizes: Mapping[str, int], inside: _Inside) -> Groups:
    def links(*names: str) -> Links:
        return _links(cluster, sizes, [name for name in names if name in sizes], inside)

    data, alone = links("cp", "dp"), links()
    return Groups(
        tp=links("tp"), cp=links("cp"), ep=alone, dp=data, pp=links("pp"), experts=data, shards=data, replicas=alone
    )


def _links(cluster: Cluster, sizes: Mapping[str, int], own: Sequence[str], inside: _Inside) -> Links:
    """The best of a communicator over the dimensions `own`."""
    ranks, one, none, far = _block(sizes, own), np.ones(1), np.zeros(1), np.full(1, np.inf)
    if ranks == 1:
        return Links(one, far, far, none, one, none, none)
    if set(own) <= inside.node:
        in_island = set(own) <= inside.island
        # Where not all lie within islands, one of them goes through the host of its node.
        ring = cluster.ring_bytes_per_s.min() if in_island else cluster.host_bytes_per_s.max()
        switch = cluster.switch_bytes_per_s.min() if in_island and ranks >= NVLS_FROM_GPUS else 0.0
        return Links(ranks * one, ring * one, far, switch * one, one, cluster.inner_hop_s * one, none)
    rate = _network(cluster, sizes, own, ranks, inside)
    return Links(ranks * one, far, rate * one, none, 2 * one, none, cluster.outer_hop_s * one)


def _torn(cluster: Cluster, units: Ints, ranks: int) -> float:
    """Where only some groups cross: half of one lies outside at most, and each node whose units are no whole groups has a part of one."""
    nic = np.zeros(len(units))
    np.maximum.at(nic, cluster.node, cluster.nic_bytes_per_s)
    uneven = nic[units % ranks > 0] * (ranks - 1)
    return float(min(nic.max() * (ranks // 2), uneven.min(initial=np.inf)))


def _network(cluster: Cluster, sizes: Mapping[str, int], own: Sequence[str], ranks: int, inside: _Inside) -> float:
    """What its slowest group has of NICs and ways out at most."""
    nic = float(cluster.nic_bytes_per_s.max())
    if own == ["pp"]:
        return nic  # neighbours send by one NIC each
    nodes, leaves = np.bincount(cluster.node), np.bincount(cluster.domains[0])
    units = np.maximum(1, nodes // _block(sizes, inside.node - set(own)))
    part = np.minimum(ranks, units)
    if ranks <= part.max():
        return _torn(cluster, units, ranks)
    rates = np.bincount(cluster.node, weights=cluster.nic_bytes_per_s)
    rate = float((rates / np.ceil(nodes / part)).min())
    there = np.minimum(ranks, np.maximum(1, leaves // _block(sizes, inside.leaf - set(own))))
    if not set(own) <= inside.leaf and ranks > there.max():
        rate = min(rate, float((cluster.out_bytes_per_s[0] / np.ceil(leaves / there)).min()))
    return rate
