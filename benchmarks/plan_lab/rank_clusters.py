"""Simulated clusters for rank maps: hosts of the lingjun2023 tree that others have parts of, and clusters of which no two nodes are alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from benchmarks.baselines_topology import Given, Tree, blind_first_fit
from whaleflux.fleet import Gpu, Link, LinkKind, Node
from whaleflux.fleet.links import Fabric
from whaleflux.fleet.model import Level
from whaleflux.planning.cluster import Cluster, Host
from whaleflux.planning.machine import Machine
from whaleflux_scheduler.core.placement.api import GroupRequest, PlaceRequest, Subgroup
from whaleflux_scheduler.core.placement.engine import Engine

NODE_GPUS, NIC = 8, 50e9
_SIZES = (1, 2, 4, 8, 16, 32, 64)  # of jobs of others, as many GPUs in each size
_FULL = 0.93


@cache
def free_gpus(tree: Tree, load: float, seed: int) -> tuple[int, ...]:
    """Of each host, when jobs of others came, first-fit, and some have ended: `load` of the fleet is taken."""
    pick, choose, free = random.Random(seed), blind_first_fit(seed), [NODE_GPUS] * len(tree.leaf)
    total, jobs = NODE_GPUS * len(free), list[Given]()
    while sum(free) > (1 - _FULL) * total:
        size = pick.choices(_SIZES, [1 / one for one in _SIZES])[0]
        given = choose(tree, free, max(1, size // NODE_GPUS), min(size, NODE_GPUS))
        if given is None:
            break
        jobs.append(given)
        for host, gpus in given:
            free[host] -= gpus
    pick.shuffle(jobs)
    while sum(free) < (1 - load) * total:
        for host, gpus in jobs.pop():
            free[host] += gpus
    return tuple(free)


def ours(tree: Tree, free: Sequence[int], gpus: int, together: int, over: float) -> Given:
    """Where the production engine places a gang whose runs of `together` ranks have to be in one island."""
    engine, host_of = Engine(fabric(over)), dict[str, int]()
    links = tuple(Link(a, b, LinkKind.NVLINK, 347e9) for a in range(NODE_GPUS) for b in range(a + 1, NODE_GPUS))
    for host, (leaf, spine) in enumerate(zip(tree.leaf, tree.spine, strict=True)):
        devices = tuple(Gpu(at, f"{host}-{at}", "GPU", 80 * 10**9) for at in range(NODE_GPUS))
        name = f"sites/a/nodes/h{host:04}"
        node = Node(
            name, "a", devices, links, spine=f"p{spine}", leaf=f"l{leaf:03}", network_bytes_per_s=NODE_GPUS * NIC
        )
        host_of[name] = host
        engine.upsert_node(node)
        if taken := NODE_GPUS - free[host]:
            there = engine.place_on(PlaceRequest(f"others-{host}", GroupRequest(taken)), [(name, tuple(range(taken)))])
            assert there is not None
            engine.apply(there)
    subgroups = (Subgroup(together, Level.ISLAND),) if together > 1 else ()
    placed = engine.fits(PlaceRequest("ours", GroupRequest(gpus, subgroups=subgroups)))
    assert placed is not None, "the fleet has room for it"
    return [(host_of[part.node], len(part.gpus)) for part in placed.nodes]


def fabric(over: float) -> Fabric:
    return Fabric(leaf_oversubscription=over, spine_oversubscription=1.0, nic_bytes_per_s=NIC)


def cluster_of(tree: Tree, given: Given, machine: Machine, over: float) -> Cluster:
    """The GPUs of a gang, hosts in the order in which it got them."""
    ring, switch = float(machine.fabric.island_bytes_per_s), float(machine.fabric.switch_bytes_per_s)
    hosts = [
        Host((f"l{tree.leaf[host]}", f"p{tree.spine[host]}", "", "a"), (0,) * gpus, (NIC,) * gpus, ring, switch)
        for host, gpus in given
    ]
    return Cluster.of(hosts, fabric(over))


def random_cluster(ranks: int, seed: int, machine: Machine, *, whole: bool = False) -> Cluster:
    """Nodes of 3 to 7 GPUs (the last of what is left), one in five without NVLink, NICs of 100 to 400 Gb/s, one rail in ten broken, leaves of four.

    `whole`: nodes of 8, all with NVLink. Hosts come in the order of the tree: the best case for ranks that are counted node by node.
    """
    pick = np.random.default_rng(seed)
    ring, switch = float(machine.fabric.island_bytes_per_s), float(machine.fabric.switch_bytes_per_s)
    hosts, left = list[Host](), ranks
    while left:
        gpus = min(left, NODE_GPUS if whole else int(pick.integers(3, 8)))
        left -= gpus
        rate = float(pick.choice([12.5e9, 25e9, 50e9]))
        nics = tuple(np.where(pick.random(gpus) < 0.1, 0.0, rate).tolist())
        linked = whole or pick.random() < 0.8
        islands = (0,) * gpus if linked else tuple(range(gpus))
        leaf = f"l{len(hosts) // 4:03}"
        hosts.append(Host((leaf, "s", "", "a"), islands, nics, ring if linked else 26e9, switch if linked else 0.0))
    return Cluster.of(hosts, fabric(2.0))
