"""Pauses between tries: grow, stay within their bounds, are spread, and heed what a server asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.rpc.status import ServerFailure


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0, 100))
def test_a_pause_is_never_nothing_and_never_too_long(failures, chance, asked_s):
    assert 0.05 <= Backoff(0.1, 1.0).pause_s(failures, chance, asked_s=asked_s) <= 1.0


def test_pauses_double_up_to_the_longest():
    pauses = [Backoff(0.1, 1.0).pause_s(failures, 0.999999) for failures in range(1, 7)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0], abs=0.001)


def test_callers_are_spread_between_half_and_all_of_a_pause():
    pauses = [Backoff(1.0, 8.0).pause_s(2) for _ in range(200)]
    assert all(1.0 <= pause <= 2.0 for pause in pauses)
    assert len(set(pauses)) > 150


def test_a_server_may_ask_for_a_longer_pause_but_not_for_a_shorter_one():
    backoff = Backoff(0.1, 2.0)
    assert backoff.pause_s(1, 0.5, asked_s=1.0) == pytest.approx(0.75)
    assert backoff.pause_s(4, 0.5, asked_s=0.2) == backoff.pause_s(4, 0.5)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("away"),
        DeadlineExceeded("late"),
        ServerFailure("a bug"),
        ResourceExhausted("calls too often", retry_after_s=0.5),
        Aborted("others kept changing it", retry_after_s=0.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_that_means_not_now_is_worth_repeating(error):
    assert worth_repeating(error)


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("the request has 9 bytes; at most 8 are taken"),
        Aborted("epoch 1 is over"),
        FailedPrecondition("drain it first"),
        PermissionDenied("no"),
        NotFound("job", "j"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_that_stays_the_same_is_not(error):
    assert not worth_repeating(error)
