"""A gang on GPUs that are named: no search, only whether each of them is there, free, healthy and open to new work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from whaleflux.fleet.wiring import bits
from whaleflux_scheduler.core.placement.api import GpuOption, Placement, PlaceRequest, Share
from whaleflux_scheduler.core.placement.columns import Columns
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.decide import assemble
from whaleflux_scheduler.core.placement.pricing import price
from whaleflux_scheduler.core.placement.search import Group

Where = Sequence[tuple[str, tuple[int, ...]]]
"""Nodes in rank order, each once, with the driver's indices of the GPUs taken there."""


def place_on(columns: Columns, request: PlaceRequest, where: Where, datasets: Datasets) -> Placement | None:
    """The request on exactly these GPUs, as many as there are; None when one of them cannot be had."""
    parts = [part for node, gpus in where if (part := _part(columns, request, node, gpus)) is not None]
    if not parts or len(parts) < len(where):
        return None
    option = _option(columns, request, parts[0])
    devices = tuple((i, at) for i, mask in parts for at in bits(mask))
    group = replace(request.group, gpus=max(1, len(devices) // option.per_unit))
    found = Group(group, devices=devices) if group.share else Group(group, parts=tuple(parts))
    sized = replace(request, group=group)
    return assemble(columns, sized, price(columns, sized, option, found, datasets), [])


def _part(columns: Columns, request: PlaceRequest, node: str, gpus: tuple[int, ...]) -> tuple[int, int] | None:
    i, need, share = columns.index.get(node), request.requirement, request.group.share
    if i is None or not columns.open[i] or node in request.exclude_nodes:
        return None
    mask, count = columns.shape(i).mask(gpus), len(gpus)
    free = _roomy(columns, i, mask, share) if share else columns.free_mask(i)
    if not mask or mask.bit_count() != count or mask & ~free:
        return None
    cpu = columns.cpu_free[i] >= need.cpu_millicores_per_gpu * count or not need.cpu_millicores_per_gpu
    memory = columns.host_free[i] >= need.host_memory_bytes_per_gpu * count or not need.host_memory_bytes_per_gpu
    return (i, mask) if cpu and memory else None


def _roomy(columns: Columns, i: int, mask: int, share: Share) -> int:
    """Of these GPUs, those with room for one more share."""
    return sum(
        1 << at
        for at in bits(mask)
        if columns.healthy[i, at] and columns.memory_free[i, at] >= max(1, share.memory_bytes)
    )


def _option(columns: Columns, request: PlaceRequest, part: tuple[int, int]) -> GpuOption:
    """What these GPUs are to the request; they were among what it asks for when they were chosen."""
    i, mask = part
    model = columns.shape(i).models[bits(mask)[0]]
    options = request.requirement.any_of
    return next((option for option in options if option.model in ("", model)), GpuOption())
