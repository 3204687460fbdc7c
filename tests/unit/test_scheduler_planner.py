"""The planner: what jobs hold, who goes next, what a refused write gives back, and ten thousand that wait."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import node
from whaleflux.clock import SystemClock, VirtualClock
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Decision, Job, JobKind, JobState, Queue, Spec, TaskPhase
from whaleflux_scheduler.core.observed import Limits, Report, Seen
from whaleflux_scheduler.core.planner import News, Planner
from whaleflux_scheduler.core.queueing import Candidate

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def planner():
    planner = Planner(VirtualClock())
    open_nodes(planner, node("s/a"), node("s/b"))
    return planner


def open_nodes(planner, *nodes):
    planner.learn(News(nodes=nodes, closed={n.name: "" for n in nodes}))


def job(name, gpus=4, at=0, queue="q", **spec):
    return Job(
        f"queues/{queue}/jobs/{name}",
        Spec(command=("x",), gpus=gpus, **spec),
        JobState.QUEUED,
        NOW + timedelta(seconds=at),
    )


def wait(planner, *jobs, exclude=()):
    planner.learn(News(jobs=jobs, candidates={j.name: Candidate(j, frozenset(exclude)) for j in jobs}))


def placed_as(job, choice):
    return lifecycle.place(job, choice.place, choice.decision, NOW)


def run(planner, job):
    """The job as it is when all of it runs, and the planner knows that."""
    wait(planner, job)
    (choice,) = [c for c in planner.decide() if c.job == job.name]
    starting = placed_as(job, choice)
    accepted = tuple(Report(t.id, TaskPhase.ACCEPTED, rendezvous="h:1") for t in starting.attempt.tasks)
    started = lifecycle.advance(starting, Seen(accepted), NOW, Limits())
    up = tuple(Report(t.id, TaskPhase.RUNNING) for t in started.attempt.tasks)
    running = lifecycle.advance(started, Seen(up), NOW, Limits())
    planner.learn(News(jobs=(running,)))
    return running


def test_what_is_chosen_is_held_at_once(planner):
    wait(planner, *(job(f"j{i}", at=i) for i in range(3)))
    choices = planner.decide()
    assert [c.place is not None for c in choices] == [True, True, False]
    assert choices[2].decision.summary.startswith("waits: ")
    planner.check()


def test_a_refused_write_gives_it_back(planner):
    one, two = job("j1", 8), job("j2", 8, at=1)
    wait(planner, one, two)
    assert {c.job: c.place is not None for c in planner.decide()} == {one.name: True, two.name: False}
    planner.learn(News(jobs=(one,), candidates={one.name: None}))  # someone cancelled it meanwhile
    assert [(c.job, c.place is not None) for c in planner.decide()] == [(two.name, True)]
    planner.check()


def test_gpus_come_free_task_by_task(planner):
    running = run(planner, job("j1", 8))
    wait(planner, job("j2", 4, at=1))
    assert [c.place for c in planner.decide()] == [None]
    half = lifecycle.advance(running, Seen((Report(running.attempt.tasks[0].id, TaskPhase.EXITED),)), NOW, Limits())
    planner.learn(News(jobs=(half,)))
    (choice,) = planner.decide()
    assert choice.place.nodes[0][0] == running.attempt.tasks[0].node
    planner.check()


def test_a_recovering_job_may_use_the_gpus_of_its_own_remains_and_nobody_else_may(planner):
    running = run(planner, job("j1", 8))
    broken = lifecycle.advance(
        running, Seen((Report(running.attempt.tasks[0].id, TaskPhase.EXITED, 1),)), NOW, Limits()
    )
    other = job("j2", 4, at=-1)
    wait(planner, other)
    planner.learn(News(jobs=(broken,), candidates={broken.name: Candidate(broken)}))
    choices = {c.job: c for c in planner.decide()}
    first = choices[other.name].place
    if first is not None:  # the free node; then the gang of 8 has to wait
        assert first.nodes[0][0] == running.attempt.tasks[0].node
        assert choices[broken.name].place is None
    planner.check()


def test_its_own_remains_do_not_block_it(planner):
    running = run(planner, job("j1", 8))
    broken = lifecycle.advance(
        running, Seen((Report(running.attempt.tasks[0].id, TaskPhase.EXITED, 1),)), NOW, Limits()
    )
    planner.learn(News(jobs=(broken,), candidates={broken.name: Candidate(broken)}))
    (choice,) = planner.decide()
    assert {n for n, _ in choice.place.nodes} == set(running.attempt.nodes)
    planner.check()


def test_avoided_nodes_are_avoided_and_said(planner):
    one = job("j1", 8)
    wait(planner, one, exclude=["sites/s/nodes/a"])
    (choice,) = planner.decide()
    assert choice.place is None
    assert "avoids sites/s/nodes/a" in choice.decision.reasons[-1]
    wait(planner, one)
    assert planner.decide()[0].place is not None


def test_a_closed_node_takes_nothing_and_opens_again(planner):
    planner.learn(News(closed={"sites/s/nodes/a": "suspect", "sites/s/nodes/b": "suspect"}))
    wait(planner, job("j1", 1))
    (choice,) = planner.decide()
    assert (choice.place, "suspect" in choice.decision.summary) == (None, True)
    planner.learn(News(closed={"sites/s/nodes/b": ""}))
    assert planner.decide()[0].place.nodes[0][0] == "sites/s/nodes/b"


def test_holdings_on_nodes_that_are_not_known_yet_count_when_they_come():
    running = run_somewhere = Planner(VirtualClock())
    open_nodes(run_somewhere, node("s/a"))
    running = run(run_somewhere, job("j1", 4))
    fresh = Planner(VirtualClock())
    fresh.learn(News(jobs=(running,)))
    open_nodes(fresh, node("s/a"))
    wait(fresh, job("j2", 1, at=1))
    assert fresh.decide()[0].place is None
    fresh.check()


def test_a_queue_takes_no_more_than_its_limit(planner):
    planner.learn(News(queues={"q": Queue("queues/q", 1.0, 4)}))
    wait(planner, job("j1", 4), job("j2", 1, at=1), job("other", 1, at=2, queue="p"))
    placed = {c.job.split("/")[3]: c for c in planner.decide()}
    assert [placed[name].place is not None for name in ("j1", "j2", "other")] == [True, False, True]
    assert placed["j2"].decision.summary == "waits: queue q holds 4 of at most 4 GPUs"
    planner.learn(News(queues={"q": Queue("queues/q", 1.0, 5)}))
    assert [c.job.split("/")[3] for c in planner.decide() if c.place] == ["j2"]


class TestPreemption:
    def test_the_cheapest_lower_ones_make_room_once(self, planner):
        low = run(planner, job("low", 4, priority=1))
        service = run(planner, job("serve", 4, priority=1, kind=JobKind.SERVICE))
        high = job("high", 4, at=5, priority=9)
        wait(planner, high)
        (choice,) = planner.decide()
        assert (choice.place, choice.victims) == (None, (low.name,))
        assert service.name not in choice.victims
        planner.learn(News(closed={"sites/s/nodes/a": ""}, queues={}))
        (again,) = planner.decide()
        assert (again.victims, again.decision.preempts) == ((), (low.name,))
        stopping = lifecycle.suspend(low, high.name, NOW)
        planner.learn(News(jobs=(stopping,)))
        gone = lifecycle.advance(
            stopping, Seen((Report(low.attempt.tasks[0].id, TaskPhase.KILLED, -15),)), NOW, Limits()
        )
        planner.learn(News(jobs=(gone,), candidates={gone.name: Candidate(gone)}))
        choices = planner.decide()
        assert [c.job for c in choices if c.place] == [high.name]
        planner.check()

    def test_equals_and_services_are_left_alone(self, planner):
        run(planner, job("a", 4, priority=5))
        run(planner, job("b", 4, priority=1, kind=JobKind.SERVICE))
        wait(planner, job("c", 4, at=1, priority=5))
        assert [(c.place, c.victims) for c in planner.decide()] == [(None, ())]


class TestDryRun:
    def test_it_changes_nothing(self, planner):
        before = planner.held()
        assert planner.dry_run(job("x", 8), NOW).placed
        refused = planner.dry_run(job("x", 9), NOW)
        assert (refused.placed, planner.held(), planner.waiting) == (False, before, 0)
        planner.check()

    def test_it_names_who_would_be_suspended(self, planner):
        low = run(planner, job("low", 8, priority=1))
        told = planner.dry_run(job("high", 4, priority=9), NOW)
        assert (told.placed, told.preempts) == (False, (low.name,))


def test_ten_thousand_alike_cost_as_one():
    planner = Planner(SystemClock())
    open_nodes(planner, node("s/a"))
    runs = run(planner, job("runs", 4))
    wait(planner, *(job(f"w{i:05d}", 4, at=i + 1) for i in range(10_000)))
    while planner.unfinished:
        planner.decide(1.0)
    ended = lifecycle.advance(runs, Seen((Report(runs.attempt.tasks[0].id, TaskPhase.EXITED),)), NOW, Limits())
    planner.learn(News(jobs=(ended,)))
    tried = planner.decide(5.0)
    assert [c.job.split("/")[3] for c in tried if c.place] == ["w00000"]
    assert len(tried) <= 3, "those behind were not tried one by one"
    planner.check()


def test_time_is_bounded_and_nobody_is_forgotten():
    clock = VirtualClock()
    planner = Planner(clock)
    open_nodes(planner, node("s/a"))
    jobs = [job(f"j{i}", 1, at=i) for i in range(6)]
    wait(planner, *jobs)
    told = planner.decide(budget_s=0.0)
    assert told == []
    assert planner.unfinished
    told = planner.decide()
    assert {c.job for c in told} == {j.name for j in jobs}
    assert not planner.unfinished


def test_what_the_engine_will_never_take_waits_with_its_reason(planner):
    strange = replace(job("j1"), spec=Spec(command=("x",), gpus=4, any_of=tuple(f"m{i}" for i in range(33))))
    wait(planner, strange)
    (choice,) = planner.decide()
    assert "33 options" in choice.decision.summary


def test_a_decision_says_where_and_why(planner):
    wait(planner, job("j1", 8))
    (choice,) = planner.decide()
    decision: Decision = choice.decision
    assert decision.summary == "8 x H100-80GB on 2 nodes, site s, one leaf"
    assert decision.usd_per_hour == pytest.approx(16.0)
    assert [t.first_rank for t in decision.tasks] == [0, 4]
    assert decision.reasons
