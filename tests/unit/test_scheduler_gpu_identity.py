"""A GPU is its UUID: whatever numbers a driver gives, whoever reports it, it has one holder."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.scheduler_world import World, node, plan_with_queues, until
from whaleflux.fleet.model import Gpu, Link, LinkKind
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Spec, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "sites/s/nodes/a", "sites/s/nodes/b"


def reporting(name, *uuids):
    """A node whose driver counts these GPUs in this order."""
    made = node(name, 0)
    gpus = tuple(Gpu(i, uuid, "H100-80GB", 80 * 10**9, (9, 0)) for i, uuid in enumerate(uuids))
    links = tuple(Link(a, b, LinkKind.NVLINK, 300e9) for b in range(len(gpus)) for a in range(b))
    return replace(made, gpus=gpus, links=links)


def planner(*nodes):
    made = plan_with_queues()
    made.apply(News(nodes=nodes, closed={n.name: "" for n in nodes}))
    return made


def start(planner, name, gpus):
    """UUIDs that a new job gets, by node, and its record; None and {} when it has to wait."""
    job = Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus), JobState.QUEUED, NOW)
    planner.apply(News(jobs=(job,), candidates={job.name: Candidate(job)}))
    choice = next(c for c in planner.decide(NOW) if c.job == job.name)
    planner.check()
    if choice.assignment is None:
        planner.apply(News(gone=(job.name,)))
        return None, {}
    started = lifecycle.place(job, choice.assignment, choice.decision, NOW)
    planner.apply(News(jobs=(started,)))
    return started, {n: set(uuids) for n, uuids in choice.assignment.nodes}


def end(planner, job):
    said = tuple(Report(task.id, TaskPhase.KILLED, -15) for task in job.attempt.tasks)
    planner.apply(News(jobs=(lifecycle.advance(job, Observations(said), NOW, Timeouts()),)))


def test_a_lost_gpu_does_not_move_the_others_from_their_holders():
    made = planner(reporting("s/a", "w", "x", "y", "z"))
    ended, first = start(made, "first", 2)
    _, second = start(made, "second", 2)
    end(made, ended)
    lost, stays = sorted(first[A])
    made.apply(News(nodes=(reporting("s/a", *(uuid for uuid in "wxyz" if uuid != lost)),)))
    assert start(made, "third", 1)[1] == {A: {stays}}
    assert start(made, "fourth", 1) == (None, {})
    assert made.held()["queues/q/jobs/second"] == second


def test_gpus_that_change_places_keep_their_holders():
    made = planner(reporting("s/a", "x", "y"))
    _, first = start(made, "first", 1)
    made.apply(News(nodes=(reporting("s/a", "y", "x"),)))
    _, second = start(made, "second", 1)
    assert first[A] | second[A] == {"x", "y"}


def test_numbers_with_holes_are_only_numbers():
    whole = reporting("s/a", "x", "y", "z")
    holes = replace(whole, links=(), gpus=tuple(replace(gpu, index=2 * gpu.index + 1) for gpu in whole.gpus))
    made = planner(holes)
    first, held = start(made, "first", 2)
    made.apply(News(nodes=(whole,)))
    assert start(made, "second", 1)[1] == {A: {"x", "y", "z"} - held[A]}
    end(made, first)
    made.apply(News(nodes=(holes,)))
    assert start(made, "third", 2)[1] == held


def test_a_held_gpu_that_is_not_reported_stays_held_and_comes_back_held():
    made = planner(reporting("s/a", "x", "y"))
    first, _ = start(made, "first", 2)
    made.apply(News(nodes=(reporting("s/a", "new"),)))
    assert start(made, "second", 1)[1] == {A: {"new"}}
    made.apply(News(nodes=(reporting("s/a", "new", "y", "x"),)))
    assert start(made, "third", 1) == (None, {})
    end(made, first)
    assert start(made, "fourth", 2)[1] == {A: {"x", "y"}}


def test_a_node_that_was_forgotten_and_comes_back_renumbered_gives_nothing_twice():
    made = planner(reporting("s/a", "x", "y", "z"))
    _, first = start(made, "first", 2)
    made.apply(News(removed=(A,)))
    made.check()
    made.apply(News(nodes=(reporting("s/a", "z", "y", "x"),), closed={A: ""}))
    assert start(made, "second", 2) == (None, {})
    assert start(made, "third", 1)[1] == {A: {"x", "y", "z"} - first[A]}


@pytest.mark.parametrize("uuids", [("", "x"), ("twice", "twice", "x")])
def test_what_has_no_identity_of_its_own_is_not_offered_and_that_is_said(uuids, caplog):
    made = planner(reporting("s/a", *uuids))
    assert start(made, "first", 2) == (None, {})
    assert start(made, "second", 1)[1] == {A: {"x"}}
    assert "does not offer" in caplog.text


class TestOneMachineUnderTwoNames:
    def test_while_both_are_open_neither_offers_it(self, caplog):
        made = planner(reporting("s/a", "x", "only-a"), reporting("s/b", "x"))
        assert start(made, "first", 1)[1] == {A: {"only-a"}}
        assert start(made, "second", 1) == (None, {})
        assert "x is reported by" in caplog.text

    def test_a_renamed_node_offers_what_nobody_holds_under_its_old_name(self):
        made = planner(reporting("s/a", "x", "y"))
        first, held = start(made, "first", 1)
        made.apply(News(nodes=(reporting("s/b", "x", "y"),), closed={A: "its agent is not connected", B: ""}))
        assert start(made, "second", 2) == (None, {})
        _, second = start(made, "third", 1)
        assert second == {B: {"x", "y"} - held[A]}
        end(made, first)
        assert start(made, "fourth", 1)[1] == {B: held[A]}

    def test_a_gpu_that_was_moved_into_another_machine_waits_for_its_holder(self):
        made = planner(reporting("s/a", "x"), reporting("s/b"))
        first, _ = start(made, "first", 1)
        made.apply(News(nodes=(reporting("s/a"), reporting("s/b", "x"))))
        assert start(made, "second", 1) == (None, {})
        end(made, first)
        assert start(made, "third", 1)[1] == {B: {"x"}}


class Machines(RuleBasedStateMachine):
    """GPUs are lost, found, renumbered and moved between nodes that come, go, close and open, while jobs start and end."""

    @initialize()
    def begin(self):
        self.planner, self.jobs, self.places, self.number = plan_with_queues(), {}, {A: [], B: []}, 0
        for name, uuids in ((A, ("u", "v", "w")), (B, ("x", "y"))):
            self.report(name, list(uuids))
            self.planner.apply(News(closed={name: ""}))

    def report(self, name, uuids):
        self.places[name] = uuids
        self.planner.apply(News(nodes=(reporting(f"s/{name[-1]}", *uuids),)))

    @rule(name=st.sampled_from([A, B]), uuids=st.lists(st.sampled_from(["", *"uvwxyz"]), max_size=5))
    def facts(self, name, uuids):
        self.report(name, uuids)

    @rule(name=st.sampled_from([A, B]), why=st.sampled_from(["", "suspect"]))
    def close(self, name, why):
        self.planner.apply(News(closed={name: why}))

    @rule(name=st.sampled_from([A, B]))
    def forget(self, name):
        self.planner.apply(News(removed=(name,)))
        self.places[name] = []

    @rule(gpus=st.integers(1, 3))
    def start(self, gpus):
        self.number += 1
        job, given = start(self.planner, f"j{self.number}", gpus)
        if job is not None:
            for name, uuids in given.items():
                assert all(self.places[name].count(uuid) == 1 for uuid in uuids), "given where it is not"
            self.jobs[job.name] = (job, set().union(*given.values()))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def end(self, data):
        job, _ = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        end(self.planner, job)

    @invariant()
    def every_gpu_has_one_holder(self):
        if not hasattr(self, "planner"):
            return
        self.planner.check()
        held = [uuid for _, uuids in self.jobs.values() for uuid in uuids]
        assert len(held) == len(set(held))
        assert "" not in held


TestMachines = Machines.TestCase
TestMachines.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_facts_that_are_replaced_while_tasks_run_change_nothing_for_them():
    async with World() as world:
        (agent,) = await world.add(node("s/a", 4))
        first = await world.submit(2)
        await world.reaches(first, "RUNNING")
        (task,) = agent.tasks.values()
        held = list(task.task.gpu_uuids)
        before = [gpu.uuid for gpu in world.nodes[A].facts.gpus]
        left = [uuid for uuid in reversed(before) if uuid != next(u for u in before if u not in held)]
        world.reports(reporting("s/a", *left))
        second = await world.submit(1)
        await world.reaches(second, "RUNNING")
        third = await world.submit(1)
        await until(lambda: len(agent.tasks) == 2, "two tasks are wanted")
        assert [list(t.task.gpu_uuids) for t in agent.tasks.values() if t.job == first] == [held]
        given = {uuid for t in agent.tasks.values() for uuid in t.task.gpu_uuids}
        assert given == set(left)
        assert (await world.job(third)).state == pb.JOB_STATE_QUEUED
        await world.restart()  # a new leader learns the same from the records
        await world.planner.ask(lambda planner: planner.check())
        assert (await world.job(third)).state == pb.JOB_STATE_QUEUED
