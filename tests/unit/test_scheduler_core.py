"""The scheduler's core alone: the state machine, what a spec may say, how an attempt ends, whose turn it is."""

import random
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.manifests.job_fields import JobKind, Rule, Spec
from whaleflux.store.api import MAX_COMMIT_BYTES
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import cost, lifecycle, state_machine, task_observations
from whaleflux_scheduler.core.decision_history import DecisionKind
from whaleflux_scheduler.core.model import ENDED, Job, JobState, SchedulingDecision, TaskPhase
from whaleflux_scheduler.core.observed import Diagnosis, NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.core.placement.validate import check_request
from whaleflux_scheduler.core.request import place_request
from whaleflux_scheduler.core.validate import MAX_SPEC_BYTES, check_spec

NOW = datetime(2026, 5, 1, tzinfo=UTC)
GOOD = Spec(command=("python", "train.py"), gpus=8)
LIMITS = Timeouts()


def after(seconds):
    return NOW + timedelta(seconds=seconds)


def job(**changes):
    return Job(**{"name": "queues/q/jobs/j", "spec": GOOD, "state": JobState.QUEUED, "create_time": NOW, **changes})


def placed(of=None, nodes=2):
    where = lifecycle.GpuAssignment(
        tuple((f"sites/s/nodes/n{i}", tuple(f"GPU-{i}-{g}" for g in range(4))) for i in range(nodes)), usd_per_hour=16.0
    )
    return lifecycle.place(of or job(), where, SchedulingDecision(NOW, placed=True, summary="here"), NOW)


def reports(of, phase, **more):
    return tuple(Report(task.id, phase, **more) for task in of.attempt.tasks)


def step(of, *, now=NOW, nodes=None, diagnosis=None, said=()):
    return lifecycle.advance(of, Observations(tuple(said), nodes or {}, diagnosis), now, LIMITS)


def running(nodes=2):
    started = step(placed(nodes=nodes), said=reports(placed(nodes=nodes), TaskPhase.ACCEPTED, rendezvous="h:1"))
    return step(started, said=reports(started, TaskPhase.RUNNING))


def decisions_with_tasks():
    return SchedulingDecision(NOW, placed=True, summary="here", tasks=placed().attempt.tasks * 1000)


class TestMachine:
    def test_no_state_is_a_dead_end_and_all_are_in_the_table(self):
        assert state_machine.dead_ends() == frozenset()
        assert set(state_machine.NEXT) == set(JobState) - {JobState.UNSPECIFIED}
        assert {state for state, following in state_machine.NEXT.items() if not following} == ENDED

    def test_numbers_are_those_of_the_contract(self):
        for ours, theirs, prefix in (
            (JobState, pb.JobState, "JOB_STATE_"),
            (TaskPhase, pb.TaskPhase, "TASK_PHASE_"),
            (JobKind, pb.JobKind, "JOB_KIND_"),
            (DecisionKind, pb.DecisionKind, "DECISION_KIND_"),
        ):
            assert {prefix + member.name: member.value for member in ours} == dict(theirs.items())

    def test_an_impossible_move_is_a_bug(self):
        with pytest.raises(state_machine.ImpossibleTransition):
            state_machine.transition(job(), JobState.RUNNING)


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
        with pytest.raises(InvalidArgument) as refused:
            check_spec(replace(GOOD, **changes), 100, NOW)
        assert [v.field for v in refused.value.violations] == [field]
        assert len(str(refused.value)) < 1000

    def test_all_wrong_fields_are_named_at_once(self):
        with pytest.raises(InvalidArgument) as refused:
            check_spec(replace(GOOD, gpus=-5, priority=-1, command=()), 100, NOW)
        assert {v.field for v in refused.value.violations} == {
            "job.spec.gpus",
            "job.spec.priority",
            "job.spec.command",
        }

    def test_the_whole_has_a_limit_too(self):
        with pytest.raises(InvalidArgument):
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
        except InvalidArgument:
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

    def test_a_setup_is_seen_has_time_and_comes_before_the_ranks(self):
        started = step(placed(), said=reports(placed(), TaskPhase.ACCEPTED, rendezvous="h:1"))
        busy = step(started, said=reports(started, TaskPhase.SETTING_UP))
        assert busy.state_message == "setup on sites/s/nodes/n0 and 1 more"
        assert step(busy, said=reports(busy, TaskPhase.FETCHING)) is busy
        assert step(busy, now=after(600)).state is JobState.STARTING
        ready = step(busy, said=reports(busy, TaskPhase.RUNNING))
        assert (ready.state, ready.state_message) == (JobState.RUNNING, "runs on 2 nodes")
        failed = step(
            busy, said=reports(busy, TaskPhase.EXITED, exit_code=3, message="setup on n0 ended with exit code 3")
        )
        assert failed.attempt.end_reason == "exit: setup on n0 ended with exit code 3"

    def test_what_no_node_can_do_ends_the_job_when_the_first_says_so_again(self):
        of = job()
        for node in ("n0", "n1", "n0"):
            assert of.state is not JobState.FAILED
            where = lifecycle.GpuAssignment(((f"sites/s/nodes/{node}", ("GPU",)),))
            live = lifecycle.place(of, where, SchedulingDecision(NOW, placed=True, summary=""), NOW)
            told = step(live, said=reports(live, TaskPhase.REFUSED, unfit=True, message="directory '/x' is not here"))
            assert told.attempt.end_reason.startswith("unfit: ")
            of = step(told, diagnosis=Diagnosis(told.epoch))
        assert of.state is JobState.FAILED
        assert "directory '/x' is not here" in of.state_message
        assert "no later try mends that on sites/s/nodes/n0, sites/s/nodes/n1" in of.state_message

    def test_what_node_after_node_can_never_do_ends_the_job_after_a_few_of_many(self):
        """Each says so once: a dataset that is not what it was, on a fleet of which any node is free."""
        of, tried = job(), 0
        said = "datasets/d: it is not what it was when it was first read; declare it under another name"
        while of.state is not JobState.FAILED:
            where = lifecycle.GpuAssignment(((f"sites/s/nodes/n{tried}", ("GPU",)),))
            live = lifecycle.place(of, where, SchedulingDecision(NOW, placed=True, summary=""), NOW)
            told = step(live, said=reports(live, TaskPhase.REFUSED, unfit=True, message=said))
            of, tried = step(told, diagnosis=Diagnosis(told.epoch)), tried + 1
            assert tried <= LIMITS.max_refusals
        assert tried == LIMITS.max_refusals
        assert of.state_message.startswith(f"refused {tried} times in a row: ")
        assert said in of.state_message
        nodes = ", ".join(f"sites/s/nodes/n{tried - 1 - at}" for at in range(4))
        ends = f"; no later try mends that on {nodes} and {tried - 4} more, and further nodes are not tried: mend it, and submit the job again"
        assert of.state_message.endswith(ends)

    def test_reports_do_not_go_back(self):
        live = running()
        assert step(live, said=reports(live, TaskPhase.ACCEPTED)) is live

    def test_out_of_memory_is_said(self):
        live = running()
        task = live.attempt.tasks[0]
        broken = step(live, said=[Report(task.id, TaskPhase.EXITED, -9, out_of_memory=True, message="rank 0 died")])
        assert broken.attempt.tasks[0].message == "out of memory; rank 0 died"
        assert "ended with SIGKILL" in broken.state_message

    @pytest.mark.parametrize(
        ("code", "message", "reason"),
        [
            (137, "rank 0 ended with exit code 137 (128 + 9: what it ran was ended by SIGKILL)", "exit code 137 (128 + 9: what it ran was ended by SIGKILL)"),
            (1, "rank 0 ended with exit code 1\nValueError: x", "exit code 1: ValueError: x"),
            (-9, "rank 0 was ended by SIGKILL", "SIGKILL"),
            (-9, "rank 0 was ended by its agent: it used 2 GB", "SIGKILL: rank 0 was ended by its agent: it used 2 GB"),
        ],
    )  # fmt: skip
    def test_why_a_rank_ended_is_said_once_with_the_words_of_its_program(self, code, message, reason):
        live = running()
        broken = step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, code, message=message)])
        assert broken.state_message == f"ranks 0-3 on sites/s/nodes/n0 ended with {reason}"

    def test_the_epoch_moves_when_the_attempt_ends_and_the_next_uses_it(self):
        live = running()
        broken = step(live, said=[Report(live.attempt.tasks[0].id, TaskPhase.EXITED, 1)])
        assert (broken.epoch, broken.attempt.epoch) == (2, 1)
        again = placed(broken)
        assert (again.epoch, again.attempt.epoch, again.past_attempts[0].epoch) == (2, 2, 1)

    def test_attempts_are_numbered_from_1_whatever_the_epoch_and_however_many_are_forgotten(self):
        current = replace(job(), epoch=7)
        for number in range(1, lifecycle.PAST_ATTEMPTS + 4):
            current = placed(replace(current, state=JobState.QUEUED))
            assert (current.attempt.number, current.attempt.epoch) == (number, 7 + number)
            current = replace(
                current,
                attempt=replace(current.attempt, tasks=(replace(current.attempt.tasks[0], phase=TaskPhase.GONE),)),
            )
        assert len(current.past_attempts) == lifecycle.PAST_ATTEMPTS

    def test_attempts_that_an_older_version_stored_are_counted(self):
        stored = replace(placed(), state=JobState.QUEUED)
        nameless = replace(stored, attempt=replace(stored.attempt, number=0))
        assert placed(nameless).attempt.number == 2

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
        assert cost.job_cost_usd(live, after(1800)) == pytest.approx(8.0)
        ended = lifecycle.cancel(live, lifecycle.Cause("request", "", "enough"), after(3600))
        assert cost.job_cost_usd(ended, after(99999)) == ended.cost_usd == pytest.approx(16.0)
        assert ended.state_message == "enough"

    def test_a_budget_ends_it(self):
        live = replace(running(), spec=replace(GOOD, budget_usd=4.0))
        assert step(live, now=after(899)) is live
        assert lifecycle.due(live, Observations(), NOW, LIMITS) <= after(901)
        spent = step(live, now=after(901))
        assert (spent.state, "budget" in spent.state_message) == (JobState.FAILED, True)


class TestNodes:
    def test_unreachable_ends_the_attempt_and_keeps_the_gpus(self):
        live = running()
        down = {"sites/s/nodes/n1": NodeCondition(unreachable="no heartbeat")}
        broken = step(live, nodes=down)
        assert broken.state is JobState.RECOVERING
        assert [t.lost for t in broken.attempt.tasks] == [False, True]
        assert broken.state_message == "sites/s/nodes/n1 is lost: no heartbeat"
        back = step(broken, nodes={"sites/s/nodes/n1": NodeCondition()})
        assert [t.lost for t in back.attempt.tasks] == [False, False]

    def test_retired_gives_them_back(self):
        live = running()
        broken = step(live, nodes={"sites/s/nodes/n1": NodeCondition(retired=True)})
        assert broken.state is JobState.RECOVERING
        assert [task.node for _, task in broken.holding()] == ["sites/s/nodes/n0"]

    def test_a_silent_site_is_waited_for(self):
        live = running()
        silent = {"sites/s/nodes/n1": NodeCondition(partitioned_since=NOW)}
        assert step(live, now=after(599), nodes=silent) is live
        assert lifecycle.due(live, Observations(nodes=silent), NOW, LIMITS) == after(600)
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
        judged = step(self.broken(), diagnosis=Diagnosis(2, incident="incidents/i"))
        assert (judged.state, judged.recoveries, judged.restarts) == (JobState.RECOVERING, 1, 0)
        assert judged.attempt.incident == "incidents/i"

    def test_a_fault_of_the_work_pauses_and_doubles(self):
        judged = step(self.broken(), diagnosis=Diagnosis(2, application_fault=True))
        assert (judged.state, judged.restarts, judged.not_before) == (JobState.QUEUED, 1, after(5))
        twice = replace(self.broken(), restarts=1)
        assert step(twice, diagnosis=Diagnosis(2, application_fault=True)).not_before == after(10)

    def test_a_verdict_on_another_epoch_is_ignored(self):
        broken = self.broken()
        assert step(broken, diagnosis=Diagnosis(1, application_fault=True)) is broken

    def test_restarts_are_limited(self):
        broken = replace(self.broken(), restarts=3)
        assert step(broken, diagnosis=Diagnosis(2, application_fault=True)).state is JobState.FAILED
        assert step(broken, diagnosis=Diagnosis(2)).state is JobState.RECOVERING

    def test_a_service_starts_again_at_once_and_then_slower(self):
        broken = self.broken(kind=JobKind.SERVICE)
        first = step(broken, diagnosis=Diagnosis(2, application_fault=True))
        assert (first.state, first.restarts) == (JobState.RECOVERING, 1)
        pauses = [
            step(replace(broken, restarts=n), diagnosis=Diagnosis(2, application_fault=True)).not_before - NOW
            for n in (1, 2, 3, 20)
        ]
        assert [pause.total_seconds() for pause in pauses] == [1, 2, 4, 60]

    def test_refusals_in_a_row_fail_a_job_but_not_a_service(self):
        current = job()
        for _ in range(LIMITS.max_refusals):
            attempt = placed(replace(current, state=JobState.QUEUED))
            refused = step(attempt, said=reports(attempt, TaskPhase.REFUSED, message="no such image"))
            current = step(refused, diagnosis=Diagnosis(refused.epoch))
        assert current.state is JobState.FAILED
        assert "no such image" in current.state_message


class TestConvert:
    def test_a_job_survives_the_store(self):
        live = replace(running(), cause=lifecycle.Cause("x", "y", "z"), step=7, loss=0.5)
        message = pb.Job()
        convert.JOBS.merge(live, message)
        message.spec.CopyFrom(pb.JobSpec(command=GOOD.command, gpus=8, kind=pb.JOB_KIND_TRAINING))
        back = convert.job_of(message)
        assert replace(back, spec=live.spec, decision=live.decision) == live

    @pytest.mark.parametrize(("count", "each"), [(7_000, 8), (16_000, 1)])
    def test_a_large_gang_fits_into_one_record_also_when_all_of_it_fails_and_starts_again(self, count, each):
        numbers = random.Random(1)
        nodes = tuple(
            (
                f"sites/onprem-europe/nodes/h200-{i:05d}",
                tuple(f"GPU-{uuid.UUID(int=numbers.getrandbits(128))}" for _ in range(each)),
            )
            for i in range(count)
        )
        large = job(name="queues/research/jobs/01m8218f0ffxykfangdd4d4yf6", spec=replace(GOOD, gpus=count * each))
        decision = decisions_with_tasks()
        attempt = lifecycle.place(large, lifecycle.GpuAssignment(nodes), decision, NOW)
        failed = step(attempt, said=reports(attempt, TaskPhase.EXITED, exit_code=1, message="x" * 2000))
        assert failed.state is JobState.RECOVERING
        again = lifecycle.place(failed, lifecycle.GpuAssignment(nodes), decision, NOW)
        for known in (attempt, failed, again):
            stored = convert.JOBS.encode(known)
            assert len(stored) < MAX_COMMIT_BYTES
            assert len(convert.JOBS.read(stored).attempt.tasks) == count

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


@given(at=st.datetimes(datetime(1960, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)))
def test_times_are_stored_as_protobuf_does(at):
    theirs = Timestamp()
    theirs.FromDatetime(at)
    assert convert.timestamp(at) == theirs
    assert convert.instant(pb.Job(create_time=theirs), "create_time") == at


class TestStuck:
    """What cannot be ended on a node keeps its GPUs, whatever its phase, until the agent says that nothing is left."""

    STUCK = "pid 7 (train): thread 8 D in nvidia_ioctl"

    def held(self, of):
        return {task.id for _, task in of.holding()}

    def test_a_failed_task_that_turns_out_to_be_stuck_takes_its_gpus_again(self):
        failed = step(running(), said=reports(running(), TaskPhase.EXITED, exit_code=1)[:1])
        assert failed.attempt.tasks[0].id not in self.held(failed)
        stuck = step(failed, said=reports(running(), TaskPhase.EXITED, exit_code=1, stuck=self.STUCK)[:1])
        assert stuck.attempt.tasks[0].id in self.held(stuck)
        assert convert.task_message(stuck.attempt.tasks[0]).stuck == self.STUCK
        assert stuck.attempt.tasks[0].exit_code == 1
        gone = step(stuck, said=reports(running(), TaskPhase.GONE)[:1])
        assert gone.attempt.tasks[0].id not in self.held(gone)

    def test_the_gpus_of_a_failed_task_are_taken_until_its_agent_has_ended_what_it_left(self):
        failed = step(running(), said=reports(running(), TaskPhase.EXITED, exit_code=1, ending=True)[:1])
        task = failed.attempt.tasks[0]
        assert task.id in self.held(failed)
        assert convert.task_of(convert.task_message(task)).ending
        reaped = step(failed, said=reports(running(), TaskPhase.EXITED, exit_code=1)[:1])
        assert task.id not in self.held(reaped)
        without = step(failed, said=reports(running(), TaskPhase.GONE)[:1])
        assert task.id not in self.held(without)
        retired = step(failed, nodes={task.node: NodeCondition(retired=True)})
        assert task.id not in self.held(retired)

    @pytest.mark.parametrize("left", [{"stuck": STUCK}, {"ending": True}])
    def test_a_gang_of_which_one_part_ended_well_and_left_something_for_a_while_ends_well(self, left):
        first = step(running(), said=reports(running(), TaskPhase.EXITED, **left)[:1])
        reaped = step(first, said=reports(running(), TaskPhase.GONE)[:1])
        done = step(reaped, said=reports(running(), TaskPhase.EXITED)[1:])
        assert done.state is JobState.SUCCEEDED
        assert not self.held(done)

    @pytest.mark.parametrize("left", [{"stuck": STUCK}, {"ending": True}])
    def test_what_ended_and_left_something_on_a_node_that_is_lost_is_lost_with_it(self, left):
        """Its GPUs stay taken; that it ended well counts, and is no failure of the attempt."""
        first, second = running().attempt.tasks
        ended = step(running(), said=reports(running(), TaskPhase.EXITED, **left)[:1])
        lost = step(ended, nodes={first.node: NodeCondition(unreachable="silent")})
        assert [task.lost for task in lost.attempt.tasks] == [True, False]
        assert (lost.state, self.held(lost)) == (JobState.RUNNING, {first.id, second.id})
        back = step(lost, nodes={first.node: NodeCondition()})
        assert not back.attempt.tasks[0].lost
        reaped = step(lost, said=reports(running(), TaskPhase.EXITED)[:1])
        assert (reaped.attempt.tasks[0].lost, self.held(reaped)) == (False, {second.id})

    def test_the_end_of_a_stuck_task_frees_its_gpus(self):
        stuck = step(running(), said=reports(running(), TaskPhase.RUNNING, stuck=self.STUCK))
        assert [task.stuck for task in stuck.attempt.tasks] == [self.STUCK] * 2
        killed = task_observations.observe(stuck, Observations(reports(running(), TaskPhase.KILLED), {}, None))
        assert self.held(killed) == set()
        assert [task.stuck for task in killed.attempt.tasks] == ["", ""]

    def test_a_node_that_is_lost_keeps_what_is_stuck_and_one_that_is_retired_does_not(self):
        failed = step(running(), said=reports(running(), TaskPhase.EXITED, exit_code=1, stuck=self.STUCK))
        node = failed.attempt.tasks[0].node
        lost = step(failed, nodes={node: NodeCondition(unreachable="silent")})
        assert lost.attempt.tasks[0].id in self.held(lost)
        assert lost.attempt.tasks[0].lost
        retired = step(failed, nodes={node: NodeCondition(retired=True)})
        assert retired.attempt.tasks[0].id not in self.held(retired)
