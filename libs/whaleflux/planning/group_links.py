"""What the communicators of rank maps run over: `Links` of groups of any GPUs of a `Cluster`, of many maps at once.

All groups of a kind (all tensor-parallel ones, ...) work at the same time and share NICs and ways out of leaves; a step waits for the slowest,
so each map gets the worst of its groups. Rings visit nodes in the order of the tree, whatever the ranks' order: NCCL takes the ranks' order
between nodes, so this favours maps that are not sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from whaleflux.planning.arrays import Array, Flags
from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.machine import NVLS_FROM_GPUS, Links
from whaleflux.planning.plans import Plans
from whaleflux.planning.step import Groups


@dataclass(frozen=True, slots=True)
class Split:
    """The sizes of one plan's dimensions, whole numbers. Ranks are counted tp first, then cp, dp, pp (`Plans`)."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    replicas: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.data * self.pp

    @property
    def data(self) -> int:
        """Data parallel, with context."""
        return self.cp * self.dp

    @staticmethod
    def of(plan: Plans) -> Split:
        """Of a single plan."""
        return Split(*(int(np.ravel(getattr(plan, name))[0]) for name in ("tp", "cp", "dp", "pp", "ep", "replicas")))


def groups_of(cluster: Cluster, split: Split, maps: Ints) -> Groups:
    """Of `maps` (count, ranks): on which GPU each rank lies. Arrays of `count` elements."""
    count, tp, data, pp, ep = len(maps), split.tp, split.data, split.pp, split.ep
    grid = maps.reshape(count, pp, data, tp)
    by_data = grid.swapaxes(2, 3)  # (count, pp, tp, data)
    shards = data // split.replicas
    experts = by_data.reshape(count, pp, tp, max(data // ep, 1), min(ep, data))
    sharded = by_data.reshape(count, pp, tp, split.replicas, shards)
    context = grid.reshape(count, pp, split.dp, split.cp, tp).swapaxes(3, 4)
    return Groups(
        tp=ring_links(cluster, grid.reshape(count, -1, tp)),
        cp=ring_links(cluster, context.reshape(count, -1, split.cp)),
        ep=exchange_links(cluster, experts.reshape(count, -1, experts.shape[-1])),
        dp=ring_links(cluster, by_data.reshape(count, -1, data)),
        pp=chain_links(cluster, grid.reshape(count, pp, -1).swapaxes(1, 2)),
        experts=ring_links(cluster, experts.swapaxes(3, 4).reshape(count, -1, experts.shape[3])),
        shards=ring_links(cluster, sharded.reshape(count, -1, shards)),
        replicas=ring_links(cluster, sharded.swapaxes(3, 4).reshape(count, -1, split.replicas)),
    )


def ring_links(cluster: Cluster, groups: Ints) -> Links:
    """Of rings through `groups` (count, groups, ranks) of GPUs."""
    if groups.shape[-1] < 2:
        return _alone(len(groups))
    found = _Sorted.of(cluster, groups)
    network = np.minimum(found.least(found.node_rate()), found.least_way_out())
    return found.links(network)


def exchange_links(cluster: Cluster, groups: Ints) -> Links:
    """Of all-to-all within `groups` (count, groups, ranks): each rank sends the same to each."""
    if groups.shape[-1] < 2:
        return _alone(len(groups))
    found = _Sorted.of(cluster, groups)
    ranks, nodes = groups.shape[-1], found.most_nodes()
    # A part of k ranks on a node sends k (n - k) / n of a rank's volume out of it: that in rates which `all_to_all_s` divides by.
    sent = found.node_sizes * (1 - found.node_sizes / ranks)
    slowest = found.least(np.where(sent > 0, found.node_rate() / np.maximum(sent, 1e-9), np.inf))
    slowest = np.minimum(slowest, found.least_exchange_out())
    each = np.where(nodes > 1, slowest, 0.0) * (nodes - 1) / nodes  # none: `links` has it
    return found.links(each * ranks / nodes)


def chain_links(cluster: Cluster, groups: Ints) -> Links:
    """Of sends between neighbours in `groups` (count, groups, stages), which come in the order of stages."""
    count, _, stages = groups.shape
    if stages < 2:
        return _alone(count)
    a, b = groups[..., :-1], groups[..., 1:]
    node = cluster.node
    far = node[a] != node[b]
    sends = np.zeros(groups.shape, dtype=bool)
    sends[..., :-1] |= far
    sends[..., 1:] |= far
    rate = _nic_share(cluster, groups, sends)
    network = np.where(sends, rate, np.inf).min(axis=(1, 2))
    for domain, out in zip(cluster.domains, cluster.out_bytes_per_s, strict=True):
        network = np.minimum(network, _chain_out(domain, out, a, b))
    near = np.where(far, np.inf, _pair_rate(cluster, a, b)).min(axis=(1, 2))
    nodes = np.where(far.any(axis=(1, 2)), float(stages), 1.0)
    sites = cluster.domains[-1]
    away = (sites[a] != sites[b]).any(axis=(1, 2))
    return Links(
        size=np.full(count, float(stages)),
        island_bytes_per_s=near,
        network_bytes_per_s=network,
        switch_bytes_per_s=np.zeros(count),
        nodes=nodes,
        inner_hop_s=np.where(np.isfinite(near), cluster.inner_hop_s, 0.0),
        outer_hop_s=np.where(nodes > 1, np.where(away, cluster.site_hop_s, cluster.outer_hop_s), 0.0),
    )


def _chain_out(domain: Ints, out: Array, a: Ints, b: Ints) -> Array:
    """The slowest way out of a domain that these sends take, of each map, shared by all of them."""
    count = len(a)
    crossing = domain[a] != domain[b]
    if not crossing.any():
        return np.full(count, np.inf)
    which = np.broadcast_to(np.arange(count)[:, None, None], a.shape)[crossing] * len(out)
    users = np.bincount(
        np.concatenate([which + domain[a][crossing], which + domain[b][crossing]]), minlength=count * len(out)
    ).reshape(count, len(out))
    return np.asarray(np.where(users > 0, out / np.maximum(users, 1), np.inf).min(axis=1))


def _alone(count: int) -> Links:
    far, none = np.full(count, np.inf), np.zeros(count)
    return Links(np.ones(count), far, far, none, np.ones(count), none, none)


def _nic_share(cluster: Cluster, groups: Ints, uses: Flags) -> Array:
    """What each rank has of the NIC that its traffic takes, shared with the others of its map that `uses` says."""
    count, nics = len(groups), len(cluster.nic_bytes_per_s)
    nic = cluster.nic[groups]
    key = nic + (np.arange(count) * nics)[:, None, None]
    users = np.bincount(key[uses], minlength=count * nics)
    return np.asarray(cluster.nic_bytes_per_s[nic] / np.maximum(users[key], 1))


def _pair_rate(cluster: Cluster, a: Ints, b: Ints) -> Array:
    """Between GPUs of one node: in an island its ring, else through the host."""
    same = cluster.island[a] == cluster.island[b]
    return np.where(same, cluster.ring_bytes_per_s[a], cluster.host_bytes_per_s[a])


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Groups whose GPUs stand in the order of the tree, so that those of a node are a run. `starts`: where runs begin in the flat array."""

    cluster: Cluster
    groups: Ints  # (count, groups, ranks)
    starts: Ints
    far: Flags  # (count, groups): over several nodes

    @staticmethod
    def of(cluster: Cluster, groups: Ints) -> _Sorted:
        ordered = np.sort(groups, axis=-1)
        node = cluster.node[ordered]
        return _Sorted(cluster, ordered, _starts(node), node[..., 0] != node[..., -1])

    @property
    def node_sizes(self) -> Array:
        """Ranks of each run."""
        return np.diff(np.append(self.starts, self.groups.size)).astype(np.float64)

    def node_rate(self) -> Array:
        """Of each run, what its ranks can send out of the node; infinite where they need not."""
        uses = np.broadcast_to(self.far[..., None], self.groups.shape)
        share = np.where(uses, _nic_share(self.cluster, self.groups, uses), np.inf)
        return np.asarray(np.add.reduceat(share.ravel(), self.starts))

    def least(self, of_runs: Array) -> Array:
        """The least of each map's runs."""
        first = np.searchsorted(self.starts, np.arange(len(self.groups)) * self.groups[0].size)
        return np.asarray(np.minimum.reduceat(of_runs, first))

    def least_way_out(self) -> Array:
        """The slowest way out of a leaf, spine, zone or site that a ring of the map takes: each goes through it once."""
        return self._through(lambda sizes: np.ones(len(sizes)))

    def least_exchange_out(self) -> Array:
        ranks = self.groups.shape[-1]
        return self._through(lambda sizes: sizes * (1 - sizes / ranks))

    def _through(self, load: Callable[[Array], Array]) -> Array:
        """The slowest way out of any domain, shared by all groups that lie partly in it; `load` of each by how many ranks it has there."""
        count, per_map = len(self.groups), self.groups[0].size
        slowest = np.full(count, np.inf)
        for domain, out in zip(self.cluster.domains, self.cluster.out_bytes_per_s, strict=True):
            there = domain[self.groups]
            apart = there[..., 0] != there[..., -1]
            if not apart.any():
                break  # what lies in one leaf lies in one spine
            starts = _starts(there)
            sizes = np.diff(np.append(starts, there.size)).astype(np.float64)
            crossing = apart.ravel()[starts // self.groups.shape[-1]]
            key = there.ravel()[starts] + (starts // per_map) * len(out)
            loads = np.bincount(key, weights=np.where(crossing, load(sizes), 0.0), minlength=count * len(out))
            loads = loads.reshape(count, len(out))
            rate = np.where(loads > 0, out / np.where(loads > 0, loads, 1.0), np.inf)
            slowest = np.minimum(slowest, rate.min(axis=1))
        return slowest

    def most_nodes(self) -> Array:
        """Over how many nodes the group with most of them lies, of each map."""
        node = self.cluster.node[self.groups]
        return np.asarray(1.0 + (node[..., 1:] != node[..., :-1]).sum(axis=-1).max(axis=-1))

    def links(self, network: Array) -> Links:
        cluster, groups = self.cluster, self.groups
        count, _, ranks = groups.shape
        a, b = groups[..., :-1], groups[..., 1:]
        inside = np.where(cluster.node[a] == cluster.node[b], _pair_rate(cluster, a, b), np.inf).min(axis=(1, 2))
        nodes = self.most_nodes()
        one_island = (cluster.island[groups[..., 0]] == cluster.island[groups[..., -1]]).all(axis=1)
        switched = one_island & (ranks >= NVLS_FROM_GPUS)
        site = cluster.domains[-1][groups]
        away = (site[..., 0] != site[..., -1]).any(axis=1)
        return Links(
            size=np.full(count, float(ranks)),
            island_bytes_per_s=inside,
            network_bytes_per_s=np.where(nodes > 1, network, np.inf),
            switch_bytes_per_s=np.where(switched, cluster.switch_bytes_per_s[groups].min(axis=(1, 2)), 0.0),
            nodes=nodes,
            inner_hop_s=np.where(np.isfinite(inside), cluster.inner_hop_s, 0.0),
            outer_hop_s=np.where(nodes > 1, np.where(away, cluster.site_hop_s, cluster.outer_hop_s), 0.0),
        )


def _starts(domain: Ints) -> Ints:
    """Where runs of one domain begin, in the flat array; each group begins one."""
    first = np.ones(domain.shape, dtype=bool)
    first[..., 1:] = domain[..., 1:] != domain[..., :-1]
    return np.flatnonzero(first.ravel())
