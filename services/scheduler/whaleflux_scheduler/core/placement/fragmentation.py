"""What a placement strands, by what is asked for: the expected fragmentation of FGD (Weng et al., "Beware of Fragmentation", USENIX ATC 2023). Pure.

    F(node) = sum over the kinds of requests of (how often it is asked) * (what is free on the node that it could not use)

in GPUs. It could use nothing where the node has too little CPU or memory or too few GPUs with room for it, else all but the GPUs whose
free part is too small. Work goes where F grows least. Shares are parts of a GPU's memory; nothing depends on a node's name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from whaleflux_scheduler.core.placement.columns import Columns, Floats, Ints
from whaleflux_scheduler.core.placement.supply import Bools


class Ask(NamedTuple):
    """What one request takes of one node: `gpus` devices, `share_bytes` of each (0: whole GPUs), CPU and host memory in all."""

    gpus: int
    share_bytes: int
    cpu_millicores: int
    memory_bytes: int


Mix = tuple[tuple[Ask, float], ...]
"""Kinds of requests, and which part of all requests each is."""


class _Nodes(NamedTuple):
    """Some rows of the fleet; devices are (row, position)."""

    whole_bytes: Ints
    free_bytes: Ints
    free: Floats  # as parts of their GPU
    cpu: Ints
    memory: Ints


def _nodes(columns: Columns, rows: Ints) -> _Nodes:
    whole = np.maximum(columns.whole_memory[columns.shapes[rows]], 1)
    free_bytes = np.where(columns.healthy[rows], columns.memory_free[rows], 0)
    return _Nodes(whole, free_bytes, free_bytes / whole, columns.cpu_free[rows], columns.host_free[rows])


def stranded_by_share(columns: Columns, mix: Mix, asked: Ask, fits: Bools) -> Floats:
    """By how much F grows when one share (`asked.gpus` is 1) goes to each device that `fits`; infinite elsewhere."""
    rows = np.flatnonzero(fits.any(axis=1))
    nodes = _nodes(columns, rows)
    part = asked.share_bytes / nodes.whole_bytes
    growth = np.zeros(part.shape)
    for kind, weight in mix:
        growth += weight * (_after_share(nodes, kind, asked, part) - _stranded(nodes, kind)[:, None])
    found = np.full(fits.shape, np.inf)
    found[rows] = np.where(fits[rows], growth, np.inf)
    return found


def stranded_by_whole(columns: Columns, mix: Mix, asked: Ask, rows: Ints) -> Floats:
    """By how much F grows when `asked.gpus` wholly free GPUs of each of these rows are taken; the caller knows that they are there."""
    nodes = _nodes(columns, rows)
    growth = np.zeros(len(rows))
    for kind, weight in mix:
        able = nodes.free_bytes >= _need(nodes, kind)
        unfit, total = _unfit(nodes, able), nodes.free.sum(axis=1) - asked.gpus
        left = _room(nodes, kind, asked) & (able.sum(axis=1) - asked.gpus >= kind.gpus)
        growth += weight * (np.where(left, unfit, total) - _stranded(nodes, kind))
    return growth


def _stranded(nodes: _Nodes, kind: Ask) -> Floats:
    """What is free on each node that the kind could not use."""
    able = nodes.free_bytes >= _need(nodes, kind)
    usable = _room(nodes, kind) & (able.sum(axis=1) >= kind.gpus)
    return np.where(usable, _unfit(nodes, able), nodes.free.sum(axis=1))


def _after_share(nodes: _Nodes, kind: Ask, asked: Ask, part: Floats) -> Floats:
    """The same after a share went to each device, one at a time."""
    need = _need(nodes, kind)
    able, still = nodes.free_bytes >= need, nodes.free_bytes - asked.share_bytes >= need
    able_left = able.sum(axis=1)[:, None] - able + still
    left = nodes.free - part
    unfit = _unfit(nodes, able)[:, None] - np.where(able, 0.0, nodes.free) + np.where(still, 0.0, left)
    usable = _room(nodes, kind, asked)[:, None] & (able_left >= kind.gpus)
    return np.where(usable, unfit, nodes.free.sum(axis=1)[:, None] - part)


def _need(nodes: _Nodes, kind: Ask) -> Ints:
    """Bytes that a device must have free."""
    return nodes.whole_bytes if not kind.share_bytes else np.full_like(nodes.whole_bytes, kind.share_bytes)


def _room(nodes: _Nodes, kind: Ask, taken: Ask | None = None) -> Bools:
    """Nodes whose CPU and memory are enough for the kind, after `taken` has had its part."""
    cpu, memory = (taken.cpu_millicores, taken.memory_bytes) if taken else (0, 0)
    enough: Bools = (nodes.cpu - cpu >= kind.cpu_millicores) | (kind.cpu_millicores == 0)
    return enough & ((nodes.memory - memory >= kind.memory_bytes) | (kind.memory_bytes == 0))


def _unfit(nodes: _Nodes, able: Bools) -> Floats:
    unfit: Floats = np.where(able, 0.0, nodes.free).sum(axis=1)
    return unfit
