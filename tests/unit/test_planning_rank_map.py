"""Rank maps: the same prices as ranks in order where nothing is special, the optimum where all maps can be tried, far from torn groups elsewhere."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.links import Fabric as Network
from whaleflux.planning.cluster import Cluster, Host, Ints
from whaleflux.planning.group_links import Split, groups_of
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.plans import Plans
from whaleflux.planning.rank_layouts import dimensions, lay, orders
from whaleflux.planning.rank_map import Price, best_map, priced
from whaleflux.planning.step import Groups, step_time
from whaleflux.planning.training import Training

H200 = Machine.of(CATALOGUE.types["H200"])
RING, SWITCH = float(H200.fabric.island_bytes_per_s), float(H200.fabric.switch_bytes_per_s)
SMALL = model_named("llama-3.1-8b")


def price_of(plan: Plans, model: str = "llama-3.1-8b") -> Price:
    shape = model_named(model)
    return lambda groups: step_time(shape, H200, plan, Training(), groups=groups).total_s


def host(gpus: int = 8, leaf: str = "l", *, nics: tuple[float, ...] | None = None, site: str = "onprem") -> Host:
    return Host((leaf, "s", "z", site), (0,) * gpus, nics or (50e9,) * gpus, RING, SWITCH)


def plan_of(split: Split) -> Plans:
    return Plans.of(
        tp=split.tp, cp=split.cp, pp=split.pp, dp=split.dp, ep=split.ep, replicas=split.replicas, micro_batch=1,
        global_batch=8 * split.dp, sequence=4096, zero=1, sequence_parallel=split.tp > 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "split",
    [Split(8, 1, 4, 2), Split(4, 2, 2, 2), Split(2, 1, 16, 1), Split(1, 1, 32, 1, replicas=4), Split(2, 1, 8, 2, ep=4), Split(8, 1, 1, 4)],
)  # fmt: skip
def test_even_nodes_in_order_cost_what_the_formula_says(split: Split) -> None:
    cluster = Cluster.of([host() for _ in range(split.ranks // 8)])
    plan = plan_of(split)
    shape = model_named("mixtral-8x7b") if split.ep > 1 else SMALL
    here = groups_of(cluster, split, np.arange(split.ranks)[None])
    known = step_time(shape, H200, plan, Training())
    found = step_time(shape, H200, plan, Training(), groups=here)
    assert float(found.total_s[0]) == pytest.approx(float(known.total_s))
    assert float(here.tp.nodes[0]) == float(Groups.in_order(H200.fabric, plan).tp.nodes)


def test_a_torn_tensor_group_goes_over_the_nics_that_it_has() -> None:
    cluster = Cluster.of([host(6), host(6)])
    links = groups_of(cluster, Split(tp=4, dp=3), np.arange(12)[None]).tp
    assert links.nodes == 2 and links.network_bytes_per_s == pytest.approx(2 * 50e9)


def test_ranks_whose_rail_is_broken_share_another_nic() -> None:
    cluster = Cluster.of([host(4, nics=(50e9, 0.0, 50e9, 50e9)), host(4)])
    links = groups_of(cluster, Split(tp=4, dp=2), np.arange(8)[None]).dp
    assert links.network_bytes_per_s == pytest.approx(25e9)


def test_an_oversubscribed_leaf_is_shared_by_all_groups_that_leave_it() -> None:
    hosts = [host(leaf=leaf) for leaf in ("a", "a", "b", "b")]
    cluster = Cluster.of(hosts, Network(leaf_oversubscription=4.0))
    links = groups_of(
        cluster, Split(tp=8, dp=4), np.arange(32)[None]
    ).dp  # 16 NICs of 50e9 behind a quarter of that, 8 rings through it
    assert links.network_bytes_per_s == pytest.approx(16 * 50e9 / 4 / 8)


def test_the_link_between_sites_is_the_slowest() -> None:
    cluster = Cluster.of([host(site="a"), host(site="b")], Network(site_bytes_per_s=1e9))
    links = groups_of(cluster, Split(tp=8, dp=2), np.arange(16)[None]).dp
    assert links.network_bytes_per_s == pytest.approx(1e9 / 8) and links.outer_hop_s == pytest.approx(20e-3)


def test_gpus_are_counted_as_their_hosts_were_given() -> None:
    cluster = Cluster.of(
        [Host(("b", "", "", "x"), (0, 1, 0), (1e9,) * 3, RING), Host(("a", "", "", "x"), (0,), (1e9,), RING)]
    )
    assert cluster.position.tolist() == [3, 0, 2, 1]  # leaf a comes first, and islands lie together


SPLITS = (
    Split(2, 1, 2, 2), Split(2, 2, 1, 2), Split(4, 1, 2, 1), Split(2, 1, 4, 1), Split(3, 1, 2, 1), Split(1, 1, 3, 2), Split(1, 2, 4, 1, ep=2),
)  # fmt: skip


def random_cluster(random: np.random.Generator, ranks: int) -> Cluster:
    """A few GPUs: nodes of 1 to 5, broken and slow rails, several islands, leaves."""
    hosts, left = list[Host](), ranks
    while left:
        gpus = min(left, int(random.integers(1, 6)))
        left -= gpus
        nics = tuple(random.choice([50e9, 25e9, 0.0], gpus, p=[0.6, 0.25, 0.15]).tolist())
        islands = tuple(sorted(random.integers(0, 2, gpus).tolist()))
        hosts.append(
            Host((str(random.choice(["a", "b"])), "s", "z", "x"), islands, nics, float(random.choice([RING, 26e9])))
        )
    return Cluster.of(hosts, Network(leaf_oversubscription=float(random.choice([1.0, 4.0]))))


@pytest.mark.parametrize("seed", range(16))
def test_the_optimum_of_all_maps_is_found(seed: int) -> None:
    """Of six and eight ranks, on clusters of which no two are alike."""
    random = np.random.default_rng(seed)
    split = SPLITS[seed % len(SPLITS)]
    cluster = random_cluster(random, split.ranks)
    price = price_of(plan_of(split))
    least = min(priced(cluster, split, price, chunk).min() for chunk in _all_maps(cluster))
    assert best_map(cluster, split, price).cost <= least * (1 + 1e-9)


def test_the_optimum_of_twelve_ranks_is_found() -> None:
    cluster = Cluster.of(
        [host(5, nics=(50e9,) * 5), host(4, leaf="b"), host(3, leaf="b")], Network(leaf_oversubscription=4.0)
    )
    for split in (Split(2, 1, 3, 2), Split(4, 1, 3, 1), Split(2, 1, 2, 3), Split(3, 2, 2, 1)):
        price = price_of(plan_of(split))
        least = min(priced(cluster, split, price, chunk).min() for chunk in _all_maps(cluster))
        assert best_map(cluster, split, price).cost <= least * (1 + 1e-9), split


def _all_maps(cluster: Cluster) -> list[Ints]:
    """All maps but those in which GPUs of one island with NICs of one rate, used by them alone, have changed places; in parts."""
    users = np.bincount(cluster.nic, minlength=len(cluster.nic_bytes_per_s))
    alike = [
        (cluster.island[gpu], cluster.nic_bytes_per_s[nic], nic if users[nic] > 1 else -1)
        for gpu, nic in enumerate(cluster.nic)
    ]
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(alike))}
    arranged = np.array(_arrangements(Counter(numbers[kind] for kind in alike), ()))
    found = np.empty(arranged.shape, dtype=np.intp)
    for kind, number in numbers.items():
        members = [gpu for gpu, one in enumerate(alike) if one == kind]
        found[arranged == number] = np.tile(members, len(arranged))
    return [found[at : at + 4000] for at in range(0, len(found), 4000)]


def _arrangements(left: Counter[int], so_far: tuple[int, ...]) -> list[tuple[int, ...]]:
    if not left.total():
        return [so_far]
    return [whole for kind in left for whole in _arrangements(left - Counter([kind]), (*so_far, kind))]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 2**32))
def test_every_map_gives_each_gpu_one_rank(split: Split, seed: int) -> None:
    cluster = random_cluster(np.random.default_rng(seed), split.ranks)
    found = best_map(cluster, split, price_of(plan_of(split)))
    assert sorted(found.gpus) == list(range(split.ranks))
    for order in permutations(dimensions(split)):
        assert sorted(lay(cluster, split, order)) == list(range(split.ranks))
    in_order = priced(cluster, split, price_of(plan_of(split)), np.arange(split.ranks)[None])[0]
    assert found.cost <= in_order * (1 + 1e-9) and found.order in orders(split)


def test_tensor_groups_stay_in_islands_of_uneven_nodes() -> None:
    """Nodes of 6, 6, 4: in order, the second group of four would be torn."""
    cluster = Cluster.of([host(6), host(6), host(4)])
    split = Split(tp=2, dp=4, pp=2)
    found = best_map(cluster, split, price_of(plan_of(split)))
    groups = found.gpus.reshape(-1, 2)
    assert all(cluster.island[a] == cluster.island[b] for a, b in groups)


def test_the_same_question_has_the_same_answer() -> None:
    cluster = Cluster.of([host(7), host(5), host(4, nics=(50e9, 0.0, 25e9, 50e9))])
    split = Split(tp=4, dp=2, pp=2)
    one, other = (best_map(cluster, split, price_of(plan_of(split))) for _ in range(2))
    assert one.gpus.tolist() == other.gpus.tolist() and one.cost == other.cost


@pytest.mark.parametrize(
    ("split", "words"),
    [(Split(tp=8, dp=3), "24 ranks, and there are 16 GPUs"), (Split(tp=8, dp=2, ep=3), "ep 3 must divide")],
)
def test_impossible_splits_are_refused_in_words(split: Split, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        best_map(Cluster.of([host(), host()]), split, price_of(plan_of(split)))
    assert words in str(refused.value)
