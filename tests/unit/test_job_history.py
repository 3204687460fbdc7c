"""What jobs and attempts were and cost: sums that agree with the job's own, and what is left when its record is gone."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from tests.support.virtual_time import LoopClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.events.accounting import account_pattern, account_subject, user_token
from whaleflux.events.memory import MemoryBus
from whaleflux.events.subjects import matches
from whaleflux.manifests.job_fields import Spec
from whaleflux.rpc import auth
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import accounts
from whaleflux_scheduler.core import accounting, cost, lifecycle
from whaleflux_scheduler.core.model import Job, JobState, SchedulingDecision, TaskPhase

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 16), st.floats(0, 100)), min_size=1, max_size=25))
def test_attempts_cost_together_what_the_job_cost_however_many_there_were(attempts):
    job, now, kept = Job("queues/q/jobs/j", Spec(command=("x",), gpus=1), JobState.QUEUED, NOW, uid="u"), NOW, {}
    for held_s, gpus, usd_per_gpu_hour in attempts:
        where = lifecycle.GpuAssignment(
            (("sites/s/nodes/n", tuple(f"GPU-{g}" for g in range(gpus))),),
            usd_per_hour=gpus * usd_per_gpu_hour,
            gpus_by_model=(("H200", gpus),),
        )
        placed = lifecycle.place(job, where, SchedulingDecision(now, placed=True, summary=""), now)
        now += timedelta(seconds=held_s)
        on = sum(account.cost_usd for account in accounting.unfinished(placed, now) if account.attempt)
        assert cost.job_cost_usd(placed, now) == pytest.approx(on + sum(a.cost_usd for a in kept.values()))
        job = replace(cost.end_attempt(placed, now, "exit: boom"), state=JobState.QUEUED)
        kept |= {account.attempt: account for account in accounting.over(job)}
    *_, whole = accounting.over(replace(job, state=JobState.FAILED, end_time=now))
    assert len(kept) == len(attempts) == whole.attempts
    assert whole.cost_usd == job.cost_usd == cost.job_cost_usd(job, now)
    assert round(sum(account.cost_usd for account in kept.values()), 2) == pytest.approx(
        round(whole.cost_usd, 2), abs=0.0051
    )
    assert sum(account.gpu_s for account in kept.values()) == pytest.approx(whole.gpu_s)
    assert whole.gpu_s == pytest.approx(sum(held_s * gpus for held_s, gpus, _ in attempts), abs=0.001)


def test_a_large_attempt_without_gpus_stays_as_it_was_accounted_for_when_its_record_is_shortened():
    job = Job("queues/q/jobs/j", Spec(command=("x",), gpus=0, ranks=100), JobState.QUEUED, NOW, uid="u")
    where = lifecycle.GpuAssignment(tuple((f"sites/s/nodes/n{n}", ()) for n in range(100)), cpu_ranks=(1,) * 100)
    placed = lifecycle.place(job, where, SchedulingDecision(NOW, placed=True, summary=""), NOW)
    over = replace(cost.end_attempt(placed, NOW, "exit: boom"), state=JobState.RECOVERING)
    assert over.attempt is not None
    gone = tuple(replace(task, phase=TaskPhase.EXITED, exit_code=3) for task in over.attempt.tasks)
    over = replace(over, attempt=replace(over.attempt, tasks=gone))
    (told,) = accounting.over(over)
    assert (told.node_count, told.exit_code) == (100, 3)
    again = lifecycle.place(over, where, SchedulingDecision(NOW, placed=True, summary=""), NOW)
    assert [account for account in accounting.over(again) if account.node_count != 100] == []


def test_a_change_of_a_job_that_goes_on_is_not_read_as_a_whole(monkeypatch):
    """Records of large gangs change with each step that is written."""
    old = pb.Job(name="queues/q/jobs/j", uid="u", state=pb.JOB_STATE_RUNNING)
    old.past_attempts.add(epoch=1, number=1).end_time.FromDatetime(NOW)
    old.attempt.epoch, old.attempt.number, old.attempt.started = 2, 2, True
    new = pb.Job()
    new.CopyFrom(old)
    new.step = 7
    ended = pb.Job()
    ended.CopyFrom(new)
    ended.attempt.end_time.FromDatetime(NOW)
    corrected = pb.Job()
    corrected.CopyFrom(new)
    corrected.past_attempts[0].end_reason = "exit: after all"
    assert all(list(accounts.of_change(new, other)) for other in (ended, corrected))
    monkeypatch.setattr(accounts.convert, "job_of", lambda _: pytest.fail("read"))
    assert not list(accounts.of_change(old, new))


def test_subjects_find_a_queue_a_user_and_a_job():
    subject = account_subject("research", "user/Ann.Lee@x", "j1", "01abc-2")
    assert subject == "wf.account.research.user-ann-lee-x.j1.01abc-2"
    for pattern in (
        account_pattern(),
        account_pattern("research"),
        account_pattern(user="user/Ann.Lee@x"),
        account_pattern("research", "", "j1"),
    ):
        assert matches(pattern, subject)
    assert not matches(account_pattern("other"), subject)
    assert user_token("///") == "unknown"


async def listed(world, **asked):
    found, token = [], ""
    while True:
        request = pb.ListJobHistoryRequest(page_token=token, **asked)
        answer = await world.scheduler.ListJobHistory(request, None)
        found += answer.records
        token = answer.next_page_token
        if not token:
            return found


@pytest.fixture
async def world():
    async with World(bus=MemoryBus(LoopClock()), keep_ended=2) as made:
        yield made


async def ended(world, **spec):
    """A job that ran for an hour on 4 GPUs and ended well; its record."""
    name = await world.submit(4, **spec)
    await world.reaches(name, "RUNNING")
    await asyncio.sleep(3600)
    for agent in world.agents.values():
        agent.exit()
    return await world.reaches(name, "SUCCEEDED")


async def test_what_a_job_cost_is_known_when_its_record_is_deleted_and_its_name_is_another_jobs(world):
    await world.add(node("s/a", usd=2.0))
    first = await ended(world, job_id="j")
    await until(lambda: not world.agents["sites/s/nodes/a"].reports, "nothing is left")
    await world.caught_up()
    with auth.acting_as(auth.Identity("operator", "bob")):
        await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=first.name), None)
    second = await ended(world, job_id="j")
    await asyncio.sleep(300)
    jobs = await listed(world, job=first.name)
    assert [record.uid for record in jobs] == [second.uid, first.uid]
    old = jobs[1]
    assert old.cost_usd == first.cost_usd == pytest.approx(8.0, abs=0.02)
    assert old.gpu_s == pytest.approx(4 * 3600, abs=40)
    assert (old.state, old.submitter, old.attempts, list(old.nodes)) == (
        pb.JOB_STATE_SUCCEEDED, "user/ada", 1, ["sites/s/nodes/a"],
    )  # fmt: skip
    assert dict(old.gpus_by_model) == {"H100-80GB": 4}
    with_attempts = await listed(world, job=first.name, show_attempts=True)
    assert sorted((r.uid, r.attempt) for r in with_attempts) == sorted(
        (u, n) for u in (first.uid, second.uid) for n in (0, 1)
    )


async def test_a_page_is_bounded_however_many_jobs_are_not_over_and_each_record_comes_once(world):
    names_ = [await world.submit(1) for _ in range(30)]
    for name in names_[::2]:
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
    found, token = [], ""
    while True:
        answer = await world.scheduler.ListJobHistory(pb.ListJobHistoryRequest(page_token=token, page_size=7), None)
        assert len(answer.records) <= 14
        found += [record.job for record in answer.records]
        token = answer.next_page_token
        await asyncio.sleep(30)  # what had just ended has not any more on later pages
        if not token:
            break
    assert sorted(found) == sorted(names_)


async def test_all_attempts_are_known_not_only_those_that_the_record_keeps(world):
    (a,) = await world.add(node("s/a"))
    name = await world.submit(4, job_id="j", retry={"max_restarts": 100, "backoff": {"seconds": 0}})
    for number in range(1, 15):
        job = await until(lambda n=number: _attempt(world, name, n), f"attempt {number} runs", 1000)
        a.exit(code=number, task=job.attempt.tasks[0].id)
        await until(lambda n=number: _is_over(world, name, n), "its end is known")
    await asyncio.sleep(300)
    records = [r for r in await listed(world, job=name, show_attempts=True) if r.attempt and r.HasField("end_time")]
    assert sorted((r.attempt, r.exit_code) for r in records) == [(n, n) for n in range(1, 15)]
    assert len((await world.job(name)).past_attempts) <= lifecycle.PAST_ATTEMPTS


async def _attempt(world, name, number):
    job = await world.job(name)
    return job if job.attempt.number == number and job.state == pb.JOB_STATE_RUNNING else None


async def _is_over(world, name, number):
    job = await world.job(name)
    return job.attempt.number > number or job.attempt.HasField("end_time")


async def test_what_is_not_over_and_what_has_just_ended_is_listed_too(world):
    await world.add(node("s/a", usd=2.0))
    done = await ended(world, job_id="done")
    name = await world.submit(2, job_id="on")
    await world.reaches(name, "RUNNING")
    await world.submit(99, job_id="waits")
    await asyncio.sleep(60)
    records = await listed(world, show_attempts=True)
    assert sorted((r.job, r.attempt) for r in records) == [
        (done.name, 0), (done.name, 1), (name, 0), (name, 1), ("queues/default/jobs/waits", 0),
    ]  # fmt: skip
    (running,) = [r for r in records if r.job == name and not r.attempt]
    assert running.gpu_s == pytest.approx(120, abs=20)
    assert not running.HasField("end_time")


async def test_filters_and_pages(world):
    await world.add(node("s/a"), node("s/b"))
    names = [(await ended(world, job_id=f"j{n}")).name for n in range(6)]
    for name in names[-2:]:
        await world.reaches(name, "SUCCEEDED")
    cancelled = await world.submit(1, job_id="never", gpu={"any_of": ["none"]})
    with auth.acting_as(auth.Identity("operator", "bob")):
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=cancelled), None)
    await asyncio.sleep(600)
    jobs = lambda records: [r.job for r in records]  # noqa: E731
    assert jobs(await listed(world, page_size=2)) == [cancelled, *reversed(names)], "pruned ones too"
    assert jobs(await listed(world, states=[pb.JOB_STATE_CANCELLED])) == [cancelled]
    assert jobs(await listed(world, user="ada")) == [cancelled, *reversed(names)]
    assert jobs(await listed(world, user="operator/bob")) == []
    assert jobs(await listed(world, parent="queues/other")) == []
    assert len(await listed(world, node="sites/s/nodes/a")) + len(await listed(world, node="sites/s/nodes/b")) >= 6
    since = pb.ListJobHistoryRequest()
    since.since.FromDatetime(world.clock.now() - timedelta(seconds=3600 + 1200))
    assert jobs(await listed(world, since=since.since)) == [cancelled, names[5], names[4]]
    assert jobs(await listed(world, until=since.since)) == list(reversed(names[:5]))


async def test_how_it_was_ended_is_told_when_it_is_known(world):
    await world.add(node("s/a"))
    name = await world.submit(4, job_id="j")
    await world.reaches(name, "RUNNING")
    with auth.acting_as(auth.Identity("operator", "bob")):
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=name, reason="enough"), None)
    await asyncio.sleep(600)
    (job, attempt) = sorted(await listed(world, job=name, show_attempts=True), key=lambda r: r.attempt)
    assert (job.state, job.end_reason) == (pb.JOB_STATE_CANCELLED, "enough")
    assert attempt.exit_code == -15


async def test_a_bus_that_is_away_is_no_empty_history_and_wrong_questions_are_refused(world):
    for wrong in ({"job": "j"}, {"parent": "q"}, {"node": "n"}, {"user": "x" * 101}, {"until": {}, "since": {"seconds": 1}},
                  {"parent": "queues/a", "job": "queues/b/jobs/j"}):  # fmt: skip
        with pytest.raises(InvalidArgument):
            await listed(world, **wrong)
    world.bus.reachable = False
    with pytest.raises(Unavailable):
        await listed(world)


async def test_records_that_could_not_be_told_are_told_later_once_each(world):
    await world.add(node("s/a"))
    world.bus.reachable = False
    job = await ended(world, job_id="j")
    await asyncio.sleep(600)
    world.bus.reachable = True
    await asyncio.sleep(60)
    assert [(r.job, r.attempt) for r in await listed(world, show_attempts=True)] == [(job.name, 0), (job.name, 1)]
    await world.restart()
    await asyncio.sleep(60)
    assert len(await listed(world, show_attempts=True)) == 2
