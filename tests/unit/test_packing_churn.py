"""Pods that come and go: exact accounts at the end of every run, moves that are paid for and undone when in vain."""

import numpy as np
import pytest

from benchmarks.baselines_packing import Policy, typical_pods
from benchmarks.churn_kernel import BY_TABLE, MOVE_S, run_churn
from benchmarks.packing_churn import bound_pct
from benchmarks.packing_columns import DeviceArrays, Kinds
from benchmarks.packing_openb import Stream, Workload
from benchmarks.placement_lab.idle_table import untaught

# half a GPU, a whole one, a gang of two
KINDS = Kinds(
    np.array([1000, 1000, 2000]),
    np.array([1, 1, 2]),
    np.array([1, 1, 2]),
    np.array([500, 1000, 1000]),
    np.zeros(3, dtype=np.int64),
)
HALF, ONE, GANG = range(3)
TABLE = untaught(1000.0, 1.0)
HOUR = 3600.0


def fleet(*gpus):
    free = np.where(np.arange(4)[None, :] < np.array(gpus)[:, None], 1000, 0).astype(np.int64)
    return DeviceArrays(
        np.full(len(gpus), 100_000),
        np.full(len(gpus), 1000),
        np.zeros(len(gpus), dtype=np.int64),
        free,
    )


def stream(*pods):
    time_s, kind, life_s = zip(*pods, strict=True)
    return Stream(np.array(time_s), np.array(kind), np.array(life_s))


def run(some_fleet, pods, *, budget=0.0, policy=BY_TABLE, warm_up_s=0.0):
    typical = typical_pods(KINDS, pods.kind)
    return run_churn(some_fleet, KINDS, pods, warm_up_s, TABLE, typical, policy=policy, move_budget=budget)


def test_a_pod_is_allocated_for_its_life_and_its_place_is_free_again():
    seen = run(fleet(1), stream((0.0, ONE, 100.0), (50.0, ONE, 10.0), (100.0, ONE, 20.0), (200.0, HALF, 1.0)))
    assert seen.dropped == 1  # the one that came at 50
    assert seen.allocated_milli_s == pytest.approx(120 * 1000)


def test_only_what_happens_after_the_warm_up_counts():
    seen = run(fleet(1), stream((0.0, ONE, 100.0), (200.0, ONE, 1.0)), warm_up_s=60.0)
    assert seen.allocated_milli_s == pytest.approx(40 * 1000)
    assert seen.arrived == 1


SCATTERED = (
    (0.0, ONE, 10 * HOUR),
    (1.0, ONE, HOUR),
    (2.0, ONE, 10 * HOUR),
    (3.0, ONE, HOUR),
    # two nodes of two GPUs, each half free from here on
    (2 * HOUR, GANG, HOUR),
    (5 * HOUR, HALF, 1.0),
)


def test_a_gang_gets_its_node_by_a_move_if_there_is_a_budget_and_the_move_is_paid():
    stay = run(fleet(2, 2), stream(*SCATTERED))
    move = run(fleet(2, 2), stream(*SCATTERED), budget=0.5)
    assert (stay.dropped_gangs, stay.moves) == (1, 0)
    assert (move.dropped_gangs, move.moves) == (0, 1)
    assert move.moving_milli_s == pytest.approx(MOVE_S * 1000)
    gained = move.allocated_milli_s - stay.allocated_milli_s
    assert gained == pytest.approx(2 * HOUR * 1000)


def busy():
    random = np.random.default_rng(5)
    count = 3000
    return Stream(
        np.sort(random.uniform(0, 10 * HOUR, count)),
        random.choice(3, size=count, p=[0.4, 0.5, 0.1]),
        random.exponential(600.0, count) + 1,
    )


MANY = fleet(4, 4, 2, 2, 4, 4, 1, 1, 4, 4, 4, 4)


def test_a_spent_budget_allows_no_further_move():
    assert 1 <= run(MANY, busy(), budget=1e-12).moves <= 2  # those for one gang: nothing was spent before them
    assert run(MANY, busy(), budget=0.05).moves > 20


@pytest.mark.parametrize("policy", [BY_TABLE, int(Policy.FGD_BEST_FIT), int(Policy.BEST_FIT)])
@pytest.mark.parametrize("budget", [0.0, 0.05])
def test_at_random_the_allocated_time_is_the_life_of_what_was_taken_and_within_the_bound(policy, budget):
    pods, some, count = busy(), MANY, 3000
    seen = run(some, pods, budget=budget, policy=policy)
    lived = np.minimum(pods.life_s, pods.time_s[-1] - pods.time_s)
    asked = (KINDS.gpus * KINDS.gpu_milli)[pods.kind] * lived
    assert 0 < seen.allocated_milli_s <= asked.sum() + seen.moving_milli_s + 1e-3
    whole = some.free_milli.sum() * pods.time_s[-1]
    work = Workload("made up", KINDS, pods.kind, np.ones(count, dtype=np.int64))
    assert 100 * seen.allocated_milli_s / whole <= bound_pct(work, pods, int(some.free_milli.sum()), 0.0, 48) + 2
    assert seen.moving_milli_s <= max(0.06 * seen.allocated_milli_s, MOVE_S * 4000)


@pytest.mark.parametrize("policy", [BY_TABLE, int(Policy.FGD_BEST_FIT), int(Policy.BEST_FIT)])
def test_where_there_is_room_for_all_the_allocated_time_is_the_life_of_all(policy):
    pods = busy()
    seen = run(fleet(*[4] * 60), pods, budget=0.0, policy=policy)
    lived = np.minimum(pods.life_s, pods.time_s[-1] - pods.time_s)
    asked = (KINDS.gpus * KINDS.gpu_milli)[pods.kind] * lived
    assert seen.dropped == 0
    assert seen.allocated_milli_s == pytest.approx(asked.sum(), rel=1e-3)
