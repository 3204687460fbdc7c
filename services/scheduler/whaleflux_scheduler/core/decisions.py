"""Decisions in words: what the engine answered, as the record that users read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core.lifecycle import Place, task_id
from whaleflux_scheduler.core.model import Decision, Job, Option, Task
from whaleflux_scheduler.core.placement.api import NoPlacement, Placement

MOST_ALTERNATIVES = 5
MOST_REASONS = 10
_EXCLUDED, _AVOIDED = "excluded by name", "avoided after a failure"  # the engine's word, and why we asked for it


def place_of(placement: Placement) -> Place:
    """Nodes and GPUs in rank order; several parts on one node are one task."""
    gpus: dict[str, list[int]] = {}
    for part in sorted(placement.nodes, key=lambda part: part.ranks):
        gpus.setdefault(part.node, []).extend(part.gpus)
    nodes = tuple((node, tuple(indices)) for node, indices in gpus.items())
    return Place(nodes, placement.cost.usd_per_hour, placement.cost.step_communication_s)


def placed(job: Job, placement: Placement, nodes: Mapping[str, Node], epoch: int, now: datetime) -> Decision:
    """The record of a placement."""
    place = place_of(placement)
    cost = placement.cost
    best_s = cost.step_communication_s
    return Decision(
        time=now,
        placed=True,
        summary=_summary(place, nodes, placement),
        reasons=placement.reasons[:MOST_REASONS],
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
        tasks=tuple(_tasks(job, place, epoch)),
    )


def waits(no: NoPlacement, now: datetime, avoided: Collection[str] = ()) -> Decision:
    """The record of a job that cannot be placed now. `avoided`: nodes that it does not get because they failed it."""
    summary = no.summary.replace(_EXCLUDED, _AVOIDED)
    reasons = [] if no.ever or avoided else ["the fleet could not hold it even if it were empty"]
    if avoided:
        names = ", ".join(sorted(avoided)[:3]) + (" and more" if len(avoided) > 3 else "")
        reasons.append(f"it avoids {names} for a while, since work of it failed there")
    return Decision(
        time=now,
        placed=False,
        summary=f"waits: {summary}" if summary else "waits: no room",
        reasons=tuple(reasons),
        exclusions=tuple((b.constraint.replace(_EXCLUDED, _AVOIDED), b.nodes) for b in no.blocked),
        smallest_change=no.smallest_change,
    )


def held_back(why: str, now: datetime, change: str = "") -> Decision:
    """The record of a job that was not even tried."""
    return Decision(time=now, placed=False, summary=f"waits: {why}", smallest_change=change)


def _summary(place: Place, nodes: Mapping[str, Node], placement: Placement) -> str:
    models = Counter(_model(nodes.get(node), index) for node, gpus in place.nodes for index in gpus)
    gpus = " + ".join(f"{count} x {model}" for model, count in sorted(models.items()))
    count = len(place.nodes)
    sites = sorted({node.split("/")[1] for node, _ in place.nodes})
    where = f"site{'s' * (len(sites) > 1)} {', '.join(sites)}"
    holds = f", one {placement.bottleneck.level.name.lower()}" if count > 1 and len(sites) == 1 else ""
    return f"{gpus} on {count} node{'s' * (count != 1)}, {where}{holds}"


def _model(node: Node | None, index: int) -> str:
    return next((gpu.model for gpu in node.gpus if gpu.index == index), "GPU") if node else "GPU"


def _tasks(job: Job, place: Place, epoch: int) -> Sequence[Task]:
    tasks, rank = [], 0
    for group_rank, (node, gpus) in enumerate(place.nodes):
        tasks.append(Task(task_id(job, epoch, group_rank), node, gpus, rank, group_rank))
        rank += len(gpus)
    return tasks
