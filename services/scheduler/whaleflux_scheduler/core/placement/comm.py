"""How long a gang's collectives take on the links it would get: the cost that "closer" is measured in.

A ring visits the nodes in the order of the tree, so each domain that holds part of the gang is entered and left once. Its rate is
bounded by the slowest of: the ring inside each node, the NICs behind the GPUs taken there, and the uplinks of every domain that is
crossed, shared with the gangs already there (`expected_slowdown`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.fleet.links import DEFAULT_BYTES_PER_S, HOP_S, all_reduce_s, expected_slowdown
from whaleflux.fleet.model import Level, LinkKind
from whaleflux_scheduler.core.placement.api import Bottleneck
from whaleflux_scheduler.core.placement.columns import SHARED_LEVELS, Columns

# What all ranks reduce in one training step: the gradients of a generic model of one billion 16-bit parameters, trained with data parallelism.
ALL_REDUCE_BYTES = 2e9
_NO_NETWORK = DEFAULT_BYTES_PER_S[LinkKind.ETHERNET]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Modelled seconds of communication per step, and the link that bounds them."""

    step_s: float
    bottleneck: Bottleneck


_ALONE = Estimate(0.0, Bottleneck(Level.GPU, LinkKind.NVLINK, 0.0))  # one GPU talks to nobody


def flows_of(columns: Columns, parts: Sequence[tuple[int, int]]) -> int:
    """NIC flows that the gang's ring sends through each boundary it crosses: those behind the GPUs of its narrowest node."""
    return max(
        1,
        math.ceil(min(node_rate(columns, i, mask) for i, mask in parts) / columns.fabric.nic_bytes_per_s - 1e-9),
    )


def node_rate(columns: Columns, i: int, mask: int) -> float:
    """Bytes per second that the GPUs of `mask` can send out of their node: their part of its NICs."""
    shape = columns.shape(i)
    network = shape.network_bytes_per_s or _NO_NETWORK
    return network * mask.bit_count() / shape.size


def estimate(columns: Columns, parts: Sequence[tuple[int, int]]) -> Estimate:
    """Of `parts`, (row, mask of GPUs) with each row once."""
    if len(parts) == 1 and parts[0][1].bit_count() == 1:
        return _ALONE
    level, _ = columns.smallest_domain(i for i, _ in parts)
    ranks = sum(mask.bit_count() for _, mask in parts)
    inside, kind = _inside(columns, parts)
    bus, hop = inside, HOP_S[kind]
    if len(parts) > 1:
        across, link = _across(columns, parts)
        hop = HOP_S[link]
        if across < inside:
            bus, kind = across, link
    hops = 2 * (len(parts) - 1) if len(parts) > 1 else 2 * (ranks - 1)
    step_s = all_reduce_s(ALL_REDUCE_BYTES, ranks, bus, hop, hops)
    return Estimate(step_s, Bottleneck(_island_level(columns, parts, level), kind, bus if math.isfinite(bus) else 0.0))


def _inside(columns: Columns, parts: Sequence[tuple[int, int]]) -> tuple[float, LinkKind]:
    slowest, at = math.inf, parts[0]
    for i, mask in parts:
        rate = columns.shape(i).wiring.ring_bytes_per_s(mask)
        if rate < slowest:
            slowest, at = rate, (i, mask)
    return slowest, (columns.shape(at[0]).wiring.slowest_kind(at[1]) if math.isfinite(slowest) else LinkKind.NVLINK)


def _across(columns: Columns, parts: Sequence[tuple[int, int]]) -> tuple[float, LinkKind]:
    """Rate of a ring over these nodes, and whether the network or the WAN between sites bounds it."""
    rate = min(node_rate(columns, i, mask) for i, mask in parts)
    flows = max(1, math.ceil(rate / columns.fabric.nic_bytes_per_s - 1e-9))
    rows, slowdown, wan = [i for i, _ in parts], 1.0, math.inf
    for level in SHARED_LEVELS:
        domain = columns.domain[level]
        touched = {domain[i] for i in rows}
        if len(touched) == 1:
            continue
        if level is Level.SITE:
            crossing = int(max(columns.crossing[level][d] for d in touched))
            wan = columns.fabric.site_bytes_per_s * flows / (crossing + flows)
        else:
            slowdown = max(slowdown, uplink_slowdown(columns, level, touched, flows))
    return (wan, LinkKind.WAN) if wan < rate / slowdown else (rate / slowdown, LinkKind.ETHERNET)


def uplink_slowdown(columns: Columns, level: Level, touched: set[int], flows: int) -> float:
    """Of the slowest flow over the busiest uplink group of these domains, counting our own other flows."""
    chosen = list(touched)
    load = ((columns.crossing[level][chosen] + flows - 1) / columns.links[level][chosen]).max()
    return expected_slowdown(round(float(load), 4), flows * len(touched), columns.fabric.hashed)


def _island_level(columns: Columns, parts: Sequence[tuple[int, int]], level: Level) -> Level:
    if level is not Level.NODE:
        return level
    i, mask = parts[0]
    if mask.bit_count() == 1:
        return Level.GPU
    return Level.ISLAND if any(mask & ~island == 0 for island in columns.shape(i).wiring.islands) else Level.NODE
