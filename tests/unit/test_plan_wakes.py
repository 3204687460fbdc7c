"""Who waits is tried again in the step in which it may have others stopped, beside a plan that tries everybody (`PlanWorld`)."""

import pytest

from tests.support.plan_soak.world import PlanWorld
from whaleflux import names
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux_scheduler.core.model import JobState, Queue
from whaleflux_scheduler.core.plan import Plan
from whaleflux_scheduler.core.soon_over import SoonOver
from whaleflux_scheduler.simulation import happenings
from whaleflux_scheduler.simulation.workload import Submission


class Beside:
    """Sixteen GPUs of four nodes, and a second plan that has to decide the same; `limits` by queue."""

    def __init__(self, **limits):
        self.world = PlanWorld(against_all=True)
        self.world.set_queues({id_: Queue(names.queue(id_), **limits.get(id_, {})) for id_ in "pq"})

    def submit(self, queue, name, gpus, priority=0, **spec):
        wanted = Spec(command=("x",), gpus=gpus, priority=priority, expected_s=3000.0, **spec)
        happenings.submit(self.world.state, Submission(names.job(queue, name), wanted, self.world.now_s, 3000.0))

    def rest(self):
        self.world.rest()

    def run(self):
        """Until all that were placed run, and the plan was told."""
        self.world.passes(20.0)
        self.submit("p", "no-such-gpu", 1, any_of=("B200",))
        self.rest()

    def delete(self, queue, name):
        self.world.delete(self.world.state.jobs[names.job(queue, name)])

    def victims(self):
        """By who claims: whose GPUs, or whose place under a limit."""
        jobs = self.world.records.values()
        return {job.id: [names.last(one) for one in job.claim.victims] for job in jobs if job.claim is not None}

    def running(self):
        return {job.id for job in self.world.records.values() if job.state is JobState.RUNNING}


def test_what_a_guarantee_covers_no_more_is_had_by_a_higher_priority_of_another_queue():
    """The first takes one GPU of the guarantee, which covers the old one then no more: for that, the high one stops it."""
    beside = Beside(q={"guaranteed_gpus": 4})
    beside.submit("q", "old", 4)
    for at in range(12):
        beside.submit("p", f"guest{at}", 1, priority=2 if at else 0)
    beside.rest()
    beside.run()
    beside.submit("p", "high", 3, priority=1)
    beside.rest()
    assert beside.victims() == {}
    beside.submit("q", "first", 1, priority=1)
    beside.rest()
    assert beside.victims() == {"first": ["guest0"], "high": ["old"]}


def test_a_guarantee_that_lower_priorities_have_is_taken_back_by_a_higher_one():
    """All of it is a service's, which is never stopped; so a guest is, though it only starts."""
    beside = Beside(q={"guaranteed_gpus": 4})
    beside.submit("q", "serves", 4, kind=JobKind.SERVICE)
    for at in range(12):
        beside.submit("p", f"guest{at}", 1, priority=2)
    beside.rest()
    beside.submit("q", "high", 2, priority=1)
    beside.rest()
    assert len(beside.victims()["high"]) == 2


def test_with_those_who_are_about_to_leave_others_may_be_enough_under_a_limit():
    """The large one gives one GPU more than is asked for; with the small one's two that is enough for the second."""
    beside = Beside(p={"max_gpus": 6})
    beside.submit("p", "large", 4, priority=1)
    beside.submit("p", "small", 2)
    beside.rest()
    beside.run()
    beside.submit("p", "second", 3, priority=1)
    beside.rest()
    assert beside.victims() == {}
    beside.submit("p", "urgent", 3, priority=2)
    beside.rest()
    assert beside.victims() == {"urgent": ["large"], "second": ["small"]}


def test_who_starts_in_the_same_step_is_not_about_to_leave():
    """The next fills the limit again, so the small one has to leave for the second, now."""
    beside = Beside(p={"max_gpus": 6})
    beside.submit("p", "large", 4, priority=3)
    beside.submit("p", "small", 2)
    beside.rest()
    beside.run()
    beside.submit("p", "next", 4, priority=2)
    beside.rest()
    beside.delete("p", "large")
    beside.submit("p", "second", 2, priority=1)
    beside.rest()
    assert beside.victims() == {"second": ["small"]}


@pytest.mark.parametrize("gpus", [1, 3])
def test_who_waits_under_a_limit_for_nobody_is_left_alone(gpus):
    beside = Beside(p={"max_gpus": 4})
    beside.submit("p", "own", 4, priority=1)
    beside.rest()
    beside.run()
    beside.submit("p", "waits", gpus, priority=1)
    beside.rest()
    assert beside.victims() == {}
    assert beside.running() == {"own"}


def test_what_is_guaranteed_no_more_may_be_stopped_by_a_higher_priority():
    beside = Beside(q={"guaranteed_gpus": 4})
    beside.submit("q", "own", 4)
    beside.submit("p", "guest", 12, priority=2)
    beside.rest()
    beside.run()
    beside.submit("p", "high", 4, priority=1)
    beside.rest()
    assert beside.victims() == {}
    beside.world.set_queues({id_: Queue(names.queue(id_)) for id_ in "pq"})
    beside.rest()
    assert beside.victims() == {"high": ["own"]}


def test_when_a_plan_looks_next_what_it_looks_for_is_due(monkeypatch):
    """The instant lies between two microseconds: at the one before, nothing would be due, and a virtual clock would stand there for ever."""
    at_s = 1767227369.2250001
    monkeypatch.setattr(SoonOver, "next_look", at_s)
    look = Plan().next_look
    assert at_s <= look.timestamp() <= at_s + 2e-6
