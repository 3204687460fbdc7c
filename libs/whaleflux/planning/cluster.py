"""The GPUs of one job one by one, and the links between them: nodes that are not alike, rails that are broken, leaves that are shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whaleflux.fleet.links import DEFAULT_BYTES_PER_S, HOP_S, Fabric
from whaleflux.fleet.model import LinkKind
from whaleflux.planning.arrays import Array

Ints = NDArray[np.intp]
LEVELS = ("leaf", "spine", "zone", "site")  # above the node, from there outwards
THROUGH_HOST = DEFAULT_BYTES_PER_S[LinkKind.PCIE_HOST]


@dataclass(frozen=True, slots=True)
class Host:
    """A node's part in a job: the GPUs of it that the job has, by position.

    `islands`: of each GPU, the number of its NVLink island in the node. `nics_bytes_per_s`: of each GPU, the rate of the NIC beside it, one
    direction; 0 where that rail is broken: its traffic takes another NIC of the node. `path`: names of its leaf, spine, zone and site.
    `ring_bytes_per_s` is a ring's bus bandwidth within an island, `switch_bytes_per_s` that of an all-reduce in its switches (0: none),
    `host_bytes_per_s` what islands of one node reach one another with.
    """

    path: tuple[str, str, str, str]
    islands: tuple[int, ...]
    nics_bytes_per_s: tuple[float, ...]
    ring_bytes_per_s: float
    switch_bytes_per_s: float = 0.0
    host_bytes_per_s: float = THROUGH_HOST


@dataclass(frozen=True, slots=True)
class Cluster:
    """Arrays of one element for each GPU, in the order of the tree, so that GPUs of one domain lie side by side.

    `position` is where each GPU stands in the hosts as they were given. `domains` are the numbers of its leaf, spine, zone and site, and
    `out_bytes_per_s` what the way out of each such domain carries for this job. `nic` is the number of the NIC that a GPU's traffic takes,
    `nic_bytes_per_s` of each NIC.
    """

    position: Ints
    island: Ints
    node: Ints
    domains: tuple[Ints, ...]
    out_bytes_per_s: tuple[Array, ...]
    nic: Ints
    nic_bytes_per_s: Array
    ring_bytes_per_s: Array
    switch_bytes_per_s: Array
    host_bytes_per_s: Array
    inner_hop_s: float = HOP_S[LinkKind.NVLINK]
    outer_hop_s: float = HOP_S[LinkKind.ETHERNET]
    site_hop_s: float = HOP_S[LinkKind.WAN]

    @property
    def gpus(self) -> int:
        return len(self.node)

    @staticmethod
    def of(hosts: Sequence[Host], fabric: Fabric | None = None) -> Cluster:
        """Of a domain's way out the job has what its own nodes bring there: their NICs, divided by the oversubscription of `fabric`.

        The link between sites is the job's alone.
        """
        fabric = fabric or Fabric()
        starts = np.cumsum([0, *(len(host.islands) for host in hosts)])
        order = sorted(range(len(hosts)), key=lambda at: (hosts[at].path[::-1], at))
        sorted_hosts = [hosts[at] for at in order]
        counts = np.array([len(host.islands) for host in sorted_hosts])
        position = np.concatenate([_by_island(hosts[at]) + starts[at] for at in order])
        island = _numbered([(at, one) for at, host in enumerate(sorted_hosts) for one in sorted(host.islands)])
        nics, rates = _nics(sorted_hosts)
        domains = tuple(
            np.repeat(_numbered([host.path[level:] for host in sorted_hosts]), counts) for level in range(len(LEVELS))
        )
        node = np.repeat(np.arange(len(hosts)), counts)
        network = (np.bincount(node, weights=rates) / counts)[node]
        return Cluster(
            position=position,
            island=island,
            node=node,
            domains=domains,
            out_bytes_per_s=tuple(_ways_out(domains, network, fabric)),
            nic=nics,
            nic_bytes_per_s=rates,
            ring_bytes_per_s=np.repeat([host.ring_bytes_per_s for host in sorted_hosts], counts),
            switch_bytes_per_s=np.repeat([host.switch_bytes_per_s for host in sorted_hosts], counts),
            host_bytes_per_s=np.repeat([host.host_bytes_per_s for host in sorted_hosts], counts),
        )


def _by_island(host: Host) -> Ints:
    """Its GPUs, those of an island side by side."""
    return np.argsort(np.asarray(host.islands), kind="stable")


def _numbered(names: Sequence[object]) -> Ints:
    """Each as the number of its first appearance."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], dtype=np.intp)


def _ways_out(domains: tuple[Ints, ...], network: Array, fabric: Fabric) -> list[Array]:
    """Of leaves, spines and zones by what they bring from below; of sites by their link."""
    ratios = np.cumprod([fabric.leaf_oversubscription, fabric.spine_oversubscription, fabric.zone_oversubscription])
    found = [np.bincount(domain, weights=network) / ratio for domain, ratio in zip(domains[:-1], ratios, strict=True)]
    return [*found, np.full(domains[-1].max() + 1, fabric.site_bytes_per_s)]


def _nics(hosts: Sequence[Host]) -> tuple[Ints, Array]:
    """(NIC of each GPU, rate of each NIC; 0: broken): its own, or the working one of the node that has the fewest users for its rate."""
    taken, rates = list[int](), list[float]()
    for host in hosts:
        own = [host.nics_bytes_per_s[at] for at in _by_island(host)]
        working = [at for at, rate in enumerate(own) if rate > 0]
        if not working:
            own, working = [DEFAULT_BYTES_PER_S[LinkKind.ETHERNET], *own[1:]], [0]
        users = dict.fromkeys(working, 1)
        first = len(rates)
        for at, rate in enumerate(own):
            if rate > 0:
                taken.append(first + at)
                continue
            other = min(working, key=lambda one: (users[one] / own[one], abs(one - at)))
            users[other] += 1
            taken.append(first + other)
        rates += own
    return np.array(taken, dtype=np.intp), np.array(rates, dtype=np.float64)
