"""Whatever the news: the plan that tries only whom it could help decides as one that tries all who wait, and nothing is given twice or lost."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.plan_soak.driver import NAMES, WEIGHTS, history, replay, shortened, worlds
from tests.support.plan_soak.world import NODES, QUEUES, PlanWorld, SoakedPlan
from tests.support.scheduler_world import GB
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News, Plan

NOW = datetime(2026, 5, 1, tzinfo=UTC)
RULE = st.sampled_from([name for name, weight in zip(NAMES, WEIGHTS, strict=True) for _ in range(weight)])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(RULE, st.integers(0, 2**32 - 1)), min_size=10, max_size=30))
def test_against_trying_all(operations):
    failed = replay(operations, worlds(against_all=True))
    assert failed is None, failed


@pytest.mark.parametrize("number", [1, 2])
def test_what_holds_always(number):
    """The long form is `make soak`."""
    failed = replay(history(7, number, 80), worlds(reasons=number == 1))
    assert failed is None, failed


class KnowsNoLimits(SoakedPlan):
    def _over_limit(self, job, gpus=None):
        return None


def test_what_is_wrong_is_found_and_shortened():
    operations = [("limits_change", 0), *history(3, 0, 16)]

    def world():
        return PlanWorld(plan=KnowsNoLimits)

    _, wrong = replay(operations, world)
    assert "GPUs and may have" in str(wrong)
    left = shortened(operations, world)
    assert [name for name, _ in left] == ["limits_change", "submit"]
    assert replay(left, world)[0] == 1
    assert replay(operations) is None


def test_who_waits_costs_nothing_when_what_came_free_cannot_help_it(monkeypatch):
    """A hundred kinds of requests that one GPU is not enough for, and one that it is: the engine is asked of one."""
    asked = []
    for name in ("feasible", "seek"):
        real = getattr(Engine, name)
        monkeypatch.setattr(
            Engine, name, lambda engine, request, real=real: (asked.append(request), real(engine, request))[1]
        )
    plan, jobs = Plan(), {}

    def submit(name, at, gpus=1, **spec):
        one = Job(
            f"queues/q/jobs/{name}",
            Spec(command=("x",), gpus=gpus, **spec),
            JobState.QUEUED,
            NOW + timedelta(seconds=at),
        )
        jobs[one.name] = one
        return one

    def tell(*made):
        return plan.step(News(jobs=made, candidates={one.name: Candidate(one) for one in made}), NOW)

    plan.step(News(nodes=tuple(NODES), closed={one.name: "" for one in NODES}, queues=QUEUES), NOW)
    running = [move for i in range(16) for move in tell(submit(f"r{i}", i))]
    tell(*(submit(f"large{i}", i, gpus=17 + i % 6, memory_bytes_per_rank=GB + i) for i in range(40)))
    tell(*(submit(f"memory{i}", i, memory_bytes_per_rank=1000 * GB + i) for i in range(30)))
    tell(*(submit(f"model{i}", i, any_of=(f"model-{i}",)) for i in range(30)))
    tell(*(submit(f"alike{i}", 100 + i) for i in range(100)))
    asked.clear()
    first = lifecycle.place(jobs[running[0].job], running[0].assignment, running[0].decision, NOW)
    tasks = tuple(replace(task, phase=TaskPhase.EXITED) for task in first.attempt.tasks)
    over = replace(first, state=JobState.SUCCEEDED, attempt=replace(first.attempt, tasks=tasks))
    moves = plan.step(News(jobs=(over,)), NOW)
    assert [move.job.split("/")[3] for move in moves if move.assignment] == ["alike0"]
    assert len(asked) == 1


def test_who_is_guaranteed_room_has_it_made_though_others_alike_wait_in_vain():
    """Its class was refused for another queue, for which nobody makes room."""
    plan, asked = Plan(), Spec(command=("x",), gpus=1)
    queues = QUEUES | {"q": Queue("queues/q", guaranteed_gpus=4)}
    plan.step(News(nodes=(NODES[0],), closed={NODES[0].name: ""}, queues=queues), NOW)
    first = [Job(f"queues/p/jobs/j{i}", asked, JobState.QUEUED, NOW + timedelta(seconds=i)) for i in range(5)]
    moves = plan.step(News(jobs=tuple(first), candidates={one.name: Candidate(one) for one in first}), NOW)
    placed = {
        move.job: lifecycle.place(first[0], move.assignment, move.decision, NOW) for move in moves if move.assignment
    }
    running = tuple(
        replace(placed[one.name], name=one.name, state=JobState.RUNNING) for one in first if one.name in placed
    )
    assert len(running) == 4
    assert not any(move.claim for move in plan.step(News(jobs=running), NOW))
    ours = Job("queues/q/jobs/ours", asked, JobState.QUEUED, NOW + timedelta(seconds=9))
    moves = plan.step(News(jobs=(ours,), candidates={ours.name: Candidate(ours)}), NOW)
    assert [move.job for move in moves if move.claim] == [ours.name]


def test_why_it_does_not_fit_is_worked_out_once_for_all_who_come_and_hold_nothing(monkeypatch):
    asked, explain = [], Engine.explain
    monkeypatch.setattr(Engine, "explain", lambda engine, request: (asked.append(request), explain(engine, request))[1])
    plan, seconds = Plan(lambda: 0.0), iter(range(100))
    plan.step(News(nodes=tuple(NODES), closed={one.name: "" for one in NODES}, queues=QUEUES), NOW)

    def submit():
        at = NOW + timedelta(seconds=next(seconds))
        one = Job(f"queues/q/jobs/j{at.second}", Spec(command=("x",), gpus=99), JobState.QUEUED, at)
        (move,) = plan.step(News(jobs=(one,), candidates={one.name: Candidate(one)}), at, budget_s=1.0)
        return move.decision.reasons

    assert [submit() for _ in range(5)] == 5 * [submit()]
    assert len(asked) == 1
    plan.step(News(closed={NODES[0].name: "cordoned"}), NOW)
    submit()
    assert len(asked) == 2, "the fleet is another now"


def test_who_was_promised_a_start_and_has_others_stopped_is_none_of_its_own_victims():
    """Else it loses its claim as soon as it has it, while they make room."""
    plan, limit = Plan(), {"time_limit_s": 600.0}

    def submit(name, at, gpus, **spec):
        return Job(
            f"queues/q/jobs/{name}", Spec(("x",), gpus=gpus, **spec), JobState.QUEUED, NOW + timedelta(seconds=at)
        )

    def tell(*jobs, candidates=()):
        return plan.step(News(jobs=jobs, candidates={one.name: Candidate(one) for one in candidates}), NOW)

    plan.step(News(nodes=tuple(NODES), closed={one.name: "" for one in NODES}, queues=QUEUES), NOW)
    first, gang = submit("first", 0, 12, priority=0, **limit), submit("gang", 1, 12, priority=0)
    (started,) = tell(candidates=[first])
    starting = lifecycle.place(first, started.assignment, started.decision, NOW)
    (promise,) = [move for move in tell(starting, candidates=[gang]) if move.claim]
    promised = lifecycle.claim(gang, promise.claim, "")
    tell(promised, candidates=[promised])
    raised = replace(promised, priority=1, spec=replace(gang.spec, priority=1))
    (move,) = [move for move in tell(raised, candidates=[raised]) if move.claim]
    assert (move.job, move.claim.victims) == (gang.name, (first.name,))
