"""From what a job asks for to what the placement engine is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from whaleflux import names
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.model import Level
from whaleflux.manifests.job_fields import Rule, Spec
from whaleflux_scheduler.core.elastic import tensor_parallel
from whaleflux_scheduler.core.goals import goal_of
from whaleflux_scheduler.core.placement.api import (
    GpuOption,
    GpuRequirement,
    GroupRequest,
    PlaceRequest,
    Preference,
    Share,
    Subgroup,
)
from whaleflux_scheduler.core.placement.validate import MAX_OPTIONS

_DATA_READS = 3.0  # how often a job reads its data, which nobody says: training does so again and again, and gains by a node that keeps it
_NO_SUCH_INSTANCE = "a MIG instance of that size"


def place_request(
    id: str, spec: Spec, *, exclude_nodes: Collection[str] = (), near_nodes: tuple[str, ...] = ()
) -> PlaceRequest:
    """The gang of `spec`."""
    return replace(shape(spec, tuple(sorted(exclude_nodes)), near_nodes), id=id)


@lru_cache(maxsize=4096)
def shape(spec: Spec, exclude_nodes: tuple[str, ...] = (), near_nodes: tuple[str, ...] = ()) -> PlaceRequest:
    """What is asked for, whoever asks. Rules over all ranks bound the gang, rules with a size bound its runs of ranks."""
    all_ranks = (0,) if any(choice.per_unit > 1 for choice in spec.gpu_options) else (0, spec.gpus)
    whole = [rule for rule in spec.placement if rule.size in all_ranks]
    parts = [rule for rule in (*spec.placement, *_wished(spec)) if rule.size not in all_ranks]
    required = max((rule.level for rule in whole if not rule.preferred), default=0)
    preferred = max((rule.level for rule in whole if rule.preferred), default=0)
    return PlaceRequest(
        id="",
        group=GroupRequest(spec.world_size, subgroups=_subgroups(parts_of=parts), share=share(spec)),
        without_gpus=not spec.gpus,
        requirement=requirement(spec),
        level=Level(required) if required else None,
        preferred=Level(preferred) if preferred else None,
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        priority=spec.priority,
        sites=tuple(site.removeprefix("sites/") for site in spec.sites),
        exclude_nodes=exclude_nodes,
        near_nodes=near_nodes,
        datasets=tuple(names.dataset(name) for name in spec.datasets),
        data_reads=_DATA_READS if spec.datasets else 1.0,
        hard_locality=spec.require_local_data,
        preference=Preference(goal=goal_of(spec)),
        reservation=spec.reservation,
    )


def that_may(asked: PlaceRequest, may: Callable[[int], bool]) -> PlaceRequest:
    """Without the GPU types of which more would be needed than `may` allows; the request itself where that leaves out none.

    Types that count one are not asked about: who waits has been asked about these.
    """
    options = asked.requirement.any_of
    left = tuple(one for one in options if one.per_unit == 1 or may(asked.units * one.per_unit))
    return asked if len(left) == len(options) else _only(asked, left)


def of_model(asked: PlaceRequest, model: str) -> PlaceRequest:
    """The request for that GPU type alone."""
    return _only(asked, tuple(one for one in asked.requirement.any_of if one.model == model))


def by_count(asked: PlaceRequest) -> Iterator[PlaceRequest]:
    """The request for the GPU types that count alike, those of which fewest are needed first."""
    options = asked.requirement.any_of
    counts = sorted({one.per_unit for one in options})
    for count in counts:
        yield asked if len(counts) == 1 else _only(asked, tuple(one for one in options if one.per_unit == count))


def gpus_of(asked: PlaceRequest) -> int:
    """The fewest GPUs that it could be given."""
    return asked.units * min(one.per_unit for one in asked.requirement.any_of)


def _only(asked: PlaceRequest, options: tuple[GpuOption, ...]) -> PlaceRequest:
    return replace(asked, requirement=replace(asked.requirement, any_of=options))


def requirement(spec: Spec) -> GpuRequirement:
    """What each GPU and its node must offer."""
    return GpuRequirement(
        any_of=_options(spec),
        mig_profile=spec.mig_profile,
        min_memory_bytes=spec.min_memory_bytes,
        min_compute_capability=divmod(spec.min_compute_capability, 10),
        cpu_millicores_per_gpu=spec.counted_cpu_millicores,
        host_memory_bytes_per_gpu=spec.memory_bytes_per_rank,
        labels=spec.node_labels,
        nvme=spec.needs_nvme,
        no_spot=spec.no_spot,
    )


def share(spec: Spec) -> Share | None:
    """The part of a GPU that each rank gets, on a GPU that no other rank of the job is on: NCCL refuses two on one."""
    return Share(spec.share_memory_bytes, apart=True) if spec.share_memory_bytes else None


def _options(spec: Spec) -> tuple[GpuOption, ...]:
    """Models that will do. A MIG instance bears its GPU's model and its profile; of a least size the smallest go first."""
    if spec.mig_memory_bytes:
        sizes = CATALOGUE.mig_with(spec.mig_memory_bytes)
        fitting = (f"{model} {mig.name}" for model, mig in sizes if not spec.any_of or model in spec.any_of)
        return tuple(map(GpuOption, fitting))[:MAX_OPTIONS] or (GpuOption(_NO_SUCH_INSTANCE),)
    suffix = f" {spec.mig_profile}" if spec.mig_profile else ""
    choices = (GpuOption(one.model + suffix, one.per_unit, one.throughput) for one in spec.gpu_choices)
    return tuple(choices) or (GpuOption(),)


def _wished(spec: Spec) -> Iterator[Rule]:
    """Tensor-parallel ranks together in an NVLink island where that costs nothing else, unless the job says more of it."""
    tensor = tensor_parallel(spec)
    told = any(rule.size == tensor and rule.level >= Level.ISLAND for rule in spec.placement)
    if tensor > 1 and not told:
        yield Rule("tensor", Level.ISLAND, tensor, preferred=True)


def _subgroups(parts_of: Sequence[Rule]) -> tuple[Subgroup, ...]:
    return tuple(Subgroup(rule.size, Level(rule.level), not rule.preferred) for rule in parts_of)
