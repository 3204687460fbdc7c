"""Trainings that the scheduler plans on the fleet: what it is asked, what is shown of it, and how a job becomes what was planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whaleflux import names
from whaleflux.planning.wish import ALLOCATOR, GROWING
from whaleflux.planning.wish import VARIABLE as MESH
from whaleflux.quantities import shown_bytes, shown_duration

if TYPE_CHECKING:
    from whaleflux.cli.submission import Submission
    from whaleflux.v1 import scheduler_pb2 as pb

TIMEOUT_S = 60.0
_MOST_SHOWN = 6


def plan_all(client: Any, jobs: Sequence[Submission]) -> list[str]:
    """Jobs that name a model and leave GPUs or their split open become what the scheduler plans for them now. Returns what to show of each plan.

    Raises InvalidArgument where a model has no plan on the fleet.
    """
    lines: list[str] = []
    known: dict[bytes, pb.PlanTrainingResponse] = {}
    for one in jobs:
        spec = one.request.job.spec
        if not spec.training.model:
            continue
        asked = request_of(spec)
        key = asked.SerializeToString(deterministic=True)
        if key not in known:
            known[key] = client.scheduler.PlanTraining(asked, timeout=TIMEOUT_S)
            lines += ["", *shown(known[key], asked.gpus)] if lines else shown(known[key], asked.gpus)
        plan = chosen(known[key])
        if spec.elastic.min:
            lines.append(
                f"  elastic    planned for {plan.gpus} GPUs; it starts with fewer, at least {spec.elastic.min}, where so many are not free"
            )
        _refuse_elsewhere(spec, plan)
        _fill(spec, plan)
    return lines


def _left_out(asked: int, plan: pb.TrainingPlan) -> str:
    """GPUs that are asked for, and why the plan has fewer."""
    left = f"{asked - plan.gpus} of the {asked} GPUs that are asked for"
    if 0 < plan.offered_gpus < asked:
        return f"{left}: {plan.offered_gpus} x {plan.gpu_type} are there"
    return f"{left}: no split of all of them is as fast"


def _refuse_elsewhere(spec: pb.JobSpec, plan: pb.TrainingPlan) -> None:
    """Raises InvalidArgument where `place` holds more ranks in a node than the plan's nodes have GPUs."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import types_pb2

    for rule in spec.placement:
        ranks = rule.size or plan.gpus
        within = rule.level >= types_pb2.TOPOLOGY_LEVEL_NODE and not rule.preferred
        if within and 0 < plan.node_gpus < ranks:
            what = f"holds {ranks} ranks in one node, and the plan is {plan.gpus} x {plan.gpu_type} of which nodes have {plan.node_gpus}"
            fix = f"write gpus: {plan.node_gpus} to plan for one node, a size of at most that, or a wider level"
            raise InvalidArgument(FieldViolation(f"place.{rule.group}", f"{what}; {fix}"))


def request_of(spec: pb.JobSpec) -> pb.PlanTrainingRequest:
    """What a job asks: with its own numbers and types of GPUs, sites and nodes where it says them."""
    from whaleflux.v1 import scheduler_pb2 as pb

    return pb.PlanTrainingRequest(
        training=spec.training,
        gpus=spec.gpus or spec.elastic.max,
        min_gpus=spec.elastic.min,
        gpus_step=math.lcm(*(max(1, one) for one in (spec.elastic.step, *(rule.size for rule in spec.placement)))),
        gpu_types=_types(spec.gpu),
        parallelism=spec.parallelism,
        sites=[names.site(names.last(site)) for site in spec.sites],
        nodes=spec.nodes,
    )


def _types(asked: pb.GpuRequirement) -> list[str]:
    """Those that will do; empty: all."""
    from whaleflux.fleet.gpu_types import CATALOGUE

    if not (asked.min_memory_bytes or asked.min_compute_capability):
        return list(asked.any_of)
    able = [
        one.name
        for one in CATALOGUE.types.values()
        if one.memory_bytes >= asked.min_memory_bytes
        and one.compute_capability[0] * 10 + one.compute_capability[1] >= asked.min_compute_capability
    ]
    return [name for name in able if not asked.any_of or name in asked.any_of]


def chosen(answer: pb.PlanTrainingResponse) -> pb.TrainingPlan:
    """The best that can start now, else the best. Raises InvalidArgument where there is none."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if not answer.plans:
        why = "; ".join(answer.refused[:3]) or "the fleet has no GPUs that take work"
        raise InvalidArgument(
            FieldViolation(
                "model", f"cannot be trained on this fleet: {why}; see what fits with: whaleflux fits MODEL --gpu TYPE"
            )
        )
    now = [one for one in answer.plans if one.free_gpus >= one.gpus and not one.misses]
    return (now or list(answer.plans))[0]


def _fill(spec: pb.JobSpec, plan: pb.TrainingPlan) -> None:
    """GPUs, their type and the split; the ranks' environment where the job does not set it itself."""
    spec.gpus = plan.gpus
    if not spec.gpu.any_of:
        spec.gpu.any_of.append(plan.gpu_type)
    spec.parallelism.CopyFrom(plan.parallelism)
    if not spec.training.model.startswith("{"):
        spec.parallelism.model = spec.training.model
    if plan.mesh and MESH not in spec.environment:
        spec.environment[MESH] = plan.mesh
        if ALLOCATOR not in spec.environment:
            spec.environment[ALLOCATOR] = GROWING


def shown(answer: pb.PlanTrainingResponse, asked_gpus: int = 0) -> list[str]:
    """For people: the plan that is taken, and what else there is. `asked_gpus`: the most that it may use; 0: any."""
    if not answer.plans:
        return [f"no plan: {one}" for one in answer.refused]
    plan = chosen(answer)
    lines = [
        f"TRAINING  {plan.gpus} x {plan.gpu_type} {_site(plan)}: {plan.words}",
        f"  batch      {plan.batch:,} samples of {plan.sequence:,} tokens, {plan.micro_batch} at once on each of {plan.data} ranks",
        f"  step       {plan.step_s:.4g} s ({_parts(plan)}); {plan.tokens_per_s:,.0f} tokens/s, {plan.mfu:.0%} of the data sheet",
        f"  memory     {shown_bytes(sum(plan.memory_bytes.values()))} of {shown_bytes(plan.usable_bytes)} on the fullest GPU",
        f"  cost       {_cost(plan)}",
        f"  what binds {plan.binding}",
    ]
    if asked_gpus > plan.gpus:
        lines.append(f"  leaves out {_left_out(asked_gpus, plan)}")
    if plan.free_gpus < plan.gpus:
        lines.append(f"  waits for  {plan.gpus - plan.free_gpus} more GPUs; {plan.free_gpus} are free")
    lines += [f"  misses     {one}" for one in plan.misses]
    lines += [f"  note       {one}" for one in answer.notes]
    others = dict.fromkeys(_in_short(one) for one in answer.plans if one != plan)
    lines += [f"  instead    {one}" for one in list(others)[:_MOST_SHOWN]]
    return [*lines, *(f"  no plan    {one}" for one in answer.refused[:_MOST_SHOWN])]


def _site(plan: pb.TrainingPlan) -> str:
    return f"in {plan.site.rpartition('/')[2]}" if plan.site else "over several sites"


def _parts(plan: pb.TrainingPlan) -> str:
    largest = sorted(plan.step_seconds.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name.removesuffix('_s')} {took / plan.step_s:.0%}" for name, took in largest if took)


def _cost(plan: pb.TrainingPlan) -> str:
    if not plan.usd_per_hour:
        return "not known: no price of these GPUs is"
    whole = (
        f", ${plan.usd:,.0f} and {shown_duration(plan.finish.ToTimedelta().total_seconds())} in all" if plan.usd else ""
    )
    source = f" ({plan.price_source})" if plan.price_source else ""
    return f"${plan.usd_per_hour:.2f}/h{source}, ${plan.usd_per_hour / 3600 / plan.tokens_per_s * 1e6:.3g} for 1M tokens{whole}"


def _in_short(plan: pb.TrainingPlan) -> str:
    free = "" if plan.free_gpus >= plan.gpus else f", {plan.free_gpus} of them free"
    missed = f"; misses the {'; '.join(plan.misses)}" if plan.misses else ""
    return f"{plan.gpus} x {plan.gpu_type} {_site(plan)}{free}: {plan.tokens_per_s:,.0f} tokens/s, {_cost(plan)}, {plan.words}{missed}"
