"""How a changed engine takes over: the stages as pure functions, under any order of what replicas do."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux_inference_router.core import rollout
from whaleflux_inference_router.core.outcomes import End, Outcome, Outcomes, Tally, bucket_of, unproven, worse
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


def tally(answered=0, first_byte_s=0.1, lasted_s=1.0, failed=0, refused=0, left=0, ages_s=()):
    outcomes = Outcomes()
    for end, count in ((End.ANSWERED, answered), (End.FAILED, failed), (End.REFUSED, refused), (End.LEFT, left)):
        for _ in range(count):
            outcomes.add("r", Outcome(1.0, end, first_byte_s, lasted_s))
    return outcomes.tally(["r"], 0.0, ages_s)


class TestComparison:
    good = tally(answered=200, failed=1)

    def test_a_version_is_worse_when_its_tries_fail_or_its_first_bytes_come_late(self):
        assert worse(tally(answered=17, failed=3), self.good).startswith("3 of 20 tries failed")
        assert "p99" in worse(tally(answered=50, first_byte_s=0.3), self.good)
        assert worse(tally(answered=48, failed=2, first_byte_s=0.14), self.good) == ""

    def test_what_it_refuses_and_the_version_before_does_not_is_its_fault(self):
        assert "3 of 3 requests were answered with a 4xx" in worse(tally(refused=3), tally(answered=27))
        assert worse(tally(answered=7, refused=3), tally(answered=63, refused=27)) == "", "clients ask both alike"
        assert worse(tally(answered=3, refused=3), tally(answered=27, refused=3)) == "", "that may be chance"
        assert worse(tally(refused=3), tally()) == "", "nothing is known of the other"

    def test_clients_that_give_up_before_a_first_byte_speak_against_it(self):
        assert "given up by their clients" in worse(tally(left=4, answered=1), tally(answered=40, left=1))
        assert worse(tally(left=4, answered=6), tally(answered=60, left=40)) == ""

    def test_requests_that_do_not_end_are_compared_with_how_long_they_usually_last(self):
        quick, slow = tally(answered=30, lasted_s=0.5), tally(answered=30, lasted_s=60)
        assert "3 of 3 requests take longer than 10 s" in worse(tally(ages_s=[12, 13, 14]), quick)
        assert worse(tally(ages_s=[5, 6, 7]), quick) == "", "too soon to tell"
        assert worse(tally(ages_s=[12, 50, 100]), slow) == "", "long answers are usual here"
        assert "take longer than" in worse(tally(ages_s=[250] * 3), slow)
        assert worse(tally(ages_s=[12, 13, 14]), tally(answered=2)) == ""

    def test_nothing_speaks_for_one_that_was_asked_and_has_answered_nothing(self):
        assert "none of 2 requests" in unproven(tally(ages_s=[1], left=1), self.good)
        assert unproven(tally(answered=1, ages_s=[1]), self.good) == ""
        assert unproven(tally(), self.good) == "", "nobody asked"
        assert unproven(tally(ages_s=[1]), tally()) == "", "the other has answered nothing either"

    def test_few_tries_say_nothing_of_times(self):
        assert tally(answered=19, first_byte_s=9.0).first_byte_p99_s is None
        assert tally(answered=20, first_byte_s=9.0).first_byte_p99_s == pytest.approx(9.0, rel=0.1)
        lucky = tally(answered=20, first_byte_s=0.1) + tally(answered=2, first_byte_s=9.0)
        assert lucky.first_byte_p99_s == pytest.approx(0.1, rel=0.1), "two that are slow are chance"

    def test_what_was_before_and_who_is_gone_does_not_count(self):
        outcomes = Outcomes()
        outcomes.add("r", Outcome(1.0, End.FAILED))
        assert outcomes.tally(["r"], 2.0) == Tally()
        outcomes.keep_only(set())
        assert outcomes.tally(["r"], 0.0) == Tally()

    @settings(max_examples=100, derandomize=True, deadline=None)
    @given(times=st.lists(st.lists(st.floats(0, 5000), max_size=40), min_size=1, max_size=4))
    def test_tallies_of_several_routers_are_as_good_as_one(self, times):
        def of(found):
            outcomes = Outcomes()
            for one in found:
                outcomes.add("r", Outcome(1.0, End.ANSWERED, one, one))
            return outcomes.tally(["r"], 0.0, found)

        apart = sum(map(of, times[1:]), of(times[0]))
        assert apart == of([one for part in times for one in part])
        for one in times[0]:
            assert one <= 2 ** (bucket_of(one) / 8) * 0.001 * 1.0001 <= max(0.001, one) * 1.1


def test_one_for_which_nothing_speaks_is_watched_for_longer_and_then_goes():
    seen = {(1, ""): Count(2, 2), (2, ""): Count(1, 1)}
    assert rollout.step(made(Stage.WATCHING), seen, 61, "", "it has answered none of 1") is None
    stage, why = rollout.step(made(Stage.WATCHING), seen, 361, "", "it has answered none of 1")
    assert (stage, "it has answered none of 1" in why) == (Stage.ROLLED_BACK, True)
