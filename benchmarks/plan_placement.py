"""How much communication our placement and rank maps save against Megatron's order, on blind placement and on the same nodes.

Part 1: 128 H200 of the lingjun2023 tree, whose hosts others have parts of. Blind placements take GPUs at random or first-fit, one by one (a job that
says how many GPUs) or as whole hosts; their ranks lie in Megatron's order (tp, cp, dp, pp) on the GPUs as they came. Ours are the production
engine's placement and map. Part 2: clusters of which no two nodes are alike, the same nodes for both, in the order of the tree, which is
Megatron's best case. Part 3: how near maps are to a bound that no map can beat (`plan_lab/rank_bound.py`), and how long they take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np

from benchmarks.baselines_topology import Policy, Tree, blind_first_fit, blind_random
from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.plan_lab.rank_bound import bound
from benchmarks.plan_lab.rank_clusters import cluster_of, free_gpus, ours, random_cluster
from benchmarks.topology import read_tree
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.cluster import Cluster, Ints
from whaleflux.planning.group_links import Split, groups_of
from whaleflux.planning.job_map import price_of, usual_plan
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.rank_layouts import lay, orders
from whaleflux.planning.rank_map import best_map
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

GPUS = 128
BLIND_GOAL, SAME_GOAL, BOUND_GOAL = 60.0, 15.0, 98.0  # percent
MATTERS = 0.05  # order matters where some known map has so much less exposed communication than Megatron's
NOTES = [
    "blind placement of single GPUs tears tensor and context parallel groups apart; of whole hosts it does not, and what is left is mostly in NVLink",
    "floor_s is the same job on whole hosts below one leaf that nothing shares: no placement saves more",
    "maps are made for the time of a step; what is exposed alone may be a little more than in another order",
    "on nodes of 3 to 7 GPUs the bound gives each torn group the best NICs that any has, which no map can: it is loose there",
]
SECONDS = {128: 0.1, 1024: 1.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A model and how it is split."""

    name: str
    shape: ModelShape
    plan: Plans

    @property
    def split(self) -> Split:
        return Split.of(self.plan)

    def exposed_s(self, cluster: Cluster, machine: Machine, gpus: Ints) -> float:
        """Seconds of a step that nothing hides, of one map."""
        groups = groups_of(cluster, self.split, gpus[None])
        return float(np.ravel(step_time(self.shape, machine, self.plan, Training(), groups=groups).exposed_s)[0])


def cases() -> list[Case]:
    """What `whaleflux plan --gpus 128 --gpu H200` chooses, batches of about 4M tokens; and for 70B a usual Megatron split besides."""
    common = {"micro_batch": 1, "sequence": 8192, "zero": 1}
    big = Plans.of(tp=8, pp=8, dp=2, global_batch=488, recompute=Recompute.FULL, sequence_parallel=True, **common)
    chosen = Plans.of(pp=4, cp=8, dp=4, vp=4, global_batch=480, **common)
    usual = Plans.of(tp=4, pp=4, cp=2, dp=4, vp=5, global_batch=480, sequence_parallel=True, **common)
    small = model_named("llama-3.1-70b")
    return [
        Case("700B: tp 8, pp 8, dp 2", model_named("dense-700b"), big),
        Case("70B: cp 8, pp 4, dp 4", small, chosen),
        Case("70B: tp 4, cp 2, pp 4, dp 4", small, usual),
    ]


def measure(options: Options) -> Report:
    """Exposed communication of rank maps against Megatron's order on blind placements and on the same nodes; maps against a bound, and their time."""
    machine = Machine.of(CATALOGUE.types["H200"])
    tree, _ = read_tree(options.trace("lingjun2023", "topo.csv"))
    report = Report(
        simulated="GPUs, links, what others have of the hosts, and steps (the planner's formulas); the tree is real"
    )
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    for over in (2.0,) if options.quick else (1.0, 2.0):
        for case in cases():
            report.rows += on_blind(tree, machine, case, over, seeds)
    report.targets += blind_targets(report.rows)
    same, targets = on_the_same(machine, range(options.seed, options.seed + (12 if options.quick else 100)))
    report.rows.append(same)
    report.targets += targets
    for ranks in (128, 1024) if options.quick else (128, 256, 512, 1024):
        for whole in (True, False):
            seeds = range(options.seed, options.seed + (3 if options.quick else 10))
            row = against_bound(machine, ranks, seeds, whole=whole)
            report.rows.append(row)
            near = row["of_bound_pct"]
            report.targets.append(Target(f"of the bound, {row['case']}", near, BOUND_GOAL, "%", better="higher"))
            if ranks in SECONDS:
                took = row["seconds_at_most"]
                report.targets.append(Target(f"seconds, {row['case']}", took, SECONDS[ranks], "s", per="numpy"))
    report.notes = NOTES
    return report


# part 1


def on_blind(tree: Tree, machine: Machine, case: Case, over: float, seeds: Sequence[int]) -> Iterator[Row]:
    """A row for each way of blind placement."""
    policies: dict[str, tuple[Callable[[int], Policy], int]] = {
        "random GPUs": (blind_random, 1),
        "first-fit GPUs": (blind_first_fit, 1),
        "random hosts": (blind_random, 8),
        "first-fit hosts": (blind_first_fit, 8),
    }
    found: dict[str, list[float]] = {name: [] for name in ("ours", *policies)}
    floor_s = _floor_s(machine, case)
    for seed in seeds:
        free = free_gpus(tree, 0.7, seed)
        given = ours(tree, free, GPUS, case.split.tp, over)
        cluster = cluster_of(tree, given, machine, over)
        placed = best_map(cluster, case.split, price_of(case.shape, machine, case.plan)).gpus
        found["ours"].append(case.exposed_s(cluster, machine, placed))
        for name, (policy, pod) in policies.items():
            blind = policy(seed)(tree, free, GPUS // pod, pod)
            assert blind is not None, "the fleet has room for it"
            cluster = cluster_of(tree, blind, machine, over)
            found[name].append(case.exposed_s(cluster, machine, np.argsort(cluster.position)))
    for name in policies:
        yield {
            "case": case.name,
            "leaves": f"{over:g}:1",
            "against": f"Megatron's order, {name}",
            "ours_s": mean(found["ours"]),
            "theirs_s": mean(found[name]),
            "floor_s": floor_s,
            "less_pct": 100 * (1 - mean(found["ours"]) / mean(found[name])),
        }


def _floor_s(machine: Machine, case: Case) -> float:
    """On whole hosts below one leaf."""
    hosts = Tree(leaf=(0,) * 16, spine=(0,) * 16)
    cluster = cluster_of(hosts, [(host, 8) for host in range(16)], machine, 1.0)
    return case.exposed_s(
        cluster, machine, best_map(cluster, case.split, price_of(case.shape, machine, case.plan)).gpus
    )


def blind_targets(rows: Sequence[Row]) -> list[Target]:
    """Of each case and way of blind placement the least."""
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["case"].split(":")[0], row["against"].split(", ")[1])
        least[key] = min(least.get(key, np.inf), row["less_pct"])
    return [
        Target(f"{model}, {how}: less exposed communication", value, BLIND_GOAL, "%", better="higher")
        for (model, how), value in least.items()
    ]


# part 2

_SPLITS = (Split(tp=4, pp=4), Split(tp=2, pp=4), Split(tp=2, cp=2, pp=2), Split(tp=2, pp=2), Split(cp=2, pp=4))


def on_the_same(machine: Machine, seeds: Sequence[int]) -> tuple[Row, list[Target]]:
    """One cluster for each seed, of 48 to 128 GPUs, with one of five splits of 70B."""
    every, matter = list[float](), list[float]()
    for seed in seeds:
        case = _random_case(seed)
        cluster = random_cluster(case.split.ranks, seed, machine)
        exposed = partial(case.exposed_s, cluster, machine)
        theirs = exposed(np.arange(case.split.ranks))
        mine = exposed(best_map(cluster, case.split, price_of(case.shape, machine, case.plan)).gpus)
        known = min(mine, *(exposed(lay(cluster, case.split, order)) for order in orders(case.split)))
        every.append(1 - mine / theirs)
        if known < theirs * (1 - MATTERS):
            matter.append(1 - mine / theirs)
    less = 100 * mean(matter) if matter else float("nan")
    row = {"case": "random clusters, 70B", "against": "Megatron's order, same nodes", "clusters": len(every),
           "order_matters": len(matter), "less_pct": less, "less_pct_of_all": 100 * mean(every), "least_pct": 100 * min(every)}  # fmt: skip
    return row, [
        Target("same nodes, where order matters: less exposed communication", less, SAME_GOAL, "%", better="higher")
    ]


def _random_case(seed: int, ranks: int = 0) -> Case:
    pick = np.random.default_rng(seed)
    split = _SPLITS[seed % len(_SPLITS)]
    copy = split.tp * split.cp * split.pp
    dp = (ranks or int(pick.integers(48, 129))) // copy
    whole = Split(split.tp, split.cp, dp, split.pp)
    shape = model_named("llama-3.1-70b")
    return Case("70B", shape, usual_plan(whole, shape))


# part 3


def against_bound(machine: Machine, ranks: int, seeds: Sequence[int], *, whole: bool) -> Row:
    """The worst of several clusters of so many GPUs: the bound's step against the map's."""
    of_bound, seconds = list[float](), list[float]()
    for seed in seeds:
        case = _random_case(seed, ranks)
        cluster = random_cluster(ranks, seed, machine, whole=whole)
        price = price_of(case.shape, machine, case.plan)
        begun = time.thread_time()
        cost = best_map(cluster, case.split, price).cost
        seconds.append(time.thread_time() - begun)
        of_bound.append(bound(cluster, case.split, price) / cost)
    return {"case": f"{ranks} GPUs, {'whole nodes' if whole else 'nodes of 3-7'}", "against": "bound of the step", "clusters": len(of_bound), "of_bound_pct": 100 * min(of_bound),
            "mean_of_bound_pct": 100 * mean(of_bound), "seconds_at_most": max(seconds)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("plan_placement", measure))
