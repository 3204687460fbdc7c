"""When steps are looked at, and who goes first when the program profiles itself. PyTorch's profiler is the real one, on a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.profiler import profile

from whaleflux.sdk.looks import EVERY, FIRST, MOST_SHARE, Looks, is_due, steps_between


@given(st.floats(0, 100), st.floats(1e-4, 100))
def test_looks_get_a_thousandth_of_the_time(cost_s, step_s):
    every = steps_between(cost_s, step_s)
    assert cost_s <= every * step_s * MOST_SHARE or every >= 1 << 24
    assert every == EVERY or cost_s > every / 2 * step_s * MOST_SHARE, "and no less than they may"


def test_ranks_for_which_looks_cost_more_look_where_the_others_do():
    due = {every: {done for done in range(1, 20_000) if is_due(done, every)} for every in (500, 1000, 4000)}
    assert due[4000] < due[1000] < due[500]
    assert [len(due[every]) for every in (500, 1000, 4000)] == [40, 20, 5]
    assert min(due[4000]) == FIRST


def test_steps_that_are_looked_at_are_no_round_ones():
    places = [done % 10 for done in range(1, 500_000) if is_due(done, 1000)]
    assert all(30 <= places.count(digit) <= 80 for digit in range(10)), "500 looks"


def walked(looks, first, last, work=lambda: torch.ones(10).sum()):
    for done in range(first, last + 1):
        work()
        looks.stepped(done)


@pytest.fixture
def looks():
    looks = Looks(2, on_gpu=False)
    looks.start(0)
    yield looks
    looks.stop()


def test_a_rank_without_collectives_communicates_nothing(looks):
    walked(looks, 1, FIRST + 1)
    assert looks.newest is None
    walked(looks, FIRST + 2, FIRST + 2)
    assert (looks.newest.in_node_s, looks.newest.cross_s, looks.newest.host_s) == (0.0, 0.0, None)


def test_a_rank_that_is_alone_on_a_cpu_has_nothing_to_look_for():
    looks = Looks(1, on_gpu=False)
    looks.start(0)
    walked(looks, 1, FIRST + 10)
    looks.stop()
    assert looks.newest is None


def test_a_step_with_a_save_is_not_looked_at(looks):
    walked(looks, 1, FIRST + 1)
    looks.spoil()
    with profile(use_kineto=True) as theirs:
        walked(looks, FIRST + 2, FIRST + 5)
    assert looks.newest is None
    assert sum(one.name == "aten::ones" for one in theirs.function_events) == 4


def test_a_program_that_profiles_itself_goes_first_and_sees_all_of_it(looks):
    walked(looks, 1, FIRST + 1)
    with profile(use_kineto=True) as theirs:
        walked(looks, FIRST + 2, FIRST + 6)
    assert sum(one.name == "aten::ones" for one in theirs.function_events) == 5
    walked(looks, FIRST + 7, 2 * EVERY)
    assert looks.newest is None


def test_what_was_seen_before_a_program_profiles_itself_is_told_no_more(looks):
    walked(looks, 1, FIRST + 10)
    assert looks.newest is not None
    with profile(use_kineto=True):
        walked(looks, FIRST + 11, FIRST + 13)
    assert looks.newest is None


def test_nothing_is_begun_while_the_program_profiles_itself():
    with profile(use_kineto=True) as theirs:
        looks = Looks(2, on_gpu=False)
        looks.start(0)
        walked(looks, 1, FIRST + 5)
        looks.stop()
    assert looks.newest is None
    assert sum(one.name == "aten::ones" for one in theirs.function_events) == FIRST + 5


class Failing(profile):
    """As where a container may not see its GPU's counters."""

    begun = 0

    def __enter__(self):
        Failing.begun += 1
        raise RuntimeError("no permission")


def test_a_profiler_that_fails_costs_the_knowledge_and_not_the_training(monkeypatch):
    monkeypatch.setattr("whaleflux.sdk.looks.profile", Failing)
    looks = Looks(2, on_gpu=False)
    looks.start(0)
    walked(looks, 1, 2 * EVERY)
    looks.stop()
    assert looks.newest is None
    assert Failing.begun == 1


def test_afterwards_everything_is_as_it_was():
    before = vars(profile)["_prepare_trace"]
    looks = Looks(2, on_gpu=False)
    looks.start(0)
    walked(looks, 1, FIRST + 1)
    looks.stop()
    assert vars(profile)["_prepare_trace"] is before
    with profile(use_kineto=True) as theirs:
        torch.ones(10)
    assert [one.name for one in theirs.function_events] == ["aten::ones", "aten::empty", "aten::fill_"]
