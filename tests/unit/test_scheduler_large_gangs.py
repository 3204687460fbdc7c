"""Jobs of thousands of tasks: what their writes cost, who is told of them, and how large their records get."""

import random
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import InvalidArgument
from whaleflux.rpc.paging import page_token
from whaleflux.store import keys, uuid_packing
from whaleflux.store.api import MAX_COMMIT_BYTES, Entry
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Claim, Job, JobState, SchedulingDecision, Task, TaskPhase
from whaleflux_scheduler.core.observed import IN_ORDER, NodeCondition, Observations, Report, Timeouts
from whaleflux_scheduler.jobs import key_of
from whaleflux_scheduler.task_index import TaskIndex, nodes_to_tell

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAME = "queues/research/jobs/large"
KEY = keys.of_name(keys.JOBS, NAME)


def places(nodes, gpus, seed=1):
    numbers = random.Random(seed)

    def device():
        return f"GPU-{uuid.UUID(int=numbers.getrandbits(128))}"

    return tuple((f"sites/onprem/nodes/h200-{i:05d}", tuple(device() for _ in range(gpus))) for i in range(nodes))


def starting(nodes=64, gpus=8, *, of=None, seed=1):
    """As the store holds it."""
    spec = pb.JobSpec(command=["python", "train.py"], gpus=nodes * gpus)
    message = pb.Job(name=NAME, uid="u", state=pb.JOB_STATE_QUEUED, spec=spec)
    message.create_time.FromDatetime(NOW)
    queued = of or convert.JOBS.decode(Entry(KEY, message.SerializeToString(), 1, 1))
    where = lifecycle.GpuAssignment(places(nodes, gpus, seed))
    placed = lifecycle.place(queued.value, where, SchedulingDecision(NOW, True, "here"), NOW)
    return stored(placed, queued)


def stored(job, over):
    return convert.JOBS.decode(Entry(KEY, convert.JOBS.encode(job, over), 1, 1))


def after(job: Job, *reports: Report, nodes=None, since=NOW, now=NOW) -> Job:
    observed = Observations(reports, nodes or dict.fromkeys(job.attempt.nodes, IN_ORDER), since=since)
    return lifecycle.advance(job, observed, now, Timeouts())


def report(task: Task, phase: TaskPhase, **more) -> Report:
    return Report(task.id, phase, node=task.node, **more)


class TestWhoIsTold:
    def test_a_report_of_one_node_is_no_news_for_the_others(self):
        before = starting()
        one = before.value.attempt.tasks[7]
        now = stored(after(before.value, report(one, TaskPhase.ACCEPTED)), before)
        everybody = frozenset(before.value.attempt.nodes)
        assert set(nodes_to_tell(before.value, now.value, everybody)) == {one.node}

    @pytest.mark.parametrize("change", ["started", "ended", "deleted"])
    def test_what_concerns_all_is_told_to_all(self, change):
        before = starting().value
        everybody = frozenset(before.attempt.nodes)
        accepted = [report(task, TaskPhase.ACCEPTED, rendezvous="a:1") for task in before.attempt.tasks]
        new = {
            "started": after(after(before, *accepted)),
            "ended": after(before, report(before.attempt.tasks[3], TaskPhase.EXITED, exit_code=1)),
            "deleted": None,
        }[change]
        assert new is None or new.attempt.started == (change == "started")
        assert set(nodes_to_tell(before, new, everybody)) == everybody

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
    @settings(max_examples=60, deadline=None)
    def test_the_index_finds_what_a_search_finds(self, on, data):
        index, phases = TaskIndex(), st.sampled_from([TaskPhase.RUNNING, TaskPhase.EXITED])
        job = starting(2).value
        for epoch in (1, 2, 2):
            tasks = tuple(
                Task(f"q.j.{epoch}.{i}", f"n{at}", (f"g{i}",), i, i, data.draw(phases)) for i, at in enumerate(on)
            )
            past = (job.attempt,) if epoch > 1 else ()
            job = replace(job, attempt=replace(job.attempt, epoch=epoch, tasks=tasks), past_attempts=past)
            index.keep(job.name, job)
            for name in [f"n{i}" for i in range(6)]:
                wanted = [task for task in tasks if task.node == name and not task.over]
                assert list(index.desired_on(job, name)) == wanted
                assert list(index.holding_on(job, name)) == [pair for pair in job.holding() if pair[1].node == name]


class TestRecords:
    def test_two_attempts_that_hold_all_their_gpus_and_a_claim_fit_into_one_record(self):
        """All nodes of a gang are lost at once, it starts again, and is to move: nobody has said yet that the GPUs are free."""
        nodes, gpus = 5_000, 8
        first = starting(nodes, gpus)
        lost = after(first.value, nodes=dict.fromkeys(first.value.attempt.nodes, NodeCondition(unreachable="gone")))
        assert lost.state is JobState.RECOVERING
        again = starting(nodes, gpus, of=stored(lost, first))
        claimed = replace(again.value, claim=Claim(places(nodes, gpus), (), NOW))
        assert len(list(claimed.holding())) == 2 * nodes
        value = convert.JOBS.encode(claimed, again)
        assert len(value) < MAX_COMMIT_BYTES - 100_000  # the placement's record is in the same transaction
        assert convert.JOBS.decode(Entry(KEY, value, 3, 1)).value.past_attempts == claimed.past_attempts

    async def test_what_was_written_here_is_read_as_any_other_reads_it(self):
        before = starting(1_000)
        tasks = before.value.attempt.tasks
        job = after(before.value, report(tasks[5], TaskPhase.RUNNING, message="m", isolation="none"))
        value = await convert.JOBS.encode_aside(job, before)
        assert value == convert.JOBS.encode(job, before)
        here = convert.JOBS.decode(Entry(KEY, value, 2, 1))
        there = replace(convert.JOBS).decode(Entry(KEY, value, 2, 1)).value
        assert here.value == convert.job_of(here.message) == there
        assert here.value.attempt.tasks[5] is job.attempt.tasks[5], "and shares its parts"


class TestUuids:
    @given(
        st.lists(st.one_of(st.binary(max_size=60), st.uuids().map(lambda u: str(u).encode())), max_size=30),
    )
    @settings(max_examples=150, deadline=None)
    def test_any_text_survives(self, parts):
        text = b"".join(parts + parts)
        assert uuid_packing.unpack(uuid_packing.pack(text), len(text)) == text

    def test_each_is_kept_once_in_its_16_bytes(self):
        text = b",".join(str(uuid.UUID(int=i * 7**40 % 2**128)).encode() for i in range(2_000))
        assert len(uuid_packing.pack(text + text)) < 2_000 * 16 + 1_000

    @given(st.binary(max_size=80), st.integers(0, 400))
    @settings(max_examples=150, deadline=None)
    def test_damage_is_found(self, noise, at):
        packed = uuid_packing.pack(b"a" * 200 + str(uuid.UUID(int=5)).encode() * 3)
        damaged = packed[:at] + noise + packed[at + len(noise) + 1 :]
        try:
            uuid_packing.unpack(damaged, 1_000)
        except ValueError:
            return
        assert len(damaged) == len(packed) or damaged == packed

    def test_more_than_is_allowed_is_refused(self):
        with pytest.raises(ValueError, match="too long"):
            uuid_packing.unpack(uuid_packing.pack(b"a" * 1_000), 999)


class TestStartDeadlines:
    @pytest.mark.parametrize("ahead", [-3_600, 3_600])
    def test_a_leader_with_another_clock_gives_a_start_as_much_time_as_the_last_one(self, ahead):
        job = starting(2).value
        mine = NOW + timedelta(seconds=ahead)
        assert after(job, since=mine, now=mine + timedelta(seconds=19)).state is JobState.STARTING
        late = after(job, since=mine, now=mine + timedelta(seconds=21))
        assert (late.state, late.state_message) == (
            JobState.RECOVERING,
            "sites/onprem/nodes/h200-00000 and 1 more did not accept within 20 s",
        )
        due = lifecycle.due(job, Observations(since=mine), mine, Timeouts())
        assert due == mine + timedelta(seconds=20)

    async def test_the_next_leader_counts_from_when_it_first_saw_the_attempt(self):
        async with World() as world:
            (agent,) = await world.add(node("s/a"))
            agent.obey = False
            name = await world.submit(1)
            await world.reaches(name, "STARTING")
            await world.clock.sleep(15)
            await world.restart()
            await world.clock.sleep(15)
            assert (await world.job(name)).state == pb.JOB_STATE_STARTING, "30 s after its placement"


async def test_steps_of_jobs_that_run_are_not_written():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        name = await world.submit(1)
        await world.reaches(name, "RUNNING")
        await world.caught_up()
        before = await world.store.get(key_of(name))
        for step in range(120):
            agent.step(name, 1, step, 1.0 / (step + 1))
            await world.clock.sleep(1.0)
        await until(lambda: agent.heard, "it was heard")
        assert (await world.job(name)).step == 119
        assert await world.store.get(key_of(name)) == before


async def test_allocations_come_in_pages_that_leave_nothing_out():
    async with World() as world:
        await world.add(*(node(f"s/n{i}") for i in range(4)))
        names = [await world.submit(gpus) for gpus in (1, 8, 2, 1)]
        for name in names:
            await world.reaches(name, "RUNNING")
        found, token = [], ""
        while token or not found:
            request = pb.ListAllocationsRequest(page_size=2, page_token=token)
            page = await world.scheduler.ListAllocations(request, None)
            assert 1 <= len(page.allocations) <= 2
            found += [(one.job, one.task.id) for one in page.allocations]
            token = page.next_page_token
        assert sorted(found) == sorted(set(found))
        whole = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
        assert [(one.job, one.task.id) for one in whole.allocations] == found
        assert {job for job, _ in found} == set(names)


@pytest.mark.parametrize("last", ["default", "tasks:", "tasks:queues/q/jobs/a", "tasks:queues/q/jobs/a x 1"])
async def test_a_token_of_an_older_version_or_of_nobody_is_refused(last):
    async with World() as world:
        with pytest.raises(InvalidArgument, match=r"again without (one|it)"):
            await world.scheduler.ListAllocations(pb.ListAllocationsRequest(page_token=page_token(last, 3)), None)
