"""Which checkpoints are kept, and that no state is a dead end."""

from hypothesis import given
from hypothesis import strategies as st

from whaleflux_checkpoint.core.lifecycle import DELETABLE, NEXT, RESTORABLE, Saved, State, newest_restorable, retain

SAVED = st.lists(
    st.builds(
        Saved,
        name=st.uuids().map(str),
        epoch=st.integers(1, 4),
        step=st.integers(0, 50),
        state=st.sampled_from(State),
        keep=st.integers(1, 4),
    ),
    unique_by=lambda s: s.age,
)


def test_every_state_leads_to_one_whose_bytes_may_go_or_is_lost():
    for start in State:
        reached, frontier = {start}, {start}
        while frontier:
            frontier = {after for state in frontier for after in NEXT[state]} - reached
            reached |= frontier
        assert reached & (DELETABLE | {State.LOST})


@given(SAVED)
def test_retention_never_gives_up_the_newest_restorable_one(saved):
    committed = [s for s in saved if s.state in RESTORABLE]
    for current in committed:
        plan = retain(saved, current)
        assert newest_restorable(saved) not in plan.expire
        assert all(s.state in RESTORABLE for s in plan.expire)
        assert all(s.state is State.WRITING for s in plan.abandon)
        assert len(committed) - len(plan.expire) == min(len(committed), current.keep)


@given(SAVED, st.integers(1, 4))
def test_an_unfinished_checkpoint_of_a_later_attempt_is_left_alone(saved, epoch):
    current = Saved("c", epoch, 10, State.COMMITTED)
    plan = retain([*saved, current], current)
    assert all(s.epoch <= epoch for s in plan.abandon)
