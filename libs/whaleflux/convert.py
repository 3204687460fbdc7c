"""Nodes between the contract (`whaleflux.v1`) and the pure domain (`whaleflux.fleet`).

Reading is lenient, since the writer may be newer: an unknown price kind counts as owned, an unknown link as the slowest.
What may be stored is checked by inventory when an agent registers.
"""

from __future__ import annotations

from typing import Any

from whaleflux import names
from whaleflux.fleet.model import Disk, Gpu, Link, LinkKind, Node, Price, PriceKind
from whaleflux.v1 import inventory_pb2, types_pb2

_LINKS: dict[types_pb2.LinkKind, LinkKind] = {
    types_pb2.LINK_KIND_NVLINK: LinkKind.NVLINK,
    types_pb2.LINK_KIND_PCIE_SWITCH: LinkKind.PCIE_SWITCH,
    types_pb2.LINK_KIND_PCIE_HOST: LinkKind.PCIE_HOST,
    types_pb2.LINK_KIND_SYSTEM: LinkKind.SYSTEM,
    types_pb2.LINK_KIND_ETHERNET: LinkKind.ETHERNET,
    types_pb2.LINK_KIND_WAN: LinkKind.WAN,
}
_LINK_NUMBERS = {kind: number for number, kind in _LINKS.items()}
_PRICES: dict[types_pb2.PriceKind, PriceKind] = {
    types_pb2.PRICE_KIND_OWNED: PriceKind.OWNED,
    types_pb2.PRICE_KIND_ON_DEMAND: PriceKind.ON_DEMAND,
    types_pb2.PRICE_KIND_RESERVED: PriceKind.RESERVED,
    types_pb2.PRICE_KIND_SPOT: PriceKind.SPOT,
}
_PRICE_NUMBERS = {kind: number for number, kind in _PRICES.items()}


def node_from_proto(node: inventory_pb2.Node) -> Node:
    """The node as placement sees it: the agent's facts, with the operator's labels and price over them.

    Raises InvalidArgument when the name is not sites/{site}/nodes/{node}.
    """
    facts = node.facts
    site, _ = names.split(node.name, "sites", "nodes")
    return Node(
        name=node.name,
        site=site,
        gpus=tuple(map(gpu_from_proto, facts.gpus)),
        links=tuple(map(link_from_proto, facts.links)),
        zone=facts.zone,
        spine=facts.spine,
        leaf=facts.leaf,
        cpu_millicores=facts.cpu_millicores,
        memory_bytes=facts.memory_bytes,
        dataset_cache_bytes=facts.dataset_cache_bytes,
        disks=tuple(Disk(d.mount, d.capacity_bytes, d.nvme) for d in facts.disks),
        network_bytes_per_s=facts.network_bytes_per_s,
        labels=tuple(sorted({**facts.labels, **node.labels}.items())),
        price=price_from_proto(node.price if node.HasField("price") else facts.price),
        simulated=facts.simulated,
    )


def facts_to_proto(node: Node) -> inventory_pb2.NodeFacts:
    """What an agent reports of itself; address, versions and runtimes are added by the agent."""
    return inventory_pb2.NodeFacts(
        gpus=map(gpu_to_proto, node.gpus),
        links=map(link_to_proto, node.links),
        zone=node.zone,
        spine=node.spine,
        leaf=node.leaf,
        cpu_millicores=node.cpu_millicores,
        memory_bytes=node.memory_bytes,
        dataset_cache_bytes=node.dataset_cache_bytes,
        disks=[types_pb2.Disk(mount=d.mount, capacity_bytes=d.capacity_bytes, nvme=d.nvme) for d in node.disks],
        network_bytes_per_s=node.network_bytes_per_s,
        labels=dict(node.labels),
        price=price_to_proto(node.price),
        simulated=node.simulated,
    )


def gpu_from_proto(gpu: types_pb2.Gpu) -> Gpu:
    """One GPU, field by field."""
    return Gpu(
        index=gpu.index,
        uuid=gpu.uuid,
        model=gpu.model,
        memory_bytes=gpu.memory_bytes,
        compute_capability=(gpu.compute_capability_major, gpu.compute_capability_minor),
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
        mig_profiles=tuple(gpu.mig_profiles),
        healthy=gpu.healthy,
        unhealthy_reason=gpu.unhealthy_reason,
        mig_profile=gpu.mig_profile,
        parent_uuid=gpu.parent_uuid,
        parent_memory_bytes=gpu.parent_memory_bytes,
    )


def gpu_to_proto(gpu: Gpu) -> types_pb2.Gpu:
    """One GPU, field by field."""
    major, minor = gpu.compute_capability
    return types_pb2.Gpu(
        index=gpu.index,
        uuid=gpu.uuid,
        model=gpu.model,
        memory_bytes=gpu.memory_bytes,
        compute_capability_major=major,
        compute_capability_minor=minor,
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
        mig_profiles=gpu.mig_profiles,
        healthy=gpu.healthy,
        unhealthy_reason=gpu.unhealthy_reason,
        mig_profile=gpu.mig_profile,
        parent_uuid=gpu.parent_uuid,
        parent_memory_bytes=gpu.parent_memory_bytes,
    )


def link_from_proto(link: types_pb2.GpuLink) -> Link:
    """One path between two GPUs."""
    return Link(link.a, link.b, _LINKS.get(link.kind, LinkKind.WAN), link.bandwidth_bytes_per_s)


def link_to_proto(link: Link) -> types_pb2.GpuLink:
    """One path between two GPUs."""
    kind = _LINK_NUMBERS[link.kind]
    return types_pb2.GpuLink(a=link.a, b=link.b, kind=kind, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s)


def price_from_proto(price: types_pb2.Price) -> Price:
    """US dollars per GPU-hour and how they are paid."""
    return Price(_PRICES.get(price.kind, PriceKind.OWNED), price.usd_per_gpu_hour)


def price_to_proto(price: Price) -> types_pb2.Price:
    """US dollars per GPU-hour and how they are paid."""
    kind = _PRICE_NUMBERS[price.kind]
    return types_pb2.Price(kind=kind, usd_per_gpu_hour=price.usd_per_gpu_hour)


def enum_name(enum: Any, number: int, prefix: str) -> str:
    """RUNNING for JOB_STATE_RUNNING; UNKNOWN_17 for a number that only a newer version knows."""
    try:
        return str(enum.Name(number)).removeprefix(prefix)
    except ValueError:
        return f"UNKNOWN_{number}"
