"""The health monitor's rpcs and loops over the memory store, under virtual time, with agents that are queues."""

import asyncio
import contextlib

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Denied, Invalid, NotFound, Unavailable
from whaleflux.events.publisher import Change
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import events_pb2
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux_health_monitor import news
from whaleflux_health_monitor.core.evidence import Probe
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.leading import Leading, Tools
from whaleflux_health_monitor.servicer import HealthServicer

A1, A2, B1, B2, C1 = FIVE = tuple(
    f"sites/{s}/nodes/{n}" for s, n in (("a", "n1"), ("a", "n2"), ("b", "n1"), ("b", "n2"), ("c", "n1"))
)
JOB = "queues/q/jobs/j"
LAUNCH = "00-" + "a" * 32 + "-" + "1" * 16 + "-01"


class Spans:
    """Takes the place of telemetry.emit_span."""

    def __init__(self):
        self.written = []

    def __call__(self, name, start_time, end_time, *, parent="", error="", attributes=None):
        self.written.append({"name": name, "parent": parent, "error": error, "attributes": dict(attributes)})
        return f"00-{'a' * 32}-{len(self.written):016x}-01"


class Agent:
    """One heartbeat stream."""

    def __init__(self, world, name, tasks=()):
        self.world, self.name, self.tasks = world, name, list(tasks)
        self.queue, self.answers, self.error = asyncio.Queue(), [], None
        self.sequence = 0
        self.say(hello={"node": name, "boot_id": "b1", "probe_address": "h:1"})
        self.task = asyncio.create_task(self.stream())

    def say(self, **message):
        self.queue.put_nowait(pb.HeartbeatRequest(**message))

    async def requests(self):
        while True:
            yield await self.queue.get()

    async def stream(self):
        with auth.acting_as(auth.Identity("agent", "/".join(self.name.split("/")[1::2]))):
            calls = self.world.rpc.Heartbeat(self.requests(), None)
            try:
                async with contextlib.aclosing(calls):
                    async for answer in calls:
                        self.answers.append(answer)
            except Exception as error:
                self.error = error

    def beat(self):
        self.sequence += 1
        self.say(beat={"sequence": self.sequence, "tasks": self.tasks})


class World:
    def __init__(self):
        self.store, self.clock, self.spans = MemoryStore(VirtualClock()), VirtualClock(), Spans()
        self.outcome, self.nodes, self.agents = {}, asyncio.Queue(), {}
        self.stopping = asyncio.Event()
        tools = Tools(self.store, self.clock, self.probe, self.watch_nodes, Timing(), self.spans)
        self.leading = Leading(tools, "me:1")
        self.rpc = HealthServicer(self.store, self.leading, self.clock, self.stopping)
        self.task = asyncio.create_task(self.leading.run())

    async def probe(self, node, address):
        return self.outcome.get(node, Probe.ANSWERED)

    async def watch_nodes(self, since):
        while True:
            yield await self.nodes.get()

    def inventory_says(self, node, intent=ipb.NODE_INTENT_ACTIVE):
        self.nodes.put_nowait(ipb.WatchNodesResponse(modified=ipb.Node(name=node, intent=intent)))

    def join(self, *names, tasks=()):
        for name in names:
            self.inventory_says(name)
            self.agents[name] = Agent(self, name, tasks)

    async def kill(self, name, outcome=Probe.REFUSED):
        self.outcome[name] = outcome
        agent = self.agents.pop(name)
        agent.task.cancel()
        await asyncio.wait({agent.task})

    async def run(self, seconds):
        for _ in range(round(seconds * 10)):
            for agent in self.agents.values():
                if round(self.clock.monotonic() * 10) % 5 == 0:
                    agent.beat()
            await self.clock.advance(0.1)

    async def health(self, name):
        return await self.rpc.GetNodeHealth(pb.GetNodeHealthRequest(name=name), None)

    async def phase(self, name):
        return pb.NodePhase.Name((await self.health(name)).phase).removeprefix("NODE_PHASE_")

    async def report(self, **more):
        fields = {"job": JOB, "epoch": 1, "task": "j-1-1", "node": A2, "exit_code": 1, "nodes": [A1, A2],
                  "traceparent": LAUNCH}  # fmt: skip
        call = asyncio.create_task(self.rpc.ReportFailure(pb.ReportFailureRequest(**{**fields, **more}), None))
        begun = self.clock.monotonic()
        while not call.done():
            await self.clock.advance(0.01)
            assert self.clock.monotonic() - begun < 1
        self.decided_in_s = self.clock.monotonic() - begun
        return await call

    async def close(self):
        self.task.cancel()
        for agent in self.agents.values():
            agent.task.cancel()
        await asyncio.wait({self.task, *(a.task for a in self.agents.values())})


@pytest.fixture
async def world():
    world = World()
    await world.clock.advance(0.1)
    yield world
    await world.close()


def running(node_index, epoch=1, step=0):
    return {"task": f"j-{epoch}-{node_index}", "job": JOB, "epoch": epoch, "step": step, "traceparent": LAUNCH,
            "alive": True}  # fmt: skip


async def test_agents_become_ready_and_are_acknowledged(world):
    world.inventory_says(B1)
    await world.run(1)
    assert await world.phase(B1) == "REGISTERED"
    world.join(*FIVE)
    await world.run(3)
    assert {await world.phase(n) for n in FIVE} == {"READY"}
    answers = world.agents[A1].answers
    assert answers[0].acknowledged == 0 and answers[-1].acknowledged >= 4
    assert (await world.health(A1)).boot_id == "b1"


async def test_heartbeats_are_not_written(world):
    world.join(*FIVE)
    await world.run(2)
    before = (await world.store.list("")).revision
    await world.run(20)
    assert (await world.store.list("")).revision == before


async def test_a_killed_node_is_suspected_then_fenced_with_one_incident_and_a_span_per_task(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    await world.run(3)
    await world.kill(A1)
    await world.run(0.5)
    suspect = await world.health(A1)
    assert (await world.phase(A1), suspect.reason) == ("SUSPECT", "HOST_REFUSES")
    assert suspect.incident and not world.spans.written
    await world.run(6)
    assert await world.phase(A1) == "UNREACHABLE"
    incident = await world.rpc.GetIncident(pb.GetIncidentRequest(name=suspect.incident), None)
    assert (list(incident.nodes), list(incident.jobs)) == ([A1], [JOB])
    assert incident.HasField("fence_time") and not incident.HasField("end_time")
    [span] = world.spans.written
    assert (span["name"], span["parent"], span["error"]) == ("health.failure", LAUNCH, "SILENT_TOO_LONG")
    assert incident.traceparents[JOB].endswith(f"{1:016x}-01") and incident.epochs[JOB] == 1
    world.join(A1)
    await world.run(1)
    assert (await world.phase(A1), (await world.health(A1)).incident) == ("READY", "")
    assert (await world.rpc.GetIncident(pb.GetIncidentRequest(name=suspect.incident), None)).HasField("end_time")
    assert not (await world.rpc.ListIncidents(pb.ListIncidentsRequest(), None)).incidents


async def test_every_phase_is_visible_in_a_watch(world):
    world.join(*FIVE)
    await world.run(2)
    seen = []

    async def look():
        async for change in world.rpc.WatchNodeHealth(pb.WatchNodeHealthRequest(), None):
            if change.WhichOneof("event") == "modified" and change.modified.name == A1:
                seen.append(pb.NodePhase.Name(change.modified.phase).removeprefix("NODE_PHASE_"))

    looking = asyncio.create_task(look())
    await world.run(0.2)
    await world.kill(A1)
    await world.report(epoch=1)
    await world.run(1)
    looking.cancel()
    assert seen[0] == "SUSPECT" and seen[-1] == "UNREACHABLE"


async def test_a_failure_after_a_node_was_killed_blames_it_fences_it_at_once_and_is_traced_once(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    world.agents[A2].tasks = [running(1)]
    await world.run(3)
    await world.kill(A1)
    incident = await world.report()
    assert world.decided_in_s <= 0.3
    assert (incident.kind, list(incident.nodes)) == (pb.INCIDENT_KIND_PEER_LOST, [A1])
    assert not incident.application_fault
    await world.run(0.5)
    assert await world.phase(A1) == "UNREACHABLE"
    fenced = await world.health(A1)
    node_incident = await world.rpc.GetIncident(pb.GetIncidentRequest(name=fenced.incident), None)
    assert node_incident.traceparents[JOB] == incident.traceparents[JOB]
    [span] = world.spans.written
    assert span["parent"] == LAUNCH and span["error"] == "PEER_LOST"
    again = await world.report()
    assert again.name == incident.name and len(world.spans.written) == 1


async def test_a_failure_reported_after_the_fence_continues_the_same_span(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    await world.run(3)
    await world.kill(A1)
    await world.run(6)
    incident = await world.report()
    assert len(world.spans.written) == 1
    assert incident.traceparents[JOB].endswith(f"{1:016x}-01")


async def test_a_failure_among_healthy_peers_is_the_works_own(world):
    world.join(*FIVE)
    await world.run(3)
    incident = await world.report(exit_code=3)
    assert incident.kind == pb.INCIDENT_KIND_PROCESS_EXIT and incident.application_fault
    assert incident.HasField("end_time")
    assert world.decided_in_s <= 0.3
    assert await world.phase(A1) == "READY"
    other = await world.report(epoch=2, message="CUDA out of memory")
    assert other.kind == pb.INCIDENT_KIND_OUT_OF_MEMORY and other.name != incident.name


async def test_when_nothing_can_be_told_in_time_the_best_guess_is_the_answer(world):
    world.join(*FIVE)
    await world.run(3)

    async def slow(node, address):
        await asyncio.Event().wait()

    object.__setattr__(world.leading._tools, "probe", slow)
    incident = await world.report()
    assert 0.19 <= world.decided_in_s <= 0.3
    assert incident.kind == pb.INCIDENT_KIND_PROCESS_EXIT


async def test_racing_reports_of_one_failure_make_one_incident(world):
    world.join(*FIVE)
    await world.run(3)
    request = pb.ReportFailureRequest(job=JOB, epoch=4, task="t", node=A2, nodes=[A1, A2], traceparent=LAUNCH)
    calls = [asyncio.create_task(world.rpc.ReportFailure(request, None)) for _ in range(5)]
    await world.run(1)
    assert len({(await call).name for call in calls}) == 1
    assert len(world.spans.written) == 1


async def test_a_partition_is_one_incident_of_its_site(world):
    world.join(*FIVE)
    await world.run(3)
    await world.kill(A1, Probe.NO_ROUTE)
    await world.kill(A2, Probe.NO_ROUTE)
    await world.run(30)
    first, second = await world.health(A1), await world.health(A2)
    assert first.reason == second.reason == "SITE_PARTITIONED"
    assert first.incident == second.incident
    incident = await world.rpc.GetIncident(pb.GetIncidentRequest(name=first.incident), None)
    assert incident.kind == pb.INCIDENT_KIND_SITE_PARTITIONED and set(incident.nodes) == {A1, A2}
    world.join(A1, A2)
    await world.run(2)
    assert await world.phase(A1) == await world.phase(A2) == "READY"
    assert (await world.rpc.GetIncident(pb.GetIncidentRequest(name=first.incident), None)).HasField("end_time")
    assert not (await world.rpc.ListIncidents(pb.ListIncidentsRequest(), None)).incidents


async def test_operators_intent_is_mirrored_and_removed_nodes_are_forgotten(world):
    world.join(*FIVE)
    await world.run(1)
    world.inventory_says(A1, ipb.NODE_INTENT_DRAINING)
    await world.run(0.5)
    assert await world.phase(A1) == "DRAINING"
    world.inventory_says(A1, ipb.NODE_INTENT_RETIRED)
    await world.run(0.5)
    assert await world.phase(A1) == "RETIRED"
    world.nodes.put_nowait(ipb.WatchNodesResponse(deleted=A1))
    await world.run(0.5)
    with pytest.raises(NotFound):
        await world.health(A1)


async def test_an_xid_becomes_a_condition_once(world):
    world.join(A1, A2)
    await world.run(1)
    for _ in range(2):
        world.agents[A1].say(observation={"kind": "XID", "code": 79, "gpu_index": 3, "detail": "fell off the bus"})
    await world.run(0.5)
    [condition] = (await world.health(A1)).conditions
    assert (condition.type, condition.reason) == ("GpuHealthy", "XID_79")
    assert "GPU 3" in condition.message


async def test_a_neighbour_is_asked_for_what_cannot_be_seen_from_here(world):
    world.join(*FIVE)
    await world.run(2)
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(2)
    assert any("h:1" in answer.probe for answer in world.agents[A2].answers)
    assert not any(answer.probe for answer in world.agents[B1].answers)
    world.agents[A2].say(observation={"kind": "PEER_REFUSED", "detail": "h:1"})
    await world.run(0.5)
    assert (await world.health(A1)).reason == "HOST_REFUSES"


async def test_a_follower_answers_not_leader_and_streams_end_with_the_leadership(world):
    world.join(A1, A2)
    await world.run(1)
    world.task.cancel()
    await asyncio.wait({world.task})
    await world.clock.advance(0.2)
    assert isinstance(world.agents[A1].error, Unavailable)
    assert world.agents[A1].error.reason == "NOT_LEADER"
    with pytest.raises(Unavailable) as refused:
        await world.rpc.ReportFailure(
            pb.ReportFailureRequest(job=JOB, epoch=1, task="t", node=A2, nodes=[A1, A2]), None
        )
    assert refused.value.reason == "NOT_LEADER"
    assert await world.phase(A1) == "READY"  # reads go on


async def test_a_lost_leadership_writes_nothing_and_the_next_begins_with_what_was_written(world):
    world.join(*FIVE)
    await world.run(2)
    await world.kill(A1)
    await world.run(7)
    leader = await world.store.get(keys.LEADERS + "health_monitor")
    assert leader is not None and await world.phase(A1) == "UNREACHABLE"
    agents = dict(world.agents)
    world.task.cancel()
    await asyncio.wait({world.task})
    for agent in agents.values():
        await asyncio.wait({agent.task})
    world.agents.clear()
    world.task = asyncio.create_task(world.leading.run())
    await world.clock.advance(0.2)
    world.join(A2, B1, B2)
    await world.run(4)
    assert await world.phase(A1) == "UNREACHABLE"
    assert await world.phase(C1) == "READY"  # not heard yet, and not judged yet
    await world.run(6)
    assert await world.phase(C1) != "READY"
    assert await world.phase(B1) == "READY"


async def test_a_stopping_monitor_takes_its_own_closing_for_no_evidence(world):
    world.join(*FIVE)
    await world.run(2)
    world.stopping.set()
    await world.kill(A1)
    await world.run(1)
    assert await world.phase(A1) == "READY"


async def test_an_agent_speaks_for_itself_alone_and_says_hello_first(world):
    with auth.acting_as(auth.Identity("agent", "a/n2")):
        for first, error in (
            ({"hello": {"node": A1}}, Denied),
            ({"beat": {"sequence": 1}}, Invalid),
            ({"hello": {"node": "n1"}}, Invalid),
            ({"hello": {"node": A2, "boot_id": "x" * 65}}, Invalid),
        ):

            async def requests(first=first):
                yield pb.HeartbeatRequest(**first)
                await asyncio.Event().wait()

            stream = world.rpc.Heartbeat(requests(), None)
            with pytest.raises(error):
                await anext(stream)


@pytest.mark.parametrize(
    "bad", [{"job": "x"}, {"epoch": 0}, {"task": ""}, {"message": "x" * 20_000}, {"nodes": ["n"] * 20_001}]
)
async def test_malformed_failures_are_refused(world, bad):
    fields = {"job": JOB, "epoch": 1, "task": "t", "node": A2, "nodes": [A1, A2]}
    with pytest.raises(Invalid):
        await world.rpc.ReportFailure(pb.ReportFailureRequest(**{**fields, **bad}), None)


async def test_lists_are_paged(world):
    world.join(*FIVE)
    await world.run(2)
    for epoch in range(1, 6):
        await world.report(epoch=epoch)
    page = await world.rpc.ListNodeHealth(pb.ListNodeHealthRequest(page_size=3), None)
    rest = await world.rpc.ListNodeHealth(pb.ListNodeHealthRequest(page_size=3, page_token=page.next_page_token), None)
    assert [h.name for h in (*page.node_health, *rest.node_health)] == sorted(FIVE)
    seen, token = [], ""
    while True:
        answer = await world.rpc.ListIncidents(
            pb.ListIncidentsRequest(page_size=2, page_token=token, show_ended=True), None
        )
        seen += [i.epochs[JOB] for i in answer.incidents]
        if not (token := answer.next_page_token):
            break
    assert seen == [5, 4, 3, 2, 1]
    with pytest.raises(Invalid):
        await world.rpc.ListIncidents(pb.ListIncidentsRequest(page_token="x"), None)


async def test_news_tell_each_phase_and_each_stage_of_an_incident_once(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    await world.run(2)
    await world.kill(A1)
    await world.run(7)
    world.join(A1)
    await world.run(1)
    told, known = [], {}
    stream = world.store.watch(keys.ROOT, after=0)
    async with contextlib.aclosing(stream):
        async for batch in stream:
            if not batch.events:
                break
            for event in batch.events:
                change = Change(event.key, known.get(event.key), event.entry, batch.revision)
                known[event.key] = event.entry
                describe = {keys.NODE_HEALTH: news.of_health, keys.INCIDENTS: news.of_incident}.get(
                    next((p for p in (keys.NODE_HEALTH, keys.INCIDENTS) if event.key.startswith(p)), "")
                )
                if describe and (item := describe(change, world.clock.now())):
                    said = events_pb2.Event.FromString(item.data)
                    if A1 in (said.resource, said.attributes["nodes"]):
                        told.append((item.subject.split(".")[3], said.what))
                        last = item
            if batch.revision >= (await world.store.list("")).revision:
                break
    assert told == [
        ("node", "READY"), ("incident", "OPENED"), ("node", "SUSPECT"), ("incident", "FENCED"),
        ("node", "UNREACHABLE"), ("incident", "CLOSED"), ("node", "READY"),
    ]  # fmt: skip
    assert last.subject == "wf.v1.hub.node.a_n1.phase"
