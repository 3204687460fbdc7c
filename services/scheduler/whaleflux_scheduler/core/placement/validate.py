"""What a request must satisfy before the engine looks at it: every number bounded, every combination meaningful."""

from __future__ import annotations

import math
from functools import lru_cache

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import (
    GpuRequirement,
    GroupRequest,
    PlaceRequest,
    Preference,
    Share,
)

MAX_GPUS = 1_000_000
MAX_OPTIONS = 32


def check_request(request: PlaceRequest, *, named: bool = True) -> None:
    """Raises InvalidArgument naming every bad field with its limit. `named` False: of nobody in particular yet."""
    bad = list(_problems(request, named))
    if bad:
        raise InvalidArgument(bad)


def _problems(request: PlaceRequest, named: bool) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    if named and not request.id:
        bad.append(FieldViolation("id", "is empty; name the attempt"))
    bad += _group(request.group)
    bad += _requirement(request.requirement)
    if request.min_nodes < 0 or request.max_nodes < 0:
        bad.append(FieldViolation("min_nodes", "node bounds are 0 (none) or positive"))
    if request.max_nodes and request.min_nodes > request.max_nodes:
        bad.append(FieldViolation("min_nodes", f"{request.min_nodes} exceeds max_nodes {request.max_nodes}"))
    if request.min_nodes > request.units:
        bad.append(
            FieldViolation("min_nodes", f"{request.min_nodes} nodes for {request.units} GPUs; at most one node per GPU")
        )
    if not (math.isfinite(request.data_reads) and request.data_reads >= 0):
        bad.append(FieldViolation("data_reads", "is finite and not negative"))
    return bad + list(_wishes(request.preference))


@lru_cache(maxsize=1024)
def _wishes(wish: Preference) -> tuple[FieldViolation, ...]:
    numbers = (wish.work_gpu_s, wish.deadline_s or 0.0, wish.budget_usd or 0.0, wish.comm_fraction)
    if all(math.isfinite(x) and x >= 0 for x in numbers):
        return ()
    return (FieldViolation("preference", "work, deadline, budget and comm_fraction are finite and not negative"),)


@lru_cache(maxsize=4096)
def _group(group: GroupRequest) -> tuple[FieldViolation, ...]:
    bad, path = list[FieldViolation](), "group"
    if not 1 <= group.gpus <= MAX_GPUS:
        return (FieldViolation(f"{path}.gpus", f"{group.gpus} is outside 1-{MAX_GPUS:,}"),)
    for at, sub in enumerate(group.subgroups):
        if sub.size < 1 or group.gpus % sub.size:
            bad.append(FieldViolation(f"{path}.subgroups[{at}].size", f"{sub.size} does not divide {group.gpus} GPUs"))
    if group.share:
        bad += _share(group.share, group, f"{path}.share")
    elif group.level is Level.GPU and group.gpus > 1:
        bad.append(FieldViolation(f"{path}.level", "several whole GPUs cannot lie in one GPU; use ISLAND or NODE"))
    return tuple(bad)


def _share(share: Share, group: GroupRequest, path: str) -> list[FieldViolation]:
    bad: list[FieldViolation] = []
    if share.memory_bytes < 1:
        bad.append(FieldViolation(f"{path}.memory_bytes", "is not positive"))
    if share.apart and group.level is Level.GPU and group.gpus > 1:
        bad.append(FieldViolation(path, "several parts that are kept apart cannot lie in one GPU"))
    if group.subgroups:
        bad.append(FieldViolation(path, "parts of GPUs have no subgroups"))
    return bad


@lru_cache(maxsize=1024)
def _requirement(need: GpuRequirement) -> tuple[FieldViolation, ...]:
    """Requests of one kind repeat, and so do their requirements."""
    bad: list[FieldViolation] = []
    if not 1 <= len(need.any_of) <= MAX_OPTIONS:
        bad.append(FieldViolation("requirement.any_of", f"{len(need.any_of)} options; 1-{MAX_OPTIONS} are allowed"))
    for at, option in enumerate(need.any_of):
        if not 1 <= option.per_unit <= 64:
            bad.append(FieldViolation(f"requirement.any_of[{at}].per_unit", f"{option.per_unit} is outside 1-64"))
        if not (math.isfinite(option.throughput) and option.throughput > 0):
            bad.append(FieldViolation(f"requirement.any_of[{at}].throughput", "is positive and finite"))
    for name in (
        "min_memory_bytes",
        "cpu_millicores_per_gpu",
        "host_memory_bytes_per_gpu",
    ):
        if not math.isfinite(getattr(need, name)) or getattr(need, name) < 0:
            bad.append(FieldViolation(f"requirement.{name}", "is finite and not negative"))
    return tuple(bad)
