"""The published policies by hand-made cases, the order of arrivals, and bounds that no policy may pass."""

import math

import numpy as np
import pytest

from benchmarks.baselines_packing import Policy, fill_by, fragmentation_milli, typical_pods
from benchmarks.packing_bound import bound_pct, choose_probe, cuts_of
from benchmarks.packing_columns import DeviceArrays, Kinds
from benchmarks.packing_openb import MIB, Workload, arrivals, read_workload

KINDS = Kinds(
    np.array([4000, 8000, 2000, 64_000]),
    np.array([1, 1, 1, 1]),
    np.array([1, 1, 0, 8]),
    np.array([600, 1000, 0, 1000]),
    np.array([0, 0b10, 0, 0]),
)
PODS = np.repeat([0, 1, 2, 3], [50, 30, 18, 2])


def fleet(*nodes):
    """Nodes as (cores, GPUs)."""
    free = np.where(np.arange(8)[None, :] < np.array([[n[1]] for n in nodes]), 1000, 0).astype(np.int64)
    return DeviceArrays(
        np.array([n[0] * 1000 for n in nodes]),
        np.full(len(nodes), 100),
        np.ones(len(nodes), dtype=np.int64),
        free,
    )


def test_typical_pods_are_the_most_frequent_until_95_percent_are_covered():
    typical = typical_pods(KINDS, PODS)
    assert typical.gpu_milli.tolist() == [600, 1000, 0]
    assert typical.share == pytest.approx([50 / 98, 30 / 98, 18 / 98])


@pytest.mark.parametrize(
    ("cpu", "model", "expected"),
    [
        # who wants a GPU or 0.6 of one loses the hole of 400, who wants none everything
        (90_000, 1, (50 * 400 + 30 * 400 + 18 * 2400) / 98),
        (90_000, 0, (50 * 400 + 30 * 2400 + 18 * 2400) / 98),  # the model is not for whole ones
        (5_000, 1, (50 * 400 + 30 * 2400 + 18 * 2400) / 98),  # CPU for shares only
        (1_000, 1, 2400.0),
    ],
)
def test_fragmentation_is_what_typical_pods_cannot_use(cpu, model, expected):
    free = np.array([1000, 400, 1000, 0])
    assert fragmentation_milli(typical_pods(KINDS, PODS), cpu, model, free) == pytest.approx(expected)


def test_fgd_breaks_ties_by_order_and_best_fit_by_fullness():
    typical = typical_pods(KINDS, PODS)
    two = fleet((900, 8), (20, 1))
    pod = np.array([2])  # needs no GPU: both nodes keep all they had, so the scores are equal
    assert fill_by(Policy.FGD, two, KINDS, pod, typical).node.tolist() == [0]
    assert fill_by(Policy.FGD_BEST_FIT, two, KINDS, pod, typical).node.tolist() == [1]


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_keeps_exact_accounts_and_drops_only_what_fits_nowhere(policy):
    some = fleet((64, 8), (16, 4), (10, 2))
    pods = np.random.default_rng(3).permutation(PODS)
    end = fill_by(policy, some, KINDS, pods, typical_pods(KINDS, PODS), tie_seed=0)
    placed = pods[end.node >= 0]
    assert end.allocated_milli == (KINDS.gpus * KINDS.gpu_milli)[placed].sum()
    assert end.allocated_milli == some.free_milli.sum() - end.free_milli.sum()
    assert end.free_milli.min() >= 0
    assert end.cpu_left.min() >= 0
    for kind in {*pods[end.node < 0].tolist()}:
        able = (end.free_milli >= max(1, KINDS.gpu_milli[kind])).sum(axis=1)
        roomy = (end.cpu_left >= KINDS.cpu_millicores[kind]) & (able >= KINDS.gpus[kind])
        assert not roomy.any()


def test_arrivals_are_the_shuffled_list_then_draws_until_the_demand_counted_once_per_pod_is_reached():
    work = Workload("made up", KINDS, PODS, np.zeros(len(PODS), dtype=np.int64))
    capacity = 100_000
    order = arrivals(work, capacity, 42)
    assert sorted(order[: len(PODS)].tolist()) == PODS.tolist()
    asked = KINDS.gpu_milli[order].sum()
    assert 1.3 * capacity - 1000 < asked <= 1.3 * capacity
    assert arrivals(work, capacity, 42).tolist() == order.tolist()
    assert arrivals(work, capacity, 43).tolist() != order.tolist()


def test_a_pod_list_is_read_by_name_order_with_models_as_bits(tmp_path):
    import gzip

    text = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "pod-2,4000,8,1,500,T4|G2,LS,Running,5,105,\n"
        "pod-1,2000,4,0,0,,LS,Running,5,3000000,10\n"
        "pod-3,2000,4,1,500,H9,LS,Running,5,6,5\n"
    )
    (tmp_path / "openb_pod_list_x.csv.gz").write_bytes(gzip.compress(text.encode()))
    work = read_workload(tmp_path, "x", {"G2": 0, "P100": 1, "T4": 2})
    first, second, third = work.pods
    assert work.kinds.cpu_millicores[[first, second]].tolist() == [2000, 4000]
    assert work.kinds.memory_bytes[second] == 8 * MIB
    assert work.kinds.models[second] == 0b101
    assert work.kinds.models[third] & 0b111 == 0
    assert work.kinds.models[third] != 0  # an unknown model fits nowhere
    assert work.life_s.tolist() == [7 * 86_400, 100, 1]


def test_cuts_are_all_ways_to_fill_a_device_so_that_no_size_fits_any_more():
    cuts = cuts_of(np.array([500, 300]))
    assert sorted(cuts.counts.tolist()) == [[0, 3], [1, 1], [2, 0]]


def test_the_bound_of_shares_that_waste_a_fifth_is_four_fifths():
    kinds = Kinds(np.array([1000]), np.array([1]), np.array([1]), np.array([800]), np.array([0]))
    assert choose_probe(kinds, np.zeros(50, dtype=np.int64)) == 0
    assert bound_pct(kinds, np.zeros(50, dtype=np.int64), 10) == pytest.approx(80.0)


def test_without_shares_the_bound_is_everything():
    kinds = Kinds(np.array([1000]), np.array([1]), np.array([1]), np.array([1000]), np.array([0]))
    assert bound_pct(kinds, np.zeros(5, dtype=np.int64), 10) == 100.0


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_passes_the_bound(seed):
    random = np.random.default_rng(seed)
    kinds = Kinds(
        np.array([3000, 3000, 8000, 11_000, 4000]),
        np.ones(5, dtype=np.int64),
        np.array([1, 1, 1, 1, 1]),
        np.array([810, 160, 470, 1000, 320]),
        np.zeros(5, dtype=np.int64),
    )
    some = fleet(*[(96, 8)] * 3, *[(104, 2)] * 4)
    pods = random.choice(5, size=90, p=[0.35, 0.05, 0.2, 0.3, 0.1])
    limit = bound_pct(kinds, pods, 32)
    assert not math.isnan(limit)
    for policy in Policy:
        end = fill_by(policy, some, kinds, pods, typical_pods(kinds, pods), tie_seed=seed)
        assert 100 * end.allocated_milli / 32_000 <= limit + 1e-6
