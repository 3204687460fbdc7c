"""The replay of savings, small: its blind baseline, its kinds and its rungs do what they say."""

import random

import pytest

from benchmarks.tco_lab import blind, kinds, ladder, pools
from benchmarks.tco_lab.speeds import App, Step
from benchmarks.tco_lab.work import Work, halves, interrupted, nodes, submissions
from whaleflux_console.core.recommend import release_idle
from whaleflux_scheduler.simulation import traces

APP = App("a", {(4, 1): {8: Step(1.0, 0.1)}, (4, 2): {8: Step(1.5, 0.6)}, (2, 1): {8: Step(0.9, 0.05)}})


def work(number, at_s, gpus, run_s=100.0, idle_s=0.0, app=APP):
    return Work(number, at_s, run_s, gpus, app, 8, idle_s, gpus)


class TestBlind:
    def test_a_job_that_lies_on_two_nodes_runs_longer_by_what_was_measured(self):
        alone, spread = blind.run([work(0, 0.0, 2), work(1, 1.0, 4)], 8)
        assert (alone.end_s, alone.nodes) == (100.0, 2)  # the balancer takes one of each node
        assert (spread.end_s, spread.nodes) == (1.0 + 150.0, 2)

    def test_no_gpu_is_held_twice(self):
        drawn = random.Random(3)
        jobs = [work(n, n * 10.0, drawn.choice((1, 2, 4, 8)), drawn.uniform(10, 400)) for n in range(200)]
        done = blind.run(jobs, 16)
        for at in {one.start_s for one in done}:
            assert sum(job.gpus for job, one in zip(jobs, done, strict=True) if one.start_s <= at < one.end_s) <= 16


class TestKinds:
    def test_what_is_promised_is_the_consoles_own(self):
        parts = [kinds.part(86400.0, 2, allocated_idle=43200.0)] * 7
        hourly = 1_000_000 * 2
        assert kinds.promised(release_idle.find, parts, 2) == pytest.approx(7 * 12 * hourly - 7 * hourly / 2, rel=1e-6)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_release_never_saves_more_than_the_week(self, seed):
        case = kinds.idle(random.Random(seed))
        assert 0 <= case.replayed <= 7 * 24 * 8 * 1_000_000


def test_the_scheduler_gets_each_gang_on_the_fewest_nodes():
    (one,) = submissions([work(0, 5.0, 4, idle_s=20.0)])
    assert (one.spec.max_nodes, one.run_s, one.at_s) == (1, 120.0, 5.0)


class TestPools:
    def test_what_is_handed_back_is_whole_nodes_and_work_that_comes_too_late_is_taken_off(self):
        found = [pools.handed_back(random.Random(seed)) for seed in (0, 3)]
        assert found[0].promised > 0
        assert 0.5 < found[0].replayed / found[0].promised < 1.5
        assert found[0].replayed <= 2 * 24 * 64 * 1_000_000
        assert found[1] == pools.Case("hand_back", 0.0, 0.0)  # it needed all of them


class TestLadder:
    def test_whole_pods_never_lie_on_more_nodes_than_they_need(self):
        drawn = random.Random(5)
        jobs = [work(n, n * 10.0, drawn.choice((1, 2, 4, 8)), drawn.uniform(10, 400)) for n in range(200)]
        for way in (blind.SPREAD, blind.PACKED):
            assert [one.nodes for one in blind.run(jobs, 16, way)] == [job.fewest_nodes for job in jobs]

    def test_the_base_is_the_best_in_each_figure(self):
        assert ladder.best([ladder.Ran(1, 5, 9), ladder.Ran(2, 4, 8)]) == ladder.Ran(1, 4, 8)

    def test_idle_gpus_are_released_only_where_the_console_says_so(self):
        assert ladder.released(work(0, 0.0, 4, run_s=36000.0, idle_s=36000.0)).idle_s == 1800.0
        assert ladder.released(work(0, 0.0, 4, run_s=36000.0, idle_s=3600.0)).idle_s == 3600.0

    def test_half_the_gpus_do_the_same_samples_where_twice_the_batch_was_measured(self):
        slow = App("s", {(4, 1): {8: Step(1.0, 0.8)}, (2, 1): {16: Step(1.2, 0.8)}})
        sized = ladder.right_sized(work(0, 0.0, 4, app=slow))
        assert (sized.gpus, sized.batch, sized.run_s) == (2, 16, pytest.approx(120.0))
        assert ladder.right_sized(work(0, 0.0, 4)).gpus == 4  # nobody measured 16 on two

    def test_every_rung_does_all_of_the_work(self):
        jobs = [work(n, n * 100.0, (1, 4, 2)[n % 3], 2000.0, 4000.0) for n in range(30)]
        ran = ladder.rungs(jobs, 16, seed=1)
        assert ran["idle released"].usd < ran["placement"].usd
        assert ran["half of it spot"].usd < ran["right-sized"].usd


def test_spot_nodes_alone_are_interrupted_and_come_again():
    fleet = nodes(32, 2.0, 1.0)
    events = interrupted(fleet, 3600.0, 600.0, 86400.0, seed=2)
    spot = {node.name for node in fleet if node.price.usd_per_gpu_hour == 1.0}
    assert len(spot) == 4
    assert {name for event in events for name in event.nodes} == spot
    assert sum(event.what == "down" for event in events) == sum(event.what == "up" for event in events) > 0


def test_clusters_are_halved_without_overlap():
    trace = traces.Trace(tuple(traces.Row(n, 100.0 * (n + 1), 1, f"vc-{n % 5}") for n in range(50)))
    a, b = halves(trace).values()
    assert (a & b, a | b) == (frozenset(), frozenset(f"vc-{n}" for n in range(5)))
