"""From what the driver says about links to the best path between each pair of GPUs. Pure.

NVLink is read from the links, not from the topology call: that one knows only PCI, and in a virtual machine says
nothing about the wiring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from whaleflux.fleet.gpu_types import NVLINK_BYTES_PER_S, PCIE_LANE_BYTES_PER_S
from whaleflux.fleet.model import Link, LinkKind

_PCIE_UNKNOWN = (4, 16)  # generation and width where the driver does not say
# What a collective gets of the wire: 347 of 450 GB/s over NVLink 4 and 26 of 63 GB/s through host memory, all-reduce of
# 1 GiB on 4 H200. A PCIe switch passes peer traffic on without touching the host.
_NVLINK_SHARE, _SWITCH_SHARE, _HOST_SHARE, _SYSTEM_SHARE = 0.77, 0.8, 0.41, 0.32


@dataclass(frozen=True, slots=True)
class NvLinkReading:
    """One active NVLink of a GPU."""

    generation: int
    to_switch: bool
    remote_bus_id: str  # of the peer GPU; meaningless behind switches


@dataclass(frozen=True, slots=True)
class GpuWires:
    """What one GPU is connected by."""

    index: int
    bus_id: str
    nvlinks: tuple[NvLinkReading, ...] = ()
    pcie_generation: int = 0  # 0: unknown
    pcie_width: int = 0


SINGLE_SWITCH, SEVERAL_SWITCHES, HOST_BRIDGE, NUMA_NODE = 10, 20, 30, 40


def best_links(gpus: Sequence[GpuWires], ancestors: Mapping[tuple[int, int], int]) -> tuple[Link, ...]:
    """The best path of each pair. `ancestors[a, b]` (a < b) is NVML's topology level, absent where it is unknown."""
    return tuple(_best(a, b, ancestors.get((a.index, b.index), -1)) for a, b in combinations(gpus, 2))


def _best(a: GpuWires, b: GpuWires, ancestor: int) -> Link:
    nvlink = _nvlink_bytes_per_s(a, b)
    if nvlink > 0:
        return Link(a.index, b.index, LinkKind.NVLINK, nvlink)
    wire = min(_pcie_bytes_per_s(a), _pcie_bytes_per_s(b))
    if 0 <= ancestor <= SEVERAL_SWITCHES:
        return Link(a.index, b.index, LinkKind.PCIE_SWITCH, wire * _SWITCH_SHARE)
    if 0 <= ancestor <= NUMA_NODE:
        return Link(a.index, b.index, LinkKind.PCIE_HOST, wire * _HOST_SHARE)
    return Link(a.index, b.index, LinkKind.SYSTEM, wire * _SYSTEM_SHARE)


def _nvlink_bytes_per_s(a: GpuWires, b: GpuWires) -> float:
    """Through switches each GPU can use all its links for any peer; direct links serve one pair only."""
    switched = min(_sum(link for link in gpu.nvlinks if link.to_switch) for gpu in (a, b))
    direct = _sum(link for link in a.nvlinks if not link.to_switch and _same_bus(link.remote_bus_id, b.bus_id))
    return (switched + direct) * _NVLINK_SHARE


def _sum(links: Iterable[NvLinkReading]) -> float:
    return sum(NVLINK_BYTES_PER_S.get(link.generation, 25e9) for link in links)


def _same_bus(one: str, other: str) -> bool:
    """Domains are printed with 4 or 8 digits."""
    return one.lower().lstrip("0") == other.lower().lstrip("0") != ""


def _pcie_bytes_per_s(gpu: GpuWires) -> float:
    generation, width = gpu.pcie_generation or _PCIE_UNKNOWN[0], gpu.pcie_width or _PCIE_UNKNOWN[1]
    newest = max(PCIE_LANE_BYTES_PER_S)
    return PCIE_LANE_BYTES_PER_S.get(generation, PCIE_LANE_BYTES_PER_S[newest]) * width
