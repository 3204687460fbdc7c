"""How long collectives take: latency and bandwidth as NCCL models them (src/graph/tuning.cc), over `Links`."""

from __future__ import annotations

import numpy as np

from whaleflux.planning.arrays import Array
from whaleflux.planning.constants import Constants
from whaleflux.planning.machine import Links

# NCCL's table: base and hops, seconds, of LL, LL128 and Simple rings; the share of the bandwidth that each protocol reaches.
# Of the wire's rate between nodes: large all-reduces over 4 nodes reach 92 of 100 GB/s (ml-engineering), as NCCL's table has it too.
NETWORK_SHARE = 0.92
_BASE_S = (6.6e-6, 14e-6, 8.4e-6)
_INNER = (0.6 / 3.4, 1.9 / 3.4, 1.0)  # of Simple's hop
_OUTER = (2.7 / 14, 4 / 14, 1.0)
_SHARE = (0.25, 0.92, 1.0)  # LL moves 8 bytes for 4, and stops at 88-141 GB/s of a node


def all_reduce_s(volume: Array, links: Links, constants: Constants) -> Array:
    """Of `volume` bytes on each rank: the best of three protocols of a ring and, in one island, of the switches."""
    ring = _ring_s(2.0, volume, links, constants)
    in_switch = links.switch_bytes_per_s
    steps = 2.0 * (links.size - 1) / np.maximum(links.size, 1)
    switched = constants.collective_latency * 33.4e-6 + volume * steps / np.where(in_switch > 0, in_switch, np.inf)
    return np.asarray(np.where(in_switch > 0, np.minimum(ring, switched), ring), dtype=np.float64)


def gather_s(volume: Array, links: Links, constants: Constants) -> Array:
    """An all-gather to `volume` bytes, or a reduce-scatter from them. The switches do not serve them (NCCL 2.2x)."""
    return _ring_s(1.0, volume, links, constants)


def all_to_all_s(volume: Array, links: Links, constants: Constants, copies: Array | float = 1.0) -> Array:
    """Each rank sends `volume` bytes in equal parts to all, itself too; what crosses nodes shares the NICs of its node.

    `copies`: the share of what would cross that does, where what several ranks of a node want goes there once.
    """
    far = links.nodes > 1
    apart = (links.size - 1) / np.maximum(links.size, 1)
    inside = volume * apart / links.island_bytes_per_s
    across = volume * copies * (links.nodes - 1) / links.nodes / np.where(far, _of_one_rank(links, constants), np.inf)
    latency = constants.collective_latency * (_BASE_S[2] + links.outer_hop_s + links.inner_hop_s)
    return np.asarray(np.where(links.size > 1, latency + np.maximum(inside, across), 0.0))


def send_s(volume: Array, links: Links, constants: Constants) -> Array:
    """From one rank to its neighbour."""
    far = links.nodes > 1
    latency = constants.collective_latency * (_BASE_S[2] + np.where(far, links.outer_hop_s, links.inner_hop_s))
    rate = np.where(far, _of_one_rank(links, constants), links.island_bytes_per_s)
    return np.asarray(np.where(links.size > 1, latency + volume / rate, 0.0))


def _of_one_rank(links: Links, constants: Constants) -> Array:
    """Its part of the network: a node's ranks of a group share what the group has."""
    share = NETWORK_SHARE * links.network_bytes_per_s
    return np.asarray(share * links.nodes / np.maximum(links.size, 1))


def _ring_s(rounds: float, volume: Array, links: Links, constants: Constants) -> Array:
    steps = rounds * (links.size - 1)
    outer = np.where(links.nodes > 1, rounds * (links.nodes - 1), 0.0)
    rate = np.minimum(links.island_bytes_per_s, NETWORK_SHARE * links.network_bytes_per_s)
    moved = volume * steps / np.maximum(links.size, 1) / rate
    inner_s, outer_s = (steps - outer) * links.inner_hop_s, outer * links.outer_hop_s
    best = np.full(np.shape(moved), np.inf)
    for base_s, inner, wide, share in zip(_BASE_S, _INNER, _OUTER, _SHARE, strict=True):
        latency = constants.collective_latency * (base_s + inner * inner_s + wide * outer_s)
        best = np.minimum(best, latency + moved / share)
    return np.asarray(np.where(links.size > 1, best, 0.0))
