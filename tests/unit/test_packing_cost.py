"""The cost of a placement: what it strands, whatever the nodes are called."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placement_lab.idle_table import (
    FREE_MILLI,
    SCARCITY,
    IdleTable,
    PartDemand,
    node_value,
    placement_costs,
    row_of,
    untaught,
)

CORE = 1000
GIB = 1 << 30
LEVEL = untaught(10 * CORE, 40 * GIB)


def nodes(*frees, cpu=1000 * CORE):
    free = np.array(frees, dtype=np.int64)
    return np.full(len(free), cpu), np.full(len(free), 10_000 * GIB), free


def share(milli, cpu=CORE):
    return PartDemand(cpu, GIB, 1, milli)


def whole(gpus, cpu=CORE):
    return PartDemand(cpu, GIB, gpus, 1000)


def table_where(stays_idle):
    """A table that does not care for scarcity: `stays_idle(free)` of a hole of `free` stays idle."""
    row = np.array([float(stays_idle(int(free))) for free in FREE_MILLI])
    return IdleTable(np.tile(row, (len(SCARCITY), 1)), 10.0 * CORE, 40.0 * GIB)


def test_a_demand_costs_infinity_where_cpu_memory_or_any_single_device_is_too_small():
    cpu = np.array([500, 9000, 9000, 9000])
    memory = np.array([8 * GIB, 100, 8 * GIB, 8 * GIB])
    free = np.array([[1000, 0], [1000, 0], [400, 400], [0, 500]])
    costs, devices = placement_costs(LEVEL, share(500), cpu, memory, free)
    assert np.isinf(costs).tolist() == [True, True, True, False]
    assert devices.tolist() == [-1, -1, -1, 1]


def test_a_gang_on_one_node_needs_so_many_wholly_free_devices():
    costs, _ = placement_costs(LEVEL, whole(2), *nodes([1000, 990, 1000], [1000, 990, 990]))
    assert np.isfinite(costs).tolist() == [True, False]


def test_a_filler_goes_into_the_hole_that_nothing_else_fills():
    wasted_if_small = table_where(lambda free: free if free < 300 else 0)
    costs, devices = placement_costs(wasted_if_small, share(160), *nodes([1000, 190], [1000, 700]))
    assert costs.argmin() == 0
    assert devices[0] == 1


def test_a_share_avoids_leaving_a_hole_that_stays_idle():
    a_fifth_is_lost = table_where(lambda free: free if free == 200 else 0)
    costs, _ = placement_costs(a_fifth_is_lost, share(500), *nodes([700], [1000]))
    assert costs.argmin() == 1


def test_among_nodes_that_strand_alike_the_fuller_wins():
    costs, _ = placement_costs(table_where(lambda _: 0), whole(1), *nodes([1000] * 4, [1000, 1000, 0, 0]))
    assert costs.argmin() == 1


def test_a_request_without_gpus_spares_the_nodes_whose_gpus_need_their_cpu():
    idle = np.outer(1.0 / (1.0 + SCARCITY), FREE_MILLI)
    table = IdleTable(idle, 10.0 * CORE, 40.0 * GIB)
    cpu, memory, free = nodes([1000, 1000], [1000, 1000], [0, 0])
    cpu = np.array([24 * CORE, 200 * CORE, 24 * CORE])
    costs, _ = placement_costs(table, PartDemand(20 * CORE, GIB, 0, 0), cpu, memory, free)
    assert costs.argsort().tolist() == [2, 1, 0]


def test_a_full_node_strands_nothing_and_an_idle_one_what_the_table_says():
    assert node_value(LEVEL, CORE, GIB, np.zeros(8, dtype=np.int64)) == 0.0
    assert node_value(LEVEL, 80 * CORE, 320 * GIB, np.full(8, 1000)) == pytest.approx(8 * 100)


@pytest.mark.parametrize("row", range(len(SCARCITY)))
def test_rows_of_the_table_lie_where_the_scale_says(row):
    assert row_of(SCARCITY[row]) == pytest.approx(row)


def test_between_two_rows_the_row_is_a_fraction_and_beyond_the_last_it_is_the_last():
    assert row_of((SCARCITY[3] + SCARCITY[4]) / 2) == pytest.approx(3.5)
    assert row_of(1e12) == len(SCARCITY) - 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=4, max_size=4), min_size=1, max_size=6),
    st.integers(1, 100),
    st.randoms(use_true_random=False),
)
def test_cost_depends_on_the_state_of_a_node_and_never_on_its_place_or_the_order_of_its_devices(frees, milli, random):
    cpu, memory, free = nodes(*frees)
    demand = share(milli * 10)
    costs, _ = placement_costs(LEVEL, demand, cpu, memory, free * 10)
    order = list(range(len(frees)))
    random.shuffle(order)
    slots = list(range(4))
    random.shuffle(slots)
    moved, _ = placement_costs(LEVEL, demand, cpu[order], memory[order], free[order][:, slots] * 10)
    assert moved == pytest.approx(costs[order])
