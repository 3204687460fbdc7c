"""Promised starts: a gang starts when it was promised, whatever others say of themselves, and its GPUs are used until then."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import node
from whaleflux.events.publisher import EntryChange
from whaleflux.manifests.job_fields import JobKind
from whaleflux.store.api import Entry
from whaleflux.v1 import events_pb2
from whaleflux_scheduler import convert, news
from whaleflux_scheduler.core import availability, estimates, expected_ends, lifecycle
from whaleflux_scheduler.core.availability import Availability
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.model import Attempt, Claim, ClaimPurpose, Job, JobState, Queue, Spec
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = 3600.0


def ended(name="train-1", run_s=HOUR, gpus=1, **more):
    spec = Spec(command=("x",), gpus=gpus, **more)
    return Job(f"queues/q/jobs/{name}", spec, JobState.SUCCEEDED, NOW, run_s=run_s, uid=name)


def waiting(name, gpus=1, **more):
    return Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, **more), JobState.QUEUED, NOW, uid=name)


class TestEstimates:
    def test_what_a_job_says_goes_before_what_was_learned_and_its_limit_is_a_bound(self):
        known = Estimates()
        known.learn(ended(run_s=10 * HOUR))
        assert known.of(waiting("train-2", expected_s=HOUR)).likely_s == HOUR
        assert known.of(waiting("train-2", expected_s=HOUR, time_limit_s=600.0)).safe_s == 600.0
        assert known.of(waiting("train-2", time_limit_s=2 * HOUR)).hard_s == 2 * HOUR

    def test_a_family_is_learned_by_name_without_numbers_and_by_size(self):
        known = Estimates()
        for number in range(9):
            known.learn(ended(f"train_{number:04}", run_s=HOUR))
            known.learn(ended(f"eval-{number}", run_s=60.0 + number))
        assert known.of(waiting("train-77")).likely_s == HOUR
        assert known.of(waiting("eval")).safe_s == 68.0
        assert known.of(waiting("other")).likely_s > 60.0, "of all of the queue"
        assert estimates.family_of("sweep-lr-0.1-3") == "sweep-lr"
        assert estimates.family_of("123") == "123"

    def test_an_ended_job_is_learned_once_and_one_that_never_ran_never(self):
        known = Estimates()
        assert known.learn(ended()) and not known.learn(ended())
        assert not known.learn(ended("other", run_s=0.0))
        assert not known.learn(waiting("third"))

    def test_who_was_cancelled_tells_nothing_of_how_long_such_jobs_run(self):
        known = Estimates()
        cancelled = replace(ended("train-1", run_s=5.0), state=JobState.CANCELLED)
        assert not known.learn(cancelled)
        assert known.of(waiting("train-2")).likely_s == estimates.DEFAULT_S

    def test_a_few_runs_of_another_name_say_nothing(self):
        known = Estimates()
        for number in range(estimates.ENOUGH_OF_OTHERS):
            assert known.of(waiting("other")).likely_s == estimates.DEFAULT_S
            known.learn(ended(f"try-{number}", run_s=5.0))
        assert known.of(waiting("other")).likely_s == estimates.LEAST_S

    @pytest.mark.parametrize(("ran_s", "guess_s"), [(0.0, HOUR), (HOUR, 2 * HOUR), (5 * HOUR, 8 * HOUR)])
    def test_who_runs_longer_than_expected_is_guessed_at_twice_as_much(self, ran_s, guess_s):
        assert Estimates().of(waiting("long", expected_s=HOUR), ran_s).likely_s == guess_s

    def test_guesses_of_runs_like_it_are_longer_than_it_has_run(self):
        known = Estimates()
        for number, hours in enumerate((1, 2, 30)):
            known.learn(ended(f"train-{number}", run_s=hours * HOUR))
        assert known.of(waiting("train-9"), 3 * HOUR).likely_s == 30 * HOUR
        assert known.of(waiting("train-9"), 40 * HOUR).likely_s > 40 * HOUR

    def test_a_service_never_ends_and_a_limit_ends_what_has_one(self):
        attempt = Attempt(1, (), NOW, run_time=NOW)
        service = replace(waiting("s", kind=JobKind.SERVICE), attempt=attempt, state=JobState.RUNNING)
        assert service.spec.is_service and estimates.end_of(Estimates(), service, NOW) is None
        limited = replace(waiting("t", time_limit_s=HOUR, expected_s=60.0), attempt=attempt, state=JobState.RUNNING)
        end = estimates.end_of(Estimates(), limited, NOW)
        assert end is not None and end.hard
        assert end.safe == NOW + timedelta(seconds=HOUR + limited.grace_s)
        assert end.likely == NOW + timedelta(minutes=1)

    def test_its_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(estimates, "MOST_FAMILIES", 10)
        known = Estimates()
        for number in range(50):
            known.learn(ended(f"{number}x", run_s=HOUR))
        assert known.families == 10


class TestAvailability:
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 30).map(str), st.one_of(st.none(), st.integers(0, 100).map(float)), st.integers(0, 8)
            ),
            max_size=80,
        ),
        st.integers(2, 6),
    )
    def test_it_is_the_sorted_list_of_what_was_said_last(self, said, block):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(availability, "BLOCK", block)
            profile, model = Availability(), dict[str, tuple[float, int]]()
            for name, end_s, gpus in said:
                profile.set(name, end_s, gpus)
                model.pop(name, None)
                if end_s is not None:
                    model[name] = end_s, gpus
        for by_s in (-1.0, 0.0, 50.0, 100.0):
            due = sorted((at, name) for name, (at, _) in model.items() if at <= by_s)
            assert list(profile.until(by_s)) == due
            assert profile.overdue(by_s) == [name for _, name in due]
            assert profile.freed_by(by_s) == sum(model[name][1] for _, name in due)
        assert len(profile) == len(model)
        assert all(profile.end_s(name) == at and profile.gpus(name) == gpus for name, (at, gpus) in model.items())


def simulate(jobs, nodes=4, **more):
    fleet = [node(f"s/n{number}", 4) for number in range(nodes)]
    simulation = Simulation(fleet, Workload(jobs, {}, Delays(save_s=10.0, restart_s=30.0)), **more)
    return {outcome.name.rpartition("/")[2]: outcome for outcome in simulation.run().outcomes}


def job(name, at_s, run_s, gpus, expected_s=None, **more):
    return Submission(
        f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, expected_s=expected_s, **more), at_s, run_s
    )


class TestPromises:
    def test_small_work_that_keeps_coming_does_not_starve_a_gang_and_runs_until_its_start(self):
        small = [job(f"s{n}", 60.0 * n, 1_000.0, 4, 1_000.0, max_nodes=1) for n in range(60)]
        jobs = sorted([*small, job("gang", 300.0, 500.0, 16, 500.0)], key=lambda j: j.at_s)
        found = simulate(jobs)
        assert found["gang"].start_s <= found["gang"].promised_s
        assert found["gang"].wait_s < 1_200.0

    def test_who_is_over_before_the_promised_start_uses_the_gpus_until_then(self):
        jobs = [
            job("long", 0.0, 10_000.0, 4, 10_000.0),
            job("gang", 10.0, 100.0, 16, 100.0),
            job("short", 20.0, 1_000.0, 4, 1_000.0),
            job("too-long", 30.0, 20_000.0, 4, 20_000.0),
        ]
        found = simulate(jobs)
        assert found["short"].wait_s == 0.0
        assert found["gang"].start_s <= found["gang"].promised_s < 10_200.0
        assert found["too-long"].start_s >= found["gang"].start_s, "it would have been in the way"
        assert sum(outcome.suspensions for outcome in found.values()) == 0

    @pytest.mark.parametrize("expected_s", [None, 600.0])
    def test_who_has_a_time_limit_is_counted_on_to_use_it_whatever_is_expected(self, expected_s):
        """So nobody within its limit is in a promise's way, and suspended for it."""
        jobs = [job(f"train-{n}", 1_000.0 * n, 600.0, 4) for n in range(3)]
        jobs += [job("long", 5_000.0, 10_000.0, 4, 10_000.0), job("gang", 5_010.0, 100.0, 16, 100.0)]
        jobs += [job("train-9", 5_020.0, 15_000.0, 4, expected_s, time_limit_s=20_000.0)]
        jobs += [job("train-10", 5_030.0, 5_000.0, 4, expected_s, time_limit_s=6_000.0)]
        found = simulate(jobs)
        assert found["train-9"].start_s >= found["gang"].start_s
        assert found["train-10"].wait_s == 0.0, "it is over in time in any case"
        assert sum(one.suspensions for one in found.values()) == 0

    def test_who_said_too_little_is_suspended_and_goes_on_later(self):
        jobs = [
            job("long", 0.0, 3_000.0, 4, 3_000.0),
            job("gang", 10.0, 100.0, 16, 100.0),
            job("liar", 20.0, 50_000.0, 4, 60.0),
        ]
        found = simulate(jobs)
        assert found["liar"].wait_s == 0.0 and found["liar"].suspensions == 1
        assert found["gang"].start_s <= found["gang"].promised_s
        assert found["liar"].state is JobState.SUCCEEDED

    @pytest.mark.parametrize(
        ("at_s", "more", "suspended"),
        [
            (20.0, {"checkpoint_every_steps": 10}, True),
            (5.0, {"checkpoint_every_steps": 10}, True),
            (20.0, {}, False),
            (20.0, {"checkpoint_every_steps": 10, "time_limit_s": 300 * HOUR}, False),
        ],
        ids=[
            "saves checkpoints",
            "came first, but waits for fewer GPU-hours",
            "would lose its work",
            "ends by a limit",
        ],
    )
    def test_work_that_passed_a_gang_for_hours_makes_room_for_it(self, at_s, more, suspended):
        """All say that they take 100 hours, so that no start is in sight: what was there first ends sooner, and other work takes its place."""
        first = [job(f"first{n}", 0.0, hours * HOUR, 4, 100 * HOUR) for n, hours in enumerate((90, 90, 1, 2))]
        late = [job(f"late{n}", at_s + n, 40 * HOUR, 4, 100 * HOUR, **more) for n in range(2)]
        beside = job("beside", 0.0, 90 * HOUR, 3, 100 * HOUR)
        ticks = [job(f"tick{n}", 600.0 * n, 60.0, 1, 60.0) for n in range(1, 40)]  # so that there are events at all
        jobs = [*first, beside, job("gang", 10.0, HOUR, 8, HOUR), *late, *ticks]
        found = simulate(sorted(jobs, key=lambda j: j.at_s), nodes=5)
        assert sum(found[f"late{n}"].suspensions for n in range(2)) == (2 if suspended else 0)
        assert (found["gang"].wait_s < 4.2 * HOUR) == suspended
        assert found["gang"].start_s >= 4 * HOUR, "it lets them pass for a while"
        assert not any(found[f"first{n}"].suspensions for n in range(4)), "nobody who ran before it came leaves for it"
        assert all(outcome.state is JobState.SUCCEEDED for outcome in found.values())

    def test_who_made_room_runs_as_long_as_before_until_it_does_so_again(self):
        first = [job(f"first{n}", 0.0, hours * HOUR, 4, 100 * HOUR) for n, hours in enumerate((90, 90, 0.1, 0.2))]
        late = [job(f"late{n}", 20.0 + n, 20 * HOUR, 4, 100 * HOUR, checkpoint_every_steps=10) for n in range(2)]
        gangs = [job(f"gang{n}", 10.0 + n * 4.5 * HOUR, HOUR, 8, 100 * HOUR) for n in range(2)]
        beside = job("beside", 0.0, 90 * HOUR, 3, 100 * HOUR)
        ticks = [job(f"tick{n}", 200.0 * n, 60.0, 1, 60.0) for n in range(1, 200)]  # so that there are events at all
        found = simulate(sorted([*first, beside, *gangs, *late, *ticks], key=lambda j: j.at_s), nodes=5)
        assert [found[f"late{n}"].suspensions for n in range(2)] == [2, 2]
        assert 4.0 * HOUR < found["gang0"].start_s < 4.1 * HOUR
        assert 8.9 * HOUR < found["gang1"].start_s < 9.1 * HOUR, "5.0 and 3.9, not 4.5 and 4"

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.floats(0, 4_000), st.floats(60, 6_000), st.sampled_from([1, 2, 4, 8, 12, 16]), st.floats(0.1, 5.0)
            ),
            min_size=5,
            max_size=16,
        )
    )
    def test_no_gang_starts_later_than_promised_whatever_was_said(self, drawn):
        jobs = sorted(
            (job(f"j{n}", at, run, gpus, run * wrong) for n, (at, run, gpus, wrong) in enumerate(drawn)),
            key=lambda j: j.at_s,
        )
        for outcome in simulate(jobs).values():
            assert not outcome.start_s > outcome.promised_s + 1.0, outcome
            assert outcome.state is JobState.SUCCEEDED

    def test_a_new_leader_keeps_what_the_records_promise(self):
        first = plan_of(4)
        running = [start(first, waiting(f"r{n}", 4, expected_s=HOUR)) for n in range(4)]
        gang = waiting("gang", 16)
        (move,) = [m for m in first.step(offered(gang), NOW) if m.claim]
        assert move.claim.purpose is ClaimPurpose.RESERVATION and move.claim.start_time > NOW + timedelta(hours=1)
        promised = lifecycle.claim(gang, move.claim, move.decision.summary)
        second = plan_of(4)
        moves = second.step(News(jobs=(*running, promised), candidates={gang.name: Candidate(promised)}), NOW)
        assert not any(m.claim for m in moves), "it has its promise"
        assert second.next_look is not None and second.next_look < move.claim.start_time
        late = move.claim.start_time - timedelta(seconds=5)
        (named,) = [m for m in second.step(News(), late) if m.claim]
        assert named.claim.start_time == move.claim.start_time
        assert set(named.claim.victims) == {r.name for r in running}
        second.check()

    def test_what_waits_for_its_start_says_when_that_is(self):
        plan = plan_of(4)
        for number in range(4):
            start(plan, waiting(f"r{number}", 4, expected_s=HOUR))
        gang = waiting("gang", 16)
        (move,) = [m for m in plan.step(offered(gang), NOW) if m.claim]
        assert "promised" in move.decision.summary
        known = lifecycle.claim(gang, move.claim, "")
        plan.step(News(jobs=(known,), candidates={gang.name: Candidate(known)}), NOW)
        assert "promised" in plan.explain(known, (), NOW).summary


def plan_of(nodes, promises=None, monotonic=lambda: 0.0):
    plan = Plan(monotonic, promises=promises)
    fleet = [node(f"s/n{number}", 4) for number in range(nodes)]
    plan.apply(News(nodes=tuple(fleet), closed={n.name: "" for n in fleet}, queues={"q": Queue("queues/q")}))
    return plan


def offered(*jobs):
    return News(jobs=jobs, candidates={j.name: Candidate(j) for j in jobs})


def start(plan, job):
    (move,) = plan.step(offered(job), NOW)
    placed = lifecycle.place(job, move.assignment, move.decision, NOW)
    runs = replace(placed, state=JobState.RUNNING, attempt=replace(placed.attempt, started=True, run_time=NOW))
    plan.step(News(jobs=(runs,)), NOW)
    return runs


def test_who_was_promised_nothing_is_told_when_it_probably_starts():
    plan = plan_of(1)
    runs = start(plan, waiting("r", 4, expected_s=HOUR))
    small = waiting("small", 1)
    plan.step(offered(small), NOW)
    reasons = " ".join(plan.explain(small, (), NOW).reasons)
    assert "expected to start 2026-05-01T01:00" in reasons
    assert runs.state is JobState.RUNNING


def test_a_job_that_was_too_large_for_any_node_until_one_came_may_leave():
    """The plan is asked by news alone: who is forgotten in one line and stays in another would end it."""
    plan = plan_of(1)
    gang = waiting("gang", 6)
    plan.step(offered(gang), NOW)
    larger = node("s/larger", 8)
    plan.step(News(nodes=(larger,), closed={larger.name: "cordoned"}), NOW)
    again = replace(gang, spec=replace(gang.spec, priority=1))
    plan.step(offered(again), NOW)
    plan.step(News(gone=(gang.name,), candidates={gang.name: None}), NOW)
    other = waiting("other", 6)
    plan.step(offered(other), NOW + timedelta(seconds=1))
    plan.check()


def test_events_tell_of_a_promise_that_it_moved_and_that_it_is_off():
    def stored(at, revision):
        claim = None
        if at is not None:
            claim = Claim((("s/n0", ("g",)),), (), at, ClaimPurpose.RESERVATION, start_time=at)
        return Entry("/k", convert.JOBS.encode(replace(waiting("gang", 16), claim=claim)), revision, 1)

    def told(old, new):
        events = news.of_change(EntryChange("/k", stored(old, 1), stored(new, 2), 2), NOW)
        return [events_pb2.Event.FromString(event.data) for event in events]

    later = NOW + timedelta(hours=2)
    (made,) = told(None, later)
    assert (made.what, made.message) == ("PROMISED", "starts at 2026-05-01T02:00:00Z at the latest")
    (moved,) = told(later, NOW + timedelta(hours=1))
    assert (moved.what, moved.attributes["start_before"]) == ("PROMISED", "2026-05-01T02:00:00Z")
    (lost,) = told(later, None)
    assert lost.what == "PROMISE_LOST" and lost.id.endswith("-promise")
    assert told(later, later) == []


def test_nobody_is_promised_anything_where_it_is_set_so():
    plan = plan_of(4, PromiseRules(0, 0))
    for number in range(4):
        start(plan, waiting(f"r{number}", 4, expected_s=HOUR))
    assert not any(move.claim for move in plan.step(offered(waiting("gang", 16)), NOW))


def test_what_cannot_start_sooner_is_not_asked_of_the_engine(monkeypatch):
    """Jobs end when they were expected to: all looks after the first are answered by counting."""
    asked = []

    def counted(*args, **more):
        asked.append(args)
        return availability.earliest(*args, **more)

    monkeypatch.setattr(expected_ends, "earliest", counted)
    jobs = [job("long", 0.0, 20_000.0, 8, 20_000.0), job("gang", 10.0, 100.0, 16, 100.0)]
    jobs += [job(f"s{n}", 20.0 + 60.0 * n, 300.0, 1, 300.0) for n in range(200)]
    found = simulate(jobs)
    assert found["gang"].start_s <= found["gang"].promised_s < 20_200.0
    assert len(asked) < 5


def test_pieces_of_nodes_that_come_free_are_counted_and_not_asked_of_the_engine_where_whole_nodes_are_wanted(
    monkeypatch,
):
    asked = []

    def counted(*args, **more):
        asked.append(args)
        return availability.earliest(*args, **more)

    monkeypatch.setattr(expected_ends, "earliest", counted)
    jobs = [job(f"long{n}", 0.0, 20_000.0, 3, 20_000.0) for n in range(4)]  # three quarters of each node
    jobs += [job("gang", 10.0, 100.0, 4, 100.0, max_nodes=1)]
    jobs += [job(f"s{n}", 20.0 + 60.0 * n, 300.0, 1, 300.0) for n in range(200)]
    found = simulate(jobs)
    assert found["gang"].start_s <= found["gang"].promised_s < 20_200.0
    assert len(asked) < 5


def test_a_step_that_ran_out_of_time_before_it_promised_is_gone_on_with_at_once():
    """On a busy machine nothing else may happen for a minute: the gang was put off for as long, and nothing could move for it."""
    clock = iter(range(10_000))
    plan = plan_of(4, monotonic=lambda: float(next(clock)))
    for number in range(4):
        start(plan, waiting(f"r{number}", 4, expected_s=HOUR))
    assert not any(move.claim for move in plan.step(offered(waiting("gang", 16)), NOW, budget_s=2.0))
    assert plan.unfinished
    (move,) = [move for move in plan.step(News(), NOW) if move.claim]
    assert (move.job, move.claim.purpose) == ("queues/q/jobs/gang", ClaimPurpose.RESERVATION)
    assert not plan.unfinished
