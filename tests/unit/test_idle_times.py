"""For how long rented machines were not needed, and what follows: never much more than twice what who knows the future pays."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.store.api import Fenced
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux_scheduler.core.idle_times import MOST_OPEN, REMEMBERED, Idle, IdleTimes, Open, is_kept
from whaleflux_scheduler.core.offered import Kind
from whaleflux_scheduler.idle_memory import IdleMemory

AGAIN_S, STEP_S = 210.0, 30.0


def test_a_level_is_idle_from_when_fewer_machines_are_needed_until_as_many_are_again():
    times = IdleTimes().seen(2, 0, False, 0.0).seen(1, 1, True, 100.0)
    assert times.idle_s(1, 130.0) == ((30.0, True),)
    times = times.seen(0, 2, False, 200.0)
    assert times.idle_s(2, 230.0) == ((30.0, False), (130.0, True))  # the one that is needed next first
    times = times.seen(0, 1, False, 250.0)  # the one that was not needed for longest was given back
    assert times.idle_s(1, 250.0) == ((50.0, False),)
    times = times.seen(2, 0, False, 400.0)
    assert times.over == (Idle(200.0, 200.0), Idle(300.0, 150.0, True)) and not times.open


def test_a_machine_that_is_lost_teaches_nothing():
    times = IdleTimes().seen(1, 0, False, 0.0).seen(0, 0, False, 50.0).seen(1, 0, False, 60.0)
    assert not times.over and not times.open


def test_a_new_leader_counts_idle_machines_that_nobody_told_it_of():
    assert IdleTimes().seen(0, 2, False, 10.0).idle_s(2, 15.0) == ((5.0, False), (5.0, False))


async def test_what_is_remembered_is_bounded_and_known_to_the_next_leader():
    times = IdleTimes().seen(200, 0, False, 0.0).seen(0, 0, False, 1.0).seen(0, 80, True, 2.0)
    assert len(times.open) == MOST_OPEN
    for at in range(100):
        times = times.seen(1, 63, False, 10.0 + at).seen(0, 64, True, 10.5 + at)
    assert len(times.over) == REMEMBERED
    kept = {Kind("cloud", "H200", 8): times, Kind("edge", "A100", 1): IdleTimes()}
    store = MemoryStore()
    async with elect(store, "scheduler", "a") as leader:
        await IdleMemory(store, leader.held).keep(kept)
    async with elect(store, "scheduler", "b") as other:
        assert await IdleMemory(store, other.held).times() == kept
    with pytest.raises(Fenced):
        await IdleMemory(store, leader.held).keep({})


def test_an_idle_time_that_goes_on_for_longer_than_a_boot_counts_as_long():
    times = IdleTimes(0, (Open(0.0, False, 40.0), Open(50.0)))
    assert times.like(False, AGAIN_S, 205.0) == ()
    assert times.like(False, AGAIN_S, 215.0) == (float("inf"),)


def test_clocks_that_go_back_make_no_idle_time_negative():
    times = IdleTimes().seen(1, 0, False, 100.0).seen(0, 1, False, 100.0)
    assert times.idle_s(1, 40.0) == ((0.0, False),)
    assert times.seen(1, 0, False, 40.0).over == (Idle(0.0, 0.0),)


def played(lasting_s):
    """What one machine costs that is not needed for these times, one after the other: seconds paid, and those of who knows them."""
    times, paid_s, least_s = IdleTimes(1), 0.0, 0.0
    for lasted_s in lasting_s:
        idle_s, seen_s, indebted = 0.0, times.like(False, AGAIN_S, 0.0), times.is_indebted(AGAIN_S)
        while idle_s < lasted_s and is_kept(seen_s, idle_s, indebted, STEP_S, AGAIN_S):
            idle_s += STEP_S
        kept_s = min(idle_s, lasted_s)
        paid_s += kept_s + (AGAIN_S if kept_s < lasted_s else 0.0)
        least_s += min(lasted_s, AGAIN_S)
        times = replace(times, over=(*times.over, Idle(lasted_s, kept_s))[-REMEMBERED:])
    return paid_s, least_s


@settings(derandomize=True, max_examples=300)
@given(st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=REMEMBERED))
def test_whatever_happens_it_costs_at_most_twice_the_least_and_renting_twice_more(lasting_s):
    paid_s, least_s = played(lasting_s)
    assert paid_s <= 2 * least_s + 2 * AGAIN_S + 1e-6


def test_what_is_learned_comes_close_to_the_least():
    for lasting_s in ([9000.0] * 30, [20.0] * 30, [20.0, 9000.0] * 15):
        paid_s, least_s = played(lasting_s)
        assert paid_s <= 1.3 * least_s + AGAIN_S, lasting_s[:2]
