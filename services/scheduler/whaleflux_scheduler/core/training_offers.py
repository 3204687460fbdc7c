"""The GPUs of the fleet as offers to a training, or to what is served: for each type and site those that are free now, and all of them. Pure.

A training stays in one site, where one has as many GPUs as it asks for; else all sites together are offered, with the links between them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from whaleflux.fleet.gpu_types import CATALOGUE, GpuType
from whaleflux.fleet.links import HOP_S
from whaleflux.fleet.links import Fabric as Network
from whaleflux.fleet.model import LinkKind
from whaleflux.planning.calibration import Calibrated
from whaleflux.planning.machine import Fabric, Tier, fabric_of, speed_of
from whaleflux.planning.offers import Offer
from whaleflux.planning.serving_sizes import FLEET, ServingOffer
from whaleflux_scheduler.core.ray_nodes import FreeNode

MOST_TYPES = 8  # and sites of which offers are compared, those with the most GPUs


@dataclass(frozen=True, slots=True)
class Had:
    """What a site has of a type; `site` "": all sites together. `usd_per_gpu_hour` on the average of its nodes; None: one of them does not say it."""

    gpu: GpuType
    site: str
    free: int
    all: int
    node_gpus: int  # of its largest node
    nic_bytes_per_s: float  # of each GPU, the slowest node's; 0: nobody knows
    usd_per_gpu_hour: float | None
    largest_site_gpus: int = 0  # of several sites
    node_free: int = 0  # most of one node


def had(nodes: Iterable[FreeNode]) -> list[Had]:
    """By type and site, and by type over all sites where there are several; of types whose speed is known, those with the most GPUs first."""
    by_place: dict[tuple[str, str], list[FreeNode]] = defaultdict(list)
    for one in nodes:
        for model in {gpu.model for gpu in one.node.gpus if gpu.offered}:
            by_place[model, one.node.site].append(one)
    by_place = {place: some for place, some in by_place.items() if _known(place[0])}
    found = [_had(CATALOGUE.types[model], site, some) for (model, site), some in by_place.items()]
    for model in sorted({model for model, _ in by_place}):
        sites = [one for one in found if one.gpu.name == model]
        if len(sites) > 1:
            everywhere = [node for (name, _), some in by_place.items() if name == model for node in some]
            whole = _had(CATALOGUE.types[model], "", everywhere)
            found.append(replace(whole, largest_site_gpus=max(one.all for one in sites)))
    return sorted(found, key=lambda one: (-one.all, one.gpu.name, one.site))


def _known(model: str) -> bool:
    return model in CATALOGUE.types and CATALOGUE.types[model].speed is not None


def _had(gpu: GpuType, site: str, nodes: Sequence[FreeNode]) -> Had:
    counts = [sum(one.offered and one.model == gpu.name for one in node.node.gpus) for node in nodes]
    rates = [one.node.network_bytes_per_s / count for one, count in zip(nodes, counts, strict=True)]
    paid = [(one.node.price.usd_per_gpu_hour, count) for one, count in zip(nodes, counts, strict=True)]
    return Had(
        gpu,
        site,
        free=sum(min(one.gpus, count) for one, count in zip(nodes, counts, strict=True)),
        all=sum(counts),
        node_gpus=max(counts),
        node_free=max(min(one.gpus, count) for one, count in zip(nodes, counts, strict=True)),
        nic_bytes_per_s=min(rates),
        usd_per_gpu_hour=sum(price * count for price, count in paid) / sum(counts)
        if all(price > 0 for price, _ in paid)
        else None,
    )


def price_of(one: Had) -> tuple[float | None, str]:
    """US dollars of a GPU for an hour, and whose price that is: inventory's, else the catalogue's; (None, "") where neither says it."""
    if one.usd_per_gpu_hour is not None:
        return one.usd_per_gpu_hour, FLEET
    listed = ServingOffer.listed(one.gpu)
    return listed.usd_per_gpu_hour, listed.price_source


def serving_offers(found: Iterable[Had], sites: Collection[str]) -> list[ServingOffer]:
    """What each site has of each type, for replicas of one node. `sites` by their ids; empty: all."""
    return [
        ServingOffer(one.gpu, *price_of(one), one.site, one.node_gpus, one.node_free)
        for one in found
        if one.site and (not sites or one.site in sites)
    ]


def unknown_types(nodes: Iterable[FreeNode]) -> list[tuple[str, str]]:
    """Types of GPUs whose speed nobody knows, with the sites that have some."""
    return sorted(
        {(gpu.model, one.node.site) for one in nodes for gpu in one.node.gpus if gpu.offered and not _known(gpu.model)}
    )


def offers(
    found: Sequence[Had],
    gpus: int,
    types: Collection[str],
    network: Network,
    measured: Mapping[str, Calibrated] | None = None,
    least: int = 1,
) -> list[Offer]:
    """`gpus` of each place that has so many, else all that there are of a type; 0: what is free of each place, and all of it.

    `types`: those that will do; empty: all. Offers of fewer than `least` GPUs are left out.
    """
    made = []
    for one in _places(found, gpus, types)[:MOST_TYPES]:
        price, source = price_of(one)
        fabric, calibrated = _fabric(one, network), (measured or {}).get(one.gpu.name)
        if calibrated is not None:
            within = replace(calibrated.machine.fabric, island=fabric.island, tiers=fabric.tiers)
            calibrated = replace(calibrated, machine=replace(calibrated.machine, fabric=within))
        counts = {min(gpus, one.all)} if gpus else {one.free, one.all}
        for count in sorted(number for number in counts if number >= max(least, 1)):
            made.append(
                Offer(one.gpu, count, price, source, measured=calibrated, fabric=fabric, idle_free=True, place=one.site)
            )
    return made


def not_compared(found: Sequence[Had], gpus: int, types: Collection[str]) -> str:
    """What `offers` leaves out of the same, in words; "": nothing."""
    more = len(_places(found, gpus, types)) - MOST_TYPES
    which = f"only the {MOST_TYPES} types at sites with the most GPUs are compared, and {more} more are not"
    return f"{which}; to compare others, name their types or sites" if more > 0 else ""


def _places(found: Sequence[Had], gpus: int, types: Collection[str]) -> list[Had]:
    """Of types that will do, the sites that have so many; of a type of which none has, the widest place."""
    suiting = [one for one in found if not types or one.gpu.name in types]
    alone = [one for one in suiting if one.site and one.all >= gpus]
    enough, widest = {one.gpu.name for one in alone}, dict[str, Had]()
    for one in suiting:  # the most GPUs first
        if one.gpu.name not in enough:
            widest.setdefault(one.gpu.name, one)
    return [*alone, *widest.values()]


def _fabric(one: Had, network: Network) -> Fabric:
    """Nodes and NICs as they are; between sites a site's line is shared by its GPUs."""
    usual = fabric_of(speed_of(one.gpu), one.nic_bytes_per_s, one.node_gpus)
    if one.site or not one.largest_site_gpus:
        return usual
    line = network.site_bytes_per_s / one.largest_site_gpus
    return replace(usual, tiers=(*usual.tiers, Tier(one.largest_site_gpus, line, hop_s=HOP_S[LinkKind.WAN])))
