"""Dealing out whole numbers: exact against trying everything, and moves that are bounded."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.planning.whole_shares import dealt, longest_s, moved

SECONDS = st.floats(0.01, 100.0)


@st.composite
def small_cases(draw):
    count = draw(st.integers(1, 4))
    least = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    most = [low + draw(st.integers(0, 5)) for low in least]
    total = draw(st.integers(sum(least), sum(most)))
    return total, draw(st.lists(SECONDS, min_size=count, max_size=count)), least, most


def by_trying(total, each_s, least, most):
    ways = itertools.product(*(range(low, high + 1) for low, high in zip(least, most, strict=True)))
    return min(longest_s(way, each_s) for way in ways if sum(way) == total)


@given(small_cases())
def test_no_other_way_is_shorter(case):
    total, each_s, least, most = case
    found = dealt(*case)
    assert sum(found) == total
    assert all(low <= one <= high for low, one, high in zip(least, found, most, strict=True))
    assert longest_s(found, each_s) == pytest.approx(by_trying(*case), rel=1e-9, abs=1e-12)


@given(st.lists(SECONDS, min_size=1, max_size=300), st.integers(1, 10**7))
def test_large_ones_are_within_one_unit_of_parts(each_s, total):
    found = dealt(total, each_s, [0] * len(each_s), [total] * len(each_s))
    level_s = total / math.fsum(1 / one for one in each_s)
    assert sum(found) == total
    assert longest_s(found, each_s) <= (level_s + max(each_s)) * (1 + 1e-9)


def test_equal_ones_get_equal_shares():
    assert dealt(12, [0.5] * 4, [1] * 4, [12] * 4) == (3, 3, 3, 3)


def test_bounds_that_leave_no_way_are_told():
    with pytest.raises(ValueError, match="12 is not between what must be taken, 2, and what can be, 10"):
        dealt(12, [1.0, 1.0], [1, 1], [5, 5])


@given(st.lists(st.integers(1, 400), min_size=2, max_size=8), st.data())
def test_moves_are_bounded_and_never_for_the_worse(shares, data):
    each_s = data.draw(st.lists(SECONDS, min_size=len(shares), max_size=len(shares)))
    most = [one + data.draw(st.integers(0, 50)) for one in shares]
    after = moved(shares, each_s, most)
    assert sum(after) == sum(shares)
    assert min(after) >= 1
    assert all(new <= high for new, high in zip(after, most, strict=True))
    assert all(abs(new - old) <= max(1, old // 4) for new, old in zip(after, shares, strict=True))
    assert longest_s(after, each_s) <= longest_s(shares, each_s)


@given(st.lists(SECONDS, min_size=2, max_size=8))
def test_steady_speeds_come_to_rest(each_s):
    shares, most = tuple([64] * len(each_s)), [10**6] * len(each_s)
    for _ in range(60):
        before, shares = shares, moved(shares, each_s, most)
    assert shares == before
    best = longest_s(dealt(64 * len(each_s), each_s, [1] * len(each_s), most), each_s)
    assert longest_s(shares, each_s) <= best / (1 - 0.03) + 1e-9


def test_noise_within_the_gain_moves_nothing():
    assert moved((10, 10), (1.0, 1.02), (20, 20)) == (10, 10)


def test_thousands_that_are_alike_are_reckoned_as_one():
    class Counting(float):
        """Seconds of a unit that are counted when they are reckoned with."""

        asked = 0

        def __rtruediv__(self, other):
            Counting.asked += 1
            return other / float(self)

    kinds = [Counting(1.0), Counting(2.0)]
    each_s = [kind for kind in kinds for _ in range(5_000)]
    found = dealt(15_000, each_s, [1] * 10_000, [15_000] * 10_000)
    assert found == (2,) * 5_000 + (1,) * 5_000
    assert Counting.asked < 3 * 10_000
