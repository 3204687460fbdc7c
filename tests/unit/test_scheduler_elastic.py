"""Elastic jobs: they start with as many GPUs as there are, grow into idle ones where that pays, and shrink instead of being stopped."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.support.scheduler_world import World, node, plan_with_queues
from tests.unit.test_scheduler_preemption import Queueing
from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.v1 import health_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import elastic, lifecycle, resize
from whaleflux_scheduler.core.holdings import held_by
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState, Queue, Spec, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
MODEL, SLOW = "H100-80GB", "A100-80GB"


def planner_of(*names, **queue):
    planner = plan_with_queues()
    machines = [node(f"s/{name}") for name in names]
    planner.apply(News(nodes=tuple(machines), closed={n.name: "" for n in machines}))
    if queue:
        planner.apply(News(queues={"q": Queue("queues/q", **queue)}))
    return planner


def job(name, gpus, least=0, most=0, at=0, **spec):
    sizes = {"elastic_min": least, "elastic_max": most} if least else {}
    asked = Spec(command=("x",), gpus=gpus, **sizes, **spec)
    return Job(f"queues/q/jobs/{name}", asked, JobState.QUEUED, NOW + timedelta(seconds=at))


def offer(planner, *jobs, now=NOW):
    planner.apply(News(jobs=jobs, candidates={j.name: Candidate(j) for j in jobs}))
    return {move.job: move for move in planner.decide(now)}


def size(move):
    return sum(len(uuids) for _, uuids in move.assignment.nodes)


def said(job_, phase, code=0, now=NOW):
    reports = tuple(Report(t.id, phase, code, rendezvous="h:1") for t in job_.attempt.tasks)
    return lifecycle.advance(job_, Observations(reports), now, Timeouts())


def placed(job_, move, now=NOW):
    after = lifecycle.place(job_, move.assignment, move.decision, now)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        after = said(after, phase, now=now)
    return after


def runs(planner, job_, now=NOW):
    after = placed(job_, offer(planner, job_, now=now)[job_.name], now)
    planner.apply(News(jobs=(after,)))
    return after


def goes_on(planner, job_, move, now=NOW):
    """The job after it stopped for what it claims, and was placed there."""
    going = lifecycle.advance(
        lifecycle.claim_while_running(job_, move.claim, move.decision.summary),
        Observations(claim_is_free=True),
        now,
        Timeouts(),
    )
    waits = said(going, TaskPhase.KILLED, -15, now)
    after = placed(waits, offer(planner, waits, now=now)[job_.name], now)
    planner.apply(News(jobs=(after,)))
    planner.check()
    return after


class TestStart:
    def test_it_starts_with_as_many_as_there_are(self):
        planner = planner_of("a", "b")
        runs(planner, job("other", 3))
        assert size(offer(planner, job("j", 8, 2))["queues/q/jobs/j"]) == 5
        planner.check()

    def test_it_starts_with_what_it_wishes_for_where_that_is_there(self):
        planner = planner_of("a", "b")
        assert size(offer(planner, job("j", 6, 2, 8))["queues/q/jobs/j"]) == 6

    def test_it_waits_while_its_least_is_not_there(self):
        planner = planner_of("a")
        runs(planner, job("other", 3))
        waits = job("j", 4, 2)
        assert offer(planner, waits)[waits.name].assignment is None
        assert "2 GPUs" in planner.explain(waits, (), NOW).summary

    def test_sizes_are_multiples_of_its_step(self):
        planner = planner_of("a", "b")
        runs(planner, job("other", 1))
        move = offer(planner, job("j", 8, 2, elastic_step=2))["queues/q/jobs/j"]
        assert size(move) == 6

    def test_where_others_wait_each_takes_its_part(self):
        planner = planner_of("a", "b")
        moves = offer(planner, *(job(f"j{i}", 8, 1, at=i) for i in range(4)))
        assert sorted(size(move) for move in moves.values()) == [2, 2, 2, 2]

    def test_a_queue_that_is_limited_bounds_its_size(self):
        planner = planner_of("a", "b", max_gpus=5)
        assert size(offer(planner, job("j", 8, 2))["queues/q/jobs/j"]) == 5
        assert planner.could_hold("q", job("j", 8, 2).spec) is False, "it is not known yet"
        assert planner.shortage("q", job("j", 8, 2).spec) == ""
        assert "at most 5" in planner.shortage("q", job("j", 8, 6).spec)

    def test_what_it_would_be_given_is_told_before(self):
        planner = planner_of("a")
        runs(planner, job("other", 3))
        assert planner.dry_run(job("j", 4, 1), NOW).placed

    def test_its_plan_says_what_its_fewest_and_its_most_gpus_cost(self):
        said = "elastic: 1 GPU at least, $2.00/h, and 8 at most, $16.00/h at the same price"
        planner = planner_of("a")
        asked = job("j", 4, 1, 8)
        assert said in planner.dry_run(asked, NOW).reasons
        runs(planner, job("other", 4))
        for decision in (planner.dry_run(asked, NOW), planner.explain(asked, (), NOW)):
            assert not decision.placed and said in decision.reasons


class TestGrowth:
    def test_into_idle_gpus_when_it_has_run_long_enough_for_that_to_pay(self):
        planner = planner_of("a", "b")
        other = runs(planner, job("other", 4))
        grows = runs(planner, job("j", 8, 2))
        assert grows.attempt.gpus == 4
        planner.apply(News(jobs=(said(other, TaskPhase.EXITED),)))
        assert planner.decide(NOW + timedelta(seconds=60)) == [], "it would not save what its restart costs"
        planner.apply(News(jobs=(grows,)))
        (move,) = planner.decide(NOW + HOUR)
        assert move.claim.purpose is ClaimPurpose.RESIZE
        assert sum(len(uuids) for _, uuids in move.claim.nodes) == 8
        assert "grows from 4 to 8 GPUs" in move.decision.summary
        again = goes_on(planner, grows, move, NOW + HOUR)
        assert (again.attempt.ranks, again.restarts, again.recoveries) == (8, 0, 0)
        assert "grows from 4 to 8" in again.past_attempts[-1].end_reason

    def test_not_while_somebody_who_waits_could_use_them(self):
        planner = planner_of("a", "b")
        grows = runs(planner, job("j", 8, 2, 8))
        assert grows.attempt.gpus == 8
        planner = planner_of("a", "b")
        other = runs(planner, job("other", 4))
        grows = runs(planner, job("j", 8, 2, 8))
        waits = job("waits", 4, at=9)
        planner.apply(News(jobs=(said(other, TaskPhase.EXITED), grows), candidates={waits.name: Candidate(waits)}))
        (move,) = planner.decide(NOW + HOUR)
        assert (move.job, size(move)) == (waits.name, 4)

    def test_what_it_wishes_for_may_be_passed_up_to_its_most(self):
        planner = planner_of("a", "b")
        grows = runs(planner, job("j", 2, 2, 6))
        planner.apply(News(jobs=(grows,)))
        (move,) = planner.decide(NOW + HOUR)
        assert sum(len(uuids) for _, uuids in move.claim.nodes) == 6

    def test_a_queue_that_is_limited_keeps_it_from_growing(self):
        planner = planner_of("a", "b", max_gpus=4)
        grows = runs(planner, job("j", 4, 2, 8))
        planner.apply(News(jobs=(grows,)))
        assert planner.decide(NOW + HOUR) == []

    def test_it_is_left_alone_for_a_while_after_each_resize(self):
        planner = planner_of("a", "b", "c")
        grows = runs(planner, job("j", 2, 2, 12))
        planner.apply(News(closed={"sites/s/nodes/c": "cordoned"}, jobs=(grows,)))
        (move,) = planner.decide(NOW + HOUR)
        again = goes_on(planner, grows, move, NOW + HOUR)
        planner.apply(News(closed={"sites/s/nodes/c": ""}, jobs=(again,)))
        assert planner.decide(NOW + HOUR + timedelta(seconds=60)) == []
        planner.apply(News(jobs=(again,)))
        assert len(planner.decide(NOW + HOUR + timedelta(seconds=resize.SETTLED_S))) == 1

    def test_and_grows_when_that_is_over_without_any_news(self):
        planner = planner_of("a", "b", "c")
        grows = runs(planner, job("j", 2, 2, 12))
        planner.apply(News(closed={"sites/s/nodes/c": "cordoned"}, jobs=(grows,)))
        (move,) = planner.decide(NOW + HOUR)
        again = goes_on(planner, grows, move, NOW + HOUR)
        planner.apply(News(closed={"sites/s/nodes/c": ""}, jobs=(again,)))
        assert planner.decide(NOW + HOUR + timedelta(seconds=60)) == []
        rested = NOW + HOUR + timedelta(seconds=resize.SETTLED_S)
        assert planner.next_look == rested
        assert planner.decide(rested - timedelta(microseconds=1)) == []
        (move,) = planner.decide(rested)
        assert sum(len(uuids) for _, uuids in move.claim.nodes) == 12
        assert planner.next_look is None or planner.next_look > rested

    def test_the_next_gpus_go_where_they_bring_most(self):
        flat = ((4, 1.0), (8, 1.05))
        jobs = [placed_as(job("flat", 4, 1, 8, elastic_speeds=flat)), placed_as(job("steep", 4, 1, 8))]
        (growth,) = resize.growths(jobs, {MODEL: 4}, NOW + HOUR)
        assert (growth.job.id, growth.gpus) == ("steep", 8)

    def test_higher_priority_grows_first(self):
        jobs = [placed_as(job("low", 4, 1, 8)), placed_as(job("high", 4, 1, 8, priority=5))]
        (growth,) = resize.growths(jobs, {MODEL: 4}, NOW + HOUR)
        assert growth.job.id == "high"

    def test_nobody_grows_for_less_than_the_restart_costs(self):
        short = placed_as(job("short", 4, 1, 8, time_limit_s=3600 + 60))
        assert resize.growths([short], {MODEL: 4}, NOW + HOUR) == []

    def test_nobody_grows_for_less_than_its_last_restart_took_to_its_first_step(self):
        """A minute until its ranks ran, and two hours until it had loaded what it needs: so long would the next one take, too."""
        grows = placed_as(job("j", 4, 1, 8))
        assert len(resize.growths([grows], {MODEL: 4}, NOW + HOUR)) == 1
        slow = replace(grows, attempt=replace(grows.attempt, first_step_time=NOW + 2 * HOUR))
        assert elastic.lost_by_restart_s(slow) == 7200 + elastic.SAVE_S
        assert resize.growths([slow], {MODEL: 4}, NOW + 3 * HOUR) == []
        assert len(resize.growths([slow], {MODEL: 4}, NOW + 24 * HOUR)) == 1

    def test_its_first_step_is_written_down_once_and_of_elastic_jobs_alone(self):
        grows, fixed = placed_as(job("j", 4, 1, 8)), placed_as(job("k", 4))
        first = Observations(step=3, first_step_time=NOW + HOUR)
        after = lifecycle.advance(grows, first, NOW + HOUR, Timeouts())
        assert after.attempt.first_step_time == NOW + HOUR
        later = Observations(step=9, first_step_time=NOW + 2 * HOUR)
        assert lifecycle.advance(after, later, NOW + 2 * HOUR, Timeouts()) is after
        assert lifecycle.advance(fixed, first, NOW + HOUR, Timeouts()) is fixed

    @settings(max_examples=25, deadline=None)
    @given(sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 64)), max_size=6), idle=st.integers(0, 64))
    def test_growth_is_within_what_is_idle_and_within_each_range(self, sizes, idle):
        jobs = [placed_as(job(f"j{at}", gpus, 1, gpus + more)) for at, (gpus, more) in enumerate(sizes)]
        growths = resize.growths(jobs, {MODEL: idle}, NOW + HOUR)
        assert sum(growth.gpus - growth.job.attempt.gpus for growth in growths) <= idle
        assert all(growth.job.attempt.gpus < growth.gpus <= elastic.most(growth.job.spec) for growth in growths)


def placed_as(job_):
    """It runs with what it asks for."""
    planner = planner_of(*"abcdefgh"[: -(-job_.spec.gpus // 4)])
    return runs(planner, job_)


class TestSeveralTypes:
    """A job that names several GPU types, with how fast it is on each."""

    BOTH = ((MODEL, SLOW), (GpuChoice(SLOW, throughput=0.4),))

    def planner(self, fast, slow):
        planner = plan_with_queues()
        machines = [node(f"s/f{at}") for at in range(fast)] + [node(f"s/s{at}", model=SLOW) for at in range(slow)]
        planner.apply(News(nodes=tuple(machines), closed={n.name: "" for n in machines}))
        return planner

    def job(self, name, gpus, least, most=0, *, types=BOTH, **spec):
        return job(name, gpus, least, most, any_of=types[0], gpu_options=types[1], **spec)

    def test_it_starts_where_type_and_number_together_are_fastest(self):
        planner = self.planner(1, 2)
        few = runs(planner, self.job("few", 4, 1))
        assert few.attempt.gpus_by_model == ((MODEL, 4),), "four fast ones, though four slow ones were there, too"
        planner = self.planner(1, 4)
        many = runs(planner, self.job("many", 16, 1))
        assert many.attempt.gpus_by_model == ((SLOW, 16),), "4 ** 0.8 < 0.4 * 16 ** 0.8"
        planner.check()

    def test_it_goes_on_with_fewer_of_a_faster_type_that_is_idle(self):
        planner = self.planner(1, 1)
        other = runs(planner, job("other", 4, any_of=(MODEL,)))
        moves = runs(planner, self.job("j", 4, 1, 4))
        assert moves.attempt.gpus_by_model == ((SLOW, 4),)
        planner.apply(News(jobs=(said(other, TaskPhase.EXITED), moves)))
        (move,) = planner.decide(NOW + HOUR)
        assert "goes on with 4 x H100-80GB instead of 4 x A100-80GB" in move.decision.summary
        again = goes_on(planner, moves, move, NOW + HOUR)
        assert again.attempt.gpus_by_model == ((MODEL, 4),)

    def test_not_for_what_is_hardly_faster(self):
        nearly = ((MODEL, SLOW), (GpuChoice(SLOW, throughput=0.97),))
        planner = self.planner(1, 1)
        other = runs(planner, job("other", 4, any_of=(MODEL,)))
        stays = runs(planner, self.job("j", 4, 1, 4, types=nearly))
        planner.apply(News(jobs=(said(other, TaskPhase.EXITED), stays)))
        assert planner.decide(NOW + HOUR) == []

    def test_never_on_a_type_that_it_does_not_name(self):
        planner = self.planner(2, 1)
        only = runs(planner, self.job("j", 4, 1, 4, types=((SLOW,), ())))
        assert only.attempt.gpus_by_model == ((SLOW, 4),)
        planner.apply(News(jobs=(only,)))
        assert planner.decide(NOW + HOUR) == []

    def test_idle_gpus_of_a_type_go_to_those_who_gain_most_by_it(self):
        gains, hardly = (self.job(n, 4, 1, 4, types=((MODEL, SLOW), (GpuChoice(SLOW, throughput=t),)))
                         for n, t in (("gains", 0.1), ("hardly", 0.8)))  # fmt: skip
        planner = self.planner(0, 2)
        jobs = [runs(planner, one) for one in (hardly, gains)]
        (growth,) = resize.growths(jobs, {MODEL: 4}, NOW + HOUR)
        assert (growth.job.id, growth.gpus, growth.model) == ("gains", 4, MODEL)

    @settings(max_examples=25, deadline=None)
    @given(
        sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 16), st.floats(0.05, 5)), max_size=5),
        fast=st.integers(0, 16),
        slow=st.integers(0, 16),
    )
    def test_growth_is_within_what_is_idle_of_each_type(self, sizes, fast, slow):
        jobs = []
        for at, (gpus, more, speed) in enumerate(sizes):
            types = ((MODEL, SLOW), (GpuChoice(SLOW, throughput=speed),))
            planner = self.planner(0, 2)
            jobs.append(runs(planner, self.job(f"j{at}", gpus, 1, gpus + more, types=types)))
        taken = {MODEL: 0, SLOW: 0}
        for growth in resize.growths(jobs, {MODEL: fast, SLOW: slow}, NOW + HOUR):
            before = growth.job.attempt.gpus if growth.model == SLOW else 0
            taken[growth.model] += growth.gpus - before
            known = growth.job.spec
            assert elastic.pace(known, growth.gpus, growth.model) > elastic.pace(known, growth.job.attempt.gpus, SLOW)
        assert taken[MODEL] <= fast
        assert taken[SLOW] <= slow


class TestShrinking:
    def test_for_a_higher_priority_instead_of_being_stopped(self):
        planner = planner_of("a", "b")
        low = runs(planner, job("low", 8, 2))
        high = job("high", 4, priority=9, at=1)
        moves = offer(planner, high)
        assert list(moves) == [low.name, high.name], "it has its smaller place before it is asked to leave"
        shrinks, claims = moves[low.name].claim, moves[high.name].claim
        assert claims.victims == (low.name,)
        assert sum(len(uuids) for _, uuids in shrinks.nodes) == 4
        assert not claims.concerns(shrinks.gpus)
        assert moves[low.name].decision.summary == f"shrinks from 8 to 4 GPUs for {high.name}"
        planner.check()
        waiting = lifecycle.claim(high, claims, "waits")
        planner.apply(News(jobs=(waiting,), candidates={high.name: Candidate(waiting)}))
        smaller = goes_on(planner, low, moves[low.name])
        assert smaller.attempt.ranks == 4
        assert high.name in {move.job for move in planner.decide(NOW) if move.assignment} or held(planner, high) == 4

    @pytest.mark.parametrize(("least", "kept"), [(2, 3), (4, 0)])
    def test_it_keeps_no_gpu_that_is_reported_as_sick(self, least, kept):
        planner = planner_of("a", "b")
        low = runs(planner, job("low", 8, least))
        first = planner.known_nodes["sites/s/nodes/a"]
        gpus = tuple(replace(gpu, healthy=gpu.index != 0) for gpu in first.gpus)
        planner.apply(News(nodes=(replace(first, gpus=gpus),)))
        moves = offer(planner, job("high", 4, priority=9, at=1))
        assert moves["queues/q/jobs/high"].claim.victims == (low.name,)
        keeps = [uuid for _, uuids in moves[low.name].claim.nodes for uuid in uuids] if low.name in moves else []
        assert len(keeps) == kept
        assert gpus[0].uuid not in keeps

    def test_it_is_stopped_when_what_is_left_is_less_than_its_least(self):
        planner = planner_of("a", "b")
        low = runs(planner, job("low", 8, 6))
        moves = offer(planner, job("high", 4, priority=9, at=1))
        assert low.name not in moves
        assert moves["queues/q/jobs/high"].claim.victims == (low.name,)

    def test_for_an_equal_when_it_has_settled(self):
        planner = planner_of("a", "b")
        grows = runs(planner, job("j", 2, 2, 8))
        planner.apply(News(jobs=(grows,)))
        (move,) = planner.decide(NOW + HOUR)
        grown = goes_on(planner, grows, move, NOW + HOUR)
        waits = job("waits", 3, at=3600)
        (move,) = offer(planner, waits, now=NOW + HOUR).values()
        assert (move.assignment, move.claim) == (None, None)
        planner.apply(News(jobs=(grown,)))  # looked at again later
        moves = {move.job: move for move in planner.decide(NOW + HOUR + timedelta(seconds=resize.SETTLED_S))}
        assert moves[waits.name].claim.victims == (grown.name,)
        assert sum(len(uuids) for _, uuids in moves[grown.name].claim.nodes) == 5

    def test_for_an_equal_when_idle_gpus_that_counted_for_its_part_are_taken(self):
        planner = planner_of("a")
        slow = node("s/slow", model=SLOW)
        planner.apply(News(nodes=(slow,), closed={slow.name: ""}))
        large = runs(planner, job("large", 4, 1, any_of=(MODEL,)))
        waits, other = job("waits", 1, any_of=(MODEL,), at=1), job("other", 4, any_of=(SLOW,), at=2)
        (move,) = offer(planner, waits, now=NOW + HOUR).values()
        assert move.claim is None, "of eight GPUs four are its part"
        moves = offer(planner, other, now=NOW + HOUR)
        assert moves[other.name].assignment is not None
        assert moves[waits.name].claim.victims == (large.name,)

    def test_for_an_equal_when_nobody_claims_its_gpus_any_more(self):
        planner = planner_of("a")
        large = runs(planner, job("large", 4, 1))
        place = tuple((task.node, task.gpus) for task in large.attempt.tasks)
        until = NOW + 2 * HOUR
        promise = Claim(place, (), until, ClaimPurpose.RESERVATION, start_time=until)
        promised, waits = replace(job("promised", 4), claim=promise), job("waits", 1, at=1)
        planner.apply(News(jobs=(promised,)))
        (move,) = offer(planner, waits, now=NOW + HOUR).values()
        assert move.claim is None, "what it left would be another's"
        planner.apply(News(jobs=(replace(promised, claim=None),)))
        moves = {move.job: move for move in planner.decide(NOW + HOUR)}
        assert moves[waits.name].claim.victims == (large.name,)

    def test_an_equal_is_left_alone_until_it_has_worked_for_what_its_restart_cost(self):
        ran = placed_as(job("j", 8, 2, 8))
        again = replace(ran, past_attempts=(ran.attempt,))
        loads = replace(again, attempt=replace(again.attempt, first_step_time=None))
        stepped = replace(again, attempt=replace(again.attempt, first_step_time=NOW + timedelta(seconds=570)))
        pays_s = resize.WORKS * (570 + elastic.SAVE_S)
        assert not resize.may_give(stepped, NOW + timedelta(seconds=570 + pays_s - 1))
        assert resize.may_give(stepped, NOW + timedelta(seconds=570 + pays_s))
        known = replace(loads, past_attempts=(stepped.attempt,))
        assert not resize.may_give(known, NOW + 24 * HOUR), "it loads its checkpoint still"

    def test_comings_and_goings_cost_no_job_more_than_a_third_of_its_time(self):
        """Every other minute a short job comes to a full machine, for six hours; each restart of the elastic one takes 250 s."""
        sizes = {"elastic_min": 1, "elastic_max": 8, "checkpoint_every_steps": 10}
        long = Submission("queues/q/jobs/long", Spec(command=("x",), gpus=8, **sizes), 0, 6 * 3600, restart_s=250.0)
        short = [
            Submission(f"queues/q/jobs/s{at}", Spec(command=("x",), gpus=1), 120.0 * at, 60) for at in range(1, 180)
        ]
        result = Simulation([node("s/a"), node("s/b")], Workload([long, *short], delays=Delays(save_s=0.0))).run()
        seen, *others = result.outcomes
        assert 0 < seen.suspensions * 250 <= seen.completion_s / (1 + resize.WORKS)
        lost_s = 250 + elastic.SAVE_S
        assert max(one.wait_s for one in others) <= (1 + resize.WORKS) * lost_s + 120, "it gives then"

    def test_its_steps_are_no_reason_to_try_again_who_waits(self):
        planner = planner_of("a")
        low = runs(planner, job("low", 4, 1))
        offer(planner, job("waits", 3, at=9))
        planner.apply(News(jobs=(replace(low, step=7),)))
        assert not planner.unfinished
        planner.apply(News(jobs=(replace(low, step=7, claim=None, epoch=low.epoch + 1),)))
        assert planner.unfinished

    def test_not_for_a_lower_priority(self):
        planner = planner_of("a")
        runs(planner, job("j", 4, 1, priority=5))
        (move,) = offer(planner, job("waits", 2, at=9), now=NOW + HOUR).values()
        assert move.claim is None

    def test_those_give_whose_speed_falls_least(self):
        planner = planner_of("a", "b")
        flat = runs(planner, job("flat", 4, 1, elastic_speeds=((1, 1.0), (4, 1.01))))
        runs(planner, job("steep", 4, 1, elastic_speeds=((1, 1.0), (4, 4.0))))
        moves = offer(planner, job("high", 2, priority=9, at=1))
        assert moves["queues/q/jobs/high"].claim.victims == (flat.name,)

    def test_several_shrink_for_one(self):
        planner = planner_of("a", "b")
        low = [runs(planner, job(f"low{i}", 4, 1, at=i)) for i in range(2)]
        moves = offer(planner, job("high", 6, priority=9, at=9))
        assert set(moves["queues/q/jobs/high"].claim.victims) == {one.name for one in low}
        assert [sum(len(u) for _, u in moves[one.name].claim.nodes) for one in low] == [1, 1]


def held(planner, job_):
    return sum(len(uuids) for uuids in planner.held().get(job_.name, {}).values())


def test_speeds_are_those_that_are_known_and_between_them_on_a_line():
    spec = Spec(gpus=8, elastic_min=2, elastic_speeds=((4, 2.0), (8, 3.0)))
    assert [elastic.speed(spec, gpus) for gpus in (2, 4, 6, 8, 64)] == [1.0, 2.0, 2.5, 3.0, 3.0]
    usual = Spec(gpus=8, elastic_min=2)
    assert elastic.speed(usual, 8) / elastic.speed(usual, 4) == pytest.approx(1.741, abs=1e-3)


class Sizes(Queueing):
    """Beside all that: elastic jobs come, are resized, and go on."""

    @rule(least=st.integers(1, 3), more=st.integers(1, 6), priority=st.integers(0, 2))
    def submit_elastic(self, least, more, priority):
        self.number += 1
        self.store(job(f"j{self.number}", least + more, least, 12, self.number, priority=priority))

    @rule(later=st.integers(0, 3), refused=st.sets(st.integers(0, 5)))
    def decide(self, refused, later=0):
        for number, move in enumerate(self.planner.decide(NOW + later * HOUR)):
            before = self.jobs[move.job]
            if number in refused:
                self.store(before)
            elif move.assignment is not None:
                self.store(lifecycle.place(before, move.assignment, move.decision, NOW))
            elif move.claim is not None and move.claim.purpose is ClaimPurpose.RESIZE:
                assert sum(len(uuids) for _, uuids in move.claim.nodes) >= before.spec.elastic_min > 0
                self.store(lifecycle.claim_while_running(before, move.claim, move.decision.summary))
            elif move.claim is not None:
                self.store(lifecycle.claim(before, move.claim, "waits"))

    @rule()
    def look_at_places(self):
        for known in list(self.jobs.values()):
            if known.claim is not None and known.claim.purpose is ClaimPurpose.RESIZE:
                others = [held_by(other) for other in self.jobs.values() if other.name != known.name]
                free = not any(known.claim.concerns(gpus) for gpus in others)
                self.store(lifecycle.advance(known, Observations(claim_is_free=free), NOW, Timeouts()))

    def room_that_was_made_is_used(self):
        """Said by the machine of fixed sizes; here others may grow first."""

    def nobody_elses(self, given, to):
        pass


TestSizes = Sizes.TestCase
TestSizes.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


ELASTIC = {"checkpoint": pb.CheckpointPolicy(every_steps=10), "elastic": pb.Elastic(min=2, max=8)}


def gpus_of(known):
    return sum(len(task.gpu_uuids) for task in known.attempt.tasks)


async def reaches(world, name, ready, what):
    """The job once it is so; hours of the loop's time may pass, so it is not looked at as often as `until` does."""
    for _ in range(1000):
        known = await world.job(name)
        if ready(known):
            return known
        await asyncio.sleep(10.0)
    raise AssertionError(f"{name} never {what}: {known}")


async def runs_with(world, name, gpus):
    def there(known):
        return known.state == pb.JOB_STATE_RUNNING and gpus_of(known) == gpus

    return await reaches(world, name, there, f"runs with {gpus} GPUs")


@pytest.mark.parametrize("new_leader", [False, True])
async def test_it_shrinks_for_another_and_grows_back(new_leader):
    async with World() as world:
        await world.add(node("s/a"), node("s/b"))
        low = await world.submit(8, **ELASTIC)
        await runs_with(world, low, 8)
        high = await world.submit(4, priority=9)
        await world.reaches(high, "RUNNING")
        smaller = await runs_with(world, low, 4)
        assert smaller.attempt.number == 2
        assert smaller.past_attempts[0].end_reason.startswith(("preempted: makes room", "resized: shrinks from 8 to 4"))
        told = [task for agent in world.agents.values() for task in agent.tasks.values() if task.job == low]
        assert {(task.world_size, task.group_world_size, task.epoch) for task in told} == {
            (4, 1, smaller.attempt.epoch)
        }
        if new_leader:
            await world.restart()
        for agent in world.agents.values():
            for task in [task for task, known in agent.tasks.items() if known.job == high]:
                agent.exit(0, task)
        larger = await runs_with(world, low, 8)
        assert "grows from 4 to 8 GPUs" in larger.past_attempts[-1].end_reason
        assert (larger.restarts, larger.recoveries) == (0, 0)
        await world.planner.ask(lambda planner: planner.check())


async def test_a_resize_that_fails_half_way_leaves_it_running():
    async with World() as world:
        a, b = await world.add(node("s/a"), node("s/b"))
        other = await world.submit(4)
        await world.reaches(other, "RUNNING")
        low = await world.submit(8, **ELASTIC)
        await runs_with(world, low, 4)
        with_other = a if any(task.job == other for task in a.tasks.values()) else b
        with_low = b if with_other is a else a
        with_low.slow_to_die = True
        with_other.exit(0)
        suspended = await reaches(world, low, lambda known: known.state == pb.JOB_STATE_SUSPENDING, "stops to grow")
        assert "grows" in suspended.attempt.end_reason
        world.phase(with_other.node, health_pb2.NODE_PHASE_UNREACHABLE)
        with_low.slow_to_die = False
        (task,) = [name for name, report in with_low.reports.items() if report.job == low]
        with_low.report(task, pb.TASK_PHASE_KILLED, -15)
        again = await runs_with(world, low, 4)
        assert ({task.node for task in again.attempt.tasks}, again.HasField("claim")) == ({with_low.node}, False)
        await world.planner.ask(lambda planner: planner.check())


class TestWhyItStays:
    """The first thing that stands in the way of growing, in the order of the rules."""

    def why(self, planner, running, at=NOW):
        return planner.why_it_stays(running, at)

    def test_it_has_what_its_file_says(self):
        planner = planner_of("a", "b")
        full = runs(planner, job("full", 4, 2, 4))
        assert self.why(planner, full) == "does not grow: it has 4 GPUs, and elastic.max is 4"
        flat = runs(planner, job("flat", 2, 1, 4, elastic_speeds=((1, 1.0), (2, 2.0), (4, 2.0))))
        assert (
            self.why(planner, flat)
            == "does not grow: its elastic.speeds say that it is no faster with more than 2 GPUs"
        )
        assert self.why(planner, runs(planner, job("fixed", 1))) == ""

    def test_its_queue_may_not_take_more(self):
        planner = planner_of("a", "b", max_gpus=5)
        one = runs(planner, job("one", 4, 4, 8, elastic_step=2))
        assert self.why(planner, one) == "does not grow: queue q holds 4 of at most 5 GPUs"

    def test_too_few_are_idle_and_others_come_first(self):
        planner = planner_of("a")
        one = runs(planner, job("one", 4, 4, 8, elastic_step=2))
        offer(planner, job("other", 3, at=1))
        why = self.why(planner, one)
        assert why.startswith("does not grow: 0 GPUs that it could use are idle, and its step is 2")
        assert why.endswith("1 jobs that wait take what comes free first")

    def test_it_would_not_pay_yet_or_was_restarted_lately(self):
        planner = planner_of("a", "b")
        one = runs(planner, job("one", 4, 4, 8, elastic_step=4, expected_s=100.0))
        why = self.why(planner, one)
        assert why.startswith("does not grow: 4 GPUs are idle; to go on with them is expected to save ")
        assert why.endswith(", and a restart costs 1m")
        again = replace(one, past_attempts=(one.attempt,))
        assert "restarted lately, and is left alone for 2m more" in self.why(planner, again)

    def test_what_grows_says_so(self):
        planner = planner_of("a", "b")
        one = runs(planner, job("one", 4, 4, 8, elastic_step=4, expected_s=10 * 3600.0))
        assert self.why(planner, one) == (
            "it grows to 8 GPUs as soon as those are close enough together: it has 4, and 4 more are idle"
        )
        (move,) = planner.decide(NOW + HOUR)
        claimed = lifecycle.claim_while_running(one, move.claim, move.decision.summary)
        assert self.why(planner, claimed) == "it is about to go on with 8 GPUs instead of 4"

    async def test_through_explain(self):
        async with World() as world:
            await world.add(node("a/n1"))
            name = await world.submit(2, elastic={"min": 1, "max": 2}, checkpoint={"every_steps": 10})
            await world.reaches(name, "RUNNING")
            answer = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name), None)
            assert answer.decision.reasons[-1] == "does not grow: it has 2 GPUs, and elastic.max is 2"
