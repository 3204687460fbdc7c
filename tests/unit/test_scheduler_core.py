"""The scheduler's core alone: the state machine, what a spec may say, how an attempt ends, whose turn it is."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import Invalid
from whaleflux.store.api import MAX_COMMIT_BYTES
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle, machine
from whaleflux_scheduler.core.model import ENDED, Decision, Job, JobKind, JobState, Queue, Rule, Spec, TaskPhase
from whaleflux_scheduler.core.observed import Limits, Report, Seen, Standing, Verdict
from whaleflux_scheduler.core.placement.validate import check_request
from whaleflux_scheduler.core.queueing import Line, Lines, over_limit
from whaleflux_scheduler.core.request import place_request
from whaleflux_scheduler.core.validate import MAX_SPEC_BYTES, check_spec

NOW = datetime(2026, 5, 1, tzinfo=UTC)
GOOD = Spec(command=("python", "train.py"), gpus=8)
LIMITS = Limits()


def after(seconds):
    return NOW + timedelta(seconds=seconds)


def job(**changes):
    return Job(**{"name": "queues/q/jobs/j", "spec": GOOD, "state": JobState.QUEUED, "create_time": NOW, **changes})


def placed(of=None, nodes=2):
    where = lifecycle.Place(tuple((f"sites/s/nodes/n{i}", (0, 1, 2, 3)) for i in range(nodes)), usd_per_hour=16.0)
    return lifecycle.place(of or job(), where, Decision(NOW, placed=True, summary="here"), NOW)


def reports(of, phase, **more):
    return tuple(Report(task.id, phase, **more) for task in of.attempt.tasks)


def step(of, *, now=NOW, nodes=None, verdict=None, said=()):
    return lifecycle.advance(of, Seen(tuple(said), nodes or {}, verdict), now, LIMITS)


def running(nodes=2):
    started = step(placed(nodes=nodes), said=reports(placed(nodes=nodes), TaskPhase.ACCEPTED, rendezvous="h:1"))
    return step(started, said=reports(started, TaskPhase.RUNNING))


def decisions_with_tasks():
    return Decision(NOW, placed=True, summary="here", tasks=placed().attempt.tasks * 1000)


class TestMachine:
    def test_no_state_is_a_dead_end_and_all_are_in_the_table(self):
        assert machine.dead_ends() == frozenset()
        assert set(machine.NEXT) == set(JobState) - {JobState.UNSPECIFIED}
        assert {state for state, following in machine.NEXT.items() if not following} == ENDED

    def test_numbers_are_those_of_the_contract(self):
        for ours, theirs, prefix in (
            (JobState, pb.JobState, "JOB_STATE_"),
            (TaskPhase, pb.TaskPhase, "TASK_PHASE_"),
            (JobKind, pb.JobKind, "JOB_KIND_"),
        ):
            assert {prefix + member.name: member.value for member in ours} == dict(theirs.items())

    def test_an_impossible_move_is_a_bug(self):
        with pytest.raises(machine.ImpossibleMove):
            machine.move(job(), JobState.RUNNING)


class TestSpec:
    def test_a_good_one_passes(self):
        check_spec(GOOD, 100, NOW)

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"gpus": 0}, "job.spec.gpus"),
            ({"gpus": 10**9}, "job.spec.gpus"),
            ({"gpus": -1}, "job.spec.gpus"),
            ({"command": ()}, "job.spec.command"),
            ({"command": ("x" * 100_000,)}, "job.spec.command"),
            ({"command": ("a\0b",)}, "job.spec.command"),
            ({"min_nodes": 9}, "job.spec.nodes.min"),
            ({"min_nodes": 4, "max_nodes": 2}, "job.spec.nodes.max"),
            ({"min_memory_bytes": -1}, "job.spec.gpu.min_memory_bytes"),
            ({"min_memory_bytes": 1 << 60}, "job.spec.gpu.min_memory_bytes"),
            ({"any_of": ("H200", "H200")}, "job.spec.gpu.any_of"),
            ({"any_of": ("x" * 10_000_000,)}, "job.spec.gpu.any_of[0]"),
            ({"placement": (Rule("tensor", 0, 2),)}, "job.spec.placement[0].level"),
            ({"placement": (Rule("tensor", 6, 3),)}, "job.spec.placement[0].size"),
            ({"environment": (("RANK", "3"),)}, "job.spec.environment[RANK]"),
            ({"environment": (("TORCHELASTIC_RUN_ID", "3"),)}, "job.spec.environment[TORCHELASTIC_RUN_ID]"),
            ({"environment": (("A B", "3"),)}, "job.spec.environment[A B]"),
            ({"priority": 1001}, "job.spec.priority"),
            ({"budget_usd": float("nan")}, "job.spec.budget_usd"),
            ({"budget_usd": -1.0}, "job.spec.budget_usd"),
            ({"deadline": NOW}, "job.spec.deadline_time"),
            ({"datasets": ("../etc",)}, "job.spec.datasets[0]"),
            ({"require_local_data": True}, "job.spec.require_local_data"),
            ({"sites": ("Bad Site",)}, "job.spec.sites[0]"),
            ({"stop_grace_s": 1e9}, "job.spec.stop_grace"),
            ({"max_restarts": -1}, "job.spec.retry.max_restarts"),
        ],
    )
    def test_each_wrong_field_is_named_with_its_limit(self, changes, field):
        with pytest.raises(Invalid) as refused:
            check_spec(replace(GOOD, **changes), 100, NOW)
        assert [v.field for v in refused.value.violations] == [field]
        assert len(str(refused.value)) < 1000

    def test_all_wrong_fields_are_named_at_once(self):
        with pytest.raises(Invalid) as refused:
            check_spec(replace(GOOD, gpus=-5, priority=-1, command=()), 100, NOW)
        assert {v.field for v in refused.value.violations} == {
            "job.spec.gpus",
            "job.spec.priority",
            "job.spec.command",
        }

    def test_the_whole_has_a_limit_too(self):
        with pytest.raises(Invalid):
            check_spec(GOOD, MAX_SPEC_BYTES + 1, NOW)

    @given(
        st.builds(
            Spec,
            command=st.lists(st.text(max_size=5), max_size=3).map(tuple) | st.just(("python",)),
            gpus=st.integers(-(2**31), 2**31 - 1) | st.integers(1, 64),
            min_nodes=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9),
            max_nodes=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9),
            min_compute_capability=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 100),
            placement=st.lists(
                st.builds(Rule, st.text(max_size=3), st.integers(-1, 9), st.integers(-5, 20)), max_size=2
            ).map(tuple),
            budget_usd=st.floats() | st.just(0.0),
            backoff_s=st.none() | st.floats(),
            any_of=st.lists(st.sampled_from([f"M{i}" for i in range(40)]), max_size=40).map(tuple),
            environment=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=4)), max_size=2).map(tuple),
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_what_passes_can_be_asked_of_the_engine(self, spec):
        try:
            check_spec(spec, 100, NOW)
        except Invalid:
            return
        request = place_request("queues/q/jobs/j", spec)
        check_request(request)
        assert request.units == spec.gpus >= 1


class TestAttempt:
    def test_ranks_are_numbered_along_the_nodes(self):
        attempt = placed().attempt
        assert [(t.id, t.first_rank, t.group_rank) for t in attempt.tasks] == [("q.j.1.0", 0, 0), ("q.j.1.1", 4, 1)]

    def test_a_gang_waits_for_the_last_to_accept(self):
        first, second = placed().attempt.tasks
        half = step(placed(), said=[Report(first.id, TaskPhase.ACCEPTED, rendezvous="h:1")])
        assert not half.attempt.started
        whole = step(half, said=[Report(second.id, TaskPhase.ACCEPTED)])
        assert (whole.attempt.started, whole.attempt.rendezvous, whole.state) == (True, "h:1", JobState.STARTING)

    def test_only_rank_0_chooses_the_rendezvous(self):
        second = placed().attempt.tasks[1]
        assert (
            step(placed(), said=[Report(second.id, TaskPhase.ACCEPTED, rendezvous="evil:1")]).attempt.rendezvous == ""
        )

    def test_who_does_not_accept_in_time_is_named(self):
        first = placed().attempt.tasks[0]
        half = step(placed(), said=[Report(first.id, TaskPhase.ACCEPTED, rendezvous="h:1")])
        assert step(half, now=after(19)) is half
        late = step(half, now=after(20))
        assert (late.state, late.epoch) == (JobState.RECOVERING, 2)
        assert late.attempt.end_reason == "late: sites/s/nodes/n1 did not accept within 20 s"

    def test_a_start_that_fetches_data_has_more_time(self):
        started = step(placed(), said=reports(placed(), TaskPhase.ACCEPTED, rendezvous="h:1"))
        fetching = step(started, said=reports(started, TaskPhase.FETCHING))
        assert fetching.state is JobState.STARTING
        assert step(fetching, now=after(600)).state is JobState.STARTING
        assert step(fetching, now=after(3601)).state is JobState.RECOVERING
        assert step(started, now=after(121)).state is JobState.RECOVERING

    def test_reports_do_not_go_back(self):
        live = running()
        assert step(live, said=reports(live, TaskPhase.ACCEPTED)) is live

    def test_out_of_memory_is_said(self):
        live = running()
        task = live.attempt.tasks[0]
        broken = step(live, said=[Report(task.id, TaskPhase.EXITED, -9, out_of_memory=True, message="rank 0 died")])
        assert broken.attempt.tasks[0].message == "out of memory; rank 0 died"
        assert "signal 9" in broken.state_message

    def test_the_epoch_moves_when_the_attempt_ends_and_the_next_uses_it(self):
        live = running()
        broken = step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, 1)])
        assert (broken.epoch, broken.attempt.epoch) == (2, 1)
        again = placed(broken)
        assert (again.epoch, again.attempt.epoch, again.past_attempts[0].epoch) == (2, 2, 1)

    def test_gpus_of_survivors_stay_taken_until_they_are_killed(self):
        live = running()
        broken = step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, 1)])
        assert [task.node for _, task in broken.holding()] == ["sites/s/nodes/n1"]
        moved = placed(broken, nodes=1)
        assert len(list(moved.holding())) == 2
        gone = step(moved, said=[Report("q.j.1.1", TaskPhase.KILLED, -15)])
        assert [task.id for _, task in gone.holding()] == ["q.j.2.0"]

    def test_cost_grows_while_it_holds_gpus_and_stops_with_the_attempt(self):
        live = running()
        assert live.cost_at(after(1800)) == pytest.approx(8.0)
        ended = lifecycle.cancel(live, lifecycle.Cause("request", "", "enough"), after(3600))
        assert ended.cost_at(after(99999)) == ended.cost_usd == pytest.approx(16.0)
        assert ended.state_message == "enough"

    def test_a_budget_ends_it(self):
        live = replace(running(), spec=replace(GOOD, budget_usd=4.0))
        assert step(live, now=after(899)) is live
        assert lifecycle.due(live, Seen(), NOW, LIMITS) <= after(901)
        spent = step(live, now=after(901))
        assert (spent.state, "budget" in spent.state_message) == (JobState.FAILED, True)


class TestNodes:
    def test_unreachable_ends_the_attempt_and_keeps_the_gpus(self):
        live = running()
        down = {"sites/s/nodes/n1": Standing(unreachable="no heartbeat")}
        broken = step(live, nodes=down)
        assert broken.state is JobState.RECOVERING
        assert [t.lost for t in broken.attempt.tasks] == [False, True]
        assert broken.state_message == "sites/s/nodes/n1 is lost: no heartbeat"
        back = step(broken, nodes={"sites/s/nodes/n1": Standing()})
        assert [t.lost for t in back.attempt.tasks] == [False, False]

    def test_retired_gives_them_back(self):
        live = running()
        broken = step(live, nodes={"sites/s/nodes/n1": Standing(retired=True)})
        assert broken.state is JobState.RECOVERING
        assert [task.node for _, task in broken.holding()] == ["sites/s/nodes/n0"]

    def test_a_silent_site_is_waited_for(self):
        live = running()
        silent = {"sites/s/nodes/n1": Standing(partitioned_since=NOW)}
        assert step(live, now=after(599), nodes=silent) is live
        assert lifecycle.due(live, Seen(nodes=silent), NOW, LIMITS) == after(600)
        assert step(live, now=after(600), nodes=silent).state is JobState.RECOVERING
        patient = replace(live, spec=replace(GOOD, never_reroute=True))
        assert step(patient, now=after(10**7), nodes=silent) is patient
        hasty = replace(live, spec=replace(GOOD, partition_wait_s=5.0))
        assert step(hasty, now=after(5), nodes=silent).state is JobState.RECOVERING


class TestVerdict:
    def broken(self, **spec):
        live = replace(running(), spec=replace(GOOD, **spec))
        return step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, 1)])

    def test_a_lost_node_costs_no_restart(self):
        judged = step(self.broken(), verdict=Verdict(2, incident="incidents/i"))
        assert (judged.state, judged.recoveries, judged.restarts) == (JobState.RECOVERING, 1, 0)
        assert judged.attempt.incident == "incidents/i"

    def test_a_fault_of_the_work_pauses_and_doubles(self):
        judged = step(self.broken(), verdict=Verdict(2, application_fault=True))
        assert (judged.state, judged.restarts, judged.not_before) == (JobState.QUEUED, 1, after(5))
        twice = replace(self.broken(), restarts=1)
        assert step(twice, verdict=Verdict(2, application_fault=True)).not_before == after(10)

    def test_a_verdict_on_another_epoch_is_ignored(self):
        broken = self.broken()
        assert step(broken, verdict=Verdict(1, application_fault=True)) is broken

    def test_restarts_are_limited(self):
        broken = replace(self.broken(), restarts=3)
        assert step(broken, verdict=Verdict(2, application_fault=True)).state is JobState.FAILED
        assert step(broken, verdict=Verdict(2)).state is JobState.RECOVERING

    def test_a_service_starts_again_at_once_and_then_slower(self):
        broken = self.broken(kind=JobKind.SERVICE)
        first = step(broken, verdict=Verdict(2, application_fault=True))
        assert (first.state, first.restarts) == (JobState.RECOVERING, 1)
        pauses = [
            step(replace(broken, restarts=n), verdict=Verdict(2, application_fault=True)).not_before - NOW
            for n in (1, 2, 3, 20)
        ]
        assert [pause.total_seconds() for pause in pauses] == [1, 2, 4, 60]

    def test_refusals_in_a_row_fail_a_job_but_not_a_service(self):
        current = job()
        for _ in range(LIMITS.refusals):
            attempt = placed(replace(current, state=JobState.QUEUED))
            refused = step(attempt, said=reports(attempt, TaskPhase.REFUSED, message="no such image"))
            current = step(refused, verdict=Verdict(refused.epoch))
        assert current.state is JobState.FAILED
        assert "no such image" in current.state_message


class TestTurns:
    def job(self, name, queue="q", priority=0, at=0):
        spec = replace(GOOD, priority=priority)
        return job(name=f"queues/{queue}/jobs/{name}", spec=spec, create_time=after(at))

    def order(self, *jobs, queues=None, held=None, shapes=lambda _: 1):
        """In which order they go when each holds 8 GPUs once it went."""
        lines, held = Lines(), dict(held or {})
        for each in jobs:
            lines.join(Line(each.spec.priority, each.queue, shapes(each)), each)
        order = []
        while (line := lines.next_turn(lines.all(), queues or {}, held)) is not None:
            name = lines.first(line)[1]
            lines.leave(name)
            order.append(name.split("/")[3])
            held[line.queue] = held.get(line.queue, 0) + 8
        assert len(lines) == 0
        return order

    @pytest.mark.parametrize("shapes", [lambda _: 1, lambda j: hash(j.name)])
    def test_priority_then_submission(self, shapes):
        jobs = [self.job("b", at=2), self.job("a", at=1), self.job("c", priority=5, at=3)]
        assert self.order(*jobs, shapes=shapes) == ["c", "a", "b"]

    def test_the_queue_that_holds_less_for_its_weight_goes_first(self):
        jobs = [self.job("a", "busy", at=0), self.job("b", "idle", at=1)]
        assert self.order(*jobs, held={"busy": 8}) == ["b", "a"]
        heavy = {"busy": Queue("queues/busy", 10.0), "idle": Queue("queues/idle", 1.0)}
        assert self.order(*jobs, queues=heavy, held={"busy": 8, "idle": 4}) == ["a", "b"]

    def test_what_is_held_counts_as_it_changes(self):
        jobs = [self.job(f"{q}{n}", q, at=n) for n in range(3) for q in "xy"]
        assert self.order(*jobs) == ["x0", "y0", "x1", "y1", "x2", "y2"]

    def test_a_job_that_left_and_came_back_has_one_place(self):
        lines, one, line = Lines(), self.job("a"), Line(0, "q", 1)
        lines.join(line, one)
        lines.leave(one.name)
        lines.join(line, one)
        assert lines.first(line)[1] == one.name
        lines.leave(one.name)
        assert lines.first(line) is None
        assert lines.all() == set()

    def test_a_queue_limit_counts_what_others_hold(self):
        queues = {"q": Queue("queues/q", 1.0, 10)}
        assert over_limit(job(), queues, {"q": 4}) != ""
        assert over_limit(job(), queues, {"q": 4}, own=2) == ""
        assert over_limit(job(), {}, {"q": 10**6}) == ""


class TestConvert:
    def test_a_job_survives_the_store(self):
        live = replace(running(), cause=lifecycle.Cause("x", "y", "z"), step=7, loss=0.5)
        message = pb.Job()
        convert.JOBS.merge(live, message)
        message.spec.CopyFrom(pb.JobSpec(command=GOOD.command, gpus=8, kind=pb.JOB_KIND_TRAINING))
        back = convert.job_of(message)
        assert replace(back, spec=live.spec, decision=live.decision) == live

    def test_the_largest_gang_fits_into_one_record_also_when_all_of_it_fails(self):
        nodes = tuple((f"sites/onprem-europe/nodes/h200-{i:05d}", tuple(range(8))) for i in range(12_500))
        large = job(name="queues/research/jobs/01m8218f0ffxykfangdd4d4yf6", spec=replace(GOOD, gpus=100_000))
        decision = decisions_with_tasks()
        attempt = lifecycle.place(large, lifecycle.Place(nodes), decision, NOW)
        failed = step(attempt, said=reports(attempt, TaskPhase.EXITED, exit_code=1, message="x" * 2000))
        assert failed.state is JobState.RECOVERING
        for each in (attempt, failed):
            assert len(convert.JOBS.encode(each)) < MAX_COMMIT_BYTES

    def test_fields_of_a_newer_version_survive_a_write(self):
        live = running()
        message = pb.Job()
        convert.JOBS.merge(live, message)
        unknown = bytes([0xFA, 0x3F, 2]) + b"hi"  # field 1023, length-delimited
        message.attempt.tasks[0].MergeFromString(unknown)
        ended = step(live, said=reports(live, TaskPhase.EXITED))
        convert.JOBS.merge(ended, message)
        assert message.attempt.tasks[0].phase == pb.TASK_PHASE_EXITED
        assert unknown in message.SerializeToString()
        broken = step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, 1)])
        convert.JOBS.merge(placed(broken), message)
        assert unknown in message.past_attempts[0].SerializeToString()
