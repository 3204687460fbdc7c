"""What a job is to cost and when it has to end: the choice among GPU types and prices, and what is said of deadlines that are missed."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import node, plan_with_queues
from whaleflux.errors import InvalidArgument
from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Goal, Spec
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import goals, lifecycle
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.model import Attempt, Job, JobState, TaskPhase
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOUR_S = 3600.0
TYPES = (GpuChoice("H200"), GpuChoice("A100-80GB", 2, 0.8))  # two A100s do 80 % of an H200


def job(name="j", gpus=4, types=TYPES, at=0, hours=None, **spec):
    """A waiting job; its deadline is `hours` from now."""
    asked = Spec(
        command=("x",),
        gpus=gpus,
        any_of=tuple(one.model for one in types),
        gpu_options=tuple(one for one in types if not one.plain),
        deadline=None if hours is None else NOW + timedelta(hours=hours),
        **spec,
    )
    return Job(f"queues/q/jobs/{name}", asked, JobState.QUEUED, NOW + timedelta(seconds=at))


def fleet(h200=1, a100=2, h200_usd=4.0, a100_usd=1.0):
    """Four GPUs a node: an hour of four H200s is $16, one of eight A100s $8, and what takes an hour there takes 1.25 h here: $10."""
    nodes = [node(f"s/h{at}", 4, model="H200", usd=h200_usd, leaf="h") for at in range(h200)]
    nodes += [node(f"s/a{at}", 4, model="A100-80GB", usd=a100_usd, leaf="a") for at in range(a100)]
    made = plan_with_queues()
    made.apply(News(nodes=tuple(nodes), closed={n.name: "" for n in nodes}))
    return made


def choose(made, asked, now=NOW):
    made.apply(News(jobs=(asked,), candidates={asked.name: Candidate(asked)}))
    (move,) = [move for move in made.decide(now) if move.job == asked.name]
    made.check()
    return move


def type_of(move):
    assert move.assignment is not None, move.decision.summary
    ((model, _),) = move.assignment.gpus_by_model
    return model


class TestChoice:
    def test_closest_asks_for_no_price(self):
        assert type_of(choose(fleet(), job(expected_s=HOUR_S))) == "H200"

    def test_the_cheapest_for_the_whole_work(self):
        move = choose(fleet(), job(goal=Goal.CHEAPEST, expected_s=HOUR_S))
        assert type_of(move) == "A100-80GB"
        assert move.decision.reasons[0].endswith("for $10.00 from now on")
        dear = choose(fleet(a100_usd=1.7), job(goal=Goal.CHEAPEST, expected_s=HOUR_S))
        assert type_of(dear) == "H200", "$17 for two and a half hours of A100s is more than $16"

    @pytest.mark.parametrize(("hours", "model"), [(1.5, "A100-80GB"), (1.1, "H200"), (0.5, "H200")])
    def test_the_cheapest_that_ends_by_the_deadline_else_the_one_that_ends_soonest(self, hours, model):
        assert type_of(choose(fleet(), job(goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=hours))) == model

    def test_nodes_of_one_type_at_several_prices(self):
        made = fleet(h200=1, a100=0)
        made.apply(News(nodes=(node("s/spot", 4, model="H200", usd=1.5, leaf="h"),), closed={"sites/s/nodes/spot": ""}))
        move = choose(made, job(goal=Goal.CHEAPEST, types=TYPES[:1], expected_s=HOUR_S))
        assert [where for where, _ in move.assignment.nodes] == ["sites/s/nodes/spot"]

    @pytest.mark.parametrize(("budget", "model"), [(20.0, "H200"), (12.0, "A100-80GB")])
    def test_the_fastest_within_the_budget(self, budget, model):
        asked = job(goal=Goal.FASTEST, expected_s=HOUR_S, budget_usd=budget)
        assert type_of(choose(fleet(), asked)) == model

    def test_of_unknown_work_price_per_speed_and_speed(self):
        assert type_of(choose(fleet(), job(goal=Goal.CHEAPEST))) == "A100-80GB"
        move = choose(fleet(), job(goal=Goal.FASTEST))
        assert type_of(move) == "H200"
        assert "not known" in move.decision.reasons[0] and "`expected`" in move.decision.reasons[0]

    def test_the_work_is_learned_from_jobs_like_it(self):
        made = fleet()
        over = replace(job("t-1"), state=JobState.SUCCEEDED, uid="1", run_s=HOUR_S, end_time=NOW)
        made.apply(News(jobs=(over,)))
        assert type_of(choose(made, job("t-2", goal=Goal.CHEAPEST, hours=1.1))) == "H200"


class TestWorkLeft:
    def ran(self, minutes, model="H200", gpus=4, **spec):
        begun = NOW - timedelta(minutes=minutes)
        attempt = Attempt(1, (), begun, run_time=begun, end_time=NOW, gpus_by_model=((model, gpus),), number=1)
        return replace(job(expected_s=HOUR_S, **spec), attempt=attempt, run_s=minutes * 60.0)

    @pytest.mark.parametrize(
        ("model", "gpus", "left_s"), [("H200", 4, 2400.0), ("A100-80GB", 8, 2640.0), ("H200", 2, 3000.0)]
    )
    def test_an_attempt_counts_as_long_as_it_ran_and_as_fast_as_its_gpus_are(self, model, gpus, left_s):
        assert goals.work_left_s(self.ran(20, model, gpus), Estimates(), NOW) == pytest.approx(left_s)

    def test_a_restart_chooses_again_with_what_is_left(self):
        fresh, again = (
            job(goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=1.1),
            self.ran(20, goal=Goal.CHEAPEST, hours=1.1),
        )
        assert type_of(choose(fleet(), fresh)) == "H200"
        assert type_of(choose(fleet(), again)) == "A100-80GB", "50 minutes of work there fit into 66"

    def test_one_that_runs_longer_than_expected_has_work_left(self):
        assert goals.work_left_s(self.ran(90), Estimates(), NOW) > 0

    def test_a_guess_is_no_knowledge(self):
        assert goals.work_left_s(job(), Estimates(), NOW) == 0
        assert goals.work_left_s(job(time_limit_s=60.0), Estimates(), NOW) == 0

    @settings(max_examples=50, deadline=None)
    @given(st.floats(1, 600), st.floats(60, 1e5), st.integers(1, 16), st.sampled_from(["H200", "A100-80GB", "other"]))
    def test_it_is_never_negative_and_never_more_than_twice_what_was_said_or_done(
        self, minutes, expected_s, gpus, model
    ):
        asked = self.ran(minutes, model, gpus)
        asked = replace(asked, spec=replace(asked.spec, expected_s=expected_s))
        left_s = goals.work_left_s(asked, Estimates(), NOW)
        assert 0 <= left_s <= 2 * max(expected_s, minutes * 60 * gpus)


class TestWords:
    def test_a_plan_that_is_late_says_what_would_make_it(self):
        made = fleet()
        taken = job("taken", types=TYPES[:1])
        started = lifecycle.place(taken, (move := choose(made, taken)).assignment, move.decision, NOW)
        made.apply(News(jobs=(started,)))
        late = job("late", goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=1.1, at=1)
        (first, *_) = choose(made, late).decision.reasons
        assert first == (
            "would end 2026-05-01 13:15 UTC, 9m after its deadline 2026-05-01 13:06 UTC; H200 would make it, but not enough are free"
        )

    def test_one_that_nothing_makes_says_so_in_plan_and_queue(self):
        asked = job(goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=0.5)
        decision = fleet().dry_run(asked, NOW)
        assert decision.placed and "no GPU type that it names would make it" in decision.reasons[0]
        small = fleet(h200=1, a100=1)
        running = job("running", types=TYPES[:1])
        started = lifecycle.place(running, (move := choose(small, running)).assignment, move.decision, NOW)
        small.apply(News(jobs=(started,)))
        assert "no GPU type that it names would make it" in choose(small, asked).decision.reasons[0]

    def test_who_waits_is_told_by_when_it_has_to_start(self):
        made = fleet()
        for name, kind, gpus in (("h", TYPES[0], 4), ("a", GpuChoice("A100-80GB"), 8)):
            asked = job(name, gpus, (kind,))
            move = choose(made, asked)
            made.apply(News(jobs=(lifecycle.place(asked, move.assignment, move.decision, NOW),)))
        asked = job(goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=3)
        text = "to end by its deadline 2026-05-01 15:00 UTC it has to start by 2026-05-01 14:00 UTC on H200 or 2026-05-01 13:45 UTC on A100-80GB"
        assert text in choose(made, asked).decision.reasons
        assert text in made.explain(asked, (), NOW).reasons

    def test_types_that_the_fleet_has_too_few_of_are_not_named(self):
        assert "H200" not in fleet(h200=0).dry_run(job(expected_s=HOUR_S, hours=0.5), NOW).reasons[0]

    def test_a_budget_that_is_too_small_is_said(self):
        reasons = fleet().dry_run(job(goal=Goal.CHEAPEST, expected_s=HOUR_S, budget_usd=5.0), NOW).reasons
        left = "$5.00 of its budget of $5.00 are left"
        assert (
            reasons[0] == f"the cheapest choice on A100-80GB needs $10.00, and {left}: raise `budget`, or ask for less"
        )
        assert reasons[1] == f"needs $10.00, and {left}: it ends as FAILED after 37m30s, before it is done"

    def test_a_budget_without_deadline_or_goal_says_what_it_allows(self):
        reasons = fleet().dry_run(job(expected_s=HOUR_S, budget_usd=20.0), NOW).reasons
        assert reasons[:2] == (
            "would end 2026-05-01 13:00 UTC",
            "expected to cost $16.00 from now on, and $20.00 of its budget of $20.00 are left",
        )

    def test_a_place_that_is_too_dear_names_the_goal_that_takes_a_cheaper_one(self):
        reasons = fleet().dry_run(job(expected_s=HOUR_S, budget_usd=12.0), NOW).reasons
        assert reasons[0] == (
            "expected to cost $10.00 at least on A100-80GB, and $12.00 of its budget of $12.00 are left; "
            "`goal: cheapest` takes such ones where they are free"
        )
        assert reasons[1].startswith("needs $16.00, and $12.00 of its budget of $12.00 are left")

    def test_of_work_of_unknown_length_it_says_how_long_the_money_lasts(self):
        reasons = fleet().dry_run(job(budget_usd=8.0), NOW).reasons
        assert reasons[0] == "$8.00 of its budget of $8.00 are left: enough for 30m at $16.00/h, then it ends as FAILED"
        assert "`expected`" in reasons[1]
        free = fleet(h200_usd=0.0).dry_run(job(budget_usd=8.0, types=TYPES[:1]), NOW).reasons
        assert free[0] == "its nodes have no price, so nothing of its budget is spent there"

    @pytest.mark.parametrize(
        ("budget", "said"), [(12.0, "expected to cost $10.00 at least"), (5.0, "needs $10.00, and $5.00")]
    )
    def test_who_waits_is_told_too(self, budget, said):
        made = fleet(h200=1, a100=2)
        for name, kind, gpus in (("h", TYPES[0], 4), ("a", GpuChoice("A100-80GB"), 8)):
            asked = job(name, gpus, (kind,))
            move = choose(made, asked)
            made.apply(News(jobs=(lifecycle.place(asked, move.assignment, move.decision, NOW),)))
        asked = job(expected_s=HOUR_S, budget_usd=budget)
        for decision in (made.dry_run(asked, NOW), made.explain(asked, (), NOW)):
            assert not decision.placed and said in decision.reasons[0]
            assert f"of its budget of ${budget:.2f} are left" in decision.reasons[0]

    def test_jobs_without_any_of_it_are_told_nothing(self):
        reasons = fleet().dry_run(job(expected_s=HOUR_S), NOW).reasons
        assert not any("end" in reason.split() for reason in reasons)


class TestFile:
    @pytest.mark.parametrize("goal", [Goal.CHEAPEST, Goal.FASTEST, Goal.CLOSEST])
    def test_it_is_a_word(self, goal):
        spec = job_from_yaml(f"run: x\ngpus: 1\ngoal: {goal.name.lower()}\n", Path("/")).spec
        assert spec.goal == getattr(pb, f"JOB_GOAL_{goal.name}")
        assert spec_of(spec).goal is goal

    def test_any_other_is_refused_with_those(self):
        with pytest.raises(InvalidArgument, match="one of: closest, cheapest, fastest"):
            job_from_yaml("run: x\ngpus: 1\ngoal: best\n", Path("/"))

    def test_what_this_version_does_not_know_counts_as_not_set(self):
        assert spec_of(pb.JobSpec(gpus=1, goal=77)).goal is Goal.UNSPECIFIED  # type: ignore[arg-type]

    def test_numbers_are_those_of_the_contract(self):
        assert {f"JOB_GOAL_{goal.name}": int(goal) for goal in Goal} == dict(pb.JobGoal.items())


class TestWaitingForCheaper:
    """An H200 node is free; the two A100 nodes, on which an hour's work takes 1.25 h and costs $10 instead of $16, are not."""

    def busy(self, lasts_h=1.0):
        """Somebody holds the A100s for so long."""
        made = fleet()
        there = job("there", types=TYPES[1:], gpus=8, expected_s=lasts_h * HOUR_S)
        there = replace(there, spec=replace(there.spec, gpu_options=()))
        move = choose(made, there)
        assert type_of(move) == "A100-80GB"
        placed = lifecycle.place(there, move.assignment, move.decision, NOW)
        self.there = replace(
            placed, state=JobState.RUNNING, attempt=replace(placed.attempt, run_time=NOW, usd_per_hour=8.0)
        )
        made.apply(News(jobs=(self.there,)))
        return made

    def ends(self, made):
        tasks = tuple(replace(task, phase=TaskPhase.EXITED, exit_code=0) for task in self.there.attempt.tasks)
        attempt = replace(self.there.attempt, tasks=tasks, end_time=NOW)
        made.apply(News(jobs=(replace(self.there, state=JobState.SUCCEEDED, attempt=attempt),)))

    def wants(self, hours=6.0, **spec):
        return job("wants", goal=Goal.CHEAPEST, expected_s=HOUR_S, hours=hours, **spec)

    def waits(self, made, asked, now=NOW):
        move = choose(made, asked, now)
        assert move.assignment is None, move.decision.summary
        return move.decision

    def test_it_waits_when_its_deadline_leaves_room_and_says_for_what(self):
        made = self.busy()
        decision = self.waits(made, self.wants())
        assert decision.summary.startswith(
            "waits: cheaper GPUs are in sight: A100-80GB for $10.00 are expected at 2026-05-01 13:0"
        )
        assert decision.summary.endswith("instead of H200 for $16.00 now")
        assert decision.reasons[-1] == "it starts on H200 at 2026-05-01 16:49 UTC at the latest, to keep its deadline"
        assert made.explain(self.wants(), (), NOW).summary == decision.summary
        self.ends(made)
        (move,) = made.decide(NOW)
        assert type_of(move) == "A100-80GB"
        assert made.next_look is None

    @pytest.mark.parametrize(
        ("why", "more"),
        [
            ("no room before its deadline", {"hours": 2.0}),
            ("no deadline", {"hours": None}),
            ("closest asks for no price", {"goal": Goal.CLOSEST}),
            ("as fast as it gets", {"goal": Goal.FASTEST}),
            ("nobody knows how long it runs", {"expected_s": None}),
        ],
    )
    def test_it_starts_at_once_when(self, why, more):
        asked = {"goal": Goal.CHEAPEST, "expected_s": HOUR_S, "hours": 6.0, **more}
        assert type_of(choose(self.busy(), job("wants", **asked))) == "H200", why

    def test_it_starts_at_once_when_others_stay_there_longer_than_it_can_wait(self):
        assert type_of(choose(self.busy(lasts_h=20.0), self.wants())) == "H200"

    def test_it_starts_on_the_dear_ones_when_the_others_did_not_come_free(self):
        made = self.busy()
        self.waits(made, self.wants())
        at, looks = NOW, 0
        while (moves := made.decide(at)) == [] or moves[0].assignment is None:
            at, looks = made.next_look, looks + 1
            assert looks < 500
        assert type_of(moves[0]) == "H200"
        assert at <= NOW + timedelta(hours=6 - 1.1)

    def test_somebody_else_may_have_what_it_does_not_take(self):
        made = self.busy()
        self.waits(made, self.wants())
        assert type_of(choose(made, job("other", types=TYPES[:1], at=1))) == "H200"
        self.ends(made)
        moves = {move.job: move for move in made.decide(NOW) if move.assignment is not None}
        assert type_of(moves["queues/q/jobs/wants"]) == "A100-80GB"

    def test_a_dry_run_says_so_too(self):
        assert self.busy().dry_run(self.wants(), NOW).summary.startswith("waits: cheaper GPUs are in sight")
