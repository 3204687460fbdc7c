"""Work without GPUs: ranks that take CPU and memory of their nodes, counted like those of work with GPUs.

Nodes without GPUs go first; then few nodes, each as full as it can be, so that large pieces stay free. Nobody is stopped for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from whaleflux.fleet.model import Level, LinkKind
from whaleflux_scheduler.core.placement.api import (
    Blocked,
    Bottleneck,
    Cost,
    GpuOption,
    NodeAssignment,
    NoPlacement,
    Placement,
    PlaceRequest,
)
from whaleflux_scheduler.core.placement.columns import Columns, Ints
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.search import stays
from whaleflux_scheduler.core.placement.supply import Bools, conditions_of, node_conditions


def place(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Placement | None:
    """Where its ranks go now; None: they do not fit."""
    room = _room(columns, request, _allowed(columns, request, datasets))
    for apart_from_gpus in (True, False):  # when that needs more nodes than it may have, GPU nodes count like others
        parts = _filled(columns, request, room, apart_from_gpus)
        if parts and len(parts) <= (request.max_nodes or len(parts)):
            return _placement(columns, request, parts)
    return None


def explain(columns: Columns, request: PlaceRequest, datasets: Datasets, empty: Columns) -> NoPlacement:
    """Why they do not fit: nodes by what they lack, and how many ranks would."""
    allowed = _allowed(columns, request, datasets)
    room = _room(columns, request, allowed)
    fit = int(np.minimum(room, request.units).sum())
    nearest = f"{fit} of {request.units} ranks have room" if columns.count else "the fleet has no nodes"
    change = f"would fit with {fit} ranks" if 0 < fit < request.units else ""
    ever = place(empty, request, datasets) is not None
    return NoPlacement(request.id, tuple(_blocked(columns, request, allowed)), nearest, change, ever, 0, 0, 0)


def _allowed(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Bools:
    excluded, sites = set(request.exclude_nodes), set(request.sites)
    wanted = request.datasets if request.hard_locality else ()
    fits = (
        row.node.name not in excluded and (not sites or row.node.site in sites) and datasets.here(row.node.name, wanted)
        for row in columns.rows
    )
    suited = node_conditions(columns, request.requirement) if request.requirement.of_node else True
    keeps = stays(columns, request, datasets) if wanted else True
    return columns.open & suited & keeps & np.fromiter(fits, dtype=np.bool_, count=columns.count)


def _room(columns: Columns, request: PlaceRequest, allowed: Bools) -> Ints:
    """Ranks that each node could take."""
    need = request.requirement
    room = columns.cpu_free // max(1, need.cpu_millicores_per_gpu)
    if need.host_memory_bytes_per_gpu:
        room = np.minimum(room, columns.host_free // need.host_memory_bytes_per_gpu)
    return np.where(allowed, np.maximum(room, 0), 0).astype(np.int64)


def _filled(columns: Columns, request: PlaceRequest, room: Ints, apart_from_gpus: bool) -> list[tuple[int, int]]:
    """Rows with the ranks that they take, in the order of ranks; none when they do not fit."""

    def last(row: int) -> bool:
        return apart_from_gpus and bool(columns.rows[row].node.gpus)

    left, parts = request.units, list[tuple[int, int]]()
    capped = np.minimum(room, -(-left // max(1, request.min_nodes))).tolist()
    ordered = sorted((i for i, ranks in enumerate(capped) if ranks), key=lambda i: (last(i), -capped[i], i))
    for at, first in enumerate(ordered):
        wanted = left - max(0, request.min_nodes - len(parts) - 1)  # the other nodes that it must have get a rank each
        row = first
        if wanted == left <= capped[first]:  # the end: the fullest of the nodes that hold the rest
            alike = (i for i in ordered[at:] if capped[i] >= left and last(i) == last(first))
            row = min(alike, key=lambda i: (int(room[i]), i))
        parts.append((row, min(wanted, capped[row])))
        left -= parts[-1][1]
        if not left:
            return sorted(parts)
    return []


def _placement(columns: Columns, request: PlaceRequest, parts: list[tuple[int, int]]) -> Placement:
    need, nodes, rank = request.requirement, [], 0
    for row, count in parts:
        nodes.append(
            NodeAssignment(
                columns.names[row],
                (),
                tuple(range(rank, rank + count)),
                cpu_millicores=count * need.cpu_millicores_per_gpu,
                host_memory_bytes=count * need.host_memory_bytes_per_gpu,
            )
        )
        rank += count
    beside = sum(bool(columns.rows[row].node.gpus) for row, _ in parts)
    reasons = (
        "nodes without GPUs" if not beside else f"{beside} of its nodes have GPUs: no other has room for it",
        "no GPU is held, so nothing is charged: prices are per GPU",
    )
    bottleneck = Bottleneck(Level.NODE if len(parts) == 1 else Level.FLEET, LinkKind.PCIE_HOST, 0.0)
    return Placement(request.id, tuple(nodes), GpuOption(), Cost(), bottleneck, reasons)


def _blocked(columns: Columns, request: PlaceRequest, allowed: Bools) -> Iterator[Blocked]:
    """Each node counts once, under what keeps it from taking a rank."""
    need, excluded = request.requirement, set(request.exclude_nodes)
    why: dict[str, int] = {}
    suited = node_conditions(columns, need)
    for i, row in enumerate(columns.rows):
        if request.sites and row.node.site not in request.sites:
            said = f"not in site {' or '.join(request.sites)}"
        elif row.node.name in excluded:
            said = "excluded by name"
        elif not row.schedulable:
            said = row.reason or "not schedulable"
        elif not suited[i]:
            said = f"without {conditions_of(need)}"
        elif not allowed[i]:
            said = "without the datasets"
        elif columns.cpu_free[i] < need.cpu_millicores_per_gpu:
            said = f"free CPU < {need.cpu_millicores_per_gpu / 1000:g} cores per rank"
        elif columns.host_free[i] < need.host_memory_bytes_per_gpu:
            said = f"free memory < {need.host_memory_bytes_per_gpu / 2**30:.4g} GiB per rank"
        else:
            continue
        why[said] = why.get(said, 0) + 1
    yield from (Blocked(said, nodes) for said, nodes in why.items())
