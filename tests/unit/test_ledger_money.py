"""Exact money: telescoping bills, and sums that are divided without remainder."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux_console.core.facts import HOUR_MS, PriceKind, PriceSpan
from whaleflux_console.core.money import charge, split

RATES = st.integers(0, 10**10)


def span(rate, start=0, end=100 * HOUR_MS):
    return PriceSpan("GPU-1", start, end, rate, PriceKind.OWNED, "a list")


class TestCharge:
    def test_a_whole_hour_costs_the_rate(self):
        assert charge(span(3_500_001, start=1_234), 1_234 + 7 * HOUR_MS, 1_234 + 8 * HOUR_MS) == 3_500_001

    def test_outside_of_its_span_it_costs_nothing(self):
        assert charge(span(10**9, 0, 10), 10, 20) == charge(span(10**9, 5, 10), 0, 5) == 0
        assert charge(span(10**9, 0, 10), 8, 3) == 0

    @given(RATES, st.integers(-HOUR_MS, HOUR_MS), st.lists(st.integers(-2 * HOUR_MS, 20 * HOUR_MS), min_size=2))
    def test_however_time_is_cut_the_pieces_sum_to_the_whole(self, rate, start, cuts):
        price, cuts = span(rate, start), sorted(cuts)
        assert sum(charge(price, a, b) for a, b in pairwise(cuts)) == charge(price, cuts[0], cuts[-1])

    @given(RATES, st.integers(0, HOUR_MS), st.integers(0, HOUR_MS))
    def test_it_is_within_a_micro_dollar_of_the_price(self, rate, start, ms):
        assert abs(charge(span(rate), start, start + ms) - Fraction(rate * ms, HOUR_MS)) < 1


class TestSplit:
    def test_the_largest_remainders_get_what_is_left_and_ties_the_first(self):
        assert split(10, [1, 1, 1]) == [4, 3, 3]
        assert split(11, [1, 1, 1]) == [4, 4, 3]
        assert split(100, [1, 2, 4]) == [14, 29, 57]

    def test_a_credit_is_divided_as_its_amount_is(self):
        assert split(-10, [1, 1, 1]) == [-4, -3, -3]

    def test_nothing_is_divided_among_none(self):
        assert split(0, []) == []
        assert split(0, [0, 0]) == [0, 0]

    @pytest.mark.parametrize("weights", [[], [0, 0], [3, -1]])
    def test_what_cannot_be_divided_is_refused(self, weights):
        with pytest.raises(ValueError, match="give weights of 0 or more"):
            split(5, weights)

    @given(st.integers(-(10**15), 10**15), st.lists(st.integers(0, 4 * 10**18), min_size=1).filter(any))
    def test_parts_sum_exactly_each_within_one_and_no_weight_gets_nothing(self, total, weights):
        parts = split(total, weights)
        assert sum(parts) == total
        assert all(abs(part - Fraction(total * w, sum(weights))) < 1 for part, w in zip(parts, weights, strict=True))
        assert not any(part for part, weight in zip(parts, weights, strict=True) if not weight)
