"""The planner: what jobs hold, who goes next, what a refused write gives back, and ten thousand that wait."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import node, plan_with_queues
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Queue, SchedulingDecision, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def planner():
    planner = plan_with_queues()
    open_nodes(planner, node("s/a"), node("s/b"))
    return planner


def open_nodes(planner, *nodes):
    planner.apply(News(nodes=nodes, closed={n.name: "" for n in nodes}))


def job(name, gpus=4, at=0, queue="q", **spec):
    return Job(
        f"queues/{queue}/jobs/{name}",
        Spec(command=("x",), gpus=gpus, **spec),
        JobState.QUEUED,
        NOW + timedelta(seconds=at),
    )


def wait(planner, *jobs, exclude=()):
    planner.apply(News(jobs=jobs, candidates={j.name: Candidate(j, frozenset(exclude)) for j in jobs}))


def placed_as(job, choice):
    return lifecycle.place(job, choice.assignment, choice.decision, NOW)


def run(planner, job):
    """The job as it is when all of it runs, and the planner knows that."""
    wait(planner, job)
    (choice,) = [c for c in planner.decide(NOW) if c.job == job.name]
    starting = placed_as(job, choice)
    accepted = tuple(Report(t.id, TaskPhase.ACCEPTED, rendezvous="h:1") for t in starting.attempt.tasks)
    started = lifecycle.advance(starting, Observations(accepted), NOW, Timeouts())
    up = tuple(Report(t.id, TaskPhase.RUNNING) for t in started.attempt.tasks)
    running = lifecycle.advance(started, Observations(up), NOW, Timeouts())
    planner.apply(News(jobs=(running,)))
    return running


def test_what_is_chosen_is_held_at_once(planner):
    wait(planner, *(job(f"j{i}", at=i) for i in range(3)))
    choices = planner.decide(NOW)
    assert [c.assignment is not None for c in choices] == [True, True, False]
    assert choices[2].decision.summary.startswith("waits: ")
    planner.check()


def test_a_refused_write_gives_it_back(planner):
    one, two = job("j1", 8), job("j2", 8, at=1)
    wait(planner, one, two)
    assert {c.job: c.assignment is not None for c in planner.decide(NOW)} == {one.name: True, two.name: False}
    planner.apply(News(jobs=(one,), candidates={one.name: None}))  # someone cancelled it meanwhile
    assert [(c.job, c.assignment is not None) for c in planner.decide(NOW)] == [(two.name, True)]
    planner.check()


def test_gpus_come_free_task_by_task(planner):
    running = run(planner, job("j1", 8))
    wait(planner, job("j2", 4, at=1))
    assert [c.assignment for c in planner.decide(NOW)] == [None]
    half = lifecycle.advance(
        running, Observations((Report(running.attempt.tasks[0].id, TaskPhase.EXITED),)), NOW, Timeouts()
    )
    planner.apply(News(jobs=(half,)))
    (choice,) = planner.decide(NOW)
    assert choice.assignment.nodes[0][0] == running.attempt.tasks[0].node
    planner.check()


def test_a_recovering_job_may_use_the_gpus_of_its_own_remains_and_nobody_else_may(planner):
    running = run(planner, job("j1", 8))
    broken = lifecycle.advance(
        running, Observations((Report(running.attempt.tasks[0].id, TaskPhase.EXITED, 1),)), NOW, Timeouts()
    )
    other = job("j2", 4, at=-1)
    wait(planner, other)
    planner.apply(News(jobs=(broken,), candidates={broken.name: Candidate(broken)}))
    choices = {c.job: c for c in planner.decide(NOW)}
    first = choices[other.name].assignment
    assert first is not None, "it came first, and the node whose task has ended is free"
    assert first.nodes[0][0] == running.attempt.tasks[0].node
    assert choices[broken.name].assignment is None, "and so the gang of 8 has to wait"
    planner.check()


def test_its_own_remains_do_not_block_it(planner):
    running = run(planner, job("j1", 8))
    broken = lifecycle.advance(
        running, Observations((Report(running.attempt.tasks[0].id, TaskPhase.EXITED, 1),)), NOW, Timeouts()
    )
    planner.apply(News(jobs=(broken,), candidates={broken.name: Candidate(broken)}))
    (choice,) = planner.decide(NOW)
    assert {n for n, _ in choice.assignment.nodes} == set(running.attempt.nodes)
    planner.check()


def test_avoided_nodes_are_avoided_and_said(planner):
    one = job("j1", 8)
    wait(planner, one, exclude=["sites/s/nodes/a"])
    (choice,) = planner.decide(NOW)
    assert choice.assignment is None
    assert "avoids sites/s/nodes/a" in choice.decision.reasons[-1]
    wait(planner, one)
    assert planner.decide(NOW)[0].assignment is not None


def test_a_closed_node_takes_nothing_and_opens_again(planner):
    planner.apply(News(closed={"sites/s/nodes/a": "suspect", "sites/s/nodes/b": "suspect"}))
    wait(planner, job("j1", 1))
    (choice,) = planner.decide(NOW)
    assert (choice.assignment, "suspect" in choice.decision.summary) == (None, True)
    planner.apply(News(closed={"sites/s/nodes/b": ""}))
    assert planner.decide(NOW)[0].assignment.nodes[0][0] == "sites/s/nodes/b"


def test_holdings_on_nodes_that_are_not_known_yet_count_when_they_come():
    running = run_somewhere = plan_with_queues()
    open_nodes(run_somewhere, node("s/a"))
    running = run(run_somewhere, job("j1", 4))
    fresh = plan_with_queues()
    fresh.apply(News(jobs=(running,)))
    open_nodes(fresh, node("s/a"))
    wait(fresh, job("j2", 1, at=1))
    assert fresh.decide(NOW)[0].assignment is None
    fresh.check()


def test_a_queue_takes_no_more_than_its_limit(planner):
    planner.apply(News(queues={"q": Queue("queues/q", 1.0, 4), "p": Queue("queues/p")}))
    wait(planner, job("j1", 4), job("j2", 1, at=1), job("other", 1, at=2, queue="p"))
    placed = {c.job.split("/")[3]: c for c in planner.decide(NOW)}
    assert [placed[name].assignment is not None for name in ("j1", "j2", "other")] == [True, False, True]
    assert placed["j2"].decision.summary == "waits: queue q holds 4 of at most 4 GPUs"
    planner.apply(News(queues={"q": Queue("queues/q", 1.0, 5)}))
    assert [c.job.split("/")[3] for c in planner.decide(NOW) if c.assignment] == ["j2"]


def test_a_queue_whose_limit_is_not_known_takes_nothing_more(planner):
    held = run(planner, job("j1", 1))
    planner.apply(News(queues={}))
    wait(planner, job("j2", 1, at=1))
    (choice,) = planner.decide(NOW)
    assert choice.assignment is None
    unknown = "waits: the record of queue q is missing or cannot be read, so its limit is not known"
    assert [d.summary for d in (choice.decision, planner.dry_run(job("j3", 1), NOW))] == [unknown, unknown]
    assert list(planner.held()) == [held.name]
    planner.apply(News(queues={"q": Queue("queues/q")}))
    assert [c.job.split("/")[3] for c in planner.decide(NOW) if c.assignment] == ["j2"]


class TestPreemption:
    def test_the_cheapest_lower_ones_make_room_once(self, planner):
        low = run(planner, job("low", 4, priority=1))
        service = run(planner, job("serve", 4, priority=1, kind=JobKind.SERVICE))
        high = job("high", 4, at=5, priority=9)
        wait(planner, high)
        (choice,) = planner.decide(NOW)
        assert (choice.assignment, choice.claim.victims) == (None, (low.name,))
        assert service.name not in choice.claim.victims
        planner.apply(News(closed={"sites/s/nodes/a": ""}, queues={"q": Queue("queues/q")}))
        assert [again.claim for again in planner.decide(NOW)] == []
        assert planner.explain(high, (), NOW).preempts == (low.name,)
        stopping = lifecycle.suspend(low, high.name, NOW)
        planner.apply(News(jobs=(stopping,)))
        gone = lifecycle.advance(
            stopping, Observations((Report(low.attempt.tasks[0].id, TaskPhase.KILLED, -15),)), NOW, Timeouts()
        )
        planner.apply(News(jobs=(gone,), candidates={gone.name: Candidate(gone)}))
        choices = planner.decide(NOW)
        assert [c.job for c in choices if c.assignment] == [high.name]
        planner.check()

    def test_equals_and_services_are_left_alone(self, planner):
        run(planner, job("a", 4, priority=5))
        run(planner, job("b", 4, priority=1, kind=JobKind.SERVICE))
        wait(planner, job("c", 4, at=1, priority=5))
        assert [(c.assignment, c.claim) for c in planner.decide(NOW)] == [(None, None)]


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


@pytest.fixture
def asked(monkeypatch):
    """Every question that is put to the placement engine, by the job that it is about: what a decision costs."""
    questions = []
    for name in ("fits", "place", "preempt"):
        real = getattr(Engine, name)

        def counting(engine, request, *rest, real=real, **more):
            questions.append(request.id)
            return real(engine, request, *rest, **more)

        monkeypatch.setattr(Engine, name, counting)
    return questions


def crowd(kind, count=10_000):
    """Jobs that wait for the same thing and cannot start on a full fleet."""
    alike = {
        "one node's worth": {"gpus": 4},
        "gangs larger than a node": {"gpus": 8},
        "gangs larger than the fleet": {"gpus": 12},
        "a type that is not there": {"gpus": 1, "any_of": ("B200",)},
        "data that is nowhere": {"gpus": 1, "datasets": ("text",), "require_local_data": True},
    }[kind]
    return [job(f"w{i:05d}", at=i + 1, **alike) for i in range(count)]


CROWDS = ["one node's worth", "gangs larger than a node", "gangs larger than the fleet", "a type that is not there"]


def settled(planner):
    """Until every job has its answer."""
    planner.decide(NOW)
    for _ in range(1_000):
        if not planner.unfinished:
            return
        planner.decide(NOW)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("kind", [*CROWDS, "data that is nowhere"])
def test_ten_thousand_alike_cost_as_one_when_they_come(planner, asked, kind):
    run(planner, job("runs", 8))
    asked.clear()
    wait(planner, *crowd(kind))
    settled(planner)
    assert len(asked) <= 20, "those behind were not tried one by one"
    assert planner.waiting == 10_000
    planner.check()


def ends(planner, running):
    """The job's last task ends, so that its GPUs come free."""
    over = tuple(Report(t.id, TaskPhase.EXITED) for t in running.attempt.tasks)
    planner.apply(News(jobs=(lifecycle.advance(running, Observations(over), NOW, Timeouts()),)))


@pytest.mark.parametrize(("kind", "started"), [
    ("one node's worth", 2), ("gangs larger than a node", 1), ("gangs larger than the fleet", 0), ("a type that is not there", 0),
])  # fmt: skip
def test_ten_thousand_alike_cost_as_one_when_something_comes_free(planner, asked, kind, started):
    running = run(planner, job("runs", 8))
    wait(planner, *crowd(kind))
    settled(planner)
    asked.clear()
    ends(planner, running)
    tried = planner.decide(NOW)
    assert [c.job.split("/")[3] for c in tried if c.assignment] == [f"w{i:05d}" for i in range(started)]
    assert len(asked) <= 20, "those behind were not tried one by one"
    planner.check()


def test_alike_jobs_of_many_queues_and_priorities_cost_as_one_too(planner, asked):
    run(planner, job("runs", 8))
    asked.clear()
    wait(planner, *(job(f"w{i}", 4, at=i + 1, queue=f"q{i % 20}", priority=-(i // 20 % 10)) for i in range(2_000)))
    settled(planner)
    assert len(asked) <= 20
    assert planner.waiting == 2_000
    planner.check()


def test_of_two_crowds_the_one_that_fits_is_not_kept_waiting_by_the_other(planner, asked):
    """Jobs of two shapes in turn: each shape is tried, none of them ten thousand times."""
    running = run(planner, job("runs", 8))
    never, soon = crowd("gangs larger than the fleet", 5_000), crowd("one node's worth", 5_000)
    wait(planner, *(replace(one, name=f"{one.name}-never") for one in never), *soon)
    settled(planner)
    asked.clear()
    ends(planner, running)
    tried = planner.decide(NOW)
    assert [c.job.split("/")[3] for c in tried if c.assignment] == ["w00000", "w00001"]
    assert len(asked) <= 30
    planner.check()


class Ticking:
    """A clock that moves 1 ms whenever it is looked at, as time does while somebody works."""

    def __init__(self):
        self.looks = 0

    def monotonic(self):
        self.looks += 1
        return self.looks / 1000

    def now(self):
        return NOW


def test_time_is_bounded_and_nobody_is_forgotten():
    clock = Ticking()
    planner = plan_with_queues(monotonic=clock.monotonic)
    open_nodes(planner, node("s/a"))
    jobs = [job(f"j{i:03}", 1 + i % 3, at=i, any_of=(f"model-{i}",)) for i in range(100)]  # no two alike
    wait(planner, *jobs)
    told, passes = [], 0
    while planner.unfinished or not passes:
        before = clock.looks
        told += [choice.job for choice in planner.decide(NOW, budget_s=0.02)]
        passes += 1
        assert clock.looks - before <= 40, "it went on after its time"
        assert passes < 100, "it makes no headway"
    assert passes > 2, "one pass is not enough for all of them"
    assert sorted(told) == [j.name for j in jobs], "each is told once"
    planner.check()


def test_without_any_time_nothing_is_decided_and_nothing_lost(planner):
    one = job("j1")
    wait(planner, one)
    assert planner.decide(NOW, budget_s=0.0) == []
    assert planner.unfinished
    assert [choice.job for choice in planner.decide(NOW)] == [one.name]
    assert not planner.unfinished


def test_what_the_engine_will_never_take_waits_with_its_reason(planner):
    strange = replace(job("j1"), spec=Spec(command=("x",), gpus=4, any_of=tuple(f"m{i}" for i in range(33))))
    wait(planner, strange)
    (choice,) = planner.decide(NOW)
    assert "33 options" in choice.decision.summary


def test_a_decision_says_where_and_why(planner):
    wait(planner, job("j1", 8))
    (choice,) = planner.decide(NOW)
    decision: SchedulingDecision = choice.decision
    assert decision.summary == "8 x H100-80GB on 2 nodes, site s, one leaf"
    assert decision.usd_per_hour == pytest.approx(16.0)
    assert [t.first_rank for t in decision.tasks] == [0, 4]
    assert decision.reasons


class TestDatasets:
    DATA = "datasets/text"

    def fact(self, *nodes):
        return DatasetFact(self.DATA, 10**9, nodes)

    def needing(self, name, at=0):
        return job(name, 1, at, datasets=("text",), require_local_data=True)

    def test_who_needs_its_data_near_is_tried_when_a_copy_has_come(self, planner):
        planner.apply(News(datasets=(self.fact(),)))
        wait(planner, *(self.needing(f"j{i}", at=i) for i in range(5)), job("large", 100, at=9))
        assert [choice for choice in planner.decide(NOW) if choice.assignment] == []
        planner.apply(News(datasets=(self.fact("sites/s/nodes/b"),)))
        tried = planner.decide(NOW)
        assert [choice.assignment.nodes[0][0] for choice in tried if choice.assignment] == ["sites/s/nodes/b"] * 4
        assert "queues/q/jobs/large" not in {choice.job for choice in tried}, "it needs no data"

    def test_a_dataset_that_is_gone_is_nowhere(self, planner):
        planner.apply(News(datasets=(self.fact("sites/s/nodes/b"),)))
        planner.apply(News(datasets_gone=(self.DATA,)))
        wait(planner, self.needing("j"))
        assert [choice.assignment for choice in planner.decide(NOW)] == [None]


def test_a_queue_that_is_put_elsewhere_in_the_tree_takes_what_comes_free_there():
    """It waited because idle GPUs are kept for others; when enough come free it starts, wherever it stands by then."""
    firm = Queue("queues/firm", guaranteed_gpus=4, lending_limit_gpus=0)
    queues = {"firm": firm, "q": Queue("queues/q"), "b": Queue("queues/b")}
    planner = plan_with_queues()
    planner.apply(News(queues=queues))
    open_nodes(planner, node("s/a"), node("s/b"))
    running, waiting = run(planner, job("first")), job("later", at=1, queue="b")
    wait(planner, waiting)
    (answer,) = planner.decide(NOW)
    assert "are kept for queues" in answer.decision.summary
    moved = {**queues, "top": Queue("queues/top"), "b": Queue("queues/b", parent="top")}
    planner.apply(News(queues=moved))
    assert [c.assignment for c in planner.decide(NOW)] in ([], [None])
    planner.apply(News(gone=(running.name,)))
    assert [(c.job, c.assignment is not None) for c in planner.decide(NOW)] == [(waiting.name, True)]


def test_a_guarantee_that_goes_to_another_job_frees_the_first_for_others():
    """Nothing came free, and nothing borrowed began to run: what ran there is no longer what its queue is guaranteed, from this step on."""
    planner = plan_with_queues()
    planner.apply(News(queues={name: Queue(f"queues/{name}", guaranteed_gpus=4) for name in ("q", "r")}))
    open_nodes(planner, node("s/a", model="A100-80GB"), node("s/h"))
    run(planner, job("low", any_of=("A100-80GB",)))
    urgent = job("urgent", at=1, queue="r", any_of=("A100-80GB",))
    wait(planner, urgent)
    assert [m.claim for m in planner.decide(NOW) if m.claim] == []
    high = job("high", at=2, priority=5, any_of=("H100-80GB",))
    wait(planner, high)
    moves = planner.decide(NOW)
    assert [m.job for m in moves if m.assignment] == [high.name]
    assert [(m.job, m.claim.victims) for m in moves if m.claim] == [(urgent.name, ("queues/q/jobs/low",))]


def test_a_guarantee_goes_by_priority_also_when_that_is_changed():
    planner = plan_with_queues()
    planner.apply(News(queues={name: Queue(f"queues/{name}", guaranteed_gpus=4) for name in ("q", "r")}))
    open_nodes(planner, node("s/a", model="A100-80GB"), node("s/h"))
    run(planner, job("low", any_of=("A100-80GB",)))
    beside = run(planner, job("other-one", at=1, any_of=("H100-80GB",)))
    urgent = job("urgent", at=2, queue="r", any_of=("H100-80GB",))
    wait(planner, urgent)
    assert [m.claim.victims for m in planner.decide(NOW) if m.claim] == [(beside.name,)]
    planner.apply(News(jobs=(urgent,), candidates={urgent.name: None}))
    other = job("other", at=3, queue="r", any_of=("A100-80GB",))
    wait(planner, other)
    assert [m.claim for m in planner.decide(NOW) if m.claim] == []
    planner.apply(News(jobs=(replace(beside, spec=replace(beside.spec, priority=9)),)))
    assert [m.claim.victims for m in planner.decide(NOW) if m.claim] == [("queues/q/jobs/low",)]


def test_nobody_leaves_for_a_promise_that_its_queue_may_not_take_any_more():
    planner = plan_with_queues("q", "b")
    open_nodes(planner, node("s/a"), node("s/b"))
    for name in "ab":
        run(planner, job(f"long-{name}", expected_s=3600.0))
    gang = job("gang", 8, at=1, queue="b")
    wait(planner, gang)
    moves = [move for at in (1, 61) for move in planner.step(News(), NOW + timedelta(seconds=at))]
    (claim,) = [move.claim for move in moves if move.claim is not None]
    wait(planner, lifecycle.claim(gang, claim, "promised"))
    planner.apply(News(queues={"q": Queue("queues/q"), "b": Queue("queues/b", max_gpus=4)}))
    given_up = [
        move.claim
        for at in range(3500, 3800, 50)
        for move in planner.step(News(), NOW + timedelta(seconds=at))
        if move.claim is not None
    ]
    assert [(claim.victims, claim.expire_time) for claim in given_up] == [((), NOW + timedelta(seconds=3500))]
    wait(planner, gang)
    raised = News(queues={"q": Queue("queues/q"), "b": Queue("queues/b", max_gpus=8)})
    moves = planner.step(raised, NOW + timedelta(seconds=3800))
    (again,) = [move.claim for move in moves if move.claim]
    assert again.victims == () and again.start_time > NOW + timedelta(seconds=3800), "it is promised another start"
