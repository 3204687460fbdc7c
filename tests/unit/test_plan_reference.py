"""Whatever the news: the plan that tries only whom it could help decides as one that tries all who wait each time."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.scheduler_world import GB, node
from whaleflux.manifests.job_fields import JobKind, Rule, Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News, Plan

NOW = datetime(2026, 5, 1, tzinfo=UTC)
NODES = [
    node(f"s/{leaf}{i}", leaf=leaf, model=model)
    for leaf, model in (("x", "H100-80GB"), ("y", "A100-80GB"))
    for i in (1, 2)
]
QUEUES = {name: Queue(f"queues/{name}") for name in "pq"}
SPECS = st.one_of(
    st.builds(Spec, command=st.just(("x",)), gpus=st.integers(1, 8), priority=st.integers(0, 2)),
    st.builds(
        Spec,
        command=st.just(("x",)),
        gpus=st.integers(1, 6),
        any_of=st.sampled_from([(), ("H100-80GB",), ("A100-80GB",), ("B200",)]),
        max_nodes=st.integers(0, 1),
        cpu_millicores_per_rank=st.sampled_from([0, 16_000, 40_000]),
    ),
    st.builds(
        Spec, command=st.just(("x",)), gpus=st.just(4), placement=st.sampled_from([(Rule(0, 4),), (Rule(2, 5),)])
    ),
    st.builds(
        Spec, command=st.just(("x",)), gpus=st.integers(1, 2), share_memory_bytes=st.sampled_from([20 * GB, 50 * GB])
    ),
    st.builds(
        Spec, command=st.just(("x",)), gpus=st.just(0), ranks=st.integers(1, 3), cpu_millicores_per_rank=st.just(30_000)
    ),
    st.builds(Spec, command=st.just(("x",)), gpus=st.just(1), array_name=st.just("a"), array_max_running=st.just(2)),
    st.builds(Spec, command=st.just(("x",)), gpus=st.just(2), kind=st.just(JobKind.SERVICE)),
    st.builds(
        Spec, command=st.just(("x",)), gpus=st.just(1), datasets=st.just(("text",)), require_local_data=st.just(True)
    ),
)


class TriesAll(Plan):
    """The reference: nobody is passed over."""

    def decide(self, now, budget_s=float("inf")):
        for kind in list(self._pending.classes):
            self._try_again(kind)
        for top in list(self._parked):
            self._unpark(top)
        return super().decide(now, budget_s)


class AgainstTryingAll(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.plans, self.jobs, self.number, self.at = (Plan(), TriesAll()), {}, 0, NOW
        self.nodes = {one.name: one for one in NODES}
        self.tell(News(nodes=tuple(NODES), closed={one.name: "" for one in NODES}, queues=QUEUES))

    def tell(self, news):
        """Both plans decide; what they do is written, and comes back as news with the next."""
        self.at += timedelta(seconds=30)
        ours, theirs = (
            [move for move in plan.step(news, self.at) if move.assignment or move.claim] for plan in self.plans
        )
        assert [(m.job, m.assignment, m.claim) for m in ours] == [(m.job, m.assignment, m.claim) for m in theirs]
        for move in ours:
            known = self.jobs[move.job]
            if move.assignment is not None:
                self.jobs[move.job] = lifecycle.place(known, move.assignment, move.decision, self.at)
            else:
                self.jobs[move.job] = lifecycle.claim(known, move.claim, "")
        if ours:
            self.tell(self.news_of(*(self.jobs[move.job] for move in ours)))

    def news_of(self, *jobs):
        waiting = {one.name: Candidate(one) if one.state is JobState.QUEUED else None for one in jobs}
        return News(jobs=jobs, candidates=waiting)

    def pick(self, which, *states):
        found = [one for one in self.jobs.values() if one.state in states]
        return found[which % len(found)] if found else None

    @rule(specs=st.lists(SPECS, min_size=1, max_size=4), queue=st.sampled_from("pq"))
    def submit(self, specs, queue):
        made = []
        for spec in specs:
            self.number += 1
            at = NOW + timedelta(seconds=self.number % 7)
            made.append(Job(f"queues/{queue}/jobs/j{self.number}", spec, JobState.QUEUED, at))
        self.jobs |= {one.name: one for one in made}
        self.tell(self.news_of(*made))

    @rule(which=st.integers(0, 99))
    def runs(self, which):
        if (known := self.pick(which, JobState.STARTING)) is not None:
            self.jobs[known.name] = replace(known, state=JobState.RUNNING)
            self.tell(self.news_of(self.jobs[known.name]))

    @rule(which=st.integers(0, 99), waits_again=st.booleans())
    def ends(self, which, waits_again):
        if (known := self.pick(which, JobState.STARTING, JobState.RUNNING)) is None:
            return
        tasks = tuple(replace(task, phase=TaskPhase.EXITED) for task in known.attempt.tasks)
        over = replace(known, attempt=replace(known.attempt, tasks=tasks), claim=None)
        if waits_again:
            self.jobs[known.name] = replace(over, state=JobState.QUEUED, epoch=known.epoch + 1)
        else:
            del self.jobs[known.name]
            over = replace(over, state=JobState.SUCCEEDED)
        self.tell(self.news_of(self.jobs.get(known.name, over)))

    @rule(which=st.integers(0, 99))
    def is_deleted(self, which):
        if (known := self.pick(which, *JobState)) is not None:
            del self.jobs[known.name]
            self.tell(News(gone=(known.name,)))

    @rule(which=st.integers(0, 3), why=st.sampled_from(["", "cordoned"]))
    def closes_or_opens(self, which, why):
        self.tell(News(closed={NODES[which].name: why}))

    @rule(which=st.integers(0, 3), sick=st.integers(0, 4), cpus=st.sampled_from([64_000, 30_000]))
    def facts_change(self, which, sick, cpus):
        before = self.nodes[NODES[which].name]
        gpus = tuple(replace(gpu, healthy=gpu.index != sick) for gpu in before.gpus)
        self.nodes[before.name] = replace(before, gpus=gpus, cpu_millicores=cpus)
        self.tell(News(nodes=(self.nodes[before.name],)))

    @rule(which=st.integers(0, 3))
    def leaves_and_comes_back(self, which):
        self.tell(News(removed=(NODES[which].name,)))
        self.tell(News(nodes=(self.nodes[NODES[which].name],), closed={NODES[which].name: ""}))

    @rule(most=st.sampled_from([0, 2, 6]), guaranteed=st.sampled_from([0, 4]))
    def limits_change(self, most, guaranteed):
        self.tell(
            News(
                queues=QUEUES
                | {"p": Queue("queues/p", max_gpus=most), "q": Queue("queues/q", guaranteed_gpus=guaranteed)}
            )
        )

    @rule(which=st.integers(0, 3))
    def a_copy_comes(self, which):
        self.tell(News(datasets=(DatasetFact("datasets/text", GB, (NODES[which].name,)),)))

    @invariant()
    def nothing_is_given_twice(self):
        for plan in self.plans:
            plan.check()


AgainstTryingAll.TestCase.settings = settings(
    max_examples=int(os.environ.get("PLAN_EXAMPLES", "15")), stateful_step_count=25, deadline=None
)
test_against_trying_all = AgainstTryingAll.TestCase


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
