"""The quick form of `benchmarks/plan_placement` on a tree that is made up, and that its bound is one."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.baselines_topology import Tree
from benchmarks.plan_lab.rank_bound import bound
from benchmarks.plan_lab.rank_clusters import free_gpus, random_cluster
from benchmarks.plan_placement import against_bound, cases, on_blind, on_the_same
from tests.unit.test_planning_rank_map import SPLITS, plan_of, price_of
from tests.unit.test_planning_rank_map import random_cluster as small_cluster
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.machine import Machine
from whaleflux.planning.rank_map import best_map

H200 = Machine.of(CATALOGUE.types["H200"])
TREE = Tree(leaf=tuple(host // 8 for host in range(64)), spine=tuple(host // 32 for host in range(64)))


@pytest.mark.parametrize("seed", range(14))
def test_no_map_is_better_than_the_bound(seed: int) -> None:
    """The optimum of a few GPUs, which best_map finds (test_planning_rank_map)."""
    split = SPLITS[seed % (len(SPLITS) - 1)]
    cluster = small_cluster(np.random.default_rng(seed), split.ranks)
    price = price_of(plan_of(split))
    assert bound(cluster, split, price) <= best_map(cluster, split, price).cost * (1 + 1e-9)


def test_on_whole_nodes_maps_are_near_the_bound() -> None:
    row = against_bound(H200, 128, range(3), whole=True)
    assert 0 < row["of_bound_pct"] <= 100.0 + 1e-6
    assert row["mean_of_bound_pct"] >= 90


def test_blind_placement_of_single_gpus_costs_most_of_the_communication() -> None:
    rows = {row["against"].split(", ")[1]: row for row in on_blind(TREE, H200, cases()[0], 2.0, [1])}
    assert rows["random GPUs"]["less_pct"] >= 60 and rows["first-fit GPUs"]["less_pct"] >= 60
    assert rows["random hosts"]["floor_s"] <= rows["random hosts"]["ours_s"] * (1 + 1e-9)


def test_where_order_matters_the_map_is_better_on_the_same_nodes() -> None:
    row, (target,) = on_the_same(H200, range(12))
    assert row["order_matters"] >= 2 and target.value >= 15


def test_others_have_parts_of_hosts_and_as_much_as_was_asked() -> None:
    free = free_gpus(TREE, 0.7, 3)
    assert 0.28 <= sum(free) / (8 * len(free)) <= 0.5 and any(0 < left < 8 for left in free)


def test_random_clusters_have_nodes_of_three_to_seven() -> None:
    sizes = Counter(Counter(random_cluster(128, 5, H200).node.tolist()).values())
    assert set(sizes) <= {1, 2, 3, 4, 5, 6, 7} and sum(size * count for size, count in sizes.items()) == 128
