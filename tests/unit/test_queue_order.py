"""Whose turn it is: keys that grow and fall while jobs come and go, against a search of all lines."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import pending as pending_module
from whaleflux_scheduler.core.in_order import InOrder
from whaleflux_scheduler.core.lazy_heap import LazyHeap
from whaleflux_scheduler.core.model import Job, JobState, Queue
from whaleflux_scheduler.core.pending import Candidate, Pending
from whaleflux_scheduler.core.queue_order import Turns
from whaleflux_scheduler.core.queue_shares import QueueShares
from whaleflux_scheduler.core.request import shape

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def job(name, queue="q", priority=0, at=0, gpus=8):
    spec = Spec(command=("x",), gpus=gpus, priority=priority)
    return Job(f"queues/{queue}/jobs/{name}", spec, JobState.QUEUED, NOW + timedelta(seconds=at))


class Lines:
    """Waiting jobs with their turns, and what queues hold."""

    def __init__(self, queues=None, held=None):
        self.shares, self.pending = QueueShares(0.0), Pending()
        self.turns = Turns(self.shares.turn, self.shares.family)
        self.shares.set_queues(queues or {})
        for queue, gpus in (held or {}).items():
            self.shares.hold(job("held", queue), gpus)

    def join(self, one):
        line = self.pending.join(Candidate(one), shape(one.spec), own=False).line
        self.turns.enter(line)
        self.turns.activate(line.kind)
        return line

    def leave(self, name):
        if (line := self.pending.leave(name)) is not None:
            self.turns.leave(line)

    def start_next(self):
        line = self.turns.next()
        if line is None:
            return None
        one = self.pending.jobs[line.first()[1]].candidate.job
        self.leave(one.name)
        self.shares.hold(one, one.spec.gpus)
        return one

    def end(self, one):
        self.shares.hold(one, 0)
        self.turns.fell(one.queue)

    def first_of_all(self):
        """By looking at every line."""
        keyed = [
            (self.shares.turn(line.queue, kind.gpus, kind.priority), *line.first())
            for kind in self.turns.active
            for line in kind.lines.values()
            if not line.parked and line not in kind.passed
        ]
        return min(keyed)[-1] if keyed else None


def order(*jobs, queues=None, held=None):
    lines = Lines(queues, held)
    for one in jobs:
        lines.join(one)
    started = []
    while (one := lines.start_next()) is not None:
        started.append(one.id)
    assert (len(lines.pending), list(lines.turns.active)) == (0, [])
    return started


@pytest.mark.parametrize("alike", [True, False])
def test_priority_then_submission(alike):
    jobs = [job("b", at=2), job("a", at=1), job("c", priority=5, at=3)]
    if not alike:
        jobs = [replace(one, spec=replace(one.spec, gpus=8 + at)) for at, one in enumerate(jobs)]
    assert order(*jobs) == ["c", "a", "b"]


def test_the_queue_that_holds_less_for_its_weight_goes_first():
    jobs = [job("a", "busy", at=0), job("b", "idle", at=1)]
    assert order(*jobs, held={"busy": 8}) == ["b", "a"]
    heavy = {"busy": Queue("queues/busy", 10.0), "idle": Queue("queues/idle", 1.0)}
    assert order(*jobs, queues=heavy, held={"busy": 8, "idle": 4}) == ["a", "b"]


def test_what_is_held_counts_as_it_changes():
    jobs = [job(f"{q}{n}", q, at=n) for n in range(3) for q in "xy"]
    assert order(*jobs) == ["x0", "y0", "x1", "y1", "x2", "y2"]


def test_what_a_queue_is_guaranteed_goes_before_what_others_borrow():
    queues = {"firm": Queue("queues/firm", guaranteed_gpus=16), "other": Queue("queues/other")}
    jobs = [job("a", "other", priority=9), *(job(f"f{n}", "firm", at=n) for n in range(3))]
    assert order(*jobs, queues=queues) == ["f0", "f1", "a", "f2"]


def test_shares_are_compared_from_the_top_of_the_tree_down():
    """Two teams of one organisation have together what the other organisation has."""
    parents = {"org": "", "lone": "", "t1": "org", "t2": "org"}
    queues = {id_: Queue(f"queues/{id_}", parent=parent) for id_, parent in parents.items()}
    jobs = [job(f"{q}-{n}", q, at=n) for n in range(2) for q in ("lone", "t1", "t2")]
    jobs.append(job("own", "org", at=9))  # takes turns with the teams
    assert order(*jobs, queues=queues) == ["lone-0", "own", "lone-1", "t1-0", "t2-0", "t1-1", "t2-1"]


def test_a_job_that_left_and_came_back_has_one_place():
    lines, one = Lines(), job("a")
    lines.join(one)
    lines.leave(one.name)
    line = lines.join(one)
    assert line.first()[1] == one.name
    lines.leave(one.name)
    assert (lines.turns.next(), list(lines.pending.classes)) == (None, [])


def test_a_name_that_is_used_again_stands_where_it_was_submitted_again():
    lines = Lines()
    for one in (job("a", at=0), job("b", at=1)):
        lines.join(one)
    lines.leave("queues/q/jobs/a")
    lines.join(job("a", at=2))
    assert [lines.start_next().id for _ in range(2)] == ["b", "a"]


def test_queues_where_nobody_waits_any_more_are_forgotten():
    lines = Lines()
    for n in range(100):
        lines.join(job("a", f"q{n}"))
        lines.leave(f"queues/q{n}/jobs/a")
    assert lines.pending.by_queue == {}


def test_a_heap_keeps_no_more_of_what_was_put_again_than_there_are_things():
    class Thing:
        entry = None

    heap, first, others = LazyHeap(), Thing(), [Thing() for _ in range(10)]
    heap.put(first, 0)
    for turn in range(1_000):
        for other in others:
            heap.put(other, 1 + turn)
        assert heap.top()[2] is first
    assert len(heap) < 200
    first.entry = None
    assert heap.top()[0] == 1_000


def test_a_clock_that_was_ahead_for_a_while_costs_no_queue_its_turn():
    """While it was a year ahead something of one queue began and ended; right again, that queue does not wait for a year."""
    shares = QueueShares(86_400.0)
    shares.goes_to(0.0)
    for queue in "ab":
        shares.hold(job("x", queue), 8)
    assert not shares.goes_to(3_600.0)
    shares.goes_to(3_600.0 + 365 * 86_400.0)
    shares.hold(job("y", "a"), 1)
    shares.hold(job("y", "a"), 0)
    assert shares.goes_to(3_610.0), "keys may have fallen"
    shares.hold(job("z", "b"), 24)
    assert shares.turn("a", 8, 0) < shares.turn("b", 8, 0)


class AgainstASearch(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.lines, self.number, self.ran = Lines(), 0, []

    @rule(queue=st.sampled_from("abcd"), priority=st.integers(0, 1), gpus=st.integers(1, 3), at=st.integers(0, 50))
    def submit(self, queue, priority, gpus, at):
        self.number += 1
        self.lines.join(job(f"j{self.number}", queue, priority, at, gpus))

    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        if waiting := list(self.lines.pending.jobs):
            self.lines.leave(waiting[which % len(waiting)])

    @rule()
    def start(self):
        expected = self.lines.first_of_all()
        one = self.lines.start_next()
        assert (one.name if one else None) == expected
        self.ran += [one] if one else []

    @rule(which=st.integers(0, 99))
    def end(self, which):
        if self.ran:
            self.lines.end(self.ran.pop(which % len(self.ran)))

    @rule(which=st.integers(0, 99), away=st.booleans())
    def pass_over(self, which, away):
        all_ = [line for kind in self.lines.pending.classes for line in kind.lines.values()]
        if all_:
            line = all_[which % len(all_)]
            (self.lines.turns.park if away else self.lines.turns.unpark)(line)

    @rule(which=st.integers(0, 99), away=st.booleans())
    def refuse(self, which, away):
        if all_ := list(self.lines.pending.classes):
            (self.lines.turns.drop if away else self.lines.turns.activate)(all_[which % len(all_)])

    @rule(which=st.integers(0, 99))
    def pass_over_until_reopened(self, which):
        all_ = [line for kind in self.lines.pending.classes for line in kind.lines.values() if not line.parked]
        if all_:
            self.lines.turns.pass_over(all_[which % len(all_)])

    @rule(which=st.integers(0, 99))
    def reopen(self, which):
        if all_ := list(self.lines.pending.classes):
            self.lines.turns.reopen(all_[which % len(all_)])

    @rule(weight=st.integers(1, 9), parent=st.sampled_from(["", "top"]), guaranteed=st.integers(0, 4))
    def change_queues(self, weight, parent, guaranteed):
        made = {name: Queue(f"queues/{name}", parent=parent) for name in "abcd"}
        made |= {
            "top": Queue("queues/top", guaranteed_gpus=guaranteed),
            "a": Queue("queues/a", float(weight), parent=parent),
        }
        self.lines.shares.set_queues(made)
        self.lines.turns.regroup(self.lines.pending.classes)

    @invariant()
    def the_next_is_the_first_of_all(self):
        line = self.lines.turns.next()
        assert (line.first()[1] if line is not None else None) == self.lines.first_of_all()


AgainstASearch.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
test_against_a_search = AgainstASearch.TestCase


class TestPositions:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1500), st.lists(st.tuples(st.booleans(), st.integers(0, 2000)), max_size=60))
    def test_where_one_stands_is_where_a_sorted_list_has_it(self, many, changes):
        known = {(0.0, float(at), "") for at in range(0, 2 * many, 2)}
        order = InOrder(known)
        for comes, at in changes:
            key = (0.0, float(at), "")
            if comes and key not in known:
                order.add(key)
            elif not comes and key in known:
                order.remove(key)
            known = known | {key} if comes else known - {key}
            assert order.before(key) == sum(one < key for one in known)
        assert list(order) == sorted(known)

    def test_who_waits_is_not_looked_at_for_each_who_comes(self, monkeypatch):
        lines, looks, order_of = Lines(), [], pending_module.order_of
        for at in range(500):
            lines.join(job(f"j{at}", at=at, gpus=1 + at % 4, priority=at % 2))
        lines.pending.positions(["queues/q/jobs/j0"])
        monkeypatch.setattr(pending_module, "order_of", lambda one: (looks.append(one), order_of(one))[1])
        lines.join(job("new", at=600, priority=1))
        lines.leave("queues/q/jobs/j1")
        assert lines.pending.positions(["queues/q/jobs/new", "queues/q/jobs/j0"]) == {
            "queues/q/jobs/new": 250,
            "queues/q/jobs/j0": 251,
        }
        ahead = lines.pending.before(job("later", at=700))
        assert (ahead.many, ahead.above, ahead.names[0]) == (500, 250, "queues/q/jobs/j3")
        assert len(looks) == 5
