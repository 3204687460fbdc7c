"""Making room: what is freed for a job is nobody else's until it starts, whoever leads and whatever the victims do meanwhile."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.scheduler_world import GB, World, node, plan_with_queues, until
from whaleflux.manifests.job_fields import JobKind
from whaleflux.store.api import Put, Unchanged
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.estimates import Estimates, safe_s
from whaleflux_scheduler.core.lending import MARGIN_S
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, JobState, Queue, Spec, TaskPhase
from whaleflux_scheduler.core.observed import NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News
from whaleflux_scheduler.jobs import key_of

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B, C = (f"sites/s/nodes/{name}" for name in "abc")
KILLED = (TaskPhase.KILLED, -15)


def planner_of(*names):
    planner = plan_with_queues()
    nodes = [node(f"s/{name}") for name in names]
    planner.apply(News(nodes=tuple(nodes), closed={n.name: "" for n in nodes}))
    return planner


def job(name, gpus=4, priority=0, at=0):
    created = NOW + timedelta(seconds=at)
    return Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, priority=priority), JobState.QUEUED, created)


def parts(name, share_gb, priority=0, at=0, **fields):
    spec = Spec(command=("x",), gpus=1, share_memory_bytes=share_gb * GB, priority=priority, **fields)
    return replace(job(name, at=at), spec=spec)


def offer(planner, *jobs):
    planner.apply(News(jobs=jobs, candidates={j.name: Candidate(j) for j in jobs}))
    return {choice.job: choice for choice in planner.decide(NOW)}


def run(planner, waiting):
    """The job as it is when all of it runs, and the planner knows that."""
    choice = offer(planner, waiting)[waiting.name]
    after = lifecycle.place(waiting, choice.assignment, choice.decision, NOW)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        after = said(after, phase)
    planner.apply(News(jobs=(after,)))
    return after


def said(job, phase, code=0):
    reports = tuple(Report(t.id, phase, code, rendezvous="h:1") for t in job.attempt.tasks)
    return lifecycle.advance(job, Observations(reports), NOW, Timeouts())


def claimed(planner, waiting):
    """The job with what the planner claims for it."""
    choice = offer(planner, waiting)[waiting.name]
    assert choice.assignment is None
    after = lifecycle.claim(waiting, choice.claim, choice.decision.summary)
    planner.apply(News(jobs=(after,), candidates={after.name: Candidate(after)}))
    return after


def stopped(planner, victim):
    """The victim after its agents have ended it, and the planner knows that it waits."""
    after = said(lifecycle.suspend(victim, "x", NOW), *KILLED)
    planner.apply(News(jobs=(after,), candidates={after.name: Candidate(after)}))
    return after


class TestClaims:
    def test_the_first_victim_that_stops_does_not_get_its_gpus_again(self):
        planner = planner_of("a", "b")
        low = [run(planner, job(f"low{i}", at=i)) for i in (1, 2)]
        high = claimed(planner, job("high", 8, priority=9, at=3))
        assert set(high.claim.victims) == {low[0].name, low[1].name}
        first = stopped(planner, low[0])
        choices = {choice.job: choice for choice in planner.decide(NOW)}
        assert choices[first.name].assignment is None
        assert choices[high.name].decision.preempts == (low[1].name,)
        planner.check()
        stopped(planner, low[1])
        placed = {choice.job for choice in planner.decide(NOW) if choice.assignment}
        assert placed == {high.name}
        planner.check()

    def test_free_gpus_of_the_place_are_kept_too(self):
        planner = planner_of("a", "b")
        low = run(planner, job("low"))
        high = claimed(planner, job("high", 8, priority=9, at=1))
        other = job("other", 1, at=2)
        assert offer(planner, other)[other.name].assignment is None
        assert any(f"kept for {high.name}" in why for why in planner.explain(other, (), NOW).reasons)
        stopped(planner, low)
        assert high.name in {choice.job for choice in planner.decide(NOW) if choice.assignment}

    def test_a_victim_that_failed_meanwhile_does_not_start_again_on_its_own_remains(self):
        planner = planner_of("a")
        low = run(planner, job("low"))
        high = claimed(planner, job("high", priority=9, at=1))
        failure = Observations((Report(low.attempt.tasks[0].id, TaskPhase.RUNNING),), {A: NodeCondition(draining="x")})
        broken = lifecycle.advance(low, failure, NOW, Timeouts())
        assert broken.state is JobState.RECOVERING
        assert offer(planner, broken)[low.name].assignment is None
        planner.apply(News(jobs=(said(broken, *KILLED),)))
        assert {choice.job for choice in planner.decide(NOW) if choice.assignment} == {high.name}
        planner.check()

    def test_a_new_planner_keeps_what_the_record_says(self):
        old = planner_of("a", "b")
        low = [run(old, job(f"low{i}", at=i)) for i in (1, 2)]
        high = claimed(old, job("high", 8, priority=9, at=3))
        first = stopped(old, low[0])
        planner = planner_of("a", "b")
        choices = offer(planner, first, low[1], high)
        assert choices[first.name].assignment is None
        assert choices[high.name].claim is None, "it has one already"
        stopped(planner, low[1])
        assert {choice.job for choice in planner.decide(NOW) if choice.assignment} == {high.name}
        planner.check()

    def test_of_a_gpu_that_others_share_still_nobody_gets_another_part(self):
        planner = plan_with_queues()
        planner.apply(News(nodes=(one := node("s/a", 1),), closed={one.name: ""}))
        low = run(planner, parts("low", 20))
        high = claimed(planner, job("high", 1, priority=9, at=2))
        other = parts("other", 20, at=3)
        assert offer(planner, other)[other.name].assignment is None
        planner.check()
        stopped(planner, low)
        assert {choice.job for choice in planner.decide(NOW) if choice.assignment} == {high.name}
        planner.check()

    def test_as_much_of_a_gpu_is_kept_as_a_part_needs_and_no_more(self):
        planner = plan_with_queues()
        planner.apply(News(nodes=(one := node("s/a", 1),), closed={one.name: ""}))
        run(planner, parts("stays", 20, priority=9))
        low = run(planner, parts("low", 20, at=1))
        high = claimed(planner, parts("high", 50, priority=9, at=2))
        assert high.claim.victims == (low.name,)
        other = parts("other", 10, at=3)
        assert offer(planner, other)[other.name].assignment is None
        stopped(planner, low)
        placed = {choice.job for choice in planner.decide(NOW) if choice.assignment}
        assert placed == {high.name, other.name}
        planner.check()

    @pytest.mark.parametrize("end", ["cancelled", "expired", "deleted"])
    def test_what_is_claimed_no_more_is_for_everybody(self, end):
        planner = planner_of("a", "b")
        run(planner, job("low", at=1))
        high = claimed(planner, job("high", 8, priority=9, at=2))
        if end == "deleted":
            planner.apply(News(gone=(high.name,)))
        else:
            asked = replace(high, cancel_requested=end == "cancelled")
            after = lifecycle.advance(asked, Observations(), high.claim.expire_time, Timeouts())
            assert after.claim is None
            planner.apply(News(jobs=(after,), candidates={high.name: None}))
        assert offer(planner, job("other", at=3))["queues/q/jobs/other"].assignment is not None
        planner.check()

    def test_two_that_make_room_take_different_victims(self):
        planner = planner_of("a", "b")
        for i in (1, 2):
            run(planner, job(f"low{i}", at=i))
        claims = [claimed(planner, job(f"high{i}", priority=9, at=i)).claim for i in (3, 4)]
        assert claims[0].victims != claims[1].victims
        assert claims[0].gpus.keys() != claims[1].gpus.keys()

    @pytest.mark.parametrize("new_leader", [False, True])
    def test_a_higher_priority_takes_what_a_lower_one_has_claimed(self, new_leader):
        planner = planner_of("a")
        low = run(planner, job("low"))
        middle = claimed(planner, job("middle", priority=5, at=1))
        high = claimed(planner, job("high", priority=9, at=2))
        assert set(high.claim.victims) == {low.name, middle.name}
        if new_leader:
            planner = planner_of("a")
            offer(planner, low, middle, high)
        stopped(planner, low)
        loses = lifecycle.advance(middle, Observations(claimed_by=high.name), NOW, Timeouts())
        assert loses.claim is None
        planner.apply(News(jobs=(loses,), candidates={loses.name: Candidate(loses)}))
        assert {choice.job for choice in planner.decide(NOW) if choice.assignment} == {high.name}
        planner.check()

    @pytest.mark.parametrize("new_leader", [False, True])
    def test_of_two_that_take_back_what_a_claim_keeps_the_first_has_it(self, new_leader):
        planner = planner_of("a")
        low = run(planner, job("low", 2))
        high = claimed(planner, job("high", 4, priority=9, at=1))
        low = lifecycle.suspend(low, "x", NOW)
        planner.apply(News(jobs=(low,)))
        planner.apply(News(queues={"q": Queue("queues/q"), "p": Queue("queues/p", guaranteed_gpus=4)}))
        back = [replace(job("x", 2, at=at), name=f"queues/p/jobs/b{at}") for at in (2, 3)]
        first = offer(planner, back[0])[back[0].name].claim
        if new_leader:
            planner = planner_of("a")
            planner.apply(News(queues={"q": Queue("queues/q"), "p": Queue("queues/p", guaranteed_gpus=4)}))
            offer(planner, low, high, lifecycle.claim(back[0], first, "waits"))
        assert first.victims == (high.name,)
        assert offer(planner, back[1])[back[1].name].claim is None
        planner.check()

    def test_idle_gpus_are_for_services_when_who_was_guaranteed_them_takes_others(self):
        planner, slow = planner_of("a"), node("s/slow", model="A100-80GB")
        planner.apply(News(nodes=(slow,), closed={slow.name: ""}))
        planner.apply(News(queues={"q": Queue("queues/q"), "p": Queue("queues/p", guaranteed_gpus=4)}))
        fast = Spec(command=("x",), gpus=4, any_of=("H100-80GB",))
        low = run(planner, replace(job("low"), spec=fast))
        serves = job("serves", at=1)
        serves = replace(serves, spec=Spec(command=("x",), gpus=4, kind=JobKind.SERVICE))
        assert offer(planner, serves)[serves.name].assignment is None, "it could not give them back"
        back = replace(job("x", at=2), name="queues/p/jobs/back", spec=fast)
        moves = offer(planner, back)
        assert moves[back.name].claim.victims == (low.name,)
        assert moves[serves.name].assignment is not None

    def test_what_a_guarantee_covers_no_more_is_had_by_others_in_the_same_step(self):
        planner = planner_of("a", "b")
        planner.apply(News(queues={"q": Queue("queues/q", guaranteed_gpus=4), "p": Queue("queues/p")}))
        run(planner, job("large"))
        lent = [run(planner, replace(job("x", 1), name=f"queues/p/jobs/lent{i}")) for i in range(4)]
        waits, first = job("waits", 1, at=1), job("first", 3, priority=1, at=2)
        assert offer(planner, waits)[waits.name].claim is None, "all that is guaranteed is held"
        moves = offer(planner, first)
        assert moves[first.name].claim is not None
        assert moves[waits.name].claim.victims[0] in {one.name for one in lent}

    def test_what_starts_may_be_stopped_for_those_who_wait_already(self):
        planner = planner_of("a")
        waiting = job("low")
        choice = offer(planner, waiting)[waiting.name]
        high = job("high", priority=9, at=1)
        assert offer(planner, high)[high.name].claim is None, "its record does not say yet that it was placed"
        starting = lifecycle.place(waiting, choice.assignment, choice.decision, NOW)
        planner.apply(News(jobs=(starting,)))
        assert [choice.claim.victims for choice in planner.decide(NOW)] == [(waiting.name,)]
        planner.check()

    def test_of_equals_what_starts_makes_room_before_what_has_worked(self):
        planner = planner_of("a", "b")
        works = run(planner, job("works", at=1))
        waiting = job("starts", at=2)
        choice = offer(planner, waiting)[waiting.name]
        planner.apply(News(jobs=(lifecycle.place(waiting, choice.assignment, choice.decision, NOW),)))
        high = job("high", priority=9, at=3)
        planner.apply(News(jobs=(high,), candidates={high.name: Candidate(high)}))
        (choice,) = planner.decide(NOW + timedelta(hours=1))
        assert choice.claim.victims == (waiting.name,) != (works.name,)

    def test_a_claimant_that_finds_room_elsewhere_takes_it_and_gives_its_claim_back(self):
        planner = planner_of("a", "b")
        low = [run(planner, job(f"low{i}", at=i)) for i in (1, 2)]
        high = claimed(planner, job("high", priority=9, at=3))
        other = next(j for j in low if j.name not in high.claim.victims)
        planner.apply(News(jobs=(said(other, TaskPhase.EXITED),)))
        (choice,) = [choice for choice in planner.decide(NOW) if choice.assignment]
        assert (choice.job, choice.assignment.nodes[0][0]) == (high.name, other.attempt.nodes[0])
        planner.check()


class TestLifecycle:
    CLAIM = Claim(((A, ("GPU-1",)),), ("queues/q/jobs/low",), NOW + timedelta(seconds=60))

    @pytest.mark.parametrize("why", [{"unreachable": "x"}, {"retired": True}, {"draining": "x"}])
    def test_a_claim_ends_with_its_node(self, why):
        high = replace(job("high"), claim=self.CLAIM)
        assert lifecycle.advance(high, Observations(), NOW, Timeouts()) is high
        assert lifecycle.advance(high, Observations(nodes={A: NodeCondition(**why)}), NOW, Timeouts()).claim is None

    def test_it_is_looked_at_when_its_claim_expires(self):
        high = replace(job("high"), claim=self.CLAIM)
        assert lifecycle.due(high, Observations(), NOW, Timeouts()) == self.CLAIM.expire_time

    @pytest.mark.parametrize("phases", [(), (TaskPhase.ACCEPTED,), (TaskPhase.ACCEPTED, TaskPhase.RUNNING)])
    def test_what_starts_or_runs_is_suspended_and_waits_when_nothing_is_left_of_it(self, phases):
        waiting = job("low")
        choice = offer(planner_of("a"), waiting)[waiting.name]
        begun = lifecycle.place(waiting, choice.assignment, choice.decision, NOW)
        for phase in phases:
            begun = said(begun, phase)
        wanted = Observations(claimed_by="queues/q/jobs/high")
        suspended = lifecycle.advance(begun, wanted, NOW, Timeouts())
        assert (suspended.state, suspended.cause.resource) == (JobState.SUSPENDING, wanted.claimed_by)
        assert suspended.attempt.end_time == NOW
        again = said(suspended, *KILLED)
        assert (again.state, again.epoch, again.restarts) == (JobState.QUEUED, begun.epoch + 1, 0)

    def test_what_runs_by_the_same_news_is_said_to_run_first(self):
        waiting = job("low")
        choice = offer(planner_of("a"), waiting)[waiting.name]
        starting = said(lifecycle.place(waiting, choice.assignment, choice.decision, NOW), TaskPhase.ACCEPTED)
        reports = tuple(Report(t.id, TaskPhase.EXITED, 0, rendezvous="h:1") for t in starting.attempt.tasks)
        both = Observations(reports, claimed_by="queues/q/jobs/high")
        ended = lifecycle.advance(lifecycle.advance(starting, both, NOW, Timeouts()), both, NOW, Timeouts())
        assert ended.state is JobState.SUCCEEDED, "it had done its work"

    def test_a_claim_survives_the_store(self):
        high = replace(job("high"), claim=self.CLAIM)
        message = pb.Job()
        convert.JOBS.merge(high, message)
        assert convert.job_of(message).claim == self.CLAIM
        convert.JOBS.merge(replace(high, claim=None), message)
        assert convert.job_of(message).claim is None


class Queueing(RuleBasedStateMachine):
    """Jobs of all priorities come, start, make room, fail and end in any order; writes are refused; leaders change."""

    NODES = tuple(node(f"s/{name}") for name in "abc")

    @initialize()
    def begin(self):
        self.jobs, self.number = {}, 0
        self.lead()
        for gpus in (4, 4, 2, 2):
            self.submit(0, gpus)
        self.all_start()

    @rule()
    def lead(self):
        """A new leader knows the records only."""
        self.planner = planner_of("a", "b", "c")
        self.store(*self.jobs.values())

    def store(self, *records):
        """Records as they are now in the store, and known to the planner."""
        self.jobs |= {record.name: record for record in records}
        candidates = {r.name: Candidate(r) if r.state is JobState.QUEUED else None for r in records}
        self.planner.apply(News(jobs=records, candidates=candidates))

    @rule(priority=st.integers(1, 3), gpus=st.sampled_from([4, 6, 8, 12]))
    def submit(self, priority, gpus):
        self.number += 1
        self.store(job(f"j{self.number}", gpus, priority, self.number))

    @rule(refused=st.sets(st.integers(0, 5)))
    def decide(self, refused):
        """Those of these numbers are not written: somebody was faster."""
        given = {}  # in this step, by job
        for number, choice in enumerate(self.planner.decide(NOW)):
            before = self.jobs[choice.job]
            if choice.assignment is not None:
                self.nobody_elses({n: set(gpus) for n, gpus in choice.assignment.nodes}, before, given)
                given[before.name] = {uuid for _, gpus in choice.assignment.nodes for uuid in gpus}
            if number in refused:
                self.store(before)
            elif choice.assignment is not None:
                self.store(lifecycle.place(before, choice.assignment, choice.decision, NOW))
            elif choice.claim is not None:
                self.store(lifecycle.claim(before, choice.claim, "waits"))

    def nobody_elses(self, nodes, to, given):
        """What somebody of the same priority or a higher one claims is given to nobody else.

        Unless that one was given another place earlier in the same step: all moves of a step are written side by side, so its write may be
        refused and the other's not. Then its record claims what the other holds, and its place is free again, where the next step puts
        it; `teardown` holds that nobody is stuck so. And what is promised for later is given to who has left it by then.
        """
        uuids = {uuid for gpus in nodes.values() for uuid in gpus}
        assert all(uuids.isdisjoint(others) for others in given.values()), "given twice in one step"
        left = NOW + timedelta(seconds=safe_s(Estimates(), to) + MARGIN_S)
        for other in self.jobs.values():
            if other.claim is None or other.name == to.name or other.name in given:
                continue
            if other.claim.purpose is ClaimPurpose.RESERVATION and left <= other.claim.start_time:
                continue
            if other.spec.priority >= to.spec.priority:
                assert not other.claim.concerns(nodes), f"{to.name} is given what {other.name} claims"

    def pick(self, data, *states):
        found = sorted(name for name, known in self.jobs.items() if known.state in states)
        return self.jobs[data.draw(st.sampled_from(found))] if found else None

    @rule()
    def all_start(self):
        self.decide(set())
        for known in [known for known in self.jobs.values() if known.state is JobState.STARTING]:
            self.store(said(said(known, TaskPhase.ACCEPTED), TaskPhase.RUNNING))

    @rule(data=st.data(), code=st.sampled_from([0, 1]))
    def ends(self, data, code):
        if (known := self.pick(data, JobState.RUNNING)) is not None:
            self.store(said(known, TaskPhase.EXITED, code))

    @rule(data=st.data())
    def recovers(self, data):
        if (known := self.pick(data, JobState.RECOVERING)) is not None:
            self.store(lifecycle.requeue(known, "again"))

    @rule()
    def victims_are_told(self):
        for known in list(self.jobs.values()):
            held = {task.node: task.gpus for _, task in known.holding()}
            by = [
                j.name
                for j in self.jobs.values()
                if j.claim and known.name in j.claim.victims and j.claim.concerns(held)
            ]
            if by:
                self.store(lifecycle.advance(known, Observations(claimed_by=by[0]), NOW, Timeouts()))

        for known in list(self.jobs.values()):
            by = [j.name for j in self.jobs.values() if j.claim and known.claim and known.name in j.claim.victims]
            if by and self.jobs[by[0]].claim.concerns(known.claim.gpus):
                self.store(lifecycle.advance(known, Observations(claimed_by=by[0]), NOW, Timeouts()))

    @rule(data=st.data())
    def stops(self, data):
        if (known := self.pick(data, JobState.SUSPENDING)) is not None:
            self.store(said(known, *KILLED))

    @rule(data=st.data())
    def cancel(self, data):
        if (known := self.pick(data, JobState.QUEUED)) is not None:
            asked = replace(known, cancel_requested=True)
            self.store(lifecycle.advance(asked, Observations(), NOW, Timeouts()))

    @invariant()
    def gpus_have_one_holder(self):
        self.planner.check()
        held = [uuid for known in self.jobs.values() for _, task in known.holding() for uuid in task.gpus]
        assert len(held) == len(set(held))

    @invariant()
    def room_that_was_made_is_used(self):
        """Once nobody else holds what is claimed, the next decision places who claims it.

        A promised start comes when it was promised: who goes before it, and is over by then, may have its place until then.
        """
        held = {uuid for known in self.jobs.values() for _, task in known.holding() for uuid in task.gpus}
        ready = {
            known.name
            for known in self.jobs.values()
            if known.claim is not None
            and known.claim.purpose is not ClaimPurpose.RESERVATION
            and self.is_first(known)
            and held.isdisjoint(uuid for _, gpus in known.claim.nodes for uuid in gpus)
        }
        if ready:
            fresh = planner_of("a", "b", "c")
            records = tuple(self.jobs.values())
            candidates = {r.name: Candidate(r) for r in records if r.state is JobState.QUEUED}
            fresh.apply(News(jobs=records, candidates=candidates))
            assert ready <= {choice.job for choice in fresh.decide(NOW) if choice.assignment}

    def teardown(self):
        """Whatever has happened: when writes go through and tasks end, everybody who waits is placed, though no claim expires."""
        for _ in range(2 * len(self.jobs) + 4):
            self.victims_are_told()
            for known in [known for known in self.jobs.values() if known.state is JobState.SUSPENDING]:
                self.store(said(known, *KILLED))
            for known in [known for known in self.jobs.values() if known.state is JobState.RECOVERING]:
                self.store(lifecycle.requeue(known, "again"))
            self.all_start()
            for known in [known for known in self.jobs.values() if known.state is JobState.RUNNING]:
                self.store(said(known, TaskPhase.EXITED))
        left = {known.name: known.state.name for known in self.jobs.values() if not known.ended}
        assert not left, "they wait for ever"

    def is_first(self, claimant):
        """Nobody of higher priority waits."""
        waiting = [known for known in self.jobs.values() if known.state is JobState.QUEUED]
        return not any(known.spec.priority > claimant.spec.priority for known in waiting)


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


async def two_low_ones(world):
    """A node each; the agent of the second is slow to end its task."""
    quick, slow = await world.add(node("s/a"), node("s/b"))
    low = [await world.submit(4) for _ in range(2)]
    for name in low:
        await world.reaches(name, "RUNNING")
    on = {task.job: agent for agent in (quick, slow) for task in agent.tasks.values()}
    slow.slow_to_die = True
    first = next(name for name in low if on[name] is quick)
    return first, next(name for name in low if name != first), slow


async def ends(agent, job):
    """The agent ends a task that it has been slow to end."""
    agent.slow_to_die = False
    (task,) = [name for name, report in agent.reports.items() if report.job == job]
    agent.report(task, pb.TASK_PHASE_KILLED, -15)


@pytest.mark.parametrize("new_leader", [False, True])
async def test_a_gang_gets_its_room_though_its_victims_stop_one_after_the_other(new_leader):
    async with World() as world:
        first, second, slow = await two_low_ones(world)
        high = await world.submit(8, priority=9)
        await world.reaches(second, "SUSPENDING")
        stopped = await world.reaches(first, "QUEUED")
        assert stopped.epoch == 2
        assert (await world.job(high)).claim.victims
        if new_leader:
            await world.restart()
        await world.planner.ask(lambda planner: planner.check())
        assert (await world.job(first)).state == pb.JOB_STATE_QUEUED
        await ends(slow, second)
        placed = await world.reaches(high, "RUNNING")
        assert not placed.HasField("claim")
        assert (await world.job(first)).state == pb.JOB_STATE_QUEUED
        for agent in world.agents.values():
            agent.exit(0)
        await world.reaches(first, "RUNNING")
        await world.reaches(second, "RUNNING")


async def test_a_cancelled_claimant_leaves_the_room_to_its_victims():
    async with World() as world:
        first, second, slow = await two_low_ones(world)
        high = await world.submit(8, priority=9)
        await world.reaches(first, "QUEUED")
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=high), None)
        await world.reaches(first, "RUNNING")
        await ends(slow, second)
        await world.reaches(second, "RUNNING")


async def test_what_was_placed_a_moment_ago_makes_room_before_it_runs():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        agent.obey = False
        low = await world.submit(4)
        await until(lambda: agent.tasks, "its task is wanted")
        agent.obey = True
        high = await world.submit(4, priority=9)
        await world.reaches(high, "RUNNING")
        stopped = await world.job(low)
        assert stopped.state == pb.JOB_STATE_QUEUED
        assert "makes room for" in stopped.attempt.end_reason
        agent.exit(0)
        await world.reaches(low, "RUNNING")


async def test_a_victim_that_was_starting_when_a_leader_was_lost_is_suspended():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        agent.obey = False
        low = await world.submit(4)
        await until(lambda: agent.tasks, "its task is wanted")
        high = await world.submit(4, priority=9)
        await world.stop()
        (task,) = agent.tasks.values()
        entry = await world.store.get(key_of(high))
        stored = convert.JOBS.decode(entry)
        claim = Claim(((A, tuple(task.task.gpu_uuids)),), (low,), world.clock.now() + timedelta(seconds=60))
        put = convert.JOBS.put(entry.key, replace(stored.value, claim=claim), stored)
        await world.store.commit(put, when=[Unchanged(entry)])
        agent.obey = True
        await world.restart()
        await world.reaches(high, "RUNNING")
        assert (await world.job(low)).state == pb.JOB_STATE_QUEUED


async def test_a_claim_on_a_node_that_is_drained_is_given_up_for_another():
    async with World() as world:
        first, second, slow = await two_low_ones(world)
        high = await world.submit(8, priority=9)
        await world.reaches(first, "QUEUED")
        await world.add(node("s/c"))
        world.phase(C, health_pb2.NODE_PHASE_READY)
        world.intend(B, inventory_pb2.NODE_INTENT_DRAINING, "test")
        await world.reaches(high, "RUNNING")
        assert {task.node for task in (await world.job(high)).attempt.tasks} == {A, C}
        await ends(slow, second)


async def test_who_comes_later_with_a_higher_priority_gets_the_room_first():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        low = await world.submit(4)
        await world.reaches(low, "RUNNING")
        agent.slow_to_die = True
        middle = await world.submit(4, priority=5)
        await world.reaches(low, "SUSPENDING")
        high = await world.submit(4, priority=9)
        await ends(agent, low)
        await world.reaches(high, "RUNNING")
        assert (await world.job(middle)).state == pb.JOB_STATE_QUEUED
        agent.exit(0)
        await world.reaches(middle, "RUNNING")


async def test_its_victims_are_suspended_however_long_the_write_of_its_record_takes(monkeypatch):
    async with World() as world:
        await world.add(node("s/a"), node("s/b"), node("s/c"))
        high = await world.submit(8, priority=9)
        placed = await world.reaches(high, "RUNNING")
        low = await world.submit(4)
        await world.reaches(low, "RUNNING")
        commit, begun, goes_on = world.store.commit, asyncio.Event(), asyncio.Event()

        async def slow(*writes, when=()):
            if any(write.key == key_of(high) and state_in(write) == pb.JOB_STATE_QUEUED for write in writes):
                begun.set()
                await goes_on.wait()
            return await commit(*writes, when=when)

        monkeypatch.setattr(world.store, "commit", slow)
        world.phase(placed.attempt.tasks[0].node, health_pb2.NODE_PHASE_UNREACHABLE)
        await asyncio.wait_for(begun.wait(), 5)
        await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=high), None)  # rounds go by meanwhile
        goes_on.set()
        await world.reaches(high, "RUNNING")
        assert (await world.job(low)).state == pb.JOB_STATE_QUEUED


def state_in(write):
    return pb.Job.FromString(write.value).state if isinstance(write, Put) else None
