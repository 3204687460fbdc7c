"""The benchmark of the planner's search in small: equal to plain loops, the four verdicts, and its speed with room for a busy host."""

import numpy as np

from benchmarks import plan_search
from benchmarks.common import Options


def test_it_equals_plain_loops_on_random_instances():
    row = plan_search.equal_to_loops(np.random.default_rng(11), 12)
    assert row["equal"] == row["instances"], row["wrong"]
    assert row["plans"] > 10_000


def test_batches_that_may_differ_lose_less_than_a_hundredth():
    assert plan_search.near_batches(np.random.default_rng(12), 3)["worst %"] < plan_search.NEAR_PCT


def test_the_four_verdicts_have_their_reasons():
    rows = plan_search.four_verdicts()
    assert [row["as expected"] for row in rows] == ["yes"] * 4
    assert all("GB of 144.6" in row["selective"] for row in rows)


def test_the_plan_of_700b_on_128_gpus_is_near_what_formulas_say():
    """90 tokens/s on each GPU at 40 % MFU."""
    row = plan_search.plan_that_fits()
    assert 70 < row["tokens/s/GPU"] < 130
    assert row["$/1M tokens"] > 0


def test_a_thousand_gpus_are_searched_in_little_time():
    assert max(row["CPU s"] for row in plan_search.speeds(1024, ("llama-3.1-70b", "deepseek-v3"))) < 1.0


def test_the_report_names_every_target(monkeypatch):
    monkeypatch.setattr(plan_search, "LIMITS_S", {128: 0.2})
    monkeypatch.setattr(plan_search, "known_at_128", lambda names: [{"worse %": 0.0}])
    monkeypatch.setattr(plan_search, "equal_to_loops", lambda rng, count: {"equal": count, "instances": count})
    report = plan_search.measure(Options(None, 0, True, None, None))
    assert {one.id for one in report.targets} == {
        "search_128", "peak_memory", "equal_to_brute_force", "worst_at_128", "worst_of_near_batches", "verdicts",
    }  # fmt: skip
