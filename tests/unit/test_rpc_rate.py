"""Calls per second and caller."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import ResourceExhausted
from whaleflux.rpc import owners
from whaleflux.rpc.auth import NOBODY, Identity
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.quotas import COSTS, Quotas, cost_of
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
    assert len(rate) == 2


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200))
def test_never_more_than_the_burst_and_the_rate_allow(pauses):
    rate, now_s, begun = Rate(per_s=5, burst=4), 0.0, 0
    for pause in pauses:
        now_s += pause
        begun += rate.wait_s("ann", now_s) == 0
    assert begun <= 4 + 5 * now_s + 1e-6


class TestQuotas:
    LIMITS = CallLimits(calls_per_s=10, burst=500, anonymous_per_s=1, anonymous_burst=2, all_anonymous_per_s=100)
    METHOD = "/whaleflux.v1.InventoryService/Join"

    def test_an_address_that_joins_without_end_locks_out_nobody_else(self):
        quotas = Quotas(self.LIMITS)
        for _ in range(2):
            quotas.take(NOBODY, "10.0.0.1", self.METHOD, 0.0)
        for _ in range(1000):
            with pytest.raises(ResourceExhausted, match=r"10\.0\.0\.1 calls too often"):
                quotas.take(NOBODY, "10.0.0.1", self.METHOD, 0.0)
        quotas.take(NOBODY, "10.0.0.2", self.METHOD, 0.0)

    def test_who_has_a_network_of_ipv6_is_one_sender(self):
        quotas = Quotas(self.LIMITS)
        for number in range(2):
            quotas.take(NOBODY, f"2001:db8::{number}", self.METHOD, 0.0)
        for other in ("2001:db8::99:1", "2001:db8:0:0:1::"):
            with pytest.raises(ResourceExhausted):
                quotas.take(NOBODY, other, self.METHOD, 0.0)
        for other in ("2001:db8:0:1::1", "::ffff:10.0.0.1", "10.0.0.1", "fe80::1%eth0", "not an: address"):
            quotas.take(NOBODY, other, self.METHOD, 0.0)
        with pytest.raises(ResourceExhausted):
            quotas.take(NOBODY, "::ffff:10.0.0.1", self.METHOD, 0.0)

    def test_all_addresses_together_have_a_bound(self):
        quotas = Quotas(self.LIMITS)
        for number in range(100):
            quotas.take(NOBODY, f"10.0.0.{number}", self.METHOD, 0.0)
        with pytest.raises(ResourceExhausted):
            quotas.take(NOBODY, "10.0.1.1", self.METHOD, 0.0)

    def test_what_costs_much_counts_for_much(self):
        quotas, ann = Quotas(self.LIMITS), Identity("user", "ann")
        for _ in range(10):
            quotas.take(ann, "", "/whaleflux.v1.SchedulerService/ExplainJob", 0.0)
        with pytest.raises(ResourceExhausted) as caught:
            quotas.take(ann, "", "/whaleflux.v1.SchedulerService/GetJob", 0.0)
        assert caught.value.retry_after_s == pytest.approx(0.1)

    def test_each_cost_is_one_of_a_method_and_fits_the_burst(self):
        words = {method.rpartition("/")[2] for method in owners.TABLE}
        for begin, cost in COSTS.items():
            assert any(word.startswith(begin) for word in words), begin
            assert cost_of(f"/whaleflux.v1.SchedulerService/{begin}Job") == cost < CallLimits().burst
        assert cost_of("/grpc.health.v1.Health/Watch") == 1
