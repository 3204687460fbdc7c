"""Moving what runs so that a gang fits: only what may be moved, only when it is worth it, and undone when it fails half-way."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import node
from whaleflux.errors import Aborted
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.holdings import held_by
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import ClaimPurpose, Job, JobState, Queue, SchedulingDecision, TaskPhase
from whaleflux_scheduler.core.movers import Movers
from whaleflux_scheduler.core.observed import NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.core.rebalance import (
    LEAST_MOVING,
    Budget,
    RebalanceRules,
    may_move,
    move_cost_gpu_s,
    moving_gpus,
    resumes,
    unsaved_s,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def name_of(short):
    return f"sites/s/nodes/{short}"


def job(name, gpus, at=-HOUR, **spec):
    asked = {"checkpoint_every_steps": 10, **spec}
    return Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, **asked), JobState.QUEUED, NOW + at, uid=name)


def gang(name="gang", gpus=8, **spec):
    """Whole nodes of four GPUs; it has waited for an hour."""
    return job(name, gpus, max_nodes=gpus // 4, **spec)


def told(known, phase, code=0, now=NOW):
    reports = tuple(Report(task.id, phase, code, rendezvous="h:1") for task in known.attempt.tasks)
    return lifecycle.advance(known, Observations(reports), now, Timeouts())


class Fleet:
    """A plan, and the records of jobs as a store would have them."""

    def __init__(self, *names, gpus=4, rules=None, **more):
        self.plan, self.jobs, self.machines = Plan(rules=rules), {}, {}
        self.plan.apply(News(queues={"q": Queue("queues/q")}))
        for short in names:
            self.machines[name_of(short)] = node(f"s/{short}", gpus, **more)
        self.plan.apply(News(nodes=tuple(self.machines.values()), closed=dict.fromkeys(self.machines, "")))

    def uuids(self, short, *at):
        return tuple(self.machines[name_of(short)].gpus[i].uuid for i in at)

    def runs(self, known, short, *at, since=-HOUR):
        """It runs on these GPUs of the node."""
        where = GpuAssignment(((name_of(short), self.uuids(short, *at)),))
        placed = lifecycle.place(known, where, SchedulingDecision(NOW, True, "there"), NOW + since)
        for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
            placed = told(placed, phase, now=NOW + since)
        return self.store(placed)

    def store(self, known):
        self.jobs[known.name] = known
        waits = known.state in (JobState.QUEUED, JobState.RECOVERING)
        self.plan.apply(News(jobs=(known,), candidates={known.name: Candidate(known) if waits else None}))
        return known

    def decide(self, now=NOW):
        """What is decided, done at once; returns the jobs that got a place."""
        moves = self.plan.decide(now)
        return [move.job for move in moves if self.carry_out(move, now) and move.assignment is not None]

    def carry_out(self, move, now=NOW):
        known = self.jobs[move.job]
        if move.assignment is not None:
            placed = lifecycle.place(known, move.assignment, move.decision, now)
            for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
                placed = told(placed, phase, now=now)
            self.store(placed)
        elif move.claim is not None and known.state is JobState.RUNNING:
            self.store(lifecycle.claim_while_running(known, move.claim))
        elif move.claim is not None:
            self.store(lifecycle.claim(known, move.claim, move.decision.summary))
        else:
            return False
        return True

    def rebalance(self, now=NOW):
        """The plan, carried out up to the claims."""
        plan = self.plan.plan_rebalance(now)
        for move in self.plan.apply_rebalance(plan.etag, now)[1]:
            self.carry_out(move, now)
        return plan

    def stop(self, name, lost=()):
        """A job that claims another place stops for it."""
        nodes = {node: NodeCondition(unreachable="lost") for node in lost}
        going = self.store(lifecycle.advance(self.jobs[name], Observations(claim_is_free=True), NOW, Timeouts()))
        assert going.state is JobState.SUSPENDING
        self.store(told(going, TaskPhase.KILLED, -15))
        after = lifecycle.advance(self.jobs[name], Observations(nodes=nodes), NOW, Timeouts())
        return self.store(after)

    def where(self, name):
        return sorted(node.rpartition("/")[2] for node in held_by(self.jobs[name]))

    def check(self):
        self.plan.check()
        held = [uuid for known in self.jobs.values() for uuids in held_by(known).values() for uuid in uuids]
        assert len(held) == len(set(held)), "a GPU is held twice"


def moves_of(plan):
    return [move.job.id for proposal in plan.proposals for move in proposal.moves]


def fragmented(rules=None, **spec):
    """Of three nodes none is free, though nine of twelve GPUs are: a gang of two whole nodes waits."""
    fleet = Fleet("a", "b", "c", rules=rules)
    for short in "abc":
        fleet.runs(job(f"on-{short}", 1, **spec), short, 0)
    fleet.store(gang())
    assert fleet.decide() == []
    return fleet


class TestPlan:
    def test_small_jobs_go_into_holes_elsewhere_until_the_gang_fits(self):
        fleet = fragmented()
        plan = fleet.plan.plan_rebalance(NOW)
        (proposal,) = plan.proposals
        assert len(proposal.moves) == 2
        assert proposal.gang.name == "queues/q/jobs/gang"
        targets = {node for move in proposal.moves for node, _ in move.to}
        assert len(targets) == 1
        assert targets.isdisjoint(node for node, _ in proposal.room)
        promised = fleet.jobs["queues/q/jobs/gang"].claim.start_time
        assert proposal.gain_gpu_s == pytest.approx(8 * ((promised - NOW).total_seconds() - 30))
        assert proposal.cost_gpu_s <= proposal.gain_gpu_s / 2
        assert "makes room for queues/q/jobs/gang: saves 24 GPU-hours of waiting for 0.25 GPU-hours" in proposal.why

    def test_planning_changes_nothing(self):
        fleet = fragmented()
        before = json.dumps(fleet.plan.held(), default=sorted), fleet.plan.plan_rebalance(NOW).etag
        assert (json.dumps(fleet.plan.held(), default=sorted), fleet.plan.plan_rebalance(NOW).etag) == before
        fleet.check()

    def test_the_gang_starts_where_others_left_for_their_new_places(self):
        fleet = fragmented()
        plan = fleet.rebalance()
        movers = [move.job.name for move in plan.proposals[0].moves]
        assert all(fleet.jobs[name].claim.purpose is ClaimPurpose.MOVE for name in movers)
        assert fleet.jobs["queues/q/jobs/gang"].claim.victims == ()
        fleet.check()
        assert fleet.decide() == [], "nobody has left yet"
        for name in movers:
            fleet.stop(name)
            fleet.check()
        assert sorted(fleet.decide()) == sorted(movers), "they may have to come back"
        assert fleet.decide() == ["queues/q/jobs/gang"]
        fleet.check()
        targets = {move.job.name: [node.rpartition("/")[2] for node, _ in move.to] for move in plan.proposals[0].moves}
        assert {name: fleet.where(name) for name in movers} == targets
        assert all(fleet.jobs[name].restarts == 0 for name in movers)

    def test_nobody_else_gets_the_room_that_is_made(self):
        fleet = fragmented()
        plan = fleet.rebalance()
        fleet.store(job("late", 4, at=timedelta(0), max_nodes=1))
        for move in plan.proposals[0].moves:
            fleet.stop(move.job.name)
        assert "queues/q/jobs/late" not in [*fleet.decide(), *fleet.decide()]
        assert fleet.jobs["queues/q/jobs/gang"].state is JobState.RUNNING

    @pytest.mark.parametrize(
        "spec",
        [
            {"kind": JobKind.SERVICE},
            {"checkpoint_every_steps": 0},
            {"priority": 1},
            {"share_memory_bytes": 10**9},
            {"time_limit_s": 3700.0},
        ],
        ids=lambda spec: next(iter(spec)),
    )
    def test_who_is_never_moved(self, spec):
        assert fragmented(**spec).plan.plan_rebalance(NOW).proposals == ()

    def test_who_was_restarted_lately_is_left_alone(self):
        fleet = fragmented()
        for short in "abc":
            known = fleet.jobs[f"queues/q/jobs/on-{short}"]
            again = replace(known.attempt, end_time=NOW - timedelta(minutes=59), end_reason="moved: x")
            fleet.store(replace(known, past_attempts=(again,)))
        assert fleet.plan.plan_rebalance(NOW).proposals == ()
        later = NOW + timedelta(minutes=6)
        assert moves_of(fleet.plan.plan_rebalance(later)) != []

    def test_a_gang_that_came_just_now_moves_nobody(self):
        fleet = Fleet("a", "b")
        fleet.runs(job("one", 1), "a", 0)
        fleet.runs(job("two", 1), "b", 0)
        fleet.store(gang("fresh", 4, at=-timedelta(seconds=90)))
        fleet.decide()
        assert fleet.plan.plan_rebalance(NOW).proposals == (), "it would wait 90 s, for 100 s of another's work"
        assert moves_of(fleet.plan.plan_rebalance(NOW + timedelta(minutes=10))) == ["one"]

    def test_the_least_loss_is_chosen(self):
        fleet = Fleet("a", "b")
        fleet.runs(job("long", 2), "a", 0, 1, since=-20 * HOUR)
        fleet.runs(job("short", 2), "b", 0, 1)
        fleet.store(gang("gang", 4))
        fleet.decide()
        assert moves_of(fleet.plan.plan_rebalance(NOW)) == ["short"]

    def test_a_checkpoint_that_was_committed_lately_makes_a_move_cheap(self):
        fleet = Fleet("a", "b")
        fleet.runs(job("long", 2), "a", 0, 1, since=-20 * HOUR)
        fleet.runs(job("short", 2), "b", 0, 1)
        fleet.store(gang("gang", 4))
        fleet.decide()
        fleet.plan.apply(News(saved={"queues/q/jobs/long": NOW - timedelta(seconds=50)}))
        (proposal,) = fleet.plan.plan_rebalance(NOW).proposals
        assert [move.job.id for move in proposal.moves] == ["long"]
        assert proposal.cost_gpu_s == pytest.approx(2 * (30 + 60 + 5))

    def test_who_finds_no_other_place_stays_and_others_move(self):
        """To empty `c` is cheapest, but what runs there needs a whole node itself."""
        fleet = Fleet("a", "b", "c", "d")
        for short in "ab":
            fleet.runs(job(f"on-{short}", 1), short, 0, since=-10 * HOUR)
        fleet.runs(job("whole", 4, max_nodes=1), "c", 0, 1, 2, 3)
        fleet.runs(job("pinned", 2, checkpoint_every_steps=0), "d", 0, 1)
        fleet.store(gang(at=-4 * HOUR))
        fleet.decide()
        fleet.plan.apply(News(saved={"queues/q/jobs/whole": NOW}))
        assert sorted(moves_of(fleet.plan.plan_rebalance(NOW))) == ["on-a", "on-b"]

    def test_so_many_move_at_once_and_no_more(self):
        """Each of five jobs that wait needs four GPUs of others to move."""
        fleet = Fleet(*"abcdefghij", gpus=8, rules=RebalanceRules(moving=0.0, most_gangs=5))
        for short in "abcdefghij":
            fleet.runs(job(f"on-{short}", 4), short, 0, 1, 2, 3)
        for number in range(5):
            fleet.store(job(f"gang-{number}", 8, max_nodes=1, at=-timedelta(hours=2, minutes=number)))
        fleet.decide()
        assert len(fleet.rebalance().proposals) == 4
        assert moving_gpus(known.claim for known in fleet.jobs.values() if known.claim) == LEAST_MOVING
        assert fleet.plan.plan_rebalance(NOW, thorough=True).proposals == (), "until the first ones have arrived"

    def test_a_day_costs_no_more_than_its_share(self):
        poor = fragmented(RebalanceRules(budget=0.0008))
        assert poor.plan.plan_rebalance(NOW).proposals == (), "12 GPUs: 830 GPU-seconds a day, and 900 are needed"
        fleet = fragmented(RebalanceRules(budget=0.001))
        plan = fleet.rebalance()
        assert plan.budget_left_gpu_s == pytest.approx(0.001 * 12 * 86400)
        left = plan.budget_left_gpu_s - plan.proposals[0].cost_gpu_s
        assert fleet.plan.plan_rebalance(NOW).budget_left_gpu_s == pytest.approx(left)
        assert fleet.plan.plan_rebalance(NOW + 25 * HOUR).budget_left_gpu_s == plan.budget_left_gpu_s

    def test_a_new_leader_counts_what_records_tell(self):
        known = fragmented().jobs["queues/q/jobs/on-a"]
        ended = replace(known.attempt, end_time=NOW - 2 * HOUR, end_reason="moved: x")
        again = replace(known.attempt, epoch=5, run_time=NOW - 2 * HOUR + timedelta(seconds=100))
        moved = replace(known, past_attempts=(ended,), attempt=again)
        budget = Budget(1.0)
        budget.learn(moved)
        assert budget.left_gpu_s(1, NOW) == pytest.approx(86400 - 100)

    def test_what_runs_far_apart_comes_together_when_it_can(self):
        fleet = Fleet("a", "b")
        for short, leaf in (("c", "l1"), ("d", "l1"), ("e", "l2")):
            fleet.machines[name_of(short)] = node(f"s/{short}", 4, leaf=leaf)
        fleet.plan.apply(News(nodes=tuple(fleet.machines.values()), closed=dict.fromkeys(fleet.machines, "")))
        where = GpuAssignment(((name_of("a"), fleet.uuids("a", 0)), (name_of("e"), fleet.uuids("e", 0))))
        far = lifecycle.place(job("far", 2), where, SchedulingDecision(NOW, True, "x"), NOW - 100 * HOUR)
        for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
            far = told(far, phase, now=NOW - 100 * HOUR)
        fleet.store(replace(far, step=1_000_000))
        (proposal,) = fleet.plan.plan_rebalance(NOW).proposals
        assert len(proposal.moves[0].to) == 1
        assert proposal.why.startswith("runs closer or cheaper: saves")
        assert proposal.gang is None

    def test_dollars_are_a_reason_too_and_only_as_long_as_it_runs(self):
        fleet = Fleet("a", usd=4.0)
        fleet.machines[name_of("b")] = node("s/b", 4, usd=1.0)
        fleet.plan.apply(News(nodes=tuple(fleet.machines.values()), closed=dict.fromkeys(fleet.machines, "")))
        placed = fleet.runs(job("dear", 4, expected_s=6 * 3600.0), "a", 0, 1, 2, 3, since=-3 * HOUR)
        fleet.store(replace(placed, step=10_000, attempt=replace(placed.attempt, usd_per_hour=16.0)))
        (proposal,) = fleet.plan.plan_rebalance(NOW).proposals
        assert proposal.gain_usd == pytest.approx(3 * 12.0)
        short = replace(fleet.jobs["queues/q/jobs/dear"], spec=replace(placed.spec, time_limit_s=3 * 3600 + 1000.0))
        fleet.store(short)
        assert fleet.plan.plan_rebalance(NOW).proposals != ()
        fleet.store(replace(short, spec=replace(placed.spec, time_limit_s=3 * 3600 + 100.0)))
        assert fleet.plan.plan_rebalance(NOW).proposals == ()


class TestApply:
    def test_an_unknown_plan_is_refused(self):
        with pytest.raises(Aborted, match="this leader did not make it"):
            fragmented().plan.apply_rebalance("0000", NOW)

    @pytest.mark.parametrize("change", ["gang", "mover", "target", "room"])
    def test_a_plan_that_does_not_fit_any_more_is_refused_with_what_changed(self, change):
        fleet = fragmented()
        plan = fleet.plan.plan_rebalance(NOW)
        (proposal,) = plan.proposals
        match change:
            case "gang":
                gone = lifecycle.cancel(fleet.jobs[proposal.gang.name], proposal.gang.cause, NOW)
                fleet.store(gone)
                what = "queues/q/jobs/gang does not wait any more"
            case "mover":
                fleet.store(told(fleet.jobs[proposal.moves[0].job.name], TaskPhase.EXITED))
                what = f"{proposal.moves[0].job.name} does not run any more"
            case "target":
                (target,) = {node for move in proposal.moves for node, _ in move.to}
                fleet.plan.apply(News(closed={target: "cordoned"}))
                what = "not all GPUs are free where queues/q/jobs/on-"
            case "room":
                fleet.plan.apply(News(closed={proposal.room[0][0]: "cordoned"}))
                what = "not all GPUs are free where queues/q/jobs/gang was to go"
        held = fleet.plan.held()
        with pytest.raises(Aborted, match=what):
            fleet.plan.apply_rebalance(plan.etag, NOW)
        assert fleet.plan.held() == held
        fleet.check()

    def test_the_same_plan_has_the_same_etag_later(self):
        fleet = fragmented()
        etags = {fleet.plan.plan_rebalance(NOW + timedelta(minutes=minutes)).etag for minutes in range(5)}
        assert len(etags) == 1


class TestHalfWay:
    def test_a_job_whose_new_place_is_lost_has_its_old_one_back(self):
        fleet = fragmented()
        (proposal,) = fleet.rebalance().proposals
        first, second = (move.job.name for move in proposal.moves)
        (target,) = {node for move in proposal.moves for node, _ in move.to}
        fleet.stop(first)
        fleet.plan.apply(News(closed={target: "unreachable"}))
        fleet.store(lifecycle.advance(fleet.jobs[first], lost(target), NOW, Timeouts()))
        fleet.store(lifecycle.advance(fleet.jobs[second], lost(target), NOW, Timeouts()))
        assert fleet.decide() == [first]
        assert fleet.where(first) == [first[-1]]
        assert fleet.jobs[first].decision.reasons[0].startswith("it is back where it was")
        assert (fleet.jobs[second].state, fleet.jobs[second].claim) == (JobState.RUNNING, None)
        fleet.check()
        end = fleet.jobs[proposal.gang.name].claim.expire_time
        fleet.store(lifecycle.advance(fleet.jobs[proposal.gang.name], Observations(), end, Timeouts()))
        assert fleet.jobs[proposal.gang.name].claim is None
        fleet.check()

    def test_another_hole_will_do(self):
        fleet = fragmented()
        (proposal,) = fleet.rebalance().proposals
        first = proposal.moves[0].job.name
        (target,) = {node for move in proposal.moves for node, _ in move.to}
        fleet.machines[name_of("d")] = node("s/d", 1)
        fleet.plan.apply(News(nodes=(fleet.machines[name_of("d")],), closed={name_of("d"): ""}))
        fleet.stop(first)
        fleet.plan.apply(News(closed={target: "unreachable"}))
        fleet.store(lifecycle.advance(fleet.jobs[first], lost(target), NOW, Timeouts()))
        assert fleet.decide() == [first]
        assert fleet.where(first) == ["d"]

    def test_a_new_leader_goes_on_from_the_records(self):
        fleet = fragmented()
        (proposal,) = fleet.rebalance().proposals
        fleet.stop(proposal.moves[0].job.name)
        after = Fleet("a", "b", "c")
        for known in fleet.jobs.values():
            after.store(known)
        after.decide()
        after.stop(proposal.moves[1].job.name)
        after.decide()
        after.decide()
        assert all(known.state is JobState.RUNNING for known in after.jobs.values())
        after.check()

    def test_a_leader_that_stored_only_the_moves_leaves_nothing_behind(self):
        fleet = fragmented()
        plan = fleet.plan.plan_rebalance(NOW)
        _, moves = fleet.plan.apply_rebalance(plan.etag, NOW)
        for move in moves[:1]:  # the others, and the gang's, were not stored
            fleet.carry_out(move)
        after = Fleet("a", "b", "c")
        for known in fleet.jobs.values():
            after.store(known)
        after.stop(moves[0].job)
        assert after.decide() == [moves[0].job]
        assert after.jobs["queues/q/jobs/gang"].claim.purpose is ClaimPurpose.RESERVATION, "as it was promised before"
        after.check()


def lost(node):
    return Observations(nodes={node: NodeCondition(unreachable="lost")})


def test_what_a_move_costs_is_known_from_the_record():
    fleet = Fleet("a")
    known = fleet.runs(job("one", 2), "a", 0, 1, since=-2 * HOUR)
    assert unsaved_s(known, NOW) == 7200
    stepped = replace(known, step=720)
    assert unsaved_s(stepped, NOW) == 100.0, "ten steps of ten seconds"
    assert move_cost_gpu_s(stepped, NOW) == pytest.approx(2 * (30 + 60 + 10))
    assert resumes(known)
    assert not resumes(job("x", 1, checkpoint_every_steps=0))


SMALL = st.tuples(
    st.integers(0, 4), st.integers(1, 2), st.sampled_from([*["plain"] * 6, "service", "fresh", "unsaved"])
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(SMALL, min_size=5, max_size=10), st.integers(1, 3), st.booleans())
def test_a_plan_makes_the_gang_fit_and_moves_only_who_may_be_moved(jobs, whole, all_stop):
    names = "abcde"
    fleet, taken = Fleet(*names), dict.fromkeys(names, 0)
    for number, (at, gpus, kind) in enumerate(jobs):
        short = names[at]
        if taken[short] + gpus > 4:
            continue
        spec = {"service": {"kind": JobKind.SERVICE}, "unsaved": {"checkpoint_every_steps": 0}}.get(kind, {})
        known = fleet.runs(job(f"{kind}-{number}", gpus, **spec), short, *range(taken[short], taken[short] + gpus))
        if kind == "fresh":
            ended = replace(known.attempt, end_time=NOW - timedelta(minutes=10), end_reason="preempted: x")
            fleet.store(replace(known, past_attempts=(ended,)))
        taken[short] += gpus
    waits = fleet.store(gang(gpus=4 * whole))
    fleet.decide()
    before = {name: held_by(known) for name, known in fleet.jobs.items()}
    plan = fleet.plan.plan_rebalance(NOW)
    fleet.check()
    assume(plan.proposals)
    (proposal,) = plan.proposals
    assert all(move.job.id.startswith("plain") for move in proposal.moves)
    assert proposal.cost_gpu_s * RebalanceRules().worth <= proposal.gain_gpu_s
    fleet.rebalance()
    fleet.check()
    movers = [move.job.name for move in proposal.moves]
    for name in movers if all_stop else movers[:-1]:
        fleet.stop(name)
        fleet.check()
    fleet.decide()
    fleet.check()
    assert fleet.jobs[waits.name].state is JobState.QUEUED, "those who moved may have to come back"
    fleet.decide()
    fleet.check()
    assert (fleet.jobs[waits.name].state is JobState.RUNNING) == all_stop
    assert all(fleet.jobs[name].state is JobState.RUNNING for name in movers)
    others = before.keys() - {waits.name, *movers}
    assert all(held_by(fleet.jobs[name]) == before[name] for name in others)


KIND = st.sampled_from([{}, {"checkpoint_every_steps": 0}, {"time_limit_s": 3700.0}, {"priority": 2}])
CHANGE = st.tuples(st.integers(0, 5), st.sampled_from(["runs", "ends", "steps", "saves", "restarts"]), KIND)


@settings(max_examples=60, deadline=None)
@given(st.lists(CHANGE, max_size=25), st.integers(0, 2))
def test_the_columns_say_what_the_records_say(changes, priority):
    """Whatever was learned in between: who may be moved, where from, and at what cost."""
    fleet, movers, jobs, saved = Fleet(*"abcdef"), Movers(), {}, {}
    for number, what, spec in changes:
        name = f"queues/q/jobs/j{number}"
        match what:
            case "runs":
                jobs[name] = fleet.runs(
                    job(f"j{number}", 2, **spec), "abcdef"[number], 0, 1, since=-HOUR * (number + 1)
                )
            case "ends" if name in jobs:
                jobs[name] = told(jobs[name], TaskPhase.EXITED)
            case "steps" if name in jobs:
                jobs[name] = replace(jobs[name], step=jobs[name].step + 500)
            case "restarts" if name in jobs:
                past = replace(jobs[name].attempt, end_time=NOW - timedelta(minutes=50 + 5 * number), end_reason="x")
                jobs[name] = replace(jobs[name], past_attempts=(past,))
            case "saves":
                saved = {**saved, name: NOW - timedelta(minutes=number)}
                movers.saved(saved)
        if name in jobs:
            movers.learn(jobs[name])
    engine = Engine()
    for machine in fleet.machines.values():
        engine.upsert_node(machine)
    columns = engine.columns
    able = movers.able(columns, NOW.timestamp(), RebalanceRules().rest_s)
    expected = {
        (columns.index[known.attempt.nodes[0]], name): move_cost_gpu_s(known, NOW, saved.get(name))
        for name, known in jobs.items()
        if may_move(known, NOW, RebalanceRules()) and known.spec.priority <= priority
    }
    found = able.movables((), priority, columns.count)
    assert {(row, name): cost for row in range(columns.count) for name, cost in found.on([row]).items()} == {
        key: pytest.approx(cost) for key, cost in expected.items()
    }
    assert found.held.sum() == 2 * len(expected)
