"""A placement in words: what the engine chose, as the record that users read. Why a job waits: `wait_reasons`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

from whaleflux import names
from whaleflux.quantities import shown_bytes
from whaleflux_scheduler.core.devices import Devices
from whaleflux_scheduler.core.lifecycle import GpuAssignment, next_epoch, tasks_of
from whaleflux_scheduler.core.model import Job, Option, SchedulingDecision
from whaleflux_scheduler.core.placement.api import Placement

MOST_ALTERNATIVES = 5
MOST_REASONS = 10


def assignment_of(placement: Placement, devices: Devices) -> GpuAssignment:
    """Nodes and GPUs in rank order; several parts on one node are one task."""
    gpus: dict[str, list[int]] = {}
    for part in sorted(placement.nodes, key=lambda part: part.ranks):
        gpus.setdefault(part.node, []).extend(part.gpus)
    nodes = tuple((node, devices.uuids(node, indices)) for node, indices in gpus.items())
    models = Counter(model for node, uuids in nodes for model in devices.models(node, uuids))
    cost = placement.cost
    share_bytes = max((part.share.memory_bytes for part in placement.nodes if part.share), default=0)
    return GpuAssignment(
        nodes,
        cost.usd_per_hour,
        cost.step_communication_s,
        tuple(sorted(models.items())),
        share_bytes=share_bytes,
        cpu_ranks=() if any(gpus.values()) else _ranks(placement, gpus),
        gpu_parts=_parts(nodes, devices, share_bytes),
    )


def _ranks(placement: Placement, nodes: Iterable[str]) -> tuple[int, ...]:
    ranks = Counter(part.node for part in placement.nodes for _ in part.ranks)
    return tuple(ranks[node] for node in nodes)


def _parts(nodes: Sequence[tuple[str, Sequence[str]]], devices: Devices, share_bytes: int) -> tuple[float, ...]:
    """How many GPUs the shares or MIG instances of each node are together; none of whole GPUs."""
    parts = tuple(sum(devices.parts_of_gpu(node, uuids, share_bytes)) for node, uuids in nodes)
    return parts if any(part != len(uuids) for part, (_, uuids) in zip(parts, nodes, strict=True)) else ()


def placed(
    job: Job, placement: Placement, assignment: GpuAssignment, devices: Devices, epoch: int, now: datetime
) -> SchedulingDecision:
    """The record of a placement."""
    cost = placement.cost
    best_s = cost.step_communication_s
    return SchedulingDecision(
        time=now,
        placed=True,
        summary=_summary(assignment, placement),
        reasons=(*_how_split(assignment), *placement.reasons)[:MOST_REASONS],
        alternatives=tuple(
            Option(
                f"{other.where}: {other.why_not}",
                other.cost.step_communication_s / best_s if best_s else 1.0,
                other.cost.usd_per_hour,
            )
            for other in placement.alternatives[:MOST_ALTERNATIVES]
        ),
        usd_per_hour=cost.usd_per_hour,
        communication_s=best_s,
        tasks=tuple(tasks_of(job, epoch, assignment)),
    )


def unexplained(job: Job, placement: Placement, assignment: GpuAssignment, now: datetime) -> SchedulingDecision:
    """The same without a word, for who simulates: where, and what it costs."""
    cost, tasks = placement.cost, tuple(tasks_of(job, next_epoch(job), assignment))
    return SchedulingDecision(
        now, True, "", usd_per_hour=cost.usd_per_hour, communication_s=cost.step_communication_s, tasks=tasks
    )


def _how_split(assignment: GpuAssignment) -> Iterable[str]:
    """How the model is split now, where that is not as before, and how ranks lie on the links."""
    return filter(None, (assignment.split.why if assignment.split is not None else "", assignment.laid))


def _summary(assignment: GpuAssignment, placement: Placement) -> str:
    models = assignment.gpus_by_model
    of = f"{shown_bytes(assignment.share_bytes)} of " if assignment.share_bytes else ""
    gpus = " + ".join(f"{count} x {of}{model}" for model, count in models)
    if assignment.cpu_ranks:
        ranks = sum(assignment.cpu_ranks)
        gpus = f"{ranks} rank{'s' * (ranks != 1)} without GPUs"
    count = len(assignment.nodes)
    sites = sorted({names.top(node) for node, _ in assignment.nodes})
    where = f"site{'s' * (len(sites) > 1)} {', '.join(sites)}"
    holds = f", one {placement.bottleneck.level.name.lower()}" if count > 1 and len(sites) == 1 else ""
    return f"{gpus} on {count} node{'s' * (count != 1)}, {where}{holds}"
