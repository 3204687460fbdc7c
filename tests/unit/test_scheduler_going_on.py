"""A running job that claims another place goes on there from its checkpoint, once nobody else holds any of it."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from tests.support.scheduler_world import GB, World, node, plan_with_queues, until
from tests.unit.test_scheduler_preemption import Queueing
from whaleflux.store.api import Unchanged
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.holdings import held_by
from whaleflux_scheduler.core.known_fleet import NOT_CONNECTED
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import (
    Claim,
    ClaimPurpose,
    Job,
    JobState,
    Queue,
    SchedulingDecision,
    Spec,
    TaskPhase,
)
from whaleflux_scheduler.core.observed import NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News
from whaleflux_scheduler.jobs import key_of

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "sites/s/nodes/a", "sites/s/nodes/b"
C = "sites/s/nodes/c"
MOVE = Claim(((B, ("GPU-b",)),), (), NOW + timedelta(seconds=60), ClaimPurpose.MOVE)
FREE = Observations(claim_is_free=True)
MOST_STARTS = (
    2  # of a job from when nothing more happens: once, and again when it had to make room for who waited already
)


def running(claim=MOVE):
    queued = Job("queues/q/jobs/j", Spec(command=("x",), gpus=1), JobState.QUEUED, NOW)
    placed = lifecycle.place(queued, GpuAssignment(((A, ("GPU-a",)),)), SchedulingDecision(NOW, True, "there"), NOW)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        placed = told(placed, phase)
    return lifecycle.claim_while_running(placed, claim)


def told(job, phase, code=0):
    reports = tuple(Report(task.id, phase, code, rendezvous="h:1") for task in job.attempt.tasks)
    return lifecycle.advance(job, Observations(reports), NOW, Timeouts())


def test_it_stops_for_the_place_that_it_claims_only_when_that_is_free():
    job = running()
    assert lifecycle.advance(job, Observations(), NOW, Timeouts()) is job
    going = lifecycle.advance(job, FREE, NOW, Timeouts())
    assert (going.state, going.attempt.end_reason) == (JobState.SUSPENDING, f"moved: moves to {B}")
    waits = told(going, TaskPhase.KILLED, -15)
    assert (waits.state, waits.claim, waits.epoch) == (JobState.QUEUED, going.claim, job.epoch + 1)
    longest = NOW + timedelta(seconds=job.grace_s + lifecycle.SUSPEND_MARGIN_S)
    assert replace(going.claim, expire_time=MOVE.expire_time) == MOVE
    assert going.claim.expire_time > longest, "else it could be over before all of it has stopped"


@pytest.mark.parametrize("why", [{"unreachable": "x"}, {"retired": True}, {"draining": "x"}])
def test_it_stays_where_it_is_when_that_place_is_lost(why):
    stays = lifecycle.advance(running(), replace(FREE, nodes={B: NodeCondition(**why)}), NOW, Timeouts())
    assert (stays.state, stays.claim) == (JobState.RUNNING, None)


def test_it_stays_where_it_is_when_the_place_did_not_come_free_in_time():
    late = NOW + timedelta(seconds=61)
    stays = lifecycle.advance(running(), Observations(), late, Timeouts())
    assert (stays.state, stays.claim) == (JobState.RUNNING, None)


def test_a_failure_ends_the_claim_as_it_ends_the_attempt():
    failed = told(running(), TaskPhase.EXITED, 1)
    assert (failed.state, failed.claim) == (JobState.RECOVERING, None)


def test_one_that_shrinks_for_another_keeps_what_it_goes_on_with():
    part = Claim(((A, ("GPU-a",)),), (), NOW + timedelta(seconds=60), ClaimPurpose.RESIZE)
    shrinks = lifecycle.advance(running(part), Observations(claimed_by="queues/q/jobs/high"), NOW, Timeouts())
    assert (shrinks.state, shrinks.claim.nodes) == (JobState.SUSPENDING, part.nodes)


def test_the_core_has_the_contracts_purposes_and_keeps_them_in_the_store():
    assert {purpose.name: purpose.value for purpose in ClaimPurpose} == {
        name.removeprefix("CLAIM_PURPOSE_"): value for name, value in pb.ClaimPurpose.items()
    }
    promised = replace(MOVE, purpose=ClaimPurpose.RESERVATION, start_time=NOW + timedelta(hours=1))
    message = pb.Job()
    convert.JOBS.merge(running(promised), message)
    assert convert.job_of(message).claim == promised


async def test_a_claim_in_the_record_of_a_running_job_takes_it_there():
    async with World() as world:
        name, _ = await one_that_may_go_on(world)
        await claims_b(world, name)
        moved = await until(lambda: runs_again(world, name), "it runs again")
        assert (moved.restarts, moved.HasField("claim")) == (0, False)


async def test_it_stops_for_its_new_place_only_when_an_agent_is_there():
    async with World() as world:
        name, agent = await one_that_may_go_on(world)
        await agent.disconnect()
        await claims_b(world, name)
        await asyncio.sleep(5.0)
        assert (await world.job(name)).state == pb.JOB_STATE_RUNNING
        await agent.connect()
        assert (await until(lambda: runs_again(world, name), "it runs again")).restarts == 0


async def one_that_may_go_on(world):
    """A job on one node, and the agent of another."""
    await world.add(node("s/a"))
    name = await world.submit(4)
    await world.reaches(name, "RUNNING")
    (agent,) = await world.add(node("s/b"))
    return name, agent


async def runs_again(world, name) -> pb.Job | None:
    known = await world.job(name)
    return known if known.attempt.number == 2 and known.state == pb.JOB_STATE_RUNNING else None


async def claims_b(world, name):
    """It is to go on there, as its record says."""
    entry = await world.store.get(key_of(name))
    stored = convert.JOBS.decode(entry)
    uuids = tuple(gpu.uuid for gpu in node("s/b").gpus[:4])
    claim = Claim(((B, uuids),), (), world.clock.now() + timedelta(seconds=60), ClaimPurpose.MOVE)
    put = convert.JOBS.put(entry.key, replace(stored.value, claim=claim), stored)
    await world.store.commit(put, when=[Unchanged(entry)])


class TestPlace:
    """Where the planner puts a job that stopped to go on elsewhere."""

    def test_exactly_there_in_the_order_of_its_claim_and_with_as_many_gpus(self):
        planner, low = planner_of("a", "b", "c"), []
        job_ = waiting("j", 2)
        job_ = ran(planner, job_)
        low.append(ran(planner, waiting("other", 1, at=1)))
        uuids = {n: tuple(gpu.uuid for gpu in node(f"s/{n}").gpus) for n in "abc"}
        place = ((nodes("c"), uuids["c"][1:]), (nodes("b"), uuids["b"][2:]))
        stopped = stopped_for(planner, job_, place)
        (move,) = [move for move in planner.decide(NOW) if move.job == job_.name]
        assert move.assignment.nodes == place
        assert move.decision.reasons[0] == "it goes on with 5 GPUs instead of 2"
        planner.check()
        again = lifecycle.place(stopped, move.assignment, move.decision, NOW)
        assert (again.attempt.ranks, again.claim, again.restarts) == (5, None, 0)

    def test_nobody_else_gets_it_meanwhile(self):
        planner = planner_of("a", "b")
        mover = ran(planner, waiting("j", 4))
        other_node = "b" if mover.attempt.nodes == (A,) else "a"
        place = ((nodes(other_node), tuple(gpu.uuid for gpu in node(f"s/{other_node}").gpus)),)
        planner.apply(News(jobs=(lifecycle.claim_while_running(mover, claim_of(place)),)))
        low = waiting("low", 1, at=1)
        planner.apply(News(candidates={low.name: Candidate(low)}))
        assert planner.decide(NOW)[0].assignment is None
        stopped_for(planner, mover, place)
        placed = {move.job: move.assignment for move in planner.decide(NOW) if move.assignment}
        assert placed[mover.name].nodes == place
        assert placed[low.name].nodes[0][0] == mover.attempt.nodes[0]
        planner.check()

    @pytest.mark.parametrize("lost", ["closed", "removed", "gpu", "avoided", "taken"])
    def test_elsewhere_when_a_gpu_of_it_cannot_be_had(self, lost):
        planner = planner_of("a", "b", "c")
        mover = ran(planner, waiting("j", 2))
        old, new = mover.attempt.nodes[0], next(n for n in (C, B, A) if n != mover.attempt.nodes[0])
        machine = node("s/" + new[-1])
        place = ((new, tuple(gpu.uuid for gpu in machine.gpus[:2])),)
        stopped = stopped_for(planner, mover, place)
        match lost:
            case "closed":
                planner.apply(News(closed={new: "cordoned"}))
            case "removed":
                planner.apply(News(removed=(new,)))
            case "gpu":
                sick = (replace(machine.gpus[0], healthy=False), *machine.gpus[1:])
                planner.apply(News(nodes=(replace(machine, gpus=sick),)))
            case "avoided":
                planner.apply(News(candidates={stopped.name: Candidate(stopped, frozenset({new}))}))
            case "taken":
                planner.apply(News(jobs=(holder_of(place),)))
        (move,) = [move for move in planner.decide(NOW) if move.job == mover.name]
        assert set(place[0][1]) - {uuid for _, uuids in move.assignment.nodes for uuid in uuids}
        near = {old, new} if lost in ("gpu", "taken") else {old}  # a node that is broken already spares a whole one
        assert {node for node, _ in move.assignment.nodes} <= near, "near its old nodes, where it can"
        assert sum(len(uuids) for _, uuids in move.assignment.nodes) == 2
        planner.check()

    @pytest.mark.parametrize("known", [True, False])
    def test_a_new_leader_waits_for_the_node_where_it_goes_on(self, known):
        """Agents come one after the other; its old place may be open before the new one is."""
        before = planner_of("a", "b")
        mover = ran(before, waiting("j", 4))
        old, new = (A, B) if mover.attempt.nodes == (A,) else (B, A)
        stopped = stopped_for(before, mover, ((new, tuple(gpu.uuid for gpu in node("s/" + new[-1]).gpus)),))
        planner = plan_with_queues()
        machines = {n: node("s/" + n[-1]) for n in (A, B)}
        away = dict.fromkeys(machines, NOT_CONNECTED)
        planner.apply(News(nodes=tuple(machines.values()) if known else (machines[old],), closed=away))
        (told,) = planner.step(News(jobs=(stopped,), candidates={stopped.name: Candidate(stopped)}), NOW)
        assert "it goes on at its new place when" in told.decision.summary
        assert not [move for move in planner.step(News(closed={old: ""}), NOW) if move.assignment]
        (move,) = planner.step(News(nodes=(machines[new],), closed={new: ""}), NOW)
        assert move.assignment.nodes == stopped.claim.nodes
        planner.check()

    def test_a_part_of_a_gpu_goes_where_its_place_is(self):
        planner = planner_of("a", "b")
        mover = ran(planner, waiting("j", 1, share_memory_bytes=20 * GB))
        new = B if mover.attempt.nodes == (A,) else A
        place = ((new, ("GPU-s/" + new[-1] + "-3",)),)
        stopped_for(planner, mover, place)
        (move,) = planner.decide(NOW)
        assert (move.assignment.nodes, move.assignment.share_bytes) == (place, 20 * GB)
        planner.check()

    def test_a_full_queue_does_not_keep_out_what_was_let_in(self):
        planner = planner_of("a", "b")
        planner.apply(News(queues={"q": Queue("queues/q", max_gpus=4)}))
        mover = ran(planner, waiting("j", 4))
        new = B if mover.attempt.nodes == (A,) else A
        stopped_for(planner, mover, ((new, tuple(gpu.uuid for gpu in node("s/" + new[-1]).gpus)),))
        assert [move.assignment.nodes[0][0] for move in planner.decide(NOW)] == [new]


def nodes(letter):
    return f"sites/s/nodes/{letter}"


def claim_of(place):
    return Claim(place, (), NOW + timedelta(seconds=300), ClaimPurpose.RESIZE)


def waiting(name, gpus, at=0, **spec):
    created = NOW + timedelta(seconds=at)
    return Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, **spec), JobState.QUEUED, created)


def holder_of(place):
    where = GpuAssignment(place)
    return lifecycle.place(waiting("thief", 2), where, SchedulingDecision(NOW, True, "there"), NOW)


def planner_of(*names):
    planner = plan_with_queues()
    machines = [node(f"s/{name}") for name in names]
    planner.apply(News(nodes=tuple(machines), closed={n.name: "" for n in machines}))
    return planner


def ran(planner, job_):
    planner.apply(News(jobs=(job_,), candidates={job_.name: Candidate(job_)}))
    (move,) = [move for move in planner.decide(NOW) if move.job == job_.name]
    after = lifecycle.place(job_, move.assignment, move.decision, NOW)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        after = told(after, phase)
    planner.apply(News(jobs=(after,)))
    return after


def stopped_for(planner, job_, place):
    """The job as it waits for its place, and the planner knows that."""
    going = lifecycle.advance(lifecycle.claim_while_running(job_, claim_of(place)), FREE, NOW, Timeouts())
    after = told(going, TaskPhase.KILLED, -15)
    assert (after.state, after.claim.nodes) == (JobState.QUEUED, place)
    planner.apply(News(jobs=(after,), candidates={after.name: Candidate(after)}))
    return after


class GoingOn(Queueing):
    """Beside all that: running jobs claim places to go on, nodes are lost and come back, claims expire."""

    @initialize()
    def no_node_is_lost(self):
        self.lost = set()

    def lead(self):
        super().lead()
        self.planner.apply(News(closed=dict.fromkeys(getattr(self, "lost", ()), "lost")))

    def conditions(self):
        return {name: NodeCondition(unreachable="lost") for name in self.lost}

    @rule(data=st.data(), new=st.integers(0, 6), keeps=st.integers(0, 8))
    def wants_another_place(self, data, new, keeps):
        known = self.pick(data, JobState.RUNNING)
        if known is None or known.claim is not None:
            return
        taken = {uuid for j in self.jobs.values() for _, task in j.holding() for uuid in task.gpus}
        taken |= {uuid for j in self.jobs.values() if j.claim for _, uuids in j.claim.nodes for uuid in uuids}
        own = [(task.node, uuid) for task in known.attempt.tasks for uuid in task.gpus][:keeps]
        free = [(n.name, g.uuid) for n in self.NODES for g in n.gpus if g.uuid not in taken and n.name not in self.lost]
        gpus: dict[str, list[str]] = {}
        for name, uuid in own + data.draw(st.permutations(free))[:new]:
            gpus.setdefault(name, []).append(uuid)
        if gpus:
            claim = claim_of(tuple((name, tuple(sorted(uuids))) for name, uuids in gpus.items()))
            self.store(lifecycle.claim_while_running(known, claim))

    @rule(late=st.booleans())
    def looks_at_its_place(self, late):
        """All that run or wait look at what they claim, after it expired or before."""
        for known in list(self.jobs.values()):
            if known.claim is not None and known.claim.purpose is ClaimPurpose.RESIZE:
                others = [j for j in self.jobs.values() if j.name != known.name]
                free = not any(known.claim.concerns(held_by(j)) for j in others)
                at = known.claim.expire_time if late else NOW
                observed = Observations(nodes=self.conditions(), claim_is_free=free)
                self.store(lifecycle.advance(known, observed, at, Timeouts()))

    @rule(name=st.sampled_from([A, B, C]))
    def node_is_lost_or_comes_back(self, name):
        self.lost ^= {name}
        self.planner.apply(News(closed={name: "lost" if name in self.lost else ""}))
        for known in list(self.jobs.values()):
            if known.state in (JobState.RUNNING, JobState.QUEUED):
                self.store(lifecycle.advance(known, Observations((), nodes=self.conditions()), NOW, Timeouts()))

    @rule(data=st.data())
    def stops_for_good(self, data):
        """What a lost node said last is learned: its tasks are gone."""
        if (known := self.pick(data, JobState.RECOVERING)) is not None:
            self.store(told(known, TaskPhase.KILLED, -9))

    def nobody_elses(self, given, to, started=()):
        for other in self.jobs.values():
            goes_on = other.claim is not None and other.claim.purpose is ClaimPurpose.RESIZE
            if goes_on and other.spec.priority >= to.spec.priority and other.name != to.name:
                assert not other.claim.concerns(given), f"{to.name} is given where {other.name} goes on"

    @invariant()
    def gpus_have_one_holder(self):
        """One job, that is: it may start again where its own remains are being ended."""
        self.planner.check()
        held = [uuid for known in self.jobs.values() for uuids in held_by(known).values() for uuid in uuids]
        assert len(held) == len(set(held))

    @invariant()
    def room_that_was_made_is_used(self):
        """A job that stopped to go on is placed by the next decision: there, when nothing happened to that place."""
        ready = [known for known in self.jobs.values() if self.can_go_on(known)]
        if not ready:
            return
        fresh = planner_of("a", "b", "c")
        records = tuple(self.jobs.values())
        waits = {r.name: Candidate(r) for r in records if r.state is JobState.QUEUED}
        fresh.apply(News(closed=dict.fromkeys(self.lost, "lost"), jobs=records, candidates=waits))
        placed = {move.job: move.assignment.nodes for move in fresh.decide(NOW) if move.assignment}
        for known in ready:
            assert placed.get(known.name) == known.claim.nodes

    def teardown(self):
        """As there, when the nodes are back and no claim of theirs is left."""
        if hasattr(self, "jobs") and hasattr(self, "lost"):  # it may have ended before it began
            for name in sorted(self.lost):
                self.node_is_lost_or_comes_back(name)
            self.looks_at_its_place(late=True)
            self.nothing_is_left_of_old_attempts()
            begun = {name: lifecycle.next_number(known) for name, known in self.jobs.items()}
            super().teardown()
            again = {name: lifecycle.next_number(self.jobs[name]) - number for name, number in begun.items()}
            assert max(again.values()) <= MOST_STARTS, "they go on in circles"

    def nothing_is_left_of_old_attempts(self):
        """So say the agents of nodes that are back."""
        for known in list(self.jobs.values()):
            runs = (
                known.attempt.epoch if known.state in (JobState.STARTING, JobState.RUNNING, JobState.SUSPENDING) else 0
            )
            left = [task for attempt, task in known.holding() if attempt.epoch != runs]
            reports = tuple(Report(task.id, TaskPhase.KILLED, -9) for task in left)
            self.store(lifecycle.advance(known, Observations(reports), NOW, Timeouts()))

    def can_go_on(self, known):
        if known.state is not JobState.QUEUED or known.claim is None or not self.is_first(known):
            return False
        if known.claim.purpose is not ClaimPurpose.RESIZE or set(known.claim.gpus) & self.lost:
            return False
        others = (other for other in self.jobs.values() if other.name != known.name)
        return not any(known.claim.concerns(held_by(other)) for other in others)


TestGoingOn = GoingOn.TestCase
TestGoingOn.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
