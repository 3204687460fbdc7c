"""Why a request waits: counts per constraint, the nearest miss, and the smallest change that would admit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from whaleflux.fleet.model import Level
from whaleflux.quantities import shown_bytes
from whaleflux_scheduler.core.placement.api import (
    Blocked,
    GpuOption,
    GpuRequirement,
    GroupRequest,
    NoPlacement,
    PlaceRequest,
    Share,
)
from whaleflux_scheduler.core.placement.columns import DOMAIN_LEVELS, Columns
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.fractions import largest_free
from whaleflux_scheduler.core.placement.search import feasible, stays
from whaleflux_scheduler.core.placement.supply import Bools, conditions_of, matching_positions, node_conditions

LARGEST_SHARE = "largest free share"
_MOST_MODELS = 4  # more are named together


def explain(columns: Columns, request: PlaceRequest, datasets: Datasets, empty: Callable[[], Columns]) -> NoPlacement:
    """Of a request that does not fit now. `empty` gives the fleet with nothing placed."""
    counted, left = _count(columns, request, datasets)
    near = _nearest_option(columns, request, left)
    free, total = _gpus(columns, near, left)
    wanted = near.units * near.requirement.any_of[0].per_unit
    ever = feasible(empty(), request, datasets)
    return NoPlacement(
        request.id,
        tuple(counted),
        _nearest_miss(columns, near, left, wanted),
        _smallest_change(columns, request, datasets),
        ever,
        wanted,
        free,
        total,
    )


def _count(columns: Columns, request: PlaceRequest, datasets: Datasets) -> tuple[list[Blocked], Bools]:
    """Each node counts under the first constraint it fails; what is left passes them all."""
    left = np.ones(columns.count, dtype=np.bool_)
    counted: list[Blocked] = []
    for constraint, field, passes in _constraints(columns, request, datasets):
        failed = int((left & ~passes).sum())
        if failed:
            counted.append(Blocked(constraint, failed, field))
        left &= passes
    return counted, left


def _constraints(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Iterator[tuple[str, str, Bools]]:
    """From what never changes to what changes every second."""
    need, rows = request.requirement, columns.rows
    if request.sites:
        yield (
            f"not in site {' or '.join(request.sites)}",
            "sites",
            _rows(columns, lambda i: rows[i].node.site in request.sites),
        )
    if request.exclude_nodes:
        excluded = set(request.exclude_nodes)
        yield "excluded by name", "exclude_nodes", _rows(columns, lambda i: columns.names[i] not in excluded)
    yield from _hardware(columns, need)
    if need.of_node:
        yield f"without {conditions_of(need)}", "requirement.labels", node_conditions(columns, need)
    if request.hard_locality and request.datasets:
        yield (
            "without the datasets",
            "hard_locality",
            _rows(columns, lambda i: datasets.here(columns.names[i], request.datasets)),
        )
        yield (
            "without room to keep the datasets beside what others hold",
            "hard_locality",
            stays(columns, request, datasets),
        )
    states = ["" if r.schedulable else r.reason or "not schedulable" for r in rows]
    for reason in sorted(set(states) - {""}):
        yield reason, "", np.array([state != reason for state in states], dtype=np.bool_)
    yield from _room(columns, request)


def _hardware(columns: Columns, need: GpuRequirement) -> Iterator[tuple[str, str, Bools]]:
    models = [o.model for o in need.any_of]
    if need.mig_profile and not all(models):
        yield (
            f"without a MIG instance {need.mig_profile}",
            "requirement.mig_profile",
            _shapes(columns, lambda s: need.mig_profile in columns.kinds[s].mig_profiles),
        )
    if all(models):
        shown = models if len(models) <= _MOST_MODELS else [*models[:_MOST_MODELS], "larger"]
        yield (
            f"gpu model is not {' or '.join(shown)}",
            "requirement.any_of",
            _shapes(columns, lambda s: any(m in models for m in columns.kinds[s].models)),
        )
    if need.min_memory_bytes:
        yield (
            f"gpu memory < {need.min_memory_bytes / 1e9:.4g} GB",
            "requirement.min_memory_bytes",
            _shapes(
                columns, lambda s: _any(columns, s, GpuRequirement(min_memory_bytes=need.min_memory_bytes), models)
            ),
        )
    if need.min_compute_capability > (0, 0):
        major, minor = need.min_compute_capability
        only = GpuRequirement(
            min_memory_bytes=need.min_memory_bytes, min_compute_capability=need.min_compute_capability
        )
        yield (
            f"compute capability < {major}.{minor}",
            "requirement.min_compute_capability",
            _shapes(columns, lambda s: _any(columns, s, only, models)),
        )
    yield "no GPU", "", _shapes(columns, lambda s: columns.kinds[s].size > 0)


def _any(columns: Columns, s: int, need: GpuRequirement, models: list[str]) -> bool:
    return any(matching_positions(columns.kinds[s], need, m) for m in models)


def _room(columns: Columns, request: PlaceRequest) -> Iterator[tuple[str, str, Bools]]:
    """Free GPUs, CPU and memory, per node."""
    need = request.requirement
    if need.cpu_millicores_per_gpu:
        passes = columns.cpu_free >= need.cpu_millicores_per_gpu
        yield (
            f"free CPU < {need.cpu_millicores_per_gpu / 1000:g} cores per GPU",
            "requirement.cpu_millicores_per_gpu",
            passes,
        )
    if need.host_memory_bytes_per_gpu:
        passes = columns.host_free >= need.host_memory_bytes_per_gpu
        yield (
            f"free memory < {need.host_memory_bytes_per_gpu / 2**30:.4g} GiB per GPU",
            "requirement.host_memory_bytes_per_gpu",
            passes,
        )
    group = request.group
    if group.share:
        yield "no GPU with room for the share", "group.share", _share_room(columns, group.share)
        return
    yield "no free GPU", "", columns.offer > 0
    each = min(option.per_unit for option in need.any_of)
    if (least := per_node_need(group, each)) > 1:
        yield f"fewer than {least} free GPUs", "group", columns.offer >= least


def per_node_need(group: GroupRequest, per_unit: int) -> int:
    """The fewest GPUs that are of any use on one node, where so many count as one that is asked for."""
    if (group.level or Level.FLEET) >= Level.NODE:
        return group.gpus * per_unit
    return max((s.size for s in group.subgroups if s.required and s.level >= Level.NODE), default=1)


def _share_room(columns: Columns, share: Share) -> Bools:
    fits = columns.healthy & (columns.memory_free >= max(1, share.memory_bytes))
    return np.asarray(fits.any(axis=1), dtype=np.bool_)


def _rows(columns: Columns, passes: Callable[[int], bool]) -> Bools:
    return np.array([passes(i) for i in range(columns.count)], dtype=np.bool_)


def _shapes(columns: Columns, passes: Callable[[int], bool]) -> Bools:
    """Answers once per shape and spreads it over the nodes."""
    table = np.array([passes(s) for s in range(len(columns.kinds))] or [False], dtype=np.bool_)
    return table[columns.shapes] if columns.count else np.zeros(0, dtype=np.bool_)


def _nearest_option(columns: Columns, request: PlaceRequest, left: Bools) -> PlaceRequest:
    """The request for the one type of which least is missing, where types count differently; else as it is."""
    options = request.requirement.any_of
    if len({option.per_unit for option in options}) < 2:
        return request
    alone = [replace(request, requirement=replace(request.requirement, any_of=(option,))) for option in options]

    def had(one: PlaceRequest) -> tuple[float, float]:
        free, total = (n / one.requirement.any_of[0].per_unit for n in _gpus(columns, one, left))
        return (total >= one.units, free)

    return max(alone, key=had)


def _gpus(columns: Columns, request: PlaceRequest, left: Bools) -> tuple[int, int]:
    """Free GPUs on nodes that pass every constraint, and all healthy GPUs of the right kind."""
    need = request.requirement
    masks = [max((matching_positions(s, need, o.model) for o in need.any_of), key=int.bit_count) for s in columns.kinds]
    suitable = columns.usable_masks & np.array(masks or [0], dtype=np.uint64)[columns.shapes]
    return int(columns.offer[left & (suitable > 0)].sum()), int(np.bitwise_count(suitable).sum())


def _nearest_miss(columns: Columns, request: PlaceRequest, left: Bools, wanted: int) -> str:
    """Among the domains that the request allows, the one with most usable GPUs and how many it lacks."""
    if not columns.count:
        return "the fleet has no nodes"
    if request.group.share:
        most_bytes, name = largest_free(columns, request.requirement, columns.open)
        return f"{LARGEST_SHARE}: {shown_bytes(most_bytes)} ({name})" if most_bytes else "no GPU has a share free"
    widest = max(request.level or Level.FLEET, request.group.level or Level.FLEET)
    need, gpus = request.requirement, "GPUs"
    if len(need.any_of) == 1 and need.any_of[0].per_unit > 1:
        gpus = need.any_of[0].model
        left = left & _shapes(columns, lambda s: gpus in columns.kinds[s].models)
    free = np.where(left, columns.offer, 0).astype(np.int64)
    if widest >= Level.NODE:
        best = int(np.argmax(free))
        return f"{columns.names[best]} has {int(free[best])} of {wanted} {gpus} free"
    level = Level(min(widest, Level.LEAF))
    room = np.add.reduceat(free, columns.lo[level])
    d = int(np.argmax(room))
    name = columns.domain_name(level, d)
    if room[d] >= wanted:
        return f"{name} has {int(room[d])} {gpus} free, but not {wanted} in the shape asked for"
    return f"{name} has {int(room[d])} of {wanted} {gpus} free"


def _smallest_change(columns: Columns, request: PlaceRequest, datasets: Datasets) -> str:
    """Single changes in the order of how little they ask of the user; the first that fits."""
    for text, changed in _changes(request):
        if feasible(columns, changed, datasets):
            return text
    fewer = _fewer_gpus(columns, request, datasets)
    return f"would fit with {fewer} GPUs" if fewer else ""


def _changes(request: PlaceRequest) -> Iterator[tuple[str, PlaceRequest]]:
    need = request.requirement
    if request.exclude_nodes:
        yield "would fit without exclude_nodes", replace(request, exclude_nodes=())
    if request.hard_locality:
        yield "would fit with soft data locality", replace(request, hard_locality=False)
    for level in _wider(request.level):
        yield f"would fit {_within(level)} (level)", replace(request, level=level)
    group = request.group
    for level in _wider(group.level):
        yield f"would fit {_within(level)} (level)", replace(request, group=replace(group, level=level))
    if request.min_nodes > 1:
        yield "would fit without min_nodes", replace(request, min_nodes=0)
    if request.max_nodes:
        yield "would fit without max_nodes", replace(request, max_nodes=0)
    if group.subgroups:
        yield "would fit without required subgroups", replace(request, group=replace(group, subgroups=()))
    for name, relaxed in (
        ("cpu_millicores_per_gpu", replace(need, cpu_millicores_per_gpu=0)),
        ("host_memory_bytes_per_gpu", replace(need, host_memory_bytes_per_gpu=0)),
    ):
        if relaxed != need:
            yield f"would fit without {name}", replace(request, requirement=relaxed)
    if need.of_node:
        bare = replace(need, labels=(), nvme=False, no_spot=False)
        yield "would fit without its conditions on the node", replace(request, requirement=bare)
    if request.sites:
        yield "would fit in another site", replace(request, sites=())
    if need.min_compute_capability > (0, 0):
        free = replace(need, min_compute_capability=(0, 0))
        yield "would fit without min_compute_capability", replace(request, requirement=free)
    if need.min_memory_bytes:
        yield "would fit without min_memory_bytes", replace(request, requirement=replace(need, min_memory_bytes=0))
    if any(o.model for o in need.any_of):
        yield "would fit on another GPU model", replace(request, requirement=replace(need, any_of=(GpuOption(),)))


def _within(level: Level) -> str:
    return "anywhere" if level is Level.FLEET else f"within one {level.name.lower()}"


def _wider(level: Level | None) -> list[Level]:
    if level is None:
        return []
    return [one for one in reversed((*DOMAIN_LEVELS, Level.NODE, Level.ISLAND)) if one < level]


def _fewer_gpus(columns: Columns, request: PlaceRequest, datasets: Datasets) -> int:
    """The most GPUs that would fit now in the same shape: by bisection over whole steps of the group."""
    group = request.group
    step = max((s.size for s in group.subgroups if s.required), default=1)
    low, high = 0, group.gpus // step
    while high - low > 1:
        middle = (low + high) // 2
        smaller = replace(request, group=replace(group, gpus=middle * step))
        if smaller.min_nodes <= middle * step and feasible(columns, smaller, datasets):
            low = middle
        else:
            high = middle
    return low * step
