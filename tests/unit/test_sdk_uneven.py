"""Which samples ranks train, whatever their shares: each once in an epoch, in the same steps."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.sdk.uneven import Epoch, Timeline, part_of, shares_of


@st.composite
def epochs(draw):
    ranks = draw(st.integers(1, 6))
    batch = draw(st.integers(ranks, 40))
    samples = draw(st.integers(ranks, 400))
    drop_last = draw(st.booleans()) and samples >= batch
    return Epoch(samples, batch, ranks, drop_last)


@st.composite
def trained(draw):
    """An epoch, and shares that change at any step."""
    epoch = draw(epochs())
    shares = []
    for _ in range(epoch.steps):
        cuts = sorted(
            draw(st.sets(st.integers(1, epoch.batch - 1), min_size=epoch.ranks - 1, max_size=epoch.ranks - 1))
            if epoch.ranks > 1
            else []
        )
        edges = [0, *cuts, epoch.batch]
        shares.append([b - a for a, b in itertools.pairwise(edges)])
    return epoch, shares


@given(trained())
def test_each_sample_is_trained_once_and_every_rank_takes_part_in_every_step(case):
    epoch, shares = case
    most = [epoch.largest] * epoch.ranks
    seen = []
    for step in range(epoch.steps):
        span = epoch.span(step)
        parts = [list(part_of(span, shares_of(len(span), shares[step], most), rank)) for rank in range(epoch.ranks)]
        assert all(parts), "a rank without samples has no loss, and the others would wait for it"
        assert len(span) <= epoch.largest
        seen += [sample for part in parts for sample in part]
    whole = epoch.samples // epoch.batch * epoch.batch if epoch.drop_last else epoch.samples
    assert seen == list(range(whole))


@given(trained(), st.integers(1, 5))
def test_steps_are_of_the_same_samples_for_any_number_of_ranks(case, ranks):
    epoch, _ = case
    other = Epoch(epoch.samples, epoch.batch, min(ranks, epoch.batch, epoch.samples), epoch.drop_last)
    for step in range(min(epoch.steps, other.steps) - 1):
        assert epoch.span(step) == other.span(step)


def test_a_small_rest_goes_to_the_last_step_and_a_larger_one_is_its_own():
    assert [len(Epoch(22, 10, 3).span(step)) for step in range(Epoch(22, 10, 3).steps)] == [10, 12]
    assert [len(Epoch(23, 10, 3).span(step)) for step in range(Epoch(23, 10, 3).steps)] == [10, 10, 3]
    assert [len(Epoch(29, 10, 3, drop_last=True).span(step)) for step in range(2)] == [10, 10]


def test_a_change_holds_from_its_step_on_and_for_those_who_look_back():
    timeline = Timeline([4, 4])
    timeline.change((0, 12), [5, 3], trained=(0, 8))
    assert timeline.newest == (5, 3)
    assert [timeline.at((0, step)) for step in (8, 11, 12, 99)] == [(4, 4), (4, 4), (5, 3), (5, 3)]
    timeline.change((0, 20), [6, 2], trained=(0, 16))
    assert [timeline.at((0, step)) for step in (16, 19, 20)] == [(5, 3), (5, 3), (6, 2)]
    assert timeline.at((1, 0)) == (6, 2)


def test_a_change_before_one_that_is_still_to_come_keeps_both():
    timeline = Timeline([4, 4])
    timeline.change((0, 12), [5, 3], trained=(0, 4))
    timeline.change((0, 14), [6, 2], trained=(0, 8))
    assert [timeline.at((0, step)) for step in (8, 12, 13, 14)] == [(4, 4), (5, 3), (5, 3), (6, 2)]


def test_wherever_the_training_goes_the_newest_shares_hold():
    timeline = Timeline([4, 4])
    timeline.change((3, 12), [5, 3], trained=(3, 4))
    timeline.restart()
    assert timeline.at((0, 0)) == (5, 3)


def test_another_size_is_dealt_out_alike():
    assert shares_of(6, [8, 4], [20, 20]) == (4, 2)
    with pytest.raises(ValueError, match="1 is not between"):
        shares_of(1, [8, 4], [20, 20])
