"""The keeper of leases over a cloud that fails, killed at every step: nothing is left running, nothing is rented twice."""

import itertools
import random
from dataclasses import replace

import pytest

from benchmarks.burst_lab import crashes
from benchmarks.burst_lab.cloud import HARSH, Faults
from tests.support import virtual_time
from tests.support.virtual_time import LoopClock


def outcome(seed, faults, crash_at=()):
    async def go():
        return await crashes.run(LoopClock(), seed, faults, crash_at)

    return virtual_time.run(go())


def check(seen, *, restarts=None):
    assert (seen.leaked, seen.double, seen.late, seen.unended) == (0, 0, 0, 0), seen
    assert restarts is None or seen.crashes == restarts, seen


def test_without_faults_three_leases_are_three_machines():
    seen = outcome(0, Faults())
    check(seen, restarts=0)
    assert (seen.machines, seen.strays) == (3, 0)
    assert seen.worst_found_s == 0.0


@pytest.mark.parametrize("first", [1, 2])
def test_killed_at_every_step_of_a_lease(first):
    """Each process gets further than the one before: together they are killed before and after each call and commit."""
    check(outcome(first, Faults(), list(itertools.chain.from_iterable((n, n) for n in range(first, 24, 2)))))


def test_killed_anywhere_over_a_cloud_with_every_fault():
    faults = replace(HARSH, no_stock=0.05, lost_after=0.3, duplicate=0.4, late=0.2, zombie=0.6)
    strays = 0
    for seed in range(4):
        draw = random.Random(seed)
        crash_at = [draw.randint(1, 25) for _ in range(draw.randint(2, 8))]
        seen = outcome(seed, replace(faults, keeps_tokens=seed % 2 == 0), crash_at)
        check(seen)
        strays += seen.strays
    assert strays


def test_a_lost_answer_makes_no_second_machine_where_tokens_are_not_kept():
    seen = outcome(5, Faults(lost_after=0.7, lag_s=29.0, keeps_tokens=False))
    check(seen)
    assert (seen.machines, seen.strays) == (3, 0)


def test_a_stock_out_costs_seconds():
    seen = outcome(3, Faults(no_stock=0.4))
    check(seen)
    assert seen.failover_s and max(seen.failover_s) <= 10.0
