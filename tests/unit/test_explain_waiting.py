"""`whaleflux explain JOB` of a job that waits: its position, who is ahead and why, when it probably starts, and what would start it sooner."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import node
from whaleflux.cli.job_commands import say_decision
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle, wait_reasons
from whaleflux_scheduler.core.expected_ends import start_in_turn
from whaleflux_scheduler.core.model import Job, JobState, Queue, SchedulingDecision
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.core.reservations import Reservation

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = 3600.0


def waiting(name, gpus=1, *, at_s=0.0, queue="q", **more):
    spec = Spec(command=("x",), gpus=gpus, **more)
    return Job(f"queues/{queue}/jobs/{name}", spec, JobState.QUEUED, NOW + timedelta(seconds=at_s), uid=name)


class Fleet:
    """Nodes of four GPUs, all of them held for some hours."""

    def __init__(self, *hours, queues=("q",)):
        self.plan = Plan()
        nodes = [node(f"s/n{number}", 4) for number in range(len(hours))]
        named = {queue: Queue(f"queues/{queue}") for queue in queues}
        self.plan.apply(News(nodes=tuple(nodes), closed={n.name: "" for n in nodes}, queues=named))
        for number, many in enumerate(hours):
            job = waiting(f"r{number}", 4, expected_s=many * HOUR)
            (move,) = self.plan.step(News(jobs=(job,), candidates={job.name: Candidate(job)}), NOW)
            placed = lifecycle.place(job, move.assignment, move.decision, NOW)
            runs = replace(placed, state=JobState.RUNNING, attempt=replace(placed.attempt, started=True, run_time=NOW))
            self.plan.step(News(jobs=(runs,)), NOW)

    def waits(self, job):
        """With its promise, if it is given one."""
        for move in self.plan.step(News(jobs=(job,), candidates={job.name: Candidate(job)}), NOW):
            if move.claim is not None:
                job = lifecycle.claim(job, move.claim, "")
                self.plan.step(News(jobs=(job,), candidates={job.name: Candidate(job)}), NOW)
        return job

    def told(self, job, capsys):
        """What the command prints, by the word that lines begin with."""
        say_decision(convert.decision_message(self.plan.explain(job, (), NOW)))
        found = {}
        for line in capsys.readouterr().out.splitlines()[1:]:
            word, _, text = line.strip().partition(" ")
            found.setdefault(word, []).append(text.strip())
        return found


def test_who_is_ahead_in_the_queue_is_named_and_why(capsys):
    fleet = Fleet(1)
    for job in (waiting("late", 4, at_s=5, priority=7), waiting("early", 4, at_s=1)):
        fleet.waits(job)
    told = fleet.told(fleet.waits(waiting("mine", 2, at_s=3)), capsys)
    assert told["position"] == ["3 in its queue"]
    assert told["ahead"] == ["1: queues/q/jobs/late", "2: queues/q/jobs/early"]
    assert "1 of higher priority and 1 submitted before it go first in its queue" in told["because"]


def test_queues_that_are_due_before_its_own_are_named(capsys):
    fleet = Fleet(1, queues=("q", "other"))
    fleet.waits(waiting("theirs", 4, queue="other", at_s=9))
    told = fleet.told(fleet.waits(waiting("mine", 4)), capsys)
    assert any(because.startswith("queue other is due before its own") for because in told["because"])
    assert told["position"] == ["1 in its queue"]


def test_the_expected_start_counts_those_ahead_who_start_and_end_before_it(capsys):
    fleet = Fleet(1)
    fleet.waits(waiting("first", 4, expected_s=2 * HOUR))
    told = fleet.told(fleet.waits(waiting("mine", 4, at_s=1)), capsys)
    assert any("expected to start 2026-05-01T03:00" in because for because in told["because"]), told


def test_the_expected_start_counts_gpus_of_types_that_the_job_may_have(capsys):
    fleet, other = Fleet(3), node("edge/n", 4, model="L40S")
    fleet.plan.step(News(nodes=(other,), closed={other.name: ""}), NOW)
    fleet.waits(waiting("elsewhere", 8, any_of=("L40S",)))
    told = fleet.told(fleet.waits(waiting("mine", 4, any_of=("H100-80GB",))), capsys)
    assert any("expected to start 2026-05-01T03:00" in because for because in told["because"]), told
    (facts,) = (one for one in fleet.plan.burst_facts((), NOW).waiting if one.name == "queues/q/jobs/mine")
    assert facts.wait_s == 3 * HOUR


def test_a_short_job_is_told_by_when_it_had_to_be_over_to_start_at_once(capsys):
    fleet = Fleet(1, 4)
    gang = fleet.waits(waiting("gang", 8))
    assert gang.claim is not None and gang.claim.start_time is not None
    fleet.plan.step(News(gone=("queues/q/jobs/r0",)), NOW)
    told = fleet.told(fleet.waits(waiting("mine", 2, at_s=1, expected_s=9 * HOUR)), capsys)
    (over,) = [way for way in told["sooner"] if way.startswith("over within")]
    assert over.startswith("over within 3h5"), "the gang starts in four hours, on both nodes"
    short = waiting("short", 2, at_s=2, expected_s=3 * HOUR)
    assert any(
        move.assignment for move in fleet.plan.step(News(jobs=(short,), candidates={short.name: Candidate(short)}), NOW)
    )


def test_the_least_priority_that_would_help_is_named(capsys):
    fleet = Fleet(1, 1)
    assert "from priority 1 on" in fleet.told(fleet.waits(waiting("mine", 4)), capsys)["sooner"][0]
    assert "sooner" not in fleet.told(fleet.waits(waiting("too-large", 12)), capsys)


@pytest.mark.parametrize(
    ("ahead", "gpus", "start_s"),
    [
        ([], 1, 0.0),
        ([], 3, 10.0),
        ([(2, 50.0)], 1, 10.0),
        ([(4, 50.0)], 1, 70.0),
        ([(9, 50.0)], 4, 20.0),
        ([], 5, None),
    ],
)
def test_one_after_the_other_starts_when_gpus_are_free_for_it(ahead, gpus, start_s):
    """Two are free, one more in ten seconds, and one in twenty."""
    assert start_in_turn(2, [(20.0, 1), (10.0, 1)], ahead, gpus) == start_s


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 4)), max_size=6),
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 100)), max_size=6),
)
def test_more_ahead_is_never_sooner(ends, ahead):
    alone, behind = start_in_turn(1, ends, [], 2), start_in_turn(1, ends, ahead, 2)
    assert (alone is None) == (behind is None)
    assert alone is None or behind is None or behind >= alone


@pytest.mark.parametrize(("maintenance", "begun"), [(False, False), (False, True), (True, False), (True, True)])
def test_what_is_said_of_a_reservation_depends_on_whether_it_has_begun(maintenance, begun):
    """By the time, too: nobody may have decided anything since it began."""
    start = NOW - timedelta(minutes=1) if begun else NOW + timedelta(hours=1)
    kept = Reservation("reservations/r", start, NOW + timedelta(hours=2), maintenance=maintenance)
    waits = SchedulingDecision(NOW, False, "waits")
    (said,) = wait_reasons.with_reservations(waits, [kept]).reasons
    assert ("until they begin" in said) is not begun
    assert ("only their members" in said) is (begun and not maintenance)
    assert ("nodes take no work" in said) is (begun and maintenance)
