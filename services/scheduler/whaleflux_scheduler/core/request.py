"""From what a job asks for to what the placement engine is asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.model import Rule, Spec
from whaleflux_scheduler.core.placement.api import (
    GpuOption,
    GpuRequirement,
    GroupRequest,
    PlaceRequest,
    Subgroup,
)


def place_request(
    id: str, spec: Spec, *, exclude_nodes: Collection[str] = (), near_nodes: tuple[str, ...] = ()
) -> PlaceRequest:
    """The gang of `spec`."""
    return replace(shape(spec, tuple(sorted(exclude_nodes)), near_nodes), id=id)


@lru_cache(maxsize=256)
def shape(spec: Spec, exclude_nodes: tuple[str, ...] = (), near_nodes: tuple[str, ...] = ()) -> PlaceRequest:
    """What is asked for, whoever asks. Rules over all ranks bound the gang, rules with a size bound its runs of ranks."""
    whole = [rule for rule in spec.placement if rule.size in (0, spec.gpus)]
    parts = [rule for rule in spec.placement if rule.size not in (0, spec.gpus)]
    required = max((rule.level for rule in whole if not rule.preferred), default=0)
    preferred = max((rule.level for rule in whole if rule.preferred), default=0)
    return PlaceRequest(
        id="",
        groups=(GroupRequest(gpus=spec.gpus, subgroups=_subgroups(parts_of=parts)),),
        requirement=requirement(spec),
        level=Level(required) if required else None,
        preferred=Level(preferred) if preferred else None,
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        priority=spec.priority,
        sites=tuple(site.removeprefix("sites/") for site in spec.sites),
        exclude_nodes=exclude_nodes,
        near_nodes=near_nodes,
        datasets=tuple(f"datasets/{name.removeprefix('datasets/')}" for name in spec.datasets),
        hard_locality=spec.require_local_data,
    )


def requirement(spec: Spec) -> GpuRequirement:
    """What each GPU and its node must offer."""
    return GpuRequirement(
        any_of=tuple(GpuOption(model) for model in spec.any_of) or (GpuOption(),),
        min_memory_bytes=spec.min_memory_bytes,
        min_compute_capability=divmod(spec.min_compute_capability, 10),
        cpu_millicores_per_gpu=spec.cpu_millicores_per_rank,
        host_memory_bytes_per_gpu=spec.memory_bytes_per_rank,
    )


def _subgroups(parts_of: Sequence[Rule]) -> tuple[Subgroup, ...]:
    return tuple(Subgroup(rule.size, Level(rule.level), not rule.preferred) for rule in parts_of)
