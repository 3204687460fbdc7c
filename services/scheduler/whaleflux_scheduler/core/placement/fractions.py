"""Parts of GPUs: memory, counted per device. A MIG instance is a device of its own.

A part goes to the device where it fits tightest, so that whole GPUs and large parts stay free for those who need them. (FGD's rule, by what is
asked for lately, allocated less while jobs came and went: `docs/decisions.md`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import cast

import numpy as np

from whaleflux_scheduler.core.placement.api import GpuRequirement, Share
from whaleflux_scheduler.core.placement.columns import Columns
from whaleflux_scheduler.core.placement.supply import Bools, matching_positions, node_conditions

Device = tuple[int, int]  # (row, position)


class Together(Enum):
    """What must hold all parts of a group."""

    ANYWHERE = "anywhere"
    NODE = "node"
    DEVICE = "device"


def place_parts(
    columns: Columns,
    need: GpuRequirement,
    model: str,
    share: Share,
    count: int,
    *,
    allowed: Bools | None,
    most_per_node: int,
    together: Together = Together.ANYWHERE,
) -> list[Device] | None:
    """`count` parts of `share` on as few devices and nodes as hold them, at most so many on one node; None when they do not fit."""
    taken: list[Device] = []
    if share.apart and together is Together.NODE:
        allowed = _roomy(columns, need, model, share, count, allowed)
    try:
        while len(taken) < count:
            rows = _open_rows(columns, allowed, taken, most_per_node, together)
            device = _best(columns, need, model, share, rows, taken if share.apart else ())
            if device is None or (together is Together.DEVICE and taken and device != taken[0]):
                return None
            _count(columns, need, device, share, 1)
            taken.append(device)
    finally:
        for device in taken:
            _count(columns, need, device, share, -1)
    return sorted(taken)


def _roomy(
    columns: Columns, need: GpuRequirement, model: str, share: Share, count: int, allowed: Bools | None
) -> Bools:
    """Nodes with room for `count` parts, each on another device."""
    rows = _rows(columns, need, allowed)
    rows &= columns.cpu_free >= count * need.cpu_millicores_per_gpu
    rows &= columns.host_free >= count * need.host_memory_bytes_per_gpu
    rows &= _fitting(columns, need, model, share).sum(axis=1) >= count
    return rows


def _fitting(columns: Columns, need: GpuRequirement, model: str, share: Share) -> Bools:
    """Devices with room for one part, whether or not their node takes work."""
    fits = columns.memory_free >= max(1, share.memory_bytes)
    return fits & columns.healthy & _matching(columns, need, model)


def _open_rows(
    columns: Columns, allowed: Bools | None, taken: list[Device], most_per_node: int, together: Together
) -> Bools | None:
    """Rows where the next part may go, given where the others went."""
    if not taken:
        return allowed
    per_node = Counter(i for i, _ in taken)
    if together is not Together.ANYWHERE:
        rows = np.zeros(columns.count, dtype=np.bool_)
        rows[list(per_node)] = True
        return rows
    rows = np.ones(columns.count, dtype=np.bool_) if allowed is None else allowed.copy()
    rows[[i for i, n in per_node.items() if n >= most_per_node]] = False
    return rows


def _count(columns: Columns, need: GpuRequirement, device: Device, share: Share, sign: int) -> None:
    columns.host(device[0], need.cpu_millicores_per_gpu, need.host_memory_bytes_per_gpu, sign)
    columns.share(*device, share.memory_bytes, sign)


def _best(
    columns: Columns, need: GpuRequirement, model: str, share: Share, allowed: Bools | None, but: Sequence[Device]
) -> Device | None:
    rows = _rows(columns, need, allowed)
    fits = _fitting(columns, need, model, share) & rows[:, None]
    for device in but:
        fits[device] = False
    if not fits.any():
        return None
    places = np.argwhere(fits)
    offer = columns.offer[places[:, 0]].astype(np.int64)
    best = int(np.lexsort((offer, columns.memory_free[fits]))[0])  # the tightest, then the fullest node
    return int(places[best][0]), int(places[best][1])


def largest_free(columns: Columns, need: GpuRequirement, rows: Bools) -> tuple[int, str]:
    """Bytes of the largest part that one GPU of these nodes has free, and its node; (0, "") when none has."""
    fits = rows[:, None] & columns.healthy & (columns.memory_free > 0)
    fits &= np.logical_or.reduce([_matching(columns, need, option.model) for option in need.any_of])
    free = np.where(fits, columns.memory_free, 0)
    if not free.size or not free.any():
        return 0, ""
    row, _ = np.unravel_index(int(np.argmax(free)), free.shape)
    return int(free.max()), columns.names[int(row)]


def _rows(columns: Columns, need: GpuRequirement, allowed: Bools | None) -> Bools:
    ok = columns.open.copy() if allowed is None else columns.open & allowed
    if need.of_node:
        ok &= node_conditions(columns, need)
    if need.cpu_millicores_per_gpu:
        ok &= columns.cpu_free >= need.cpu_millicores_per_gpu
    if need.host_memory_bytes_per_gpu:
        ok &= columns.host_free >= need.host_memory_bytes_per_gpu
    return ok


def _matching(columns: Columns, need: GpuRequirement, model: str) -> Bools:
    """Which devices are of the right kind, one row per node; kept until nodes change."""
    key = ("devices", need, model)
    found = columns.matches.get(key)
    if found is None:
        by_shape = np.zeros((len(columns.kinds), columns.width), dtype=np.bool_)
        for s, shape in enumerate(columns.kinds):
            mask = matching_positions(shape, need, model)
            by_shape[s] = [bool(mask >> p & 1) for p in range(columns.width)]
        found = columns.keep(key, by_shape[columns.shapes])
    return cast("Bools", found)
