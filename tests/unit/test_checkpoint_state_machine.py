"""Which checkpoints are kept, and that no state is a dead end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import FailedPrecondition
from whaleflux_checkpoint.core.state_machine import (
    DELETABLE,
    NEXT,
    RESTORABLE,
    Saved,
    State,
    end_with_job,
    newest_restorable,
    retain,
)

SAVED = st.lists(
    st.builds(
        Saved,
        name=st.uuids().map(str),
        epoch=st.integers(1, 4),
        step=st.integers(0, 50),
        state=st.sampled_from(State),
        keep=st.integers(1, 4),
        serial=st.integers(0, 2),
    ),
    unique_by=lambda s: s.age,
)


KNOWN = set(State) - {State.UNKNOWN}  # of which a newer version knows what follows


def reachable(start):
    found, frontier = {start}, {start}
    while frontier:
        frontier = {after for state in frontier for after in NEXT[state]} - found
        found |= frontier
    return found


def test_every_state_leads_to_one_whose_bytes_may_go():
    for start in KNOWN:
        assert reachable(start) & DELETABLE, f"{start} keeps its bytes for ever"


def test_what_was_found_damaged_can_come_back_and_what_may_be_deleted_cannot():
    assert reachable(State.LOST) & RESTORABLE
    for state in DELETABLE:
        assert reachable(state) == {state}


def test_a_checkpoint_of_a_job_that_is_gone_ends_where_its_bytes_may_go():
    for state in KNOWN:
        assert end_with_job(state) in DELETABLE
        assert end_with_job(state) is state or end_with_job(state) in NEXT[state]


@given(SAVED)
def test_retention_never_gives_up_the_newest_restorable_one(saved):
    committed = [s for s in saved if s.state in RESTORABLE]
    for current in committed:
        plan = retain(saved, current)
        assert max(committed, key=lambda s: s.age) not in plan.expire
        assert all(s.state in RESTORABLE | {State.LOST} for s in plan.expire)
        assert all(s.state is State.WRITING for s in plan.abandon)
        kept = [s for s in committed if s not in plan.expire]
        latest = sorted(committed, key=lambda s: (s.epoch, s.age), reverse=True)[: current.keep]
        assert set(latest) <= set(kept), "an attempt keeps what it commits, however far those before it came"
        assert len(kept) <= len(latest) + 1
        given_up = [s for s in plan.expire if s.state is State.LOST]
        assert all(s.age < k.age for s in given_up for k in kept)
        assert not given_up or len(kept) >= current.keep, "while too few are kept, a lost one may be needed yet"


@given(SAVED, st.data())
def test_what_is_offered_is_the_newest_that_was_not_tried_and_lost_ones_come_last(saved, data):
    known = [s for s in saved if s.state in RESTORABLE | {State.LOST}]
    exclude = {s.name for s in data.draw(st.lists(st.sampled_from(known)) if known else st.just([]))}
    left = [s for s in known if s.name not in exclude]
    if known and not left:
        with pytest.raises(FailedPrecondition):
            newest_restorable(saved, exclude=exclude)
        return
    found = newest_restorable(saved, exclude=exclude)
    best = [s for s in left if s.state in RESTORABLE] or left
    assert found == (max(best, key=lambda s: s.age) if best else None)


@given(SAVED, st.integers(1, 4))
def test_an_unfinished_checkpoint_of_a_later_attempt_is_left_alone(saved, epoch):
    current = Saved("c", epoch, 10, State.COMMITTED)
    plan = retain([*saved, current], current)
    assert all(s.epoch <= epoch for s in plan.abandon)
