"""Agents' streams: what is acknowledged and when, logs on demand, two replicas, deadlines, news, spans."""

import asyncio
import contextlib

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from tests.support.scheduler_world import USER, World, node, until
from whaleflux import telemetry
from whaleflux.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.telemetry.registry import METRICS
from whaleflux.v1 import agent_pb2, events_pb2, health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import logs
from whaleflux_scheduler.agent_sessions import AgentSession, AgentSessions
from whaleflux_scheduler.bootstrap import Peers, assemble
from whaleflux_scheduler.core.observed import Timeouts
from whaleflux_scheduler.jobs import key_of


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def running(world, gpus=4, **spec):
    name = await world.submit(gpus, **spec)
    await world.reaches(name, "RUNNING")
    return name


class TestAgentSession:
    def wanted(self, **tasks):
        return lambda _: ({k: agent_pb2.DesiredTask(job=v) for k, v in tasks.items()}, 7)

    async def sent(self, session, count):
        found = []
        answers = session.responses()
        async with asyncio.timeout(2):
            async for answer in answers:
                found.append(answer)
                if len(found) == count:
                    break
        await answers.aclose()
        return found

    async def test_everything_first_then_differences(self):
        desired = {name: agent_pb2.DesiredTask(job="1") for name in "ab"}
        session = AgentSession("n", lambda _: (dict(desired), 7))
        (first,) = await self.sent(session, 1)
        assert ([t.job for t in first.desired.tasks], first.desired.revision) == (["1", "1"], 7)
        desired = {"b": agent_pb2.DesiredTask(job="2"), "c": agent_pb2.DesiredTask(job="1")}
        session.wake()
        changes = await self.sent(session, 3)
        assert changes[0].removed == "a"
        assert sorted(c.changed.job for c in changes[1:]) == ["1", "2"]

    async def test_only_what_is_stored_without_a_gap_is_acknowledged(self):
        session = AgentSession("n", self.wanted())
        await self.sent(session, 1)
        for sequence in (5, 6, 9):
            session.received(sequence)
        session.stored(6)
        session.stored(9)
        (first,) = await self.sent(session, 1)
        assert first.acknowledged_sequence == 4
        session.stored(5)
        (all_,) = await self.sent(session, 1)
        assert all_.acknowledged_sequence == 9
        session.received(5)
        session.stored(5)
        session.send(agent_pb2.SyncResponse(cancel_logs="x"))
        (next_,) = await self.sent(session, 1)
        assert next_.cancel_logs == "x", "nothing is acknowledged twice"

    async def test_messages_to_a_stuck_agent_are_bounded(self):
        session = AgentSession("n", self.wanted())
        with pytest.raises(ResourceExhausted):
            for _ in range(1000):
                session.send(agent_pb2.SyncResponse(cancel_logs="x"))


class TestMachines:
    def test_a_second_machine_under_a_connected_nodes_name_is_refused(self):
        sessions = AgentSessions()
        first, second, again = (AgentSession("n", lambda _: ({}, 0), machine) for machine in ("1", "2", "1"))
        sessions.add(first)
        with pytest.raises(FailedPrecondition) as refused:
            sessions.add(second)
        assert refused.value.reason == "NODE_NAME_TAKEN"
        assert sessions.connected["n"] is first and first.open
        sessions.add(again)  # the same machine dials anew: the older stream is what a broken connection left
        assert sessions.connected["n"] is again and not first.open

    def test_a_copy_of_a_connected_machine_is_refused_until_the_first_is_gone(self):
        sessions = AgentSessions()
        first, copied = (AgentSession("n", lambda _: ({}, 0), "1", boot_id=boot) for boot in ("boot-1", "boot-2"))
        sessions.add(first)
        with pytest.raises(FailedPrecondition) as refused:
            sessions.add(copied)
        assert refused.value.reason == "NODE_RUNS_TWICE"
        assert "boot-1" in str(refused.value) and "boot-2" in str(refused.value)
        assert sessions.connected["n"] is first and first.open
        sessions.remove(first)
        sessions.add(copied)  # it was the same machine, rebooted

    def test_an_agent_is_told_of_unreadable_jobs_that_it_has_something_of(self):
        mine, other = "queues/q/jobs/mine", "queues/q/jobs/other"
        session = AgentSession(
            "n", lambda _: ({}, 0), unreadable=lambda: frozenset({mine, other}), jobs=frozenset({mine})
        )
        assert list(session.due()[0].desired.unreadable_jobs) == [mine]


class TestStreams:
    async def test_no_report_is_acknowledged_while_the_store_is_down(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        await until(lambda: a.acknowledged == a.sequence, "what it reported so far is acknowledged")
        before = a.acknowledged
        world.store.down = True
        a.exit()
        await asyncio.sleep(0.1)  # were it acknowledged without being stored, it would be by now
        assert a.acknowledged == before
        world.store.down = False
        await world.reaches(name, "SUCCEEDED")
        await until(lambda: a.acknowledged == before + 1, "it is acknowledged")

    async def test_the_first_message_is_a_hello_of_the_own_node(self, world):
        async def say(message):
            async def requests():
                yield message

            with auth.acting_as(auth.Identity("agent", "s/a")):
                async with contextlib.aclosing(world.tasks.Sync(requests(), None)) as answers:
                    return [answer async for answer in answers]

        with pytest.raises(InvalidArgument):
            await say(agent_pb2.SyncRequest(report=agent_pb2.TaskReport()))
        with pytest.raises(PermissionDenied):
            await say(agent_pb2.SyncRequest(hello=agent_pb2.SyncHello(node="sites/s/nodes/b")))

    async def test_reports_on_other_nodes_tasks_end_the_stream(self, world):
        a, b = await world.add(node("s/a"), node("s/b"))
        name = await running(world, 8)
        of_b = next(iter(b.tasks.values()))
        a.tasks["x"] = of_b
        a.say(
            agent_pb2.SyncRequest(
                report=agent_pb2.TaskReport(
                    task=of_b.task.id, job=name, epoch=1, phase=pb.TASK_PHASE_EXITED, sequence=99
                )
            )
        )
        await until(lambda: a.error is not None, "it is refused")
        assert isinstance(a.error, PermissionDenied)
        assert (await world.job(name)).state == pb.JOB_STATE_RUNNING

    async def test_an_agent_whose_hello_is_refused_is_not_connected(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        with auth.acting_as(auth.Identity("agent", "s/b")):
            hello = agent_pb2.SyncHello(
                node="sites/s/nodes/b", tasks=[agent_pb2.TaskReport(task=next(iter(a.tasks)), job=name)]
            )

            async def requests():
                yield agent_pb2.SyncRequest(hello=hello)

            with pytest.raises(PermissionDenied):
                await anext(world.tasks.Sync(requests(), None))
        assert list(world.service.sessions.connected) == ["sites/s/nodes/a"]

    async def test_a_newer_stream_replaces_the_older(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        old = a.running
        await a.connect()
        await until(old.done, "the old stream ends")
        a.exit()
        await world.reaches(name, "SUCCEEDED")

    async def test_a_task_that_its_agent_lost_is_a_failure(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        await a.disconnect()
        a.reports.clear()
        a.tasks.clear()
        await a.connect()
        job = await world.reaches(name, "RUNNING")
        await until(lambda: any(t.epoch == 2 for t in a.tasks.values()), "it starts again")
        job = await world.job(name)
        assert "came back without it" in job.past_attempts[0].end_reason

    async def test_a_late_report_of_an_ended_job_frees_its_gpus(self, world):
        (a,) = await world.add(node("s/a"))
        a.slow_to_die = True
        name = await running(world)
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
        held = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
        assert [(x.job, len(x.task.gpu_uuids), x.usd_per_gpu_hour) for x in held.allocations] == [(name, 4, 2.0)]
        a.report(next(iter(a.reports)), pb.TASK_PHASE_KILLED, -9)

        async def free():
            return not (await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)).allocations

        await until(free, "nothing is held")


class TestLogs:
    def request(self, name, **more):
        return pb.StreamLogsRequest(name=name, all_ranks=True, **more)

    async def read(self, world, request, found):
        with auth.acting_as(USER):
            async with contextlib.aclosing(world.scheduler.StreamLogs(request, None)) as lines:
                async for line in lines:
                    found.append((line.rank, line.epoch, line.data))

    def answer(self, agent, data, *, rank=0, epoch=1, end=False, behind=0):
        request = agent.logs[-1].request
        chunk = agent_pb2.LogChunk(request=request, rank=rank, epoch=epoch, data=data, end=end, next_offset=behind)
        agent.say(agent_pb2.SyncRequest(log=chunk))

    async def test_lines_of_all_nodes_are_merged(self, world):
        agents = await world.add(node("s/a"), node("s/b"))
        name = await running(world, 8)
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name, tail_lines=5), found))
        for rank, agent in enumerate(agents):
            await until(lambda: agent.logs, "it is asked")  # noqa: B023
            assert (agent.logs[0].rank, agent.logs[0].tail_lines, agent.logs[0].epoch) == (-1, 5, 1)
            self.answer(agent, b"line %d" % rank, rank=rank)
            self.answer(agent, b"", end=True)
        await reading
        assert sorted(found) == [(0, 1, b"line 0"), (1, 1, b"line 1")]

    async def test_an_agent_that_comes_back_is_asked_for_what_comes_behind(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name, follow=True), found))
        await until(lambda: a.logs, "it is asked")
        self.answer(a, b"one\n", behind=104)
        await until(lambda: found, "it is read")
        await a.disconnect()
        await a.connect()
        await until(lambda: len(a.logs) == 2, "it is asked again")
        assert [(known.rank, known.epoch, known.offset) for known in a.logs[1].after] == [(0, 1, 104)]
        self.answer(a, b"two\n", behind=108, end=True)
        a.exit()
        await reading
        assert [data for _, _, data in found] == [b"one\n", b"two\n"]

    async def test_an_agent_answers_for_its_own_node_only(self, world):
        a, b = await world.add(node("s/a"), node("s/b"))
        name = await running(world, 8)
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name), found))
        await until(lambda: a.logs and b.logs, "both are asked")
        forged = agent_pb2.LogChunk(request=a.logs[0].request, rank=0, epoch=1, data=b"forged\n", end=True)
        b.say(agent_pb2.SyncRequest(log=forged))
        await until(lambda: b.heard, "it was said")
        self.answer(a, b"true\n", end=True)
        self.answer(b, b"", end=True)
        await reading
        assert [data for _, _, data in found] == [b"true\n"]

    async def test_a_reader_says_what_it_has_and_gets_the_rest(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        request = self.request(name, tail_lines=5)
        request.after.add(rank=0, epoch=1, offset=7)
        request.after.add(rank=0, epoch=9, offset=8)
        reading = asyncio.create_task(self.read(world, request, []))
        await until(lambda: a.logs, "it is asked")
        assert [(known.rank, known.epoch, known.offset) for known in a.logs[0].after] == [(0, 1, 7)]
        self.answer(a, b"", end=True)
        await reading

    async def test_an_agent_that_goes_away_in_the_middle_is_no_end_of_its_output(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name), found))
        await until(lambda: a.logs, "it is asked")
        self.answer(a, b"one\n")
        await until(lambda: found, "it is read")
        await a.disconnect()
        with pytest.raises(Unavailable) as refused:
            await reading
        assert refused.value.reason == "NODES_UNREACHABLE"

    async def test_a_node_that_is_away_is_named_after_the_output_of_the_others(self, world):
        a, b = await world.add(node("s/a"), node("s/b"))
        name = await running(world, 8)
        await b.disconnect()
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name), found))
        await until(lambda: a.logs, "it is asked")
        self.answer(a, b"one\n", end=True)
        with pytest.raises(Unavailable) as refused:
            await reading
        assert (found, refused.value.reason) == ([(0, 1, b"one\n")], "NODES_UNREACHABLE")
        assert "not complete without sites/s/nodes/b" in refused.value.message

    async def test_a_replica_that_leads_no_more_ends_its_readers(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        reading = asyncio.create_task(self.read(world, self.request(name, follow=True), []))
        await until(lambda: a.logs, "it is asked")
        await world.stop()
        with pytest.raises(Unavailable) as refused:
            async with asyncio.timeout(5):
                await reading
        assert refused.value.reason == "NOT_LEADER"

    async def test_following_goes_on_with_the_next_attempt_and_ends_with_the_job(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, retry={"max_restarts": 1, "backoff": {"nanos": 1}})
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name, follow=True), found))
        await until(lambda: a.logs, "it is asked")
        self.answer(a, b"one", end=True)
        a.exit(1)
        await until(lambda: len(a.logs) == 2, "it is asked about the next attempt")
        assert a.logs[1].epoch == 2
        self.answer(a, b"two", epoch=2, end=True)
        await until(lambda: any(t.epoch == 2 and t.start for t in a.tasks.values()), "it runs")
        await until(lambda: len(found) == 2, "both are read")
        a.exit(0)
        await asyncio.wait_for(reading, 5)
        assert found == [(0, 1, b"one"), (0, 2, b"two")]

    async def test_one_attempt_is_read_to_its_end_and_no_further(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, retry={"max_restarts": 1, "backoff": {"nanos": 1}})
        found = []
        since = Timestamp(seconds=5)
        request = self.request(name, follow=True, attempt=1, times=True, since_time=since)
        reading = asyncio.create_task(self.read(world, request, found))
        await until(lambda: a.logs, "it is asked")
        assert (a.logs[0].epoch, a.logs[0].times, a.logs[0].since_time) == (1, True, since)
        a.exit(1)
        await until(lambda: any(t.epoch == 2 and t.start for t in a.tasks.values()), "the next attempt runs")
        self.answer(a, b"last words", end=True)
        await asyncio.wait_for(reading, 5)
        assert found == [(0, 1, b"last words")]
        found.clear()
        reading = asyncio.create_task(self.read(world, self.request(name, attempt=1), found))
        await until(lambda: len(a.logs) == 2, "an attempt that is over can be read")
        assert a.logs[1].epoch == 1
        self.answer(a, b"last words", end=True)
        await reading
        assert found == [(0, 1, b"last words")]

    async def test_the_next_attempt_can_be_followed_before_it_is_there(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, retry={"max_restarts": 1, "backoff": {"nanos": 1}})
        found = []
        reading = asyncio.create_task(self.read(world, self.request(name, follow=True, attempt=2), found))
        a.exit(1)
        await until(lambda: a.logs, "it is asked")
        self.answer(a, b"two", epoch=2, end=True)
        await until(lambda: found, "it is read")
        a.exit(0)
        await asyncio.wait_for(reading, 5)
        assert found == [(0, 2, b"two")]

    async def test_output_that_is_kept_no_more_is_no_empty_output(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        reading = asyncio.create_task(self.read(world, self.request(name), []))
        await until(lambda: a.logs, "it is asked")
        chunk = agent_pb2.LogChunk(request=a.logs[-1].request, end=True, error="its output is not kept any more")
        a.say(agent_pb2.SyncRequest(log=chunk))
        with pytest.raises(NotFound) as refused:
            await reading
        assert "sites/s/nodes/a: its output is not kept any more" in refused.value.message

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"rank": 99}, "rank: 99: {} has 4 ranks, 0 to 3"),
            ({"attempt": 9, "all_ranks": True}, "attempt: 9: {} has had one attempt, 1"),
            ({"attempt": 2, "all_ranks": True}, "attempt: 2: {} has had one attempt, 1"),
            ({"attempt": 9, "follow": True}, "attempt: 9: {} has had one attempt, 1"),
        ],
    )
    async def test_what_is_not_there_is_refused_with_what_is(self, world, asked, said):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        with pytest.raises(InvalidArgument) as refused:
            await self.read(world, pb.StreamLogsRequest(name=name, **asked), [])
        assert refused.value.message == said.format(name)
        assert not a.logs

    async def test_who_stops_reading_is_told_to_the_agent(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        reading = asyncio.create_task(self.read(world, self.request(name, follow=True), []))
        await until(lambda: a.logs, "it is asked")
        reading.cancel()
        await until(lambda: a.cancelled_logs == [a.logs[0].request], "it is cancelled")

    async def test_a_slow_reader_is_cut_off(self, world, monkeypatch):
        monkeypatch.setattr(logs, "PATIENCE_S", 0.05)
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        with auth.acting_as(USER):
            lines = world.scheduler.StreamLogs(self.request(name, follow=True), None)
            first = asyncio.ensure_future(anext(lines))
            await until(lambda: a.logs, "it is asked")
            self.answer(a, b"x")
            await first
            for _ in range(200):
                self.answer(a, b"y" * 100)
            await until(lambda: a.cancelled_logs, "the agent is told to stop")
            with pytest.raises(ResourceExhausted):
                async for _ in lines:
                    pass

    async def test_a_reader_that_leaves_while_its_agent_waits_for_it_leaves_the_agent_alone(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        with auth.acting_as(USER):
            lines = world.scheduler.StreamLogs(self.request(name, follow=True), None)
            first = asyncio.ensure_future(anext(lines))
            await until(lambda: a.logs, "it is asked")
            self.answer(a, b"x")
            await first
            for _ in range(2 * logs.CHUNKS):
                self.answer(a, b"y")
            await asyncio.sleep(logs.PATIENCE_S / 2)
            await lines.aclose()
        await asyncio.sleep(2 * logs.PATIENCE_S)
        a.exit()
        await world.reaches(name, "SUCCEEDED")
        assert not a.running.done()

    async def test_without_an_agent_it_says_so(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        await a.disconnect()
        with pytest.raises(Unavailable):
            await self.read(world, self.request(name), [])
        waiting = await world.submit(1)
        await self.read(world, self.request(waiting), [])
        with pytest.raises(NotFound):
            await self.read(world, self.request("queues/default/jobs/none"), [])


class TestTwoReplicas:
    async def test_one_leads_both_take_jobs_and_the_other_takes_over(self, world):
        (a,) = await world.add(node("s/a"))
        peers = Peers(world.inventory, world.health, world.checkpoint)
        second = assemble(world.store, None, world.clock, peers, Timeouts(), "there:2")
        loop = asyncio.create_task(second.loops[0]())
        try:
            await until(second.ready, "it has read the store")
            follower = second.servicers[0][1]
            with auth.acting_as(USER):
                request = pb.CreateJobRequest(
                    parent="queues/default", job=pb.Job(spec=pb.JobSpec(command=["x"], gpus=1))
                )
                name = (await follower.CreateJob(request, None)).name
                await world.reaches(name, "RUNNING")
                assert (await follower.GetJob(pb.GetJobRequest(name=name), None)).name == name
                request.validate_only = True
                with pytest.raises(Unavailable) as refused:
                    await follower.CreateJob(request, None)
            assert (refused.value.reason, refused.value.metadata["leader"]) == ("NOT_LEADER", "here:1")
            await world.stop()
            await until(lambda: second.leader_session.current is not None, "the second leads")
            await until(lambda: a.error is not None, "the agent is sent away")
            assert a.error.reason == "NOT_LEADER"
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)


class TestDeadlines:
    async def test_a_node_that_does_not_accept_is_avoided(self):
        async with World(timeouts=Timeouts(accept_s=0.1)) as world:
            a, b = await world.add(node("s/a"), node("s/b"))
            a.obey = b.obey = False
            name = await world.submit(4)
            first = await until(lambda: (a.tasks and a) or (b.tasks and b), "one gets it")
            other = b if first is a else a
            other.obey = True
            job = await world.reaches(name, "RUNNING")
            assert (job.attempt.tasks[0].node, job.restarts, job.recoveries) == (other.node, 0, 0)
            assert "did not accept" in job.past_attempts[0].end_reason

    @pytest.mark.parametrize(("away_s", "restarts"), [(3.0, 0), (60.0, 1)])
    async def test_whose_fault_an_end_was_is_asked_until_a_new_leader_can_answer(self, world, away_s, restarts):
        (a,) = await world.add(node("s/a"))
        world.health.answer = lambda request: health_pb2.Incident(name="incidents/gpu", message="a GPU failed")
        name = await running(world)
        world.health.down = Unavailable("no leader")
        asyncio.get_running_loop().call_later(away_s, setattr, world.health, "down", None)
        begun_s = asyncio.get_running_loop().time()
        a.exit(1)
        await until(lambda: sum("RUNNING" in line for line in a.history) == 2, "it runs again")
        assert asyncio.get_running_loop().time() - begun_s < 20
        assert (await world.job(name)).restarts == restarts

    async def test_a_backoff_is_over_without_further_news(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, retry={"max_restarts": 1, "backoff": {"nanos": 150_000_000}})
        a.exit(1)
        job = await world.reaches(name, "QUEUED")
        assert job.HasField("not_before_time")
        await world.reaches(name, "RUNNING")

    async def test_a_partitioned_site_keeps_its_jobs_for_the_jobs_own_time(self, world):
        a, b = await world.add(node("s/a"), node("t/b"))
        name = await running(world, 4, on_partition={"wait": {"nanos": 300_000_000}})
        first = next(x for x in (a, b) if x.tasks)
        other = b if first is a else a
        await first.disconnect()
        world.phase(first.node, health_pb2.NODE_PHASE_SUSPECT, "SITE_PARTITIONED")
        await asyncio.sleep(0.1)
        assert (await world.job(name)).state == pb.JOB_STATE_RUNNING
        await until(lambda: other.tasks, "it moves after its time")
        await world.reaches(name, "RUNNING")


class TestOthers:
    async def test_what_cannot_be_is_explained(self, world):
        await world.add(node("s/a"))
        name = await world.submit(4, gpu={"any_of": ["H200"]})
        explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name), None)
        assert not explained.decision.placed
        assert {e.constraint: e.nodes for e in explained.decision.exclusions} == {"gpu model is not H200": 1}
        assert explained.decision.position == 1

        async def shown():
            return (await world.job(name)).state_message.startswith("waits: ")

        await until(shown, "the reason is shown with the job")
        placed = await running(world)
        explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=placed), None)
        assert (explained.decision.placed, explained.decision.summary) == (True, "4 x H100-80GB on 1 node, site s")

    async def test_unknown_datasets_are_refused(self, world):
        with pytest.raises(InvalidArgument) as refused:
            await world.submit(1, datasets=["c4"])
        assert refused.value.violations[0].field == "job.spec.datasets[0]"
        world.inventory.datasets["datasets/c4"] = inventory_pb2.Dataset(name="datasets/c4", size_bytes=1)
        name = await world.submit(1, datasets=["c4"])
        stored = await world.scheduler.GetJob(pb.GetJobRequest(name=name), None)
        assert list(stored.spec.datasets) == ["datasets/c4"]  # whichever form was sent: agents ask for it by its name

    async def test_a_name_may_be_used_again_and_its_epochs_go_on(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, 1, job_id="mine")
        a.exit()
        await world.reaches(name, "SUCCEEDED")
        await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
        assert await running(world, 1, job_id="mine") == name
        assert (await world.job(name)).epoch == 2

    async def test_old_ended_jobs_are_deleted(self, monkeypatch):
        monkeypatch.setattr("whaleflux_scheduler.housekeeping.DELETE_AT_ONCE", 2)
        async with World(keep_ended=1) as world:
            names = []
            for _ in range(4):
                names.append(await world.submit(1))
                await world.scheduler.CancelJob(pb.CancelJobRequest(name=names[-1]), None)

            async def few():
                return len((await world.store.list(keys.JOBS)).entries) <= 2

            await until(few, "the oldest are gone")
            assert (await world.job(names[-1])).state == pb.JOB_STATE_CANCELLED

    async def test_lists_are_newest_first_in_pages(self, world):
        names = []
        for _ in range(5):
            names.append(await world.submit(1, gpu={"any_of": ["none"]}))
            await world.clock.sleep(0.001)  # names made in one millisecond have no order
        found, token = [], ""
        for _ in range(3):
            page = await world.scheduler.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token), None)
            found += [job.name for job in page.jobs]
            token = page.next_page_token
        assert (found, token) == (names[::-1], "")

    async def test_a_watch_of_one_job_tells_of_that_job_only(self, world):
        (a,) = await world.add(node("s/a"))
        one, _ = await running(world, 1, job_id="j"), await running(world, 1, job_id="j2")
        seen = []

        async def watch():
            async for change in world.scheduler.WatchJobs(pb.WatchJobsRequest(name=one), None):
                seen.append(change)

        watching = asyncio.create_task(watch())
        await until(lambda: seen, "it is listed")
        a.exit()
        await until(lambda: any(c.modified.state == pb.JOB_STATE_SUCCEEDED for c in seen), "its end is told")
        watching.cancel()
        assert {c.added.name or c.modified.name for c in seen if not c.HasField("bookmark")} == {one}

    async def test_metrics_say_what_is_offered_held_and_waiting(self, world, monkeypatch):
        monkeypatch.setattr("whaleflux_scheduler.reconciler.SHOW_EVERY_S", 0.01)
        await world.add(node("s/a"), node("s/b", model="H200"))
        await running(world, 3, gpu={"any_of": ["H200"]})
        await world.submit(99)

        def value(metric, *labels):
            named = dict(zip(METRICS[metric].labels, labels, strict=True))
            return REGISTRY.get_sample_value(metric.value, named) or 0

        def right():
            metric = telemetry.Metric
            return (
                value(metric.GPUS, "H200"),
                value(metric.GPUS_ALLOCATED, "H200"),
                value(metric.GPUS_ALLOCATED, "H100-80GB"),
                value(metric.JOBS, "RUNNING"),
                value(metric.QUEUE_DEPTH, "jobs"),
            ) == (4, 3, 0, 1, 1)

        await until(right, "the gauges show it")

    async def test_who_leads_no_more_shows_nothing_of_its_time(self):
        def shown():
            return REGISTRY.get_sample_value(telemetry.Metric.JOBS.value, {"state": "RUNNING"})

        async with World() as world:
            await world.add(node("s/a"))
            await running(world)
            await until(lambda: shown() == 1, "the gauge shows it")
        assert shown() is None

    async def test_states_are_published_once_each(self):
        world = World()
        bus = MemoryBus()
        service = assemble(world.store, bus, world.clock, Peers(world.inventory, world.health), Timeouts(), "here:1")
        loop = asyncio.create_task(service.loops[0]())
        try:
            await until(lambda: service.leader_session.current is not None, "it leads")
            with auth.acting_as(USER):
                request = pb.CreateJobRequest(
                    parent="queues/default", job=pb.Job(spec=pb.JobSpec(command=["x"], gpus=1))
                )
                job = await service.servicers[0][1].CreateJob(request, None)
                await service.servicers[0][1].CancelJob(pb.CancelJobRequest(name=job.name), None)
            told = []
            async with bus.subscribe(["wf.v1.>"], durable="test") as news, asyncio.timeout(5):
                async for delivery in news:
                    event = events_pb2.Event.FromString(delivery.data)
                    if event.resource == job.name:
                        told.append((event.previous, event.what))
                    await delivery.ack()
                    if told and told[-1][1] == "CANCELLED":
                        break
            assert told in ([("", "QUEUED"), ("QUEUED", "CANCELLED")], [("", "CANCELLED")])
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await world.store.close()

    async def test_one_trace_from_submission_through_failure_to_the_next_attempt(self, world):
        exporter = InMemorySpanExporter()
        telemetry.setup_tracing("scheduler", exporter=exporter)
        try:
            a, b = await world.add(node("s/a"), node("s/b"))
            failure = telemetry.new_traceparent()

            def answer(request):
                parent = telemetry.new_traceparent(request.traceparent)
                return health_pb2.Incident(name="incidents/i", traceparents={request.job: parent}, nodes=[request.node])

            world.health.answer = answer
            with telemetry.span("CreateJob"):
                name = await world.submit(4)
            await world.reaches(name, "RUNNING")
            first = a if a.tasks else b
            first.exit(1)
            other = b if first is a else a
            await until(lambda: other.tasks, "it moves")
            await world.reaches(name, "RUNNING")
            other.exit()
            await world.reaches(name, "SUCCEEDED")
            telemetry.flush()
            spans = {}
            for span in exporter.get_finished_spans():
                spans.setdefault(span.name, []).append(span)
            assert failure  # only to have one more trace around
            root = spans["CreateJob"][0].context
            decide = sorted(spans["scheduler.decide"], key=lambda s: s.start_time)
            allocate = sorted(spans["scheduler.allocate"], key=lambda s: s.start_time)
            recover = spans["scheduler.recover"][0]
            assert decide[0].parent.span_id == root.span_id
            assert [x.parent.span_id for x in allocate] == [x.context.span_id for x in decide]
            assert decide[1].parent.span_id == recover.context.span_id
            assert {s.context.trace_id for group in spans.values() for s in group if s.name != "other"} == {
                root.trace_id
            }
            told = int(world.health.asked[0].traceparent.split("-")[2], 16)
            assert told == allocate[0].context.span_id, "the agent launched under the allocation"
        finally:
            telemetry.setup_tracing("test")


async def test_what_the_store_does_not_take_holds_nothing(monkeypatch):
    async with World() as world:
        agents = await world.add(node("s/a"), node("s/b"))
        small = await world.submit(1)
        await world.reaches(small, "RUNNING")
        stored = await world.store.get(key_of(small))
        for agent in agents:
            agent.exit(0)
        await world.reaches(small, "SUCCEEDED")
        monkeypatch.setattr("whaleflux.store.api.MAX_COMMIT_BYTES", len(stored.value) + 850)
        large = await world.submit(8)

        async def told():
            return "bytes are more than" in (await world.job(large)).state_message

        await until(told, "it waits for what can never be")

        async def nothing_is_held():
            return not await world.held()

        await until(nothing_is_held, "its GPUs are free again")
        await world.reaches(await world.submit(1), "RUNNING")
        monkeypatch.undo()
        await world.restart()  # the next leader tries again
        for agent in agents:
            agent.exit(0)
        await world.reaches(large, "RUNNING")


@pytest.mark.parametrize(
    ("networks", "elsewhere"), [(("host-1", "host-2"), True), (("host-1",) * 2, False), (("host-1", ""), False)]
)
async def test_a_task_says_which_node_of_its_gang_is_on_another_host(world, networks, elsewhere):
    agents = await world.add(node("x/a"), node("x/b"), connect=False)
    for agent, network in zip(agents, networks, strict=True):
        agent.network = network
        await agent.connect()
    await running(world, gpus=8)
    ((first,), (second,)) = ([*agent.tasks.values()] for agent in agents)
    assert first.elsewhere == (agents[1].node if elsewhere else "")
    assert second.elsewhere == (agents[0].node if elsewhere else "")


NOT_ROOT = {"kind": "none", "reason": "the agent is not root", "limits": "watched"}
APART = {"kind": "uid", "private_folders": True, "limits": "enforced"}


@pytest.mark.parametrize(
    ("isolations", "simulated", "said"),
    [
        ([APART, APART], False, "isolation: a user for each queue, own folders, limits enforced"),
        ([APART, NOT_ROOT], False, "isolation on sites/x/nodes/b: none (the agent is not root), memory watched"),
        ([NOT_ROOT, NOT_ROOT], True, ""),
        ([{}, {}], False, ""),
    ],
)
async def test_plan_and_job_say_how_work_is_kept_apart(world, isolations, simulated, said):
    agents = await world.add(node("x/a"), node("x/b"))
    for agent, isolation in zip(agents, isolations, strict=True):
        world.nodes[agent.node].facts.isolation.CopyFrom(inventory_pb2.NodeIsolation(**isolation))
        world.nodes[agent.node].facts.simulated = simulated
        world.node_view.set_node(agent.node, world.nodes[agent.node])
    planned = (await world.create(8, dry=True)).decision
    assert [reason for reason in planned.reasons if "isolation" in reason] == ([said] if said else [])
    assert [bool(task.isolation) for task in planned.tasks] == [bool(isolation) for isolation in isolations]
    name = await running(world, gpus=8)
    told = {agent.node: f"uid 2001000003 on {agent.node}" for agent in agents}
    for agent in agents:
        (task,) = agent.tasks
        agent.report(task, pb.TASK_PHASE_RUNNING, isolation=told[agent.node])

    async def is_told() -> bool:
        return {task.node: task.isolation for task in (await world.job(name)).attempt.tasks} == told

    await until(is_told, "both tasks say it")


@pytest.mark.parametrize(("limits", "said"), [("watched", True), ("kernel", False), ("", False)])
async def test_plan_and_job_say_where_the_kernel_does_not_limit_memory(world, limits, said):
    (agent,) = await world.add(node("x/a"))
    world.nodes[agent.node].facts.memory_limits = limits
    world.node_view.set_node(agent.node, world.nodes[agent.node])
    planned = await world.create(1, dry=True, memory_bytes_per_rank=1 << 30)
    job = await world.job(await running(world, gpus=1, memory_bytes_per_rank=1 << 30))
    for decision in (planned.decision, job.decision):
        assert decision.placed
        assert any("memory_per_rank is not limited by the kernel" in reason for reason in decision.reasons) == said
    unlimited = await world.job(await running(world, gpus=1))
    assert not any("memory_per_rank" in reason for reason in unlimited.decision.reasons)
