"""How a changed engine takes over: the stages as pure functions, under any order of what replicas do."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux_inference_router.core import rollout
from whaleflux_inference_router.core.outcomes import Outcomes, Sample, worse
from whaleflux_inference_router.core.rollout import NEXT, UNDER_WAY, Count, Policy, Rollout, Stage

POLICY = Policy(share=0.1, watch_s=60, ready_within_s=300)


def made(stage, wanted=None, before=None):
    wanted = wanted or {"": 2}
    return Rollout(stage, 1, 2, wanted, before if before is not None else wanted, POLICY)


def test_no_stage_is_a_dead_end_but_for_those_from_which_another_rollout_begins():
    assert set(NEXT) == set(Stage)
    for stage in UNDER_WAY:
        assert Stage.ROLLED_BACK in NEXT[stage]
    assert all(NEXT[stage] == {Stage.SURGING} for stage in set(Stage) - UNDER_WAY)


class TestStages:
    def test_one_replica_comes_on_top_at_the_first_site_and_no_old_one_leaves(self):
        found = rollout.counts(made(Stage.SURGING, {"sites/b": 2, "sites/a": 1}), {})
        assert found == {(1, "sites/b"): 2, (1, "sites/a"): 1, (2, "sites/b"): 1}

    def test_it_is_watched_once_it_is_ready_and_then_the_others_follow(self):
        seen = {(1, ""): Count(2, 2), (2, ""): Count(1, 1)}
        assert rollout.step(made(Stage.SURGING), seen, 0)[0] is Stage.WATCHING
        assert rollout.step(made(Stage.WATCHING), seen, 59) is None
        assert rollout.step(made(Stage.WATCHING), seen, 60)[0] is Stage.SHIFTING
        assert rollout.counts(made(Stage.SHIFTING), seen) == {(1, ""): 1, (2, ""): 2}

    def test_one_that_is_never_ready_is_rolled_back_and_says_what_it_waited_for(self):
        seen = {(1, ""): Count(2, 2), (2, ""): Count(1, 0, "its job waits for GPUs")}
        assert rollout.step(made(Stage.SURGING), seen, 299) is None
        stage, why = rollout.step(made(Stage.SURGING), seen, 300)
        assert (stage, "its job waits for GPUs" in why, "300 s" in why) == (Stage.ROLLED_BACK, True, True)

    @pytest.mark.parametrize("stage", sorted(UNDER_WAY, key=str))
    def test_one_that_does_worse_is_rolled_back_in_any_stage(self, stage):
        assert rollout.step(made(stage), {}, 0, "it is worse")[0] is Stage.ROLLED_BACK

    def test_one_that_stops_while_it_is_watched_is_rolled_back(self):
        seen = {(1, ""): Count(2, 2), (2, ""): Count(1, 0, "its health path does not answer")}
        assert rollout.step(made(Stage.WATCHING), seen, 5)[0] is Stage.ROLLED_BACK

    def test_what_was_rolled_back_stays_for_as_long_as_nobody_else_answers(self):
        back = made(Stage.ROLLED_BACK, {"": 1})
        assert rollout.counts(back, {(2, ""): Count(1, 1)}) == {(1, ""): 1, (2, ""): 1}
        assert rollout.counts(back, {(2, ""): Count(1, 1), (1, ""): Count(1, 1)}) == {(1, ""): 1}

    def test_what_was_rolled_back_stays_for_as_many_as_are_missing(self):
        back = made(Stage.ROLLED_BACK, {"": 10})
        assert rollout.counts(back, {(1, ""): Count(1, 1), (2, ""): Count(9, 9)}) == {(1, ""): 10, (2, ""): 9}
        assert rollout.counts(back, {(1, ""): Count(10, 4), (2, ""): Count(9, 9)}) == {(1, ""): 10, (2, ""): 6}

    def test_the_next_rollout_leaves_those_of_the_last_one_that_alone_answer(self):
        following = Rollout(Stage.SURGING, 1, 3, {"": 2}, {"": 2}, POLICY)
        seen = {(1, ""): Count(2, 0), (2, ""): Count(2, 2)}
        assert rollout.counts(following, seen) == {(1, ""): 2, (3, ""): 1, (2, ""): 2}
        assert rollout.counts(following, {**seen, (1, ""): Count(2, 1)})[2, ""] == 1

    def test_sites_that_the_new_one_does_not_have_leave_last(self):
        moving = made(Stage.SHIFTING, {"sites/b": 2}, {"sites/a": 2})
        seen = {(1, "sites/a"): Count(2, 2), (2, "sites/b"): Count(2, 1)}
        assert rollout.counts(moving, seen)[1, "sites/a"] == 2
        assert rollout.counts(moving, {**seen, (2, "sites/b"): Count(2, 2)})[1, "sites/a"] == 0


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32), wanted=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 3), min_size=1)
)
def test_as_many_as_before_always_answer_and_it_ends(seed, wanted):
    """Replicas become READY and fail in any order; what answers is never less than before, but for those that failed by themselves."""
    luck = random.Random(seed)
    stage, existing, ready = (
        Stage.SURGING,
        {(1, s): n for s, n in wanted.items()},
        {(1, s): n for s, n in wanted.items()},
    )
    age, total, failed, broken, first = 0.0, sum(wanted.values()), 0, set(), next(iter(wanted))
    for _ in range(80):
        seen = {key: Count(existing.get(key, 0), ready.get(key, 0), "x") for key in existing}
        now = Rollout(stage, 1, 2, wanted, wanted, POLICY)
        for key, number in rollout.counts(now, seen).items():
            existing[key] = number
            ready[key] = min(ready.get(key, 0), number)
        answering = sum(ready.values())
        assert answering >= total - failed
        assert sum(existing.values()) <= total + 1 + failed, "one on top"
        seen = {key: Count(existing[key], ready.get(key, 0), "x") for key in existing}
        after, _ = rollout.step(Rollout(stage, 1, 2, wanted, wanted, POLICY), seen, age) or (stage, "")
        assert after in NEXT[stage] | {stage}
        stage, age = after, 0.0 if after is not stage else age
        if stage not in UNDER_WAY:
            break
        coming = [key for key in existing if existing[key] > ready.get(key, 0)]
        if coming and luck.random() < 0.5:
            key = luck.choice(sorted(coming))
            ready[key] = ready.get(key, 0) + 1
            failed = max(0, failed - (key in broken))
            broken -= {key}
            age = 0.0
        elif luck.random() < 0.1 and ready.get((1, first), 0):
            ready[1, first] -= 1
            failed += 1
            broken |= {(1, first)}
        else:
            age += luck.choice([20.0, 61.0, 150.0])
    assert stage not in UNDER_WAY


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32), wanted=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 4), min_size=1)
)
def test_a_rollback_never_takes_answers_away_and_ends_with_the_old_version_alone(seed, wanted):
    """However far the rollout had come, with room for one more than are wanted; old ones become READY one by one, in any order."""
    luck, total = random.Random(seed), sum(wanted.values())
    new = {site: luck.randint(0, number) for site, number in wanted.items()}
    existing = {(2, s): n for s, n in new.items()} | {(1, s): wanted[s] - n for s, n in new.items()}
    ready = dict(existing)
    for _ in range(4 * total + 4):
        seen = {key: Count(existing[key], ready[key]) for key in existing}
        plan = rollout.counts(Rollout(Stage.ROLLED_BACK, 1, 2, wanted, wanted, POLICY), seen)
        for key in existing:
            ready[key] = min(ready[key], plan.get(key, 0))
            existing[key] = min(existing[key], plan.get(key, 0))
        assert sum(ready.values()) >= total, "as many as are wanted answer"
        waiting = [(1, s) for s, n in wanted.items() if existing.get((1, s), 0) < n]
        if waiting and sum(existing.values()) <= total:
            existing[luck.choice(waiting)] += 1
        starting = [key for key in existing if existing[key] > ready[key]]
        if starting and luck.random() < 0.8:
            ready[luck.choice(starting)] += 1
    seen = {key: Count(existing[key], ready[key]) for key in existing}
    assert rollout.counts(Rollout(Stage.ROLLED_BACK, 1, 2, wanted, wanted, POLICY), seen) == {
        (1, site): number for site, number in wanted.items()
    }


class TestComparison:
    def test_a_version_is_worse_when_its_tries_fail_or_its_first_bytes_come_late(self):
        good = Sample(200, 1, 0.1)
        assert worse(Sample(20, 3, 0.1), good).startswith("3 of 20 tries failed")
        assert "p99" in worse(Sample(50, 0, 0.3), good)
        assert worse(Sample(50, 2, 0.14), good) == ""

    def test_few_tries_say_nothing_of_times(self):
        outcomes = Outcomes()
        for _ in range(19):
            outcomes.add("new", 1.0, 9.0)
        assert outcomes.sample(["new"], 0.0) == Sample(19, 0, None)
        outcomes.add("new", 1.0, 9.0)
        assert outcomes.sample(["new"], 0.0).first_byte_p99_s == 9.0
        for _ in range(20):
            outcomes.add("lucky", 1.0, 0.1)
        for _ in range(2):
            outcomes.add("lucky", 1.0, 9.0)
        assert outcomes.sample(["lucky"], 0.0).first_byte_p99_s == 0.1, "two that are slow are chance"
        assert outcomes.sample(["new"], 2.0) == Sample()
        outcomes.keep_only(set())
        assert outcomes.sample(["new"], 0.0) == Sample()
