"""One decision: what each possible place costs, which one the request prefers, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import (
    Alternative,
    Cost,
    Goal,
    GpuOption,
    NodeAssignment,
    Placement,
    PlaceRequest,
)
from whaleflux_scheduler.core.placement.columns import Columns
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.pricing import PricedPlace, inner_size, price
from whaleflux_scheduler.core.placement.search import Group, searches

_PLURAL = {
    Level.FLEET: "fleets",
    Level.SITE: "sites",
    Level.ZONE: "zones",
    Level.SPINE: "spines",
    Level.LEAF: "leaves",
    Level.NODE: "nodes",
}
_UNKNOWN_RUN_S = 3600.0  # what a run is taken to last when the request does not say
_BREAKING_S = 600.0  # seconds that breaking a whole node is taken to cost those who wait for one
# Where the work has data, which draws it to whole nodes: with less, gangs wait (`benchmarks.locality`).
_BREAKING_FOR_DATA_S = 1_800.0
_ALTERNATIVES, _LOOKED_AT = 3, 8
_EQUAL = 0.005  # costs this close are equal; the next criterion decides


def decide(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Placement | None:
    """The preferred placement, or None when nothing fits."""
    found = list(candidates(columns, request, datasets))
    if not found:
        return None
    ordered = rank(request, found)
    return assemble(columns, request, ordered[0], ordered[1:])


def candidates(columns: Columns, request: PlaceRequest, datasets: Datasets) -> Iterator[PricedPlace]:
    """Every option on every pool of like nodes, with and without the data's nodes, and by price where price decides."""
    found: set[GpuOption] = set()
    for option, search in searches(columns, request, datasets):
        if search.last_resort and option in found:
            continue
        for group in search.all_groups():
            found.add(option)
            yield price(columns, request, option, group, datasets)


def rank(request: PlaceRequest, found: list[PricedPlace]) -> list[PricedPlace]:
    """Best first by the request's goal. Sorting is stable, so equal candidates keep the order in which they were looked at."""
    goal, wish = request.preference.goal, request.preference
    if goal is Goal.CHEAPEST and wish.work_gpu_s:
        late = wish.deadline_s if wish.deadline_s is not None else float("inf")
        return sorted(found, key=lambda c: ((t := _time(c)) > late, t if t > late else 0.0, c.cost.total_usd or 0.0, t))
    if goal is Goal.CHEAPEST:
        return sorted(found, key=lambda c: (c.cost.usd_per_hour / c.option.throughput, c.cost.step_communication_s))
    if goal is Goal.FASTEST and not wish.work_gpu_s:
        return sorted(found, key=lambda c: (-c.option.throughput, c.cost.step_communication_s, c.cost.usd_per_hour))
    if goal is Goal.FASTEST:
        budget = wish.budget_usd if wish.budget_usd is not None else float("inf")
        return sorted(
            found, key=lambda c: ((u := c.cost.total_usd or 0.0) > budget, u if u > budget else 0.0, _time(c))
        )
    if len(found) == 1:
        return found
    return _closest(request, found)


def _time(candidate: PricedPlace) -> float:
    return (candidate.cost.run_s or 0.0) + candidate.cost.fetch_s


def _closest(request: PlaceRequest, found: list[PricedPlace]) -> list[PricedPlace]:
    """Least time lost to communication and fetching; near-equal ones by price, then by what they leave to others.

    Work of one node that breaks a whole one loses time too: that of those who wait for whole nodes.
    """
    fastest = min((c.cost.step_communication_s for c in found if c.cost.step_communication_s), default=0.0)
    speed = max(c.option.throughput for c in found)

    def lost(c: PricedPlace) -> float:
        return sum(_lost_s(request, c, fastest, speed).values())

    least = min(map(lost, found))
    slack = _EQUAL * _UNKNOWN_RUN_S * request.preference.comm_fraction

    def key(c: PricedPlace) -> tuple[object, ...]:
        over = max(0.0, lost(c) - least)
        return (0.0 if over <= slack else over, c.cost.usd_per_hour, c.value)

    return sorted(found, key=key)


def _lost_s(request: PlaceRequest, c: PricedPlace, fastest_s: float, speed: float) -> dict[str, float]:
    """Seconds lost at a place, by what loses them, against the least communication and the greatest speed of all places."""
    run = c.cost.run_s or _UNKNOWN_RUN_S
    slower = c.cost.step_communication_s / fastest_s - 1 if fastest_s else 0.0
    return {
        "communication": run * request.preference.comm_fraction * slower,
        "slower": run * (speed / c.option.throughput - 1),
        "fetch": c.cost.fetch_s,
        "breaks": (_BREAKING_FOR_DATA_S if request.datasets else _BREAKING_S) * c.breaks,
    }


def assemble(columns: Columns, request: PlaceRequest, best: PricedPlace, others: list[PricedPlace]) -> Placement:
    return Placement(
        request.id,
        tuple(_assignments(columns, request, best.group)),
        best.option,
        best.cost,
        best.estimate.bottleneck,
        reasons(columns, request, best),
        tuple(_alternative(columns, request, best, other) for other in elsewhere(columns, best, others)),
    )


def elsewhere(columns: Columns, best: PricedPlace, others: list[PricedPlace]) -> list[PricedPlace]:
    """The best three that people would call other places."""
    if not others:
        return []
    named = {_place(columns, best): best}
    for other in others[:_LOOKED_AT]:
        named.setdefault(_place(columns, other), other)
        if len(named) > _ALTERNATIVES:
            break
    return list(named.values())[1:]


def _assignments(columns: Columns, request: PlaceRequest, group: Group) -> list[NodeAssignment]:
    need, made, rank_at = request.requirement, list[NodeAssignment](), 0
    size = inner_size(request)
    per_node: dict[int, list[int]] = {}
    for i, mask in group.parts:
        per_node[i] = list(columns.shape(i).wiring.rank_order(mask, size))
    for i, position in group.devices:
        per_node.setdefault(i, []).append(position)
    for i, positions in per_node.items():
        indices = columns.shape(i).indices
        ranks = tuple(range(rank_at, rank_at + len(positions)))
        rank_at += len(positions)
        made.append(
            NodeAssignment(
                columns.names[i],
                tuple([indices[p] for p in positions]),
                ranks,
                group.request.share,
                need.cpu_millicores_per_gpu * len(positions),
                need.host_memory_bytes_per_gpu * len(positions),
            )
        )
    return made


def reasons(columns: Columns, request: PlaceRequest, best: PricedPlace) -> tuple[str, ...]:
    """Why here, for people: what was taken, how close it is, what bounds it, what it costs."""
    rows = best.rows
    level, d = columns.smallest_domain(rows)
    count = sum(mask.bit_count() for _, mask in best.group.parts) + len(best.group.devices)
    nodes = len(set(rows))
    lines = [f"{count} x {_model(columns, best)} on {nodes} node{'s' * (nodes > 1)}, {where(columns, level, d)}"]
    among, several = best.group.considered
    if several > 1:
        lines.append(f"best of {several} {_PLURAL[among]} with room")
    link = best.estimate.bottleneck
    if link.bandwidth_bytes_per_s:
        lines.append(f"collectives at {link.bandwidth_bytes_per_s / 1e9:.3g} GB/s, bound by {link.link.value}")
    if best.cost.fetch_s:
        lines.append(f"fetches its data in {best.cost.fetch_s:.0f} s")
    elif best.elsewhere_s:
        lines.append(f"its data is here: 0 s; elsewhere {best.elsewhere_s:.0f} s")
    if best.cost.usd_per_hour:
        lines.append(f"${best.cost.usd_per_hour:.2f} per hour")
    return tuple(lines)


def where(columns: Columns, level: Level, d: int) -> str:
    if level < Level.NODE:
        return columns.domain_name(level, d)
    leaf = columns.domain_name(Level.LEAF, columns.domain[Level.LEAF][d])
    return f"{columns.names[d]} ({leaf})"


def _alternative(columns: Columns, request: PlaceRequest, best: PricedPlace, other: PricedPlace) -> Alternative:
    why = [why_not(request, best, other)]
    if (less := best.cost.usd_per_hour - other.cost.usd_per_hour) > 0.005:
        why.append(f"though ${less:.2f} less per hour")
    elif less < -0.005 and "per hour" not in why[0]:
        why.append(f"${-less:.2f} more per hour")
    return Alternative(_place(columns, other), other.cost, ", ".join(why))


def _place(columns: Columns, place: PricedPlace) -> str:
    level, d = columns.smallest_domain(place.rows)
    return f"{_model(columns, place)}, {where(columns, level, d)}"


def _model(columns: Columns, place: PricedPlace) -> str:
    """Of the first device that is taken: a node may have several models, and MIG instances of several sizes."""
    if place.option.model:
        return place.option.model
    parts = place.group.parts or [(i, 1 << position) for i, position in place.group.devices]
    i, mask = parts[0]
    return columns.shape(i).models[(mask & -mask).bit_length() - 1]


def why_not(request: PlaceRequest, best: PricedPlace, other: PricedPlace) -> str:
    """The term by which `best` was preferred to `other`, as `rank` compares them."""
    ours, theirs = best.cost, other.cost
    if request.preference.goal is Goal.CLOSEST:
        pair = [c for c in (ours.step_communication_s, theirs.step_communication_s) if c]
        speed = max(best.option.throughput, other.option.throughput)
        lost = [_lost_s(request, c, min(pair, default=0.0), speed) for c in (other, best)]
        more = {term: lost[0][term] - lost[1][term] for term in lost[0]}
        worst = max(more, key=more.__getitem__)
        if sum(more.values()) > _EQUAL * _UNKNOWN_RUN_S * request.preference.comm_fraction:
            return _TERMS[worst](ours, theirs, more[worst])
    if theirs.usd_per_hour > ours.usd_per_hour:
        return f"${theirs.usd_per_hour - ours.usd_per_hour:.2f} more per hour"
    if other.value > best.value:
        return "it would leave less room in one piece to others"
    if theirs.step_communication_s > ours.step_communication_s * (1 + _EQUAL):
        return _TERMS["communication"](ours, theirs, 0.0)
    return "as good; the first of them was taken"


_TERMS: dict[str, Callable[[Cost, Cost, float], str]] = {
    "communication": lambda ours, theirs, _: (
        f"{theirs.step_communication_s / (ours.step_communication_s or theirs.step_communication_s):.2g}x the communication"
    ),
    "slower": lambda _ours, _theirs, _: "its GPUs are slower for this work",
    "fetch": lambda _ours, _theirs, more: f"{more:.0f} s more to fetch data",
    "breaks": lambda _ours, _theirs, _: (
        "it would break into a node that is wholly free, which others may need as a whole"
    ),
}
