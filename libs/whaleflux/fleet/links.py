"""How fast the links are, and what a fabric does to several jobs that share it.

Bandwidths are bytes per second in one direction as a collective sees them (NCCL bus bandwidth), not as data sheets print them.
Source of the defaults: all-reduce of 1 GiB measured on one host of 4 H200 (NVLink 347.5, through host memory 26, TCP on
loopback 3.8 GB/s); they are used only where a node does not report its own figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from whaleflux.fleet.model import Level, LinkKind

DEFAULT_BYTES_PER_S: dict[LinkKind, float] = {
    LinkKind.NVLINK: 347e9,
    LinkKind.PCIE_SWITCH: 26e9,
    LinkKind.PCIE_HOST: 26e9,
    LinkKind.SYSTEM: 20e9,
    LinkKind.ETHERNET: 3.8e9,
    LinkKind.WAN: 0.125e9,
}

# One hop of a ring, seconds: NVLink and network figures of NCCL's own tuning table (Simple protocol), WAN one way.
HOP_S: dict[LinkKind, float] = {
    LinkKind.NVLINK: 3.4e-6,
    LinkKind.PCIE_SWITCH: 5.7e-6,
    LinkKind.PCIE_HOST: 5.7e-6,
    LinkKind.SYSTEM: 5.7e-6,
    LinkKind.ETHERNET: 14e-6,
    LinkKind.WAN: 20e-3,
}


@dataclass(frozen=True, slots=True)
class Fabric:
    """What the network above the nodes offers.

    `*_oversubscription`: what enters a domain from below over what leaves it above (1: non-blocking). `site_bytes_per_s` is what one site can
    send to the others. `nic_bytes_per_s` is one flow's line rate: a switch hashes each flow onto one uplink of that rate (static ECMP)
    unless `hashed` is False (adaptive routing, packet spraying), where flows share all uplinks evenly.
    """

    leaf_oversubscription: float = 1.0
    spine_oversubscription: float = 2.0
    zone_oversubscription: float = 2.0
    site_bytes_per_s: float = 1.25e9
    nic_bytes_per_s: float = 50e9
    hashed: bool = True

    def oversubscription(self, level: Level) -> float:
        """Of the uplinks of a domain of `level`, cumulative from the nodes up."""
        ratio = self.leaf_oversubscription
        if level <= Level.SPINE:
            ratio *= self.spine_oversubscription
        if level <= Level.ZONE:
            ratio *= self.zone_oversubscription
        return ratio


@lru_cache(maxsize=65536)
def expected_slowdown(others_per_link: float, flows: int, hashed: bool = True) -> float:
    """By how much the slowest of `flows` flows is slowed when `others_per_link` foreign flows share each uplink on average.

    Hashed: foreign flows fall on links like balls into bins (Poisson), and a collective waits for its slowest flow, so this is
    the expected maximum of `flows` draws, plus one for the flow itself. Not hashed: even sharing, no slowdown below one flow per link.
    """
    if others_per_link <= 0 or flows <= 0:
        return 1.0
    if not hashed:
        return max(1.0, others_per_link)
    term, below, total, k = math.exp(-others_per_link), 0.0, 1.0, 0
    while True:
        below += term
        tail = 1.0 - below**flows
        if tail < 1e-9 or k > 400:
            return total
        total += tail
        k += 1
        term *= others_per_link / k


def all_reduce_s(size_bytes: float, ranks: int, bus_bytes_per_s: float, hop_s: float = 0.0, hops: int = 0) -> float:
    """Ring all-reduce: each rank sends 2 (n-1)/n of the buffer; latency is one hop per step."""
    if ranks < 2:
        return 0.0
    return size_bytes * 2 * (ranks - 1) / ranks / bus_bytes_per_s + hops * hop_s
