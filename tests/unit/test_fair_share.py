"""Decayed use by weight: exact as time goes, without touching what does not change."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux_scheduler.core.fair_share import FairShare

DAY_S, HOUR_S = 86_400.0, 3_600.0
T0 = 1.8e9
SPANS = st.lists(st.tuples(st.floats(0, 4 * HOUR_S), st.integers(0, 200)), min_size=1, max_size=30)


def exact_average(history, now_s, half_life_s):
    """The integral of each stretch of constant holdings, by its definition."""
    k, total = math.log(2) / half_life_s, 0.0
    ends = [*(at for at, _ in history[1:]), now_s]
    for (begin, gpus), end in zip(history, ends, strict=True):
        total += gpus * (math.exp(-k * (now_s - end)) - math.exp(-k * (now_s - begin)))
    return total


def played(share, queue, spans):
    now, history = T0, []
    for wait, gpus in spans:
        share.hold(queue, gpus, now)
        history.append((now, gpus))
        now += wait
    return now, history


@settings(max_examples=50, deadline=None)
@given(SPANS, st.sampled_from([HOUR_S, DAY_S, 7 * DAY_S]))
def test_the_average_is_the_integral(spans, half_life_s):
    share = FairShare(half_life_s)
    now, history = played(share, "q", spans)
    exact = exact_average(history, now, half_life_s)
    assert share.average("q", now) == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert share.score("q", now) == pytest.approx((exact + history[-1][1]) / 2, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(SPANS, min_size=2, max_size=4), st.sampled_from([0.5, 1.0, 3.0]), st.floats(0, DAY_S))
def test_keys_of_any_time_order_queues_as_their_scores_do_within_two_percent(played_by, weight, later):
    """Keys are compared as a heap would hold them: of the moment of the last change, and of now."""
    share, now = FairShare(DAY_S), T0
    weights = {f"q{n}": weight if n else 1.0 for n in range(len(played_by))}
    for queue, spans in zip(weights, played_by, strict=True):
        share.set_weight(queue, weights[queue])
        now = max(now, played(share, queue, spans)[0])
    now += later
    keys = {queue: share.key(queue, now) for queue in weights}
    scores = {queue: share.score(queue, now) / weights[queue] for queue in weights}
    least = min(keys, key=lambda queue: (keys[queue], queue))
    assert scores[least] <= min(scores.values()) * 1.02 + 1e-9


@settings(max_examples=30, deadline=None)
@given(SPANS, st.lists(st.floats(0, 100 * DAY_S), min_size=2, max_size=10))
def test_a_key_never_falls_while_nothing_changes(spans, later):
    share = FairShare(HOUR_S)
    now, history = played(share, "q", spans)
    keys = [share.key("q", now + wait) for wait in sorted(later)]
    assert keys == sorted(keys)
    assert history[-1][1] or len(set(keys)) == 1


def test_without_a_half_life_only_what_is_held_counts():
    share = FairShare(0.0)
    share.set_weight("a", 2.0)
    share.hold("a", 8, T0)
    share.hold("b", 5, T0)
    assert share.key("a", T0) == 4.0
    share.hold("b", 0, T0 + 9)
    assert share.key("b", T0 + 9) == 0.0
    assert share.key("nobody", T0) == -math.inf


def test_a_clock_that_steps_back_decays_nothing():
    share = FairShare(HOUR_S)
    share.hold("a", 8, T0)
    share.hold("a", 0, T0 + HOUR_S)
    assert share.average("a", T0) == share.average("a", T0 + HOUR_S) == pytest.approx(4.0)


def test_one_who_held_nothing_goes_first_and_equals_share_evenly():
    share, held = FairShare(DAY_S), {"a": 0, "b": 0, "c": 0}
    share.hold("c", 10, T0 - DAY_S)
    share.hold("c", 0, T0)
    for _ in range(30):
        first = min(held, key=lambda queue: (share.key(queue, T0), queue))
        held[first] += 1
        share.hold(first, held[first], T0)
    assert held == {"a": 12, "b": 12, "c": 6} or held["a"] == held["b"] > held["c"]
