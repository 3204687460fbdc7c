"""The replay of savings, small: its blind baseline, its kinds and its rungs do what they say."""

import random

import pytest

from benchmarks.tco_lab import blind, kinds, pools
from benchmarks.tco_lab.speeds import App, Step
from benchmarks.tco_lab.work import Work, submissions
from whaleflux_console.core.recommend import release_idle

APP = App("a", {(4, 1): {8: Step(1.0, 0.1)}, (4, 2): {8: Step(1.5, 0.6)}, (2, 1): {8: Step(0.9, 0.05)}})


def work(number, at_s, gpus, run_s=100.0, idle_s=0.0):
    return Work(number, at_s, run_s, gpus, APP, idle_s)


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
