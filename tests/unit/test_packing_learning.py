"""Replays: exact accounts, nothing refused that fits, and a table that packs better for having seen the past."""

import numpy as np
import pytest

from benchmarks.baselines_packing import Policy, fill_by, typical_pods
from benchmarks.packing_columns import DeviceArrays, Kinds
from benchmarks.placement_lab.idle_table import PartDemand, placement_costs, untaught
from benchmarks.placement_lab.sharing_replay import PRESSURE, Schedule, draw, fill, learn, needs_per_gpu

CORE, GIB = 1000, 1 << 30


def fleet_of(*nodes):
    """Nodes as (GPUs, cores, model bit)."""
    gpus = np.array([n[0] for n in nodes])
    return DeviceArrays(
        np.array([n[1] * CORE for n in nodes]),
        np.full(len(nodes), 4096 * GIB),
        np.array([n[2] for n in nodes]),
        np.where(np.arange(8)[None, :] < gpus[:, None], 1000, 0).astype(np.int64),
    )


def kinds_of(*kinds):
    """Requests as (cores, GPUs, milli, models)."""
    cpu, gpus, milli, models = (np.array(column, dtype=np.int64) for column in zip(*kinds, strict=True))
    return Kinds(cpu * CORE, np.full(len(kinds), GIB), gpus, milli, models)


FLEET = fleet_of(*[(8, 96, 0)] * 24, *[(2, 104, 1)] * 16, *[(4, 32, 2)] * 4)
KINDS = kinds_of(
    (3, 1, 810, 0),
    (4, 1, 160, 0),
    (4, 1, 320, 0),
    (8, 1, 470, 0),
    (11, 1, 650, 0),
    (11, 1, 1000, 0),
    (18, 1, 1000, 0b011),
    (88, 8, 1000, 0),
    (32, 0, 0, 0b100),  # a list of models means nothing to a request without GPUs
)
HISTORY = np.repeat(np.arange(9), [120, 40, 60, 80, 40, 300, 60, 4, 40])
SHORT = Schedule(rounds=8, replays=2)


@pytest.fixture(scope="module")
def table():
    return learn(FLEET, KINDS, HISTORY, seed=1, schedule=SHORT)


def sample(seed):
    return draw(FLEET, KINDS, HISTORY, np.random.default_rng(seed))


def demand(kind):
    return PartDemand(*(int(column[kind]) for column in KINDS[:4]))


def test_what_is_left_and_what_was_placed_add_up_on_every_node(table):
    arrivals = sample(5)
    end = fill(FLEET, KINDS, arrivals, table)
    for node in range(len(FLEET.model)):
        here = arrivals[end.node == node]
        assert FLEET.cpu_millicores[node] - end.cpu_left[node] == KINDS.cpu_millicores[here].sum()
        assert FLEET.memory_bytes[node] - end.memory_left[node] == KINDS.memory_bytes[here].sum()
        given = (KINDS.gpus * KINDS.gpu_milli)[here].sum()
        assert FLEET.free_milli[node].sum() - end.free_milli[node].sum() == given
    assert end.allocated_milli == FLEET.free_milli.sum() - end.free_milli.sum()
    assert min(end.cpu_left.min(), end.memory_left.min(), end.free_milli.min()) >= 0


def test_whoever_was_dropped_fits_nowhere_even_at_the_end(table):
    arrivals = sample(6)
    end = fill(FLEET, KINDS, arrivals, table)
    dropped = set(arrivals[end.node < 0].tolist())
    assert dropped
    for kind in dropped:
        costs, _ = placement_costs(table, demand(kind), end.cpu_left, end.memory_left, end.free_milli)
        models = int(KINDS.models[kind]) if KINDS.gpus[kind] else 0
        allowed = (models == 0) | ((models >> FLEET.model) & 1 == 1)
        assert not (np.isfinite(costs) & allowed).any(), kind


def test_a_list_of_models_holds_for_requests_with_gpus_and_only_for_them(table):
    arrivals = sample(7)
    end = fill(FLEET, KINDS, arrivals, table)
    picky = end.node[(arrivals == 6) & (end.node >= 0)]
    assert set(FLEET.model[picky].tolist()) <= {0, 1}
    no_gpus = end.node[(arrivals == 8) & (end.node >= 0)]
    assert set(FLEET.model[no_gpus].tolist()) - {2}


def test_learning_again_from_the_same_history_gives_the_same_bytes(table):
    again = learn(FLEET, KINDS, HISTORY, seed=1, schedule=SHORT)
    assert again.idle_milli.tobytes() == table.idle_milli.tobytes()


def test_a_learned_table_packs_better_than_an_untaught_one_best_fit_and_fgd(table):
    typical = typical_pods(KINDS, HISTORY)
    samples = [sample(seed) for seed in range(100, 106)]

    def mean(place):
        return np.mean([100 * place(s).allocated_milli / FLEET.free_milli.sum() for s in samples])

    ours = mean(lambda s: fill(FLEET, KINDS, s, table))
    blank = untaught(*needs_per_gpu(KINDS, HISTORY))
    assert ours > mean(lambda s: fill(FLEET, KINDS, s, blank)) + 0.3
    assert ours > mean(lambda s: fill_by(Policy.BEST_FIT, FLEET, KINDS, s, typical)) + 1
    assert ours > mean(lambda s: fill_by(Policy.FGD_BEST_FIT, FLEET, KINDS, s, typical))


def test_neither_the_order_of_nodes_nor_of_ties_decides_how_much_fits(table):
    size = FLEET.free_milli.sum(axis=1)
    orders = [np.argsort(size, kind="stable"), np.argsort(-size, kind="stable")]
    values = []
    for seed in range(6):
        arrivals = sample(seed)
        for order in orders:
            values.append((seed, fill(DeviceArrays(*(c[order] for c in FLEET)), KINDS, arrivals, table)))
        values.append((seed, fill(FLEET, KINDS, arrivals, table, tie_seed=seed)))
    means = [np.mean([f.allocated_milli for _, f in values[i::3]]) for i in range(3)]
    assert (max(means) - min(means)) / FLEET.free_milli.sum() < 0.002


def test_a_sample_asks_for_as_much_as_the_pressure_says_and_only_what_the_history_knows():
    arrivals = sample(8)
    asked = (KINDS.gpus * KINDS.gpu_milli)[arrivals]
    wanted = PRESSURE * FLEET.free_milli.sum()
    assert asked[:-1].sum() < wanted <= asked.sum()
    assert set(arrivals.tolist()) <= set(HISTORY.tolist())


def test_a_history_without_gpus_teaches_nothing_and_breaks_nothing():
    idle = learn(FLEET, KINDS, np.array([8, 8, 8]), seed=1, schedule=Schedule(rounds=1, replays=1))
    assert np.isfinite(idle.idle_milli).all()
    assert fill(FLEET, KINDS, np.array([8]), idle).node[0] >= 0
