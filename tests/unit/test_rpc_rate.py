"""Calls per second and caller."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.rpc.rate import Rate


def test_a_burst_then_the_steady_rate():
    rate = Rate(per_s=10, burst=3)
    assert [rate.wait_s("ann", 0.0) for _ in range(3)] == [0, 0, 0]
    assert rate.wait_s("ann", 0.0) == pytest.approx(0.1)
    assert rate.wait_s("ann", 0.05) == pytest.approx(0.05)
    assert rate.wait_s("ann", 0.1) == 0


def test_callers_do_not_share():
    rate = Rate(per_s=1, burst=1)
    assert rate.wait_s("ann", 0.0) == 0
    assert rate.wait_s("ann", 0.0) > 0
    assert rate.wait_s("bob", 0.0) == 0


def test_the_longest_idle_caller_is_forgotten_first():
    rate = Rate(per_s=0.001, burst=1, max_callers=2)
    rate.wait_s("ann", 0.0)
    rate.wait_s("bob", 0.0)
    rate.wait_s("ann", 1.0)  # refused, and yet a sign of life
    rate.wait_s("eve", 2.0)  # bob goes
    assert rate.wait_s("ann", 2.0) > 0
    assert len(rate._buckets) == 2


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200))
def test_never_more_than_the_burst_and_the_rate_allow(pauses):
    rate, now_s, begun = Rate(per_s=5, burst=4), 0.0, 0
    for pause in pauses:
        now_s += pause
        begun += rate.wait_s("ann", now_s) == 0
    assert begun <= 4 + 5 * now_s + 1e-6
