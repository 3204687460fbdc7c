"""RoutingState decisions: the ranking, who is left out and why, and how load and failures change it."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument, NotFound, Unavailable
from whaleflux_inference_router.core.load_tracker import FORGET_S, Ended, LoadTracker
from whaleflux_inference_router.core.ranking import Load, Model, Replica, Request, RequestClass, Snapshot, Trial, rank
from whaleflux_inference_router.core.replicas import NEXT, Observed, Standing, State, state_after, surplus, wanted

GB = 10**9


def replica(name, gpu="H200", memory=141, price=4.0, ready=True):
    return Replica(
        f"models/m/replicas/{name}",
        f"10.0.0.1:{9000 + ord(name[0])}",
        ready,
        "READY" if ready else "STARTING",
        gpu,
        memory * GB,
        price,
    )


def snapshot(*replicas, **model):
    return Snapshot({"m": Model("m", **model)}, {"m": replicas})


def names(decision):
    return [ranked.replica.name[-1] for ranked in decision.ranking]


def test_least_loaded_first_and_every_ready_replica_is_ranked():
    loads = {"models/m/replicas/a": Load(in_flight=3), "models/m/replicas/b": Load(in_flight=1)}
    decision = rank(Request("m"), snapshot(replica("a"), replica("b"), replica("c", ready=False)), loads, 0)
    assert names(decision) == ["b", "a"]
    assert [(r.name[-1], why) for r, why in decision.excluded] == [("c", "it is STARTING")]


def test_long_prompts_go_to_big_cards_and_short_ones_to_cheap_cards():
    fleet = snapshot(replica("a", "RTX4090", 24, 0.4), replica("b", "H200", 141, 4.0))
    assert names(rank(Request("m", prompt_tokens=100_000), fleet, {}, 0)) == ["b", "a"]
    assert names(rank(Request("m", prompt_tokens=100), fleet, {}, 0)) == ["a", "b"]


def test_declared_classes_rule():
    classes = (RequestClass(1000, ("RTX4090", "H200")), RequestClass(0, ("H200",)))
    fleet = snapshot(replica("a", "RTX4090", 24, 9.0), replica("b"), classes=classes)
    assert names(rank(Request("m", prompt_tokens=10), fleet, {}, 0)) == ["a", "b"]
    assert names(rank(Request("m", prompt_tokens=5000), fleet, {}, 0)) == ["b", "a"]


class TestVersions:
    old, new, back = (
        dataclasses.replace(replica(name, price=1.0), version=version)
        for name, version in (("a", 1), ("b", 3), ("c", 2))
    )

    def test_what_does_not_fit_into_one_versions_window_goes_to_another(self):
        trial = Trial(3, 0.5, 1)
        fleet = snapshot(self.old, self.new, context_window_tokens=32_000, windows={1: 8_000}, trial=trial)
        assert names(rank(Request("m", 20_000), fleet, {}, 0)) == ["b"]
        assert names(rank(Request("m", 100), fleet, {}, 0)) == ["a", "b"]
        only_old = snapshot(self.old, context_window_tokens=32_000, windows={1: 8_000}, trial=trial)
        with pytest.raises(InvalidArgument, match="8000 tokens of m"):
            rank(Request("m", 20_000), only_old, {}, 0)

    def test_what_was_rolled_back_answers_only_where_the_others_are_crowded(self):
        fleet = snapshot(self.old, self.back, trial=Trial(2, 0.0, 1, 20.0))
        crowded = {"models/m/replicas/a": Load(in_flight=30)}
        assert names(rank(Request("m", 100), fleet, {}, 0)) == ["a", "c"]
        assert names(rank(Request("m", 100), fleet, crowded, 0)) == ["c", "a"]
        following = snapshot(self.old, self.new, self.back, trial=Trial(3, 0.0, 1))
        assert names(rank(Request("m", 100), following, {}, 0)) == ["a", "c", "b"]


def test_a_crowded_favourite_gives_way():
    fleet = snapshot(replica("a", "RTX4090", 24, 0.4), replica("b"))
    assert names(rank(Request("m", 10), fleet, {"models/m/replicas/a": Load(in_flight=50)}, 0)) == ["b", "a"]


def test_a_replica_that_failed_is_last_and_comes_back():
    tracker = LoadTracker(0.0)
    tracker.fail("models/m/replicas/a", 100.0)
    fleet = snapshot(replica("a"), replica("b"))
    loads = {**tracker.loads, "models/m/replicas/b": Load(in_flight=5)}
    assert names(rank(Request("m"), fleet, loads, 100.0)) == ["b", "a"]
    assert names(rank(Request("m"), fleet, loads, 160.0)) == ["a", "b"]


def test_what_cannot_be_served_says_what_to_do():
    with pytest.raises(NotFound, match="list what you may use"):
        rank(Request("x"), snapshot(replica("a")), {}, 0)
    with pytest.raises(Unavailable, match="try again"):
        rank(Request("m"), snapshot(replica("a", ready=False)), {}, 0)
    with pytest.raises(Unavailable, match="front door does not know it yet"):
        rank(Request("m"), snapshot(replica("a")), {}, 0, frozenset())
    with pytest.raises(InvalidArgument, match="shorten"):
        rank(
            Request("m", prompt_tokens=900, max_output_tokens=200),
            snapshot(replica("a"), context_window_tokens=1000),
            {},
            0,
        )


def test_an_estimate_does_not_refuse_what_may_fit():
    fleet = snapshot(replica("a"), context_window_tokens=1000)
    assert rank(Request("m", prompt_bytes=6000, max_output_tokens=100), fleet, {}, 0).ranking


def test_load_is_released_once_by_a_record_or_by_time():
    tracker = LoadTracker(0.0)
    tracker.open("d1", "a", 0.0)
    tracker.open("d2", "a", 1.0)
    tracker.close(Ended("d1", "x", 0.2, True))
    tracker.close(Ended("d1", "x", 0.2, True))
    assert tracker.loads["a"].in_flight == 1
    tracker.open("d3", "b", FORGET_S + 2)
    assert tracker.loads["a"].in_flight == 0
    tracker.close(Ended("d2", "", None, False))
    assert tracker.loads["a"].in_flight == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 50), st.floats(0.1, 9)),
        unique_by=lambda t: t[0],
    ),
    st.integers(0, 200_000),
)
def test_every_ready_replica_is_ranked_exactly_once(fleet, tokens):
    replicas = [replica(n, price=p, ready=r) for n, r, _, p in fleet]
    loads = {r.name: Load(in_flight=load) for r, (_, _, load, _) in zip(replicas, fleet, strict=True)}
    ready = {r.name for r in replicas if r.ready}
    if not ready:
        with pytest.raises(Unavailable):
            rank(Request("m", tokens), snapshot(*replicas), loads, 0)
        return
    decision = rank(Request("m", tokens), snapshot(*replicas), loads, 0)
    assert sorted(r.replica.name for r in decision.ranking) == sorted(ready)
    assert [r.score for r in decision.ranking] == sorted(r.score for r in decision.ranking)
    best = rank(Request("m", tokens), snapshot(*replicas), loads, 0, most=2)
    assert best.ranking == decision.ranking[:2], "what the front door gets is the head of what `route` shows"
    assert decision == rank(Request("m", tokens), snapshot(*reversed(replicas)), loads, 0) or len(decision.excluded) > 1


def test_replica_states_follow_probes_and_endpoints():
    assert state_after(State.STARTING, Observed("", -1))[0] is State.STARTING
    assert state_after(State.STARTING, Observed("a:1", 0))[0] is State.READY
    assert state_after(State.READY, Observed("a:1", 1))[0] is State.READY, "one slow answer is forgiven"
    assert state_after(State.READY, Observed("a:1", 2))[0] is State.STARTING
    assert state_after(State.READY, Observed("", -1))[0] is State.STARTING, "a lost process is not waited for"
    assert state_after(State.DRAINING, Observed("a:1", 0))[0] is State.DRAINING


def test_no_replica_state_is_a_dead_end():
    for start in set(State) - {State.UNKNOWN}:  # of which a newer version knows what follows
        reached, frontier = {start}, {start}
        while frontier:
            frontier = {after for state in frontier for after in NEXT[state]} - reached
            reached |= frontier
        assert State.GONE in reached


def test_wanted_replicas():
    assert [w.id for w in wanted("m", {(1, ""): 2}, ())] == ["m-0", "m-1"]
    assert [w.address for w in wanted("m", {(1, ""): 2}, ("h:1",))] == ["h:1"]
    assert surplus(["m-0", "m-1", "old"], wanted("m", {(1, ""): 1}, ())) == ["m-1", "old"]
    two = {(1, "sites/edge"): 1, (2, "sites/edge"): 1}
    first, second = wanted("m", two, ())
    assert (first.version, first.site, second.version, second.site) == (1, "sites/edge", 2, "sites/edge")
    assert re.fullmatch("m-edge-[0-9a-f]{6}-0", first.id)
    assert re.fullmatch("m-v2-edge-[0-9a-f]{6}-0", second.id)


def test_of_those_that_exist_the_ones_that_answer_stay_whatever_they_are_called():
    there = {
        "m-0": Standing(State.STARTING),
        "m-1": Standing(State.READY),
        "m-2": Standing(State.DRAINING),
        "m-v2-0": Standing(State.READY, 2),
        "of-old": Standing(State.READY),
    }
    assert [w.id for w in wanted("m", {(1, ""): 2}, (), there)] == ["m-1", "of-old"]
    assert [w.id for w in wanted("m", {(1, ""): 4}, (), there)] == ["m-1", "of-old", "m-0", "m-3"]
    assert [w.id for w in wanted("m", {(2, ""): 1}, (), there)] == ["m-v2-0"]


NAMES = st.from_regex("[ab][ab-]{0,60}[ab]|v2|a", fullmatch=True)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    models=st.lists(
        st.tuples(
            NAMES, st.sampled_from([1, 2, 11]), st.sampled_from(["", "sites/v2", "sites/a", f"sites/{'s' * 62}"])
        ),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_no_two_models_versions_or_sites_have_a_name_in_common(models):
    found = [w.id for name, version, site in models for w in wanted(name, {(version, site): 12}, ())]
    assert len(set(found)) == len(found)
    assert all(len(one) <= 63 for one in found)


def test_where_names_are_long():
    long = wanted("m" * 63, {(10**6, f"sites/{'s' * 62}{end}"): 1000 for end in "ab"}, ())
    assert len({w.id for w in long}) == 2000
    assert max(len(w.id) for w in long) <= 63
