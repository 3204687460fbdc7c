"""The best place by exhaustion, for fleets of up to 64 hosts: what the engine's choice is measured against.

Under the engine's own cost model (`comm.estimate`) a gang on like hosts costs what its narrowest host, the set of leaves it touches
and its number of hosts make it cost. So all sets of leaves and all widths are tried, each with the fewest hosts that realise it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from benchmarks.common import Row, Target
from whaleflux.fleet import Gpu, Level, Link, LinkKind, Node
from whaleflux.fleet.links import Fabric
from whaleflux_scheduler.core.placement.api import GroupRequest, Placement, PlaceRequest, Subgroup
from whaleflux_scheduler.core.placement.columns import Columns
from whaleflux_scheduler.core.placement.comm import estimate
from whaleflux_scheduler.core.placement.engine import Engine

_LINKS = tuple(Link(a, b, LinkKind.NVLINK, 347e9) for a, b in combinations(range(8), 2))


def sampled(seed: int, *, partly: bool) -> Engine:
    """A fleet of at most 64 hosts under one to three spines, loaded by random gangs and, if `partly`, small jobs."""
    pick = random.Random(seed)
    made = Engine(Fabric(leaf_oversubscription=pick.choice([1.0, 2.0]), spine_oversubscription=1.0))
    spines, host = pick.choice([1, 2, 3]), 0
    for leaf in range(8):
        for _ in range(pick.choice([4, 7, 8])):
            gpus = tuple(Gpu(i, f"{host}-{i}", "GPU", 80 * 10**9) for i in range(8))
            spine = f"p{leaf * spines // 8}"
            name = f"sites/a/nodes/h{host:02}"
            made.upsert_node(Node(name, "a", gpus, _LINKS, spine=spine, leaf=f"l{leaf}", network_bytes_per_s=400e9))
            host += 1
    names = sorted(made.nodes)
    for at in range(pick.randrange(3, 12)):
        hidden = tuple(pick.sample(names, pick.randrange(len(names) // 2, len(names) - 4)))  # scatters the gangs
        size = pick.choice([8, 16, 32]) if not partly else pick.choice([1, 2, 3, 5, 8, 12, 16])
        found = made.fits(PlaceRequest(f"x{at}", GroupRequest(size), exclude_nodes=hidden))
        if found:
            made.apply(found)
    return made


def best_step_s(columns: Columns, gpus: int, widths: Sequence[int]) -> float:
    """The least modelled seconds of any placement of `gpus` in which every host gives at least one of `widths`, and one exactly that."""
    leaves = sorted(set(columns.domain[Level.LEAF]))
    best = float("inf")
    for width in widths:
        free = {
            d: sorted((i for i in _rows(columns, d) if columns.offered[i] >= width), key=lambda i: -columns.offered[i])
            for d in leaves
        }
        usable = [d for d in leaves if free[d]]
        for size in range(1, len(usable) + 1):
            for chosen in combinations(usable, size):
                rows = _fewest(columns, [free[d] for d in chosen], gpus, width)
                if rows is not None:
                    best = min(best, _cost(columns, rows, gpus, width))
    return best


def _rows(columns: Columns, leaf: int) -> range:
    return range(int(columns.lo[Level.LEAF][leaf]), int(columns.hi[Level.LEAF][leaf]))


def _fewest(columns: Columns, by_leaf: list[list[int]], gpus: int, width: int) -> list[int] | None:
    """The fewest hosts that touch every leaf and hold `gpus` with at least `width` each; None when there are none."""
    rows = [hosts[0] for hosts in by_leaf]
    others = sorted((i for hosts in by_leaf for i in hosts[1:]), key=lambda i: -columns.offered[i])
    while sum(columns.offered[i] for i in rows) < gpus and others:
        rows.append(others.pop(0))
    enough = sum(columns.offered[i] for i in rows) >= gpus >= width * len(rows)
    return rows if enough else None


def _cost(columns: Columns, rows: list[int], gpus: int, width: int) -> float:
    """One host gives exactly `width`, the others share the rest as evenly as they can; only the narrowest counts."""
    give = dict.fromkeys(rows, width)
    left = gpus - width * len(rows)
    for i in rows:
        more = min(left, columns.offered[i] - width)
        give[i] += more
        left -= more
    parts = [(i, columns.shape(i).wiring.choose(columns.free_mask(i), n)) for i, n in sorted(give.items())]
    return estimate(columns, parts).step_s


def compare(seed: int, states: int) -> tuple[list[Row], list[Target]]:
    """How far the engine's choice is from the best one, on sampled states, for whole-host gangs and for any shape."""
    rows: list[Row] = []
    targets: list[Target] = []
    for kind, partly in (("whole hosts", False), ("any shape", True)):
        gaps: list[float] = []
        for at in range(states):
            made = sampled(seed + at, partly=partly)
            pick = random.Random(seed - at)
            gpus = 8 * pick.randrange(2, 24) if not partly else pick.choice([2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 96])
            group = GroupRequest(gpus, subgroups=() if partly else (Subgroup(8, Level.NODE),))
            found = made.fits(PlaceRequest("new", group))
            best = best_step_s(made.columns, gpus, range(1, 9) if partly else [8])
            assert (found is None) == (best == float("inf")), "one of them found a place and the other did not"
            if isinstance(found, Placement) and best > 0:
                gaps.append(found.cost.step_communication_s / best - 1)
        rows.append(
            {
                "exact": kind,
                "states": len(gaps),
                "equal": sum(g < 1e-9 for g in gaps),
                "within_1_percent": sum(g <= 0.01 for g in gaps),
                "mean_gap_percent": 100 * sum(gaps) / len(gaps),
                "worst_gap_percent": 100 * max(gaps),
            }
        )
        within = 100 * sum(g <= 0.01 for g in gaps) / len(gaps)
        targets.append(Target(f"states_within_1_percent_of_exact ({kind})", within, 100, "%", "higher"))
    return rows, targets
