"""What a place costs: communication, fetching data, money, and what the GPUs taken are worth to others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from whaleflux.fleet.links import HOP_S, all_reduce_s
from whaleflux.fleet.model import Level, LinkKind
from whaleflux_scheduler.core.placement.api import Cost, DatasetFact, GpuOption, PlaceRequest
from whaleflux_scheduler.core.placement.columns import Columns, cache_room_bytes
from whaleflux_scheduler.core.placement.comm import ALL_REDUCE_BYTES, Estimate, estimate
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.search import Group, Part


@dataclass(frozen=True, slots=True)
class PricedPlace:
    """A feasible place and what it costs."""

    option: GpuOption
    group: Group
    estimate: Estimate
    cost: Cost
    breaks: bool  # work of one node takes part of a node that was wholly free
    value: tuple[float, float]  # what the GPUs taken are worth to others: lower is taken first
    elsewhere_s: float = 0.0  # to fetch its data where none of it is

    @property
    def rows(self) -> list[int]:
        return [i for i, _ in self.group.parts or self.group.devices]


def price(
    columns: Columns,
    request: PlaceRequest,
    option: GpuOption,
    group: Group,
    datasets: Datasets,
) -> PricedPlace:
    """What the place costs in time and money."""
    merged: dict[int, int] = {}
    usd = 0.0
    for i, mask in group.parts:
        merged[i] = merged.get(i, 0) | mask
        row = columns.rows[i]
        gpus = mask.bit_count() if row.shape.whole else row.shape.gpus(mask)
        usd += row.node.price.usd_per_gpu_hour * gpus
    for i, position in group.devices:
        merged[i] = merged.get(i, 0) | 1 << position
        usd += columns.rows[i].node.price.usd_per_gpu_hour * _part_of(columns, i, position, group)
    parts = sorted(merged.items())
    found = estimate(columns, parts)
    fetch_s = max(_fetch_s(columns, i, request, datasets) for i, _ in parts) if request.datasets else 0.0
    run_s = _run_s(columns, request, option, parts, found)
    total = usd * (run_s + fetch_s) / 3600 if run_s is not None else None
    first = columns.shape(parts[0][0])
    only, mask = parts[0]
    breaks = len(parts) == 1 and columns.taken[only] == 0 and mask != columns.usable[only] and first.whole
    elsewhere_s = _elsewhere_s(columns, merged, request, datasets) if request.datasets else 0.0
    cost = Cost(found.step_s, fetch_s, usd, run_s, total)
    return PricedPlace(option, group, found, cost, breaks, first.value, elsewhere_s)


def inner_size(request: PlaceRequest) -> int:
    """Ranks of the largest subgroup that lives inside a node; 1 when there is none."""
    return max((sub.size for sub in request.group.subgroups if sub.level >= Level.NODE), default=1)


def _part_of(columns: Columns, i: int, position: int, group: Group) -> float:
    """Of its memory."""
    share, gpu = group.request.share, columns.rows[i].node.gpus[position]
    assert share is not None
    return share.memory_bytes / gpu.memory_bytes if gpu.memory_bytes else 0.0


_COMING = 0.5  # of what is on its way to a node for others half is there, for all that is known


def _fetch_s(columns: Columns, i: int, request: PlaceRequest, datasets: Datasets) -> float:
    """Seconds of reading from afar: once where the node can keep the data, each time where it cannot, nothing where it has it."""
    name, row = columns.names[i], columns.rows[i]
    network = row.node.network_bytes_per_s
    missing = [datasets[d] for d in request.datasets if d in datasets and name not in datasets[d].cached_on]
    coming = [d for d in missing if datasets.book.holds(name, d.name)]
    room = cache_room_bytes(row) + sum(d.size_bytes for d in coming)
    times = 1.0 if sum(d.size_bytes for d in missing) <= room else max(1.0, request.data_reads)
    return times * (_once_s(missing, network) - (1 - _COMING) * _once_s(coming, network))


def _once_s(missing: Sequence[DatasetFact], network_bytes_per_s: float) -> float:
    return sum(d.size_bytes / min(d.origin_bytes_per_s, network_bytes_per_s or d.origin_bytes_per_s) for d in missing)


def _elsewhere_s(columns: Columns, rows: Iterable[int], request: PlaceRequest, datasets: Datasets) -> float:
    """Seconds that the data would be fetched in where none of it is."""
    wanted = [datasets[d] for d in request.datasets if d in datasets]
    return max(_once_s(wanted, columns.rows[i].node.network_bytes_per_s) for i in rows)


def _run_s(
    columns: Columns, request: PlaceRequest, option: GpuOption, parts: list[Part], found: Estimate
) -> float | None:
    work = request.preference.work_gpu_s
    if not work:
        return None
    ideal = ideal_step_s(columns, parts)
    slower = found.step_s / ideal - 1 if ideal else 0.0
    return work / (request.units * option.throughput) * (1 + request.preference.comm_fraction * max(0.0, slower))


def ideal_step_s(columns: Columns, parts: list[Part]) -> float:
    """Communication on the same GPUs if no link were shared or split: whole nodes, their full network."""
    ranks = sum(m.bit_count() for _, m in parts)
    shape = columns.shape(parts[0][0])
    bus = shape.wiring.ring_bytes_per_s((1 << shape.size) - 1)
    if ranks > shape.size and shape.network_bytes_per_s:
        bus = min(bus, shape.network_bytes_per_s)
    return all_reduce_s(ALL_REDUCE_BYTES, ranks, bus, HOP_S[LinkKind.NVLINK], 2 * (ranks - 1))
