"""What a node is: its GPUs, how they are wired, where it stands in the tree, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Level(IntEnum):
    """Levels of the one topology tree, widest first; a smaller domain has a higher number."""

    FLEET = 0
    SITE = 1
    ZONE = 2
    SPINE = 3
    LEAF = 4
    NODE = 5
    ISLAND = 6  # GPUs of one node that reach one another over NVLink
    GPU = 7


LEVELS: tuple[Level, ...] = tuple(Level)


class LinkKind(Enum):
    """How two GPUs of one node, or two nodes, reach one another; faster first."""

    NVLINK = "nvlink"
    PCIE_SWITCH = "pcie_switch"  # one or several PCIe switches, no CPU in between
    PCIE_HOST = "pcie_host"  # through a host bridge of one NUMA node
    SYSTEM = "system"  # across sockets
    ETHERNET = "ethernet"
    WAN = "wan"


class PriceKind(Enum):
    """How the node is paid for."""

    ON_DEMAND = "on_demand"
    RESERVED = "reserved"
    SPOT = "spot"
    OWNED = "owned"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that work can be given: a physical GPU, or a MIG instance of one."""

    index: int
    uuid: str
    model: str  # catalogue name: "H200", "H100-80GB", "A100-80GB", "RTX4090"; "H200 1g.18gb" of a MIG instance
    memory_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    pci_bus_id: str = ""
    numa_node: int = -1
    mig_profiles: tuple[str, ...] = ()  # of an agent that does not report instances as devices: nobody can have it
    healthy: bool = True
    unhealthy_reason: str = ""  # "UPPER_SNAKE: words" while it is not
    mig_profile: str = ""  # of a MIG instance: "1g.18gb"
    parent_uuid: str = ""  # of a MIG instance: the GPU that it is part of
    parent_memory_bytes: int = 0

    @property
    def offered(self) -> bool:
        """Whether work can be given this very device."""
        return self.healthy and not self.mig_profiles

    @property
    def part_of_gpu(self) -> float:
        """How much of a GPU it is, by memory: what it costs of a GPU's price."""
        return self.memory_bytes / self.parent_memory_bytes if self.parent_memory_bytes else 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """A working connection between GPUs `a` < `b` (indices) of one node, best path only."""

    a: int
    b: int
    kind: LinkKind
    bandwidth_bytes_per_s: float  # one direction


@dataclass(frozen=True, slots=True)
class Disk:
    """Local storage that datasets may be pinned to."""

    mount: str
    capacity_bytes: int
    nvme: bool = True


@dataclass(frozen=True, slots=True)
class Price:
    """What one GPU of the node costs per hour while it is held."""

    kind: PriceKind = PriceKind.OWNED
    usd_per_gpu_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Node:
    """Facts about one node. `name` is sites/{site}/nodes/{node}.

    `zone`, `spine` and `leaf` are ids within their parent ("" where unknown: one domain of that name per parent).
    `network_bytes_per_s` is what the node can send to its leaf, all NICs together, one direction.
    """

    name: str
    site: str
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    zone: str = ""
    spine: str = ""
    leaf: str = ""
    cpu_millicores: int = 0
    memory_bytes: int = 0
    disks: tuple[Disk, ...] = ()
    dataset_cache_bytes: int = 0  # most that its agent keeps of datasets; 0: it does not say
    network_bytes_per_s: float = 0.0
    labels: tuple[tuple[str, str], ...] = ()
    price: Price = field(default_factory=Price)
    simulated: bool = False
