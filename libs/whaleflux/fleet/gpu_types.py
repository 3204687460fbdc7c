"""The GPU types that WhaleFlux knows, in one table: adding one is one entry of `GPU_TYPES`, in this file alone.

The table gives each type its catalogue name (what job and model files ask for), its facts, and the machines that agents can
play with it (`--profile`). A type that is missing here still works: its driver's product name is shortened by rule.
Speeds between GPUs are bytes per second in one direction as a collective sees them (see `fleet.links`), memory is what a card of the
type holds, prices are examples in US dollars per GPU and hour that an agent's settings replace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from whaleflux.fleet.gpu_speed import GpuSpeed, ampere, blackwell, hopper, without_nvlink
from whaleflux.fleet.model import Disk, Link, LinkKind, Price, PriceKind

_GIB = 1 << 30
_ACROSS_SOCKETS_BYTES_PER_S = 10e9

# NVLink by generation, one link, one direction, on the wire (NVIDIA's data sheets: 2 x 25 GB/s from NVLink 2 on).
NVLINK_BYTES_PER_S = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
NVLINK_GENERATIONS = {
    1: 1,
    2: 2,
    3: 2,
    4: 3,
    5: 3,
    6: 4,
    7: 5,
}  # nvmlDeviceGetNvLinkVersion: 2 is "2.0", 4 is "3.0", ...
MAX_NVLINKS = 18  # of one GPU
# PCIe by generation, one lane, one direction, after encoding.
PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


@dataclass(frozen=True, slots=True)
class LinkGroup:
    """GPUs (positions) that reach one another in one way."""

    gpus: frozenset[int]
    kind: LinkKind
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class MachineShape:
    """A machine as its maker describes it; `links` are groups of GPUs, best first."""

    count: int
    links: tuple[LinkGroup, ...]
    cpu_millicores: int
    memory_bytes: int
    disks: tuple[Disk, ...]
    network_bytes_per_s: float
    price: Price

    def link(self, a: int, b: int) -> Link:
        """The first group that holds both decides; without one, across sockets at the speed of the slowest."""
        for group in self.links:
            if {a, b} <= group.gpus:
                return Link(a, b, group.kind, group.bandwidth_bytes_per_s)
        slowest = min((group.bandwidth_bytes_per_s for group in self.links), default=_ACROSS_SOCKETS_BYTES_PER_S)
        return Link(a, b, LinkKind.SYSTEM, slowest)

    def all_links(self) -> tuple[Link, ...]:
        """The best path of each pair."""
        return tuple(self.link(a, b) for a, b in combinations(range(self.count), 2))


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One size of MIG instance: `sevenths` of the GPU's compute, `eighths` of its memory."""

    name: str  # "1g.18gb"
    gb: int  # the size in its name
    sevenths: int
    eighths: int


@dataclass(frozen=True, slots=True)
class GpuType:
    """One type of GPU. `name` is {family} or, where one family is sold with several sizes of memory, {family}-{size}GB."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    products: tuple[str, ...]  # as NVML names them
    machines: Mapping[str, MachineShape] = field(default_factory=dict)  # by the name of their profile
    mig: tuple[MigProfile, ...] = ()  # smallest first
    speed: GpuSpeed | None = None  # None: not known, and nothing is planned on it
    list_price: ListPrice | None = None  # None: not known


@dataclass(frozen=True, slots=True)
class ListPrice:
    """What somebody rents a GPU of the type out for: an example to plan with, until a fleet's own or an offer's price is known."""

    usd_per_gpu_hour: float
    source: str  # whose price, and when it was read


def _mig(eighth_gb: int, quarter_gb: int, half_gb: int, whole_gb: int) -> tuple[MigProfile, ...]:
    """The profiles of a type by what NVIDIA calls an eighth, a quarter, a half and all of its memory.

    https://docs.nvidia.com/datacenter/tesla/mig-user-guide/supported-mig-profiles.html
    """
    parts = (
        (1, eighth_gb, 1),
        (1, quarter_gb, 2),
        (2, quarter_gb, 2),
        (3, half_gb, 4),
        (4, half_gb, 4),
        (7, whole_gb, 8),
    )
    return tuple(MigProfile(f"{sevenths}g.{gb}gb", gb, sevenths, eighths) for sevenths, gb, eighths in parts)


def _nvlink(count: int, bytes_per_s: float) -> tuple[LinkGroup, ...]:
    """All of them behind NVSwitches."""
    return (LinkGroup(frozenset(range(count)), LinkKind.NVLINK, bytes_per_s),)


def _pairs(kind: LinkKind, bytes_per_s: float) -> tuple[LinkGroup, ...]:
    """Four GPUs on PCIe: two pairs, and the way across sockets."""
    every = LinkGroup(frozenset(range(4)), LinkKind.SYSTEM, _ACROSS_SOCKETS_BYTES_PER_S)
    return LinkGroup(frozenset({0, 1}), kind, bytes_per_s), LinkGroup(frozenset({2, 3}), kind, bytes_per_s), every


def _nvme(capacity_bytes: int, mount: str = "/mnt/nvme") -> tuple[Disk, ...]:
    return (Disk(mount, capacity_bytes),)


GPU_TYPES: tuple[GpuType, ...] = (
    GpuType(
        "H200",
        memory_bytes=141 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA H200", "NVIDIA H200 NVL"),
        mig=_mig(18, 35, 71, 141),
        machines={
            # 8 behind NVSwitches, 8 x 400 Gb/s; and half of such a host.
            "h200x8": MachineShape(
                8, _nvlink(8, 347e9), 192_000, 2048 * _GIB, _nvme(30 * 10**12), 400e9, Price(PriceKind.OWNED, 2.6)
            ),
            "h200x4": MachineShape(
                4, _nvlink(4, 347e9), 96_000, 1024 * _GIB, _nvme(30 * 10**12), 200e9, Price(PriceKind.OWNED, 2.6)
            ),
        },
        speed=hopper(150_754_820_096, 4.8e12),
        list_price=ListPrice(3.5, "Nebius on demand, SkyPilot catalogue v8, 2025-26"),
    ),
    GpuType(
        "H100-80GB",
        memory_bytes=80 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"),
        mig=_mig(10, 20, 40, 80),
        machines={
            "h100x8": MachineShape(  # 8 behind NVSwitches, 8 x 400 Gb/s
                8, _nvlink(8, 347e9), 224_000, 2048 * _GIB, _nvme(30 * 10**12), 400e9, Price(PriceKind.RESERVED, 2.1)
            ),
            "h100x1": MachineShape(  # a virtual machine of a cloud
                1, (), 26_000, 220 * _GIB, _nvme(2 * 10**12, "/"), 3.1e9, Price(PriceKind.ON_DEMAND, 2.9)
            ),
        },
        speed=hopper(85_520_809_984, 3.35e12),
        list_price=ListPrice(2.95, "Nebius on demand, SkyPilot catalogue v8, 2025-26"),
    ),
    GpuType(
        "H100-94GB",
        memory_bytes=94 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA H100 NVL",),
        mig=_mig(12, 24, 47, 94),
        speed=GpuSpeed(100_485_038_080, 3.9e12, {"bf16": 835e12, "fp8": 1671e12}, {}, 4, 300e9, 2),
        list_price=ListPrice(2.525, "Vast.ai on demand, 2026-06"),
    ),
    GpuType(
        "A100-80GB",
        memory_bytes=80 * _GIB,
        compute_capability=(8, 0),
        products=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        mig=_mig(10, 20, 40, 80),
        machines={
            "a100x8": MachineShape(  # 8 behind NVSwitches, 8 x 200 Gb/s
                8, _nvlink(8, 231e9), 128_000, 1024 * _GIB, _nvme(15 * 10**12), 200e9, Price(PriceKind.ON_DEMAND, 1.8)
            ),
            "a100x4pcie": MachineShape(  # pairs below a switch
                4,
                _pairs(LinkKind.PCIE_SWITCH, 25e9),
                64_000,
                512 * _GIB,
                (Disk("/mnt/data", 8 * 10**12, nvme=False),),
                12.5e9,
                Price(PriceKind.SPOT, 1.1),
            ),
        },
        speed=ampere(85_899_345_920, 2.039e12),
        list_price=ListPrice(1.39, "RunPod, 2026-03"),
    ),
    GpuType(
        "A100-40GB",
        memory_bytes=40 * _GIB,
        compute_capability=(8, 0),
        products=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        mig=_mig(5, 10, 20, 40),
        speed=ampere(42_949_672_960, 1.555e12),
        list_price=ListPrice(2.7447, "AWS on demand, a third party's copy, 2025-26"),
    ),
    GpuType(
        "H800-80GB",
        memory_bytes=80 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA H800",),
        speed=GpuSpeed(
            85_520_809_984, 3.35e12, {"bf16": 989e12, "fp8": 1979e12}, {"bf16": 794.5e12, "fp8": 1402.6e12}, 4, 200e9, 8
        ),
    ),
    GpuType(
        "A800-80GB",
        memory_bytes=80 * _GIB,
        compute_capability=(8, 0),
        products=("NVIDIA A800-SXM4-80GB",),
        speed=GpuSpeed(85_899_345_920, 2.039e12, {"bf16": 312e12}, {"bf16": 271.2e12}, 3, 200e9, 8, 31e9, 25e9),
    ),
    GpuType(
        "A800-40GB",
        memory_bytes=40 * _GIB,
        compute_capability=(8, 0),
        products=("NVIDIA A800 40GB PCIe",),
        speed=GpuSpeed(42_949_672_960, 1.555e12, {"bf16": 312e12}, {}, 0, 0, 1, 31e9, 25e9),
    ),
    GpuType(
        "GH200-96GB",
        memory_bytes=96 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA GH200 480GB",),
        speed=GpuSpeed(
            102_625_181_696, 4e12, {"bf16": 989e12, "fp8": 1979e12}, {"bf16": 828.6e12, "fp8": 1535e12}, 4, 450e9, 4
        ),
        list_price=ListPrice(2.29, "Lambda on demand, SkyPilot catalogue v8, 2026"),
    ),
    GpuType(
        "GH200-144GB",
        memory_bytes=144 * _GIB,
        compute_capability=(9, 0),
        products=("NVIDIA GH200 144G HBM3e",),
        speed=GpuSpeed(
            150_754_820_096, 4.9e12, {"bf16": 989e12, "fp8": 1979e12}, {"bf16": 828.6e12, "fp8": 1535e12}, 4, 450e9, 4
        ),
    ),
    GpuType(
        "V100-32GB",
        memory_bytes=32 * _GIB,
        compute_capability=(7, 0),
        products=("Tesla V100-SXM2-32GB",),
        speed=GpuSpeed(34_359_738_368, 0.9e12, {"bf16": 125e12}, {}, 2, 150e9, 8, 15.75e9, 12.5e9),
    ),
    GpuType(
        "V100-16GB",
        memory_bytes=16 * _GIB,
        compute_capability=(7, 0),
        products=("Tesla V100-SXM2-16GB",),
        speed=GpuSpeed(16_945_512_448, 0.9e12, {"bf16": 125e12}, {}, 2, 150e9, 8, 15.75e9, 12.5e9),
        list_price=ListPrice(0.79, "Lambda on demand, SkyPilot catalogue v8, 2026"),
    ),
    GpuType(
        "B200",
        memory_bytes=180 * _GIB,
        compute_capability=(10, 0),
        products=("NVIDIA B200",),
        speed=blackwell(192_265_846_784, 2250e12, 1745e12, 3432.5e12, 9000e12, 8),
        list_price=ListPrice(5.5, "Nebius on demand, SkyPilot catalogue v8, 2025-26"),
    ),
    GpuType(
        "GB200",
        memory_bytes=186 * _GIB,
        compute_capability=(10, 0),
        products=("NVIDIA GB200",),
        speed=blackwell(198_600_000_000, 2500e12, 1822e12, 3615.6e12, 10_000e12, 72),
    ),
    GpuType(
        "B300",
        memory_bytes=288 * _GIB,
        compute_capability=(10, 3),
        products=("NVIDIA B300", "NVIDIA B300 SXM6 AC"),
        speed=blackwell(288_400_000_000, 2250e12, 1769e12, 3353.3e12, 13_500e12, 8),
    ),
    GpuType(
        "GB300",
        memory_bytes=288 * _GIB,
        compute_capability=(10, 3),
        products=("NVIDIA GB300",),
        speed=GpuSpeed(288_400_000_000, 8e12, {"bf16": 2500e12, "fp8": 5000e12, "fp4": 15_000e12}, {}, 5, 900e9, 72),
    ),
    GpuType(
        "L40S",
        memory_bytes=48 * _GIB,
        compute_capability=(8, 9),
        products=("NVIDIA L40S",),
        machines={
            "l40sx4": MachineShape(  # one host bridge per pair
                4,
                _pairs(LinkKind.PCIE_HOST, 13e9),
                64_000,
                512 * _GIB,
                _nvme(4 * 10**12),
                12.5e9,
                Price(PriceKind.ON_DEMAND, 1.0),
            ),
        },
        speed=without_nvlink(48_305_799_168, 0.864e12, 362e12, 733e12, peers=False),
        list_price=ListPrice(1.5484, "Nebius on demand, SkyPilot catalogue v8, 2025-26"),
    ),
    GpuType(
        "RTX4090",
        memory_bytes=24 * _GIB,
        compute_capability=(8, 9),
        products=("NVIDIA GeForce RTX 4090",),
        machines={
            # An edge room: no NVLink, one host bridge.
            "rtx4090x1": MachineShape(
                1, (), 32_000, 64 * _GIB, _nvme(2 * 10**12, "/"), 1.25e9, Price(PriceKind.OWNED, 0.35)
            ),
            "rtx4090x2": MachineShape(
                2,
                (LinkGroup(frozenset({0, 1}), LinkKind.PCIE_HOST, 13e9),),
                32_000,
                128 * _GIB,
                _nvme(2 * 10**12, "/"),
                1.25e9,
                Price(PriceKind.OWNED, 0.35),
            ),
        },
        speed=without_nvlink(25_757_220_864, 1.008e12, 165.2e12, 330.3e12, peers=False),
        list_price=ListPrice(0.34, "RunPod, 2026-03"),
    ),
    GpuType(
        "RTX3090",
        memory_bytes=24 * _GIB,
        compute_capability=(8, 6),
        products=("NVIDIA GeForce RTX 3090",),
        speed=without_nvlink(25_769_803_776, 0.936e12, 71e12, 0, peers=False),
    ),
    GpuType(
        "L4",
        memory_bytes=24 * _GIB,
        compute_capability=(8, 9),
        products=("NVIDIA L4",),
        speed=without_nvlink(24_152_899_584, 0.3e12, 121e12, 242.5e12, peers=False),
        list_price=ListPrice(0.44, "RunPod, 2026-03"),
    ),
    GpuType(
        "A10G",
        memory_bytes=24 * _GIB,
        compute_capability=(8, 6),
        products=("NVIDIA A10G",),
        speed=without_nvlink(24_146_608_128, 0.6e12, 70e12, 0, peers=True),
        list_price=ListPrice(1.006, "AWS on demand, 2026-06"),
    ),
    GpuType(
        "T4",
        memory_bytes=16 * _GIB,
        compute_capability=(7, 5),
        products=("Tesla T4",),
        speed=without_nvlink(16_106_127_360, 0.32e12, 65e12, 0, pcie=15.75e9, peers=True),
    ),
)

_NOISE = re.compile(
    r"\b(NVIDIA|Tesla|Quadro|GeForce|Graphics|Device|SXM\d?|PCIe|NVL|HBM\d?e?|OEM|\d+\s?GB|\d+G)\b", re.IGNORECASE
)
_SIZED = re.compile(r"(.+)-(\d+)GB")
_SIZE = re.compile(r"(\d+)\s?GB\b", re.IGNORECASE)


class Catalogue:
    """Questions about a table of GPU types."""

    def __init__(self, types: Iterable[GpuType] = GPU_TYPES) -> None:
        self.types = {one.name: one for one in types}
        self._by_product = {product: one.name for one in self.types.values() for product in one.products}
        self._profiles = {name: (one, shape) for one in self.types.values() for name, shape in one.machines.items()}
        self._sizes_gb: dict[str, list[int]] = {}
        for sized in filter(None, map(_SIZED.fullmatch, self.types)):
            self._sizes_gb.setdefault(sized[1], []).append(int(sized[2]))

    def name_of(self, product: str, memory_bytes: int) -> str:
        """What jobs ask for: H100-80GB for "NVIDIA H100 80GB HBM3"; a product that is not listed is named by rule.

        Drivers report a little less (reserved) or more (GiB) than the size on the box: the nearest one that is sold counts.
        """
        if product in self._by_product:
            return self._by_product[product]
        family = "".join(_NOISE.sub(" ", product.replace("-", " ")).split()) or "UNKNOWN"
        if family not in self._sizes_gb:
            return family
        named, gib = _SIZE.search(product), memory_bytes / _GIB
        size_gb = int(named[1]) if named else min(self._sizes_gb[family], key=lambda size: abs(size - gib))
        return f"{family}-{size_gb}GB"

    def profile(self, name: str) -> tuple[GpuType, MachineShape] | None:
        """The machine that `--profile NAME` plays; None where no type lists it."""
        return self._profiles.get(name)

    def mig_with(self, least_bytes: int) -> list[tuple[str, MigProfile]]:
        """Types with their profiles of at least so much memory, by the size in the name, smallest first."""
        fitting = [(one.name, mig) for one in self.types.values() for mig in one.mig if mig.gb * 10**9 >= least_bytes]
        return sorted(fitting, key=lambda pair: (pair[1].gb, pair[1].sevenths))

    def profiles(self) -> list[str]:
        """Names of all machines that can be played."""
        return sorted(self._profiles)


CATALOGUE = Catalogue()
