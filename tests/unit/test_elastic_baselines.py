"""The policies that elastic jobs are compared with, on cases that are worked out by hand or by trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.elastic_policies import cheapest as cheapest_of_one_type
from benchmarks.elastic_typed_policies import NOTHING, Gavel, TypedActive, cheapest, fractions, sia, simulate
from benchmarks.elastic_types import TypedApp, TypedJob

FAST, SLOW = "fast", "slow"


def app(fast, slow, restart=""):
    return TypedApp(restart or "x", {FAST: (0.0, fast), SLOW: (0.0, slow)})


def job(name, speeds, work=1e5, at_s=0.0):
    return TypedJob(name, at_s, speeds, 1, work)


class TestGavel:
    def test_two_alike_have_half_of_the_time_each(self):
        one_kind = TypedApp("x", {FAST: (0.0, 1.0)})
        found = fractions([job("a", one_kind), job("b", one_kind)], {FAST: 1})
        assert found.tolist() == [[pytest.approx(0.5)], [pytest.approx(0.5)]]

    def test_who_gains_nothing_by_the_fast_gpu_leaves_it_to_the_other(self):
        """Its ratio is 1 anywhere: the least ratio cannot be more, and the sum decides."""
        found = fractions([job("gains", app(10.0, 1.0)), job("not", app(1.0, 1.0))], {FAST: 1, SLOW: 1})
        assert np.allclose(found, [[1, 0], [0, 1]])

    def test_the_least_ratio_is_as_large_as_it_can_be(self):
        """Ratios are (1 + 9a) / 5.5 and (2 - a) / 1.5 when the first has the fast GPU for a of the time: equal, and 1, at a half."""
        found = fractions([job("a", app(10.0, 1.0)), job("b", app(2.0, 1.0))], {FAST: 1, SLOW: 1})
        assert np.allclose(found, 0.5, atol=1e-3)

    def test_what_it_does_in_rounds_comes_to_these_fractions(self):
        one_kind = TypedApp("x", {FAST: (0.0, 1.0)})
        jobs = [job(name, one_kind, work=3600.0) for name in ("a", "b", "c")]
        outcome = simulate(jobs, {FAST: 1}, Gavel(), 360.0)
        assert outcome.makespan_h == pytest.approx(3.0 + outcome.restarts * 30 / 3600, abs=0.1)
        assert min(outcome.jct_h) > 2.5, "all of them end at the end"


class TestSia:
    def test_it_minimises_the_sum_that_the_paper_states(self):
        """With p = -0.5: fast for the first adds 2 ** -0.5 + 1 = 1.71, for the second 1 + 8 ** -0.5 = 1.35."""
        active = [TypedActive(job("a", app(2.0, 1.0)), 1.0), TypedActive(job("b", app(8.0, 1.0)), 1.0)]
        assert sia(active, {FAST: 1, SLOW: 1}, 10.0) == [(SLOW, 1), (FAST, 1)]

    def test_it_doubles_at_most_and_weighs_restarts(self):
        wide = TypedApp("ResNet-50 (batch size 1)", {FAST: (0.0, 1.0, 2.0, 3.0, 4.0)})
        one = TypedActive(TypedJob("a", 0.0, wide, 4, 1e5), 1e5)
        assert sia([one], {FAST: 4}, 10.0) == [(FAST, 1)]
        one.has, one.most_so_far, one.ran = (FAST, 1), 1, True
        assert sia([one], {FAST: 4}, 60.0) == [(FAST, 1)], "a restart of 250 s at the age of a minute does not pay"
        assert sia([one], {FAST: 4}, 3600.0) == [(FAST, 2)]

    @settings(max_examples=25, deadline=None)
    @given(
        gpus=st.fixed_dictionaries({FAST: st.integers(0, 4), SLOW: st.integers(0, 4)}),
        costs=st.lists(st.lists(st.floats(0, 2), min_size=6, max_size=6), min_size=1, max_size=3),
    )
    def test_its_optimum_is_that_of_trying_everything(self, gpus, costs):
        sizes = [(model, size) for model in gpus for size in (1, 2, 4)]
        options = [{NOTHING: 1.1, **dict(zip(sizes, each, strict=True))} for each in costs]

        def fits(chosen):
            return all(sum(size for of, size in chosen if of == model) <= gpus[model] for model in gpus)

        def total(chosen):
            return sum(each[choice] for each, choice in zip(options, chosen, strict=True))

        found = cheapest(options, gpus)
        assert fits(found)
        assert total(found) == pytest.approx(min(total(one) for one in itertools.product(*options) if fits(one)))


@settings(max_examples=25, deadline=None)
@given(
    gpus=st.integers(0, 5),
    costs=st.lists(st.lists(st.floats(0, 2), min_size=6, max_size=6), min_size=1, max_size=3),
)
def test_the_optimum_of_one_type_is_that_of_trying_everything(gpus, costs):
    tables = [np.array([1.1, *each[:5]])[: gpus + 1] for each in costs]
    found = cheapest_of_one_type(tables, gpus)
    every = itertools.product(*(range(len(table)) for table in tables))
    best = min(sum(t[n] for t, n in zip(tables, sizes, strict=True)) for sizes in every if sum(sizes) <= gpus)
    assert sum(found) <= gpus
    assert sum(table[size] for table, size in zip(tables, found, strict=True)) == pytest.approx(best)
