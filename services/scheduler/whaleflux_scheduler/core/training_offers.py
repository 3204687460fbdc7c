"""The GPUs of the fleet as offers to a training: for each type those that are free now, and all of them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from whaleflux.fleet.gpu_types import CATALOGUE, GpuType
from whaleflux.planning.calibration import Calibrated
from whaleflux.planning.machine import Fabric, fabric_of, speed_of
from whaleflux.planning.offers import Offer
from whaleflux_scheduler.core.ray_nodes import FreeNode

MOST_TYPES = 8  # of which offers are compared, those with the most GPUs
_FLEET, _LIST = "inventory", "list price"


@dataclass(frozen=True, slots=True)
class Had:
    """What the fleet has of a type. `usd_per_gpu_hour` as its nodes cost on average; None: none of them says it."""

    gpu: GpuType
    free: int
    all: int
    node_gpus: int  # of its largest node
    nic_bytes_per_s: float  # of each GPU, the slowest node's; 0: nobody knows
    usd_per_gpu_hour: float | None


def had(nodes: Iterable[FreeNode]) -> list[Had]:
    """Of types whose speed is known, those with the most GPUs first."""
    by_type: dict[str, list[FreeNode]] = defaultdict(list)
    for one in nodes:
        for model in {gpu.model for gpu in one.node.gpus if gpu.offered}:
            by_type[model].append(one)
    known = [name for name in by_type if name in CATALOGUE.types and CATALOGUE.types[name].speed is not None]
    found = [_had(CATALOGUE.types[name], by_type[name]) for name in known]
    return sorted(found, key=lambda one: (-one.all, one.gpu.name))


def _had(gpu: GpuType, nodes: Sequence[FreeNode]) -> Had:
    counts = [sum(one.offered and one.model == gpu.name for one in node.node.gpus) for node in nodes]
    rates = [one.node.network_bytes_per_s / count for one, count in zip(nodes, counts, strict=True)]
    paid = [(one.node.price.usd_per_gpu_hour, count) for one, count in zip(nodes, counts, strict=True)]
    usd = sum(price * count for price, count in paid)
    priced = all(price > 0 for price, _ in paid)
    return Had(
        gpu,
        free=sum(min(one.gpus, count) for one, count in zip(nodes, counts, strict=True)),
        all=sum(counts),
        node_gpus=max(counts),
        nic_bytes_per_s=min(rates),
        usd_per_gpu_hour=usd / sum(counts) if priced else None,
    )


def offers(
    found: Sequence[Had], gpus: int, types: Collection[str], measured: Mapping[str, Calibrated] | None = None
) -> list[Offer]:
    """`gpus` of each type that has so many; 0: what is free of it, and all of it. `types`: those that will do; empty: all."""
    made = []
    for one in [one for one in found if not types or one.gpu.name in types][:MOST_TYPES]:
        counts = {gpus} if gpus else {one.free, one.all}
        price, source = one.usd_per_gpu_hour, _FLEET
        if price is None and one.gpu.list_price is not None:
            price, source = one.gpu.list_price.usd_per_gpu_hour, f"{_LIST}: {one.gpu.list_price.source}"
        calibrated = (measured or {}).get(one.gpu.name)
        if calibrated is not None:
            calibrated = replace(
                calibrated, machine=replace(calibrated.machine, fabric=_fabric(one, calibrated.machine.fabric))
            )
        for count in sorted(number for number in counts if 0 < number <= one.all):
            made.append(
                Offer(
                    one.gpu,
                    count,
                    price,
                    source if price is not None else "",
                    measured=calibrated,
                    fabric=_fabric(one),
                    idle_free=True,
                )
            )
    return made


def _fabric(one: Had, island: Fabric | None = None) -> Fabric:
    """Nodes and NICs as they are; within nodes as was measured, or as is usual for the type."""
    usual = fabric_of(speed_of(one.gpu), one.nic_bytes_per_s, one.node_gpus)
    return replace(island, island=usual.island, tiers=usual.tiers) if island is not None else usual
