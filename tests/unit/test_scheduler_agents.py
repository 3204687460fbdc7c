"""Agents' streams: what is acknowledged and when, logs on demand, two replicas, deadlines, news, spans."""

import asyncio
import contextlib

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.scheduler_world import USER, World, node, until
from whaleflux import telemetry
from whaleflux.errors import Denied, Invalid, NotFound, OverLimit, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.v1 import agent_pb2, events_pb2, health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import logs
from whaleflux_scheduler.bootstrap import Peers, assemble
from whaleflux_scheduler.core.observed import Limits
from whaleflux_scheduler.hub import Connection


@pytest.fixture
async def world():
    async with World() as world:
        yield world


async def running(world, gpus=4, **spec):
    name = await world.submit(gpus, **spec)
    await world.reaches(name, "RUNNING")
    return name


class TestConnection:
    def wanted(self, **tasks):
        return lambda _: ({k: agent_pb2.DesiredTask(job=v) for k, v in tasks.items()}, 7)

    async def sent(self, connection, count):
        found = []
        answers = connection.responses()
        async with asyncio.timeout(2):
            async for answer in answers:
                found.append(answer)
                if len(found) == count:
                    break
        await answers.aclose()
        return found

    async def test_everything_first_then_differences(self):
        connection = Connection("n", self.wanted(a="1", b="1"))
        (first,) = await self.sent(connection, 1)
        assert ([t.job for t in first.desired.tasks], first.desired.revision) == (["1", "1"], 7)
        connection._wanted = self.wanted(b="2", c="1")
        connection.kick()
        changes = await self.sent(connection, 3)
        assert changes[0].removed == "a"
        assert sorted(c.changed.job for c in changes[1:]) == ["1", "2"]

    async def test_only_what_is_stored_without_a_gap_is_acknowledged(self):
        connection = Connection("n", self.wanted())
        await self.sent(connection, 1)
        for sequence in (5, 6, 9):
            connection.received(sequence)
        connection.stored(6)
        connection.stored(9)
        assert [r.acknowledged_sequence for r in connection._due()] == [4]
        connection.stored(5)
        assert [r.acknowledged_sequence for r in connection._due()] == [9]
        connection.received(5)
        assert not connection._due()

    async def test_messages_to_a_stuck_agent_are_bounded(self):
        connection = Connection("n", self.wanted())
        with pytest.raises(OverLimit):
            for _ in range(1000):
                connection.send(agent_pb2.SyncResponse(cancel_logs="x"))


class TestStreams:
    async def test_no_report_is_acknowledged_while_the_store_is_down(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        await until(lambda: a.acknowledged == a._sequence, "what it reported so far is acknowledged")
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

        with pytest.raises(Invalid):
            await say(agent_pb2.SyncRequest(report=agent_pb2.TaskReport()))
        with pytest.raises(Denied):
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
        await until(lambda: a.refusal is not None, "it is refused")
        assert isinstance(a.refusal, Denied)
        assert (await world.job(name)).state == pb.JOB_STATE_RUNNING

    async def test_a_newer_stream_replaces_the_older(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world)
        old = a._running
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
        assert [(x.job, len(x.task.gpu_indices), x.usd_per_gpu_hour) for x in held.allocations] == [(name, 4, 2.0)]
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

    def answer(self, agent, data, *, rank=0, epoch=1, end=False):
        chunk = agent_pb2.LogChunk(request=agent.logs[-1].request, rank=rank, epoch=epoch, data=data, end=end)
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
            with pytest.raises(OverLimit):
                async for _ in lines:
                    pass

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
        second = assemble(world.store, None, world.clock, peers, Limits(), "there:2")
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
            await until(lambda: second.term.brain is not None, "the second leads")
            await until(lambda: a.refusal is not None, "the agent is sent away")
            assert a.refusal.reason == "NOT_LEADER"
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)


class TestDeadlines:
    async def test_a_node_that_does_not_accept_is_avoided(self):
        async with World(limits=Limits(accept_s=0.1)) as world:
            a, b = await world.add(node("s/a"), node("s/b"))
            a.obey = b.obey = False
            name = await world.submit(4)
            first = await until(lambda: (a.tasks and a) or (b.tasks and b), "one gets it")
            other = b if first is a else a
            other.obey = True
            job = await world.reaches(name, "RUNNING")
            assert (job.attempt.tasks[0].node, job.restarts, job.recoveries) == (other.node, 0, 0)
            assert "did not accept" in job.past_attempts[0].end_reason

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
        with pytest.raises(Invalid) as refused:
            await world.submit(1, datasets=["c4"])
        assert refused.value.violations[0].field == "job.spec.datasets[0]"
        world.inventory.datasets["datasets/c4"] = inventory_pb2.Dataset(name="datasets/c4", size_bytes=1)
        await world.submit(1, datasets=["c4"])

    async def test_a_name_may_be_used_again_and_its_epochs_go_on(self, world):
        (a,) = await world.add(node("s/a"))
        name = await running(world, 1, job_id="mine")
        a.exit()
        await world.reaches(name, "SUCCEEDED")
        await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), None)
        assert await running(world, 1, job_id="mine") == name
        assert (await world.job(name)).epoch == 2

    async def test_old_ended_jobs_are_deleted(self, monkeypatch):
        monkeypatch.setattr("whaleflux_scheduler.brain.DELETE_AT_ONCE", 2)
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
        names = [await world.submit(1, gpu={"any_of": ["none"]}) for _ in range(5)]
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
        monkeypatch.setattr("whaleflux_scheduler.brain.SHOW_EVERY_S", 0.01)
        await world.add(node("s/a"), node("s/b", model="H200"))
        await running(world, 3, gpu={"any_of": ["H200"]})
        await world.submit(99)

        def value(metric, *labels):
            return telemetry.gauge(metric).labels(*labels)._value.get()

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

    async def test_states_are_published_once_each(self):
        world = World()
        bus = MemoryBus()
        service = assemble(world.store, bus, world.clock, Peers(world.inventory, world.health), Limits(), "here:1")
        loop = asyncio.create_task(service.loops[0]())
        try:
            await until(lambda: service.term.brain is not None, "it leads")
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
