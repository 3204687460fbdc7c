"""Jobs with deadlines on pools at several prices: capacity holds, deadlines come first, and the plan is the cheapest on small sets."""

import random
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mixed_pools import exact
from benchmarks.placement_lab.mixed import Choice, Pool, Skyline, Work, cheapest, in_order

H = 3600.0
CHEAP, DEAR = Pool("cheap", 1.0, 8), Pool("dear", 4.0)


def test_a_job_that_can_wait_leaves_the_cheap_pool_to_one_that_cannot():
    patient = Work("patient", 10 * H, (Choice(0, 8, 4 * H), Choice(1, 8, 2 * H)))
    hurried = Work("hurried", 4 * H, (Choice(0, 8, 4 * H), Choice(1, 8, 2 * H)))
    naive = in_order([patient, hurried], [CHEAP, DEAR], [0, 1])
    assert naive.assignments[1].choice.pool == 1, "first come, first served makes the hurried one pay"
    plan = cheapest([patient, hurried], [CHEAP, DEAR])
    assert [a.choice.pool for a in plan.assignments] == [0, 0]
    assert (plan.usd, plan.late) == (64.0, 0)


def test_a_deadline_nobody_can_meet_is_missed_by_least():
    plan = cheapest([Work("late", 1 * H, (Choice(0, 1, 3 * H), Choice(1, 1, 2 * H)))], [CHEAP, DEAR])
    assert plan.assignments[0].late_s == H


def test_a_job_too_large_for_every_pool_is_left_out():
    assert cheapest([Work("huge", H, (Choice(0, 9, H),))], [CHEAP]).assignments == ()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=30))
def test_a_skyline_never_holds_more_than_its_pool(jobs):
    skyline, placed = Skyline(8), []
    for gpus, hours in jobs:
        start = skyline.earliest(gpus, hours * H)
        skyline.take(start, gpus, hours * H)
        placed.append((start, start + hours * H, gpus))
    for at, _, _ in placed:
        assert sum(g for a, b, g in placed if a <= at < b) <= 8
    for (start, _, gpus), (_, hours) in zip(placed, jobs, strict=True):
        # One hour earlier would not have fitted at the time: it does not now either.
        before = [(a, b, g) for a, b, g in placed if (a, b, g) != (start, start + hours * H, gpus)]
        assert start == 0 or sum(g for a, b, g in before if a <= start - 1 < b) + gpus > 8


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_the_optimum_of_small_sets(seed):
    pick = random.Random(seed)
    works = [
        Work(
            f"j{at}",
            pick.randrange(3, 12) * H,
            tuple(Choice(p, pick.choice([2, 4, 8]), pick.randrange(1, 4) * H) for p in range(2)),
        )
        for at in range(6)
    ]
    plan = cheapest(works, [CHEAP, DEAR])
    assert plan.usd == pytest.approx(exact(works, [CHEAP, DEAR]))
    assert plan.usd <= min(in_order(works, [CHEAP, DEAR], order).usd for order in list(permutations(range(6)))[::40])
