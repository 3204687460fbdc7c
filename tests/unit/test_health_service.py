"""The health monitor's rpcs and loops over the memory store, under virtual time, with agents that are queues."""

import asyncio
import contextlib
from datetime import timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import REGISTRY

from tests.support.acting import AsAdmin
from whaleflux.clock import VirtualClock
from whaleflux.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from whaleflux.events.publisher import EntryChange
from whaleflux.rpc import auth
from whaleflux.store import Put, keys, placements
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.audit import NoAudit
from whaleflux.v1 import events_pb2, types_pb2
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux_health_monitor import news
from whaleflux_health_monitor.campaign import Campaign
from whaleflux_health_monitor.core.evidence import Probe
from whaleflux_health_monitor.core.timing import Timing
from whaleflux_health_monitor.figures import show_no_gpu_faults
from whaleflux_health_monitor.leader_session import Dependencies
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

    def __init__(self, world, name, tasks=(), machine=""):
        self.world, self.name, self.tasks = world, name, list(tasks)
        self.queue, self.answers, self.error = asyncio.Queue(), [], None
        self.sequence, self.silent = 0, False
        self.say(hello={"node": name, "boot_id": "b1", "probe_address": "h:1", "machine_id": machine})
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

    def heartbeat(self):
        self.sequence += 1
        self.say(heartbeat={"sequence": self.sequence, "tasks": self.tasks})


class Trail(list, NoAudit):
    def record(self, record):
        self.append(record)


class World:
    def __init__(self):
        self.store, self.clock, self.spans = MemoryStore(VirtualClock()), VirtualClock(), Spans()
        self.outcome, self.nodes, self.agents = {}, asyncio.Queue(), {}
        self.stopping = asyncio.Event()
        self.dependencies = Dependencies(self.store, self.clock, self.probe, self.watch_nodes, Timing(), self.spans)
        self.campaign = Campaign(self.dependencies, "me:1")
        self.trail = Trail()
        health = HealthServicer(self.store, self.campaign, self.clock, self.stopping, trail=self.trail)
        self.rpc = AsAdmin(health)
        self.task = asyncio.create_task(self.campaign.run())

    async def probe(self, node, address):
        return self.outcome.get(node, Probe.ANSWERED)

    async def watch_nodes(self, since):
        while True:
            yield await self.nodes.get()

    def inventory_says(self, node, intent=ipb.NODE_INTENT_ACTIVE, facts=None):
        self.nodes.put_nowait(ipb.WatchNodesResponse(modified=ipb.Node(name=node, intent=intent, facts=facts)))

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
                if not agent.silent and round(self.clock.monotonic() * 10) % 5 == 0:
                    agent.heartbeat()
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
    await world.store.commit(placements.put(JOB, 1, "uid", FIVE))
    await world.clock.advance(0.1)
    yield world
    await world.close()


def running(node_index, epoch=1, step=0):
    return {"task": f"j-{epoch}-{node_index}", "job": JOB, "epoch": epoch, "step": step, "traceparent": LAUNCH,
            "alive": True}  # fmt: skip


def shown(metric, **labels):
    return REGISTRY.get_sample_value(metric, labels)


def refused():
    """Claims of heartbeats about tasks that are placed elsewhere, so far."""
    return REGISTRY.get_sample_value("whaleflux_agent_claims_refused_total", {"what": "heartbeat"}) or 0.0


async def test_an_agent_says_nothing_about_tasks_that_are_placed_elsewhere(world):
    """b/n2 claims to run the job that runs on a/n1, and to be ahead: neither does it belong to b/n2's incident, nor does a/n1 profit."""
    await world.store.commit(placements.put(JOB, 1, "uid", [A1]))
    world.join(A1, B2, C1)
    before = refused()
    for step in range(20):
        world.agents[A1].tasks, world.agents[B2].tasks = [running(0, step=1)], [running(1, step=step)]
        await world.run(0.5)
    assert refused() > before
    await world.kill(B2, Probe.NO_ROUTE)
    await world.run(8)
    incident = await world.rpc.GetIncident(pb.GetIncidentRequest(name=(await world.health(B2)).incident), None)
    assert (list(incident.nodes), list(incident.jobs)) == ([B2], [])
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(8)
    incident = await world.rpc.GetIncident(pb.GetIncidentRequest(name=(await world.health(A1)).incident), None)
    assert list(incident.jobs) == [JOB]


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


async def test_a_record_that_cannot_be_read_holds_up_no_leader_and_no_listing():
    world = World()
    lost = [keys.of_name(keys.NODE_HEALTH, A1), keys.of_name(keys.INCIDENTS, "incidents/i1")]
    await world.store.commit(*(Put(key, b"\xff garbage") for key in lost))
    await world.clock.advance(0.1)
    world.join(A2)
    await world.run(3)
    assert await world.phase(A2) == "READY"
    listed = await world.rpc.ListNodeHealth(pb.ListNodeHealthRequest(), None)
    assert ([health.name for health in listed.node_health], list(listed.unreadable)) == ([A2], [A1])
    incidents = await world.rpc.ListIncidents(pb.ListIncidentsRequest(show_ended=True), None)
    assert (list(incidents.incidents), list(incidents.unreadable)) == ([], ["incidents/i1"])
    world.join(A1)
    await world.run(3)
    assert await world.phase(A1) == "READY"
    await world.close()


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
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(0.5)
    suspect = await world.health(A1)
    assert (await world.phase(A1), suspect.reason) == ("SUSPECT", "STREAM_LOST")
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
    assert (incident.kind, list(incident.nodes)) == (pb.INCIDENT_KIND_NODE_LOST, [A1])
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
    second = await world.report(job="queues/q/jobs/other")
    listed = await world.rpc.ListIncidents(pb.ListIncidentsRequest(show_ended=True), None)
    assert [one.name for one in listed.incidents] == [incident.name] == [second.name] == [fenced.incident], (
        "one loss is one"
    )
    assert set(listed.incidents[0].failed) == {JOB, "queues/q/jobs/other"}


async def test_a_loss_that_a_job_noticed_first_is_one_incident_too(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    await world.run(3)
    first = await world.report(disconnected_nodes=[A1])
    assert first.kind == pb.INCIDENT_KIND_PEER_LOST
    await world.kill(A1)
    await world.run(6)
    assert (await world.health(A1)).incident == first.name
    listed = await world.rpc.ListIncidents(pb.ListIncidentsRequest(show_ended=True), None)
    assert [(one.name, one.kind) for one in listed.incidents] == [(first.name, pb.INCIDENT_KIND_NODE_LOST)]


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

    object.__setattr__(world.dependencies, "probe", slow)
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


async def test_a_partition_of_a_large_site_writes_its_incident_once_a_tick_not_once_a_node(world):
    nodes = [f"sites/big/nodes/n{i}" for i in range(200)]
    world.join(B1, B2, *nodes)
    await world.run(3)
    before = (await world.store.list("")).revision
    for node in nodes:
        world.outcome[node] = Probe.NO_ROUTE
        world.agents[node].silent = True
    await world.run(5)
    assert {(await world.health(node)).reason for node in nodes} == {"SITE_PARTITIONED"}
    written, kept = 0, {}
    newest = max(entry.revision for entry in (await world.store.list(keys.INCIDENTS)).entries)
    async with contextlib.aclosing(world.store.watch(keys.INCIDENTS, after=before)) as watch:
        async for batch in watch:
            written += sum(len(event.entry.value) for event in batch.events if event.entry)
            kept.update({event.key: len(event.entry.value) for event in batch.events if event.entry})
            if batch.revision >= newest:
                break
    assert written <= 12 * sum(kept.values())


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


def machine(*sick, conditions=()):
    """Facts of a machine with four GPUs; `sick` are index and reason."""
    facts = ipb.NodeFacts(gpus=[{"index": i, "uuid": f"GPU-{i}", "healthy": True} for i in range(4)])
    for index, reason in sick:
        facts.gpus[index].healthy, facts.gpus[index].unhealthy_reason = False, reason
    for kind, reason in conditions:
        facts.conditions.add(type=kind, status=types_pb2.CONDITION_STATUS_FALSE, reason=reason, message="why")
    return facts


def conditions(health):
    status = types_pb2.ConditionStatus.Name
    return [(c.type, status(c.status).removeprefix("CONDITION_STATUS_"), c.reason) for c in health.conditions]


async def test_a_gpu_that_the_facts_call_unhealthy_is_a_condition_until_they_do_not(world):
    world.inventory_says(A1, facts=machine((3, "GPU_LOST: memory: GPU is lost")))
    world.join(A2)
    await world.run(1)
    health = await world.health(A1)
    assert conditions(health) == [("GpuHealthy", "FALSE", "GPU_LOST")]
    assert health.conditions[0].message == "GPU 3: GPU_LOST: memory: GPU is lost"
    since = health.conditions[0].last_transition_time
    world.inventory_says(A1, facts=machine((2, "XID_48: reset the GPU"), (3, "GPU_LOST: gone")))
    await world.run(1)
    health = await world.health(A1)
    assert (
        conditions(health) == [("GpuHealthy", "FALSE", "XID_48")] and health.conditions[0].last_transition_time == since
    )
    world.inventory_says(A1, facts=machine())
    await world.run(1)
    assert conditions(await world.health(A1)) == [("GpuHealthy", "TRUE", "CLEARED")]


async def test_a_node_without_a_driver_says_so_from_its_first_record_on(world):
    world.inventory_says(
        A1, facts=ipb.NodeFacts(conditions=machine(conditions=[("DriverWorks", "NO_DRIVER")]).conditions)
    )
    await world.run(0.5)
    assert (await world.phase(A1), conditions(await world.health(A1))) == (
        "REGISTERED", [("DriverWorks", "FALSE", "NO_DRIVER")],
    )  # fmt: skip
    world.agents[A1] = Agent(world, A1)
    await world.run(1)
    assert (await world.phase(A1), conditions(await world.health(A1))) == (
        "READY", [("DriverWorks", "FALSE", "NO_DRIVER")],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "kind"), [(48, "GPU_FAULT"), (79, "GPU_FAULT"), (94, "GPU_FAULT"), (13, "PROCESS_EXIT")]
)
async def test_an_xid_of_the_hardware_is_to_blame_for_the_end_of_work_and_a_programs_is_not(world, code, kind):
    world.join(*FIVE)
    await world.run(3)
    world.agents[A2].say(observation={"kind": "XID", "code": code, "gpu_index": 3, "detail": f"Xid {code}"})
    await world.run(0.1)
    incident = await world.report(message="CUDA error")
    assert incident.kind == getattr(pb, f"INCIDENT_KIND_{kind}")
    assert incident.application_fault == (kind == "PROCESS_EXIT")
    assert list(incident.nodes) == ([A2] if kind == "GPU_FAULT" else [])
    assert incident.HasField("end_time")  # what stays broken is a condition of the node


async def test_the_report_of_a_fault_may_come_after_the_exit(world):
    world.join(*FIVE)
    await world.run(3)
    report = asyncio.create_task(world.report(message="NCCL watchdog thread terminated"))
    await asyncio.sleep(0)
    world.agents[A1].say(observation={"kind": "XID", "code": 79, "gpu_index": 0, "detail": "fell off the bus"})
    incident = await report
    assert (incident.kind, list(incident.nodes)) == (pb.INCIDENT_KIND_GPU_FAULT, [A1])
    assert world.decided_in_s <= 0.3


async def test_a_gpu_that_becomes_unhealthy_is_to_blame_and_one_that_was_before_is_not(world):
    world.inventory_says(A2, facts=machine((0, "GPU_LOST: gone")))
    world.join(A1, B1, B2, C1)
    world.agents[A2] = Agent(world, A2)
    await world.run(3)
    assert (await world.report()).kind == pb.INCIDENT_KIND_PROCESS_EXIT
    world.inventory_says(A2, facts=machine((0, "GPU_LOST: gone"), (3, "RESET_GPU: the driver asks for it")))
    await world.run(0.2)
    assert (await world.report(epoch=2)).kind == pb.INCIDENT_KIND_GPU_FAULT
    await world.run(60)
    assert (await world.report(epoch=3)).kind == pb.INCIDENT_KIND_PROCESS_EXIT


async def test_the_words_of_an_ecc_death_are_no_fault_of_the_user(world):
    world.join(*FIVE)
    await world.run(3)
    incident = await world.report(message="RuntimeError: CUDA error: uncorrectable ECC error encountered")
    assert (incident.kind, list(incident.nodes)) == (pb.INCIDENT_KIND_GPU_FAULT, [A2])
    assert not incident.application_fault


async def test_a_neighbour_is_asked_for_what_cannot_be_seen_from_here(world):
    world.join(*FIVE)
    await world.run(2)
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(2)
    assert any("h:1" in answer.indirect_probes for answer in world.agents[A2].answers)
    assert not any(answer.indirect_probes for answer in world.agents[B1].answers)
    world.agents[A2].say(observation={"kind": "PEER_REFUSED", "detail": "h:1"})
    await world.run(0.5)
    assert (await world.health(A1)).reason == "HOST_REFUSES"


async def test_a_copy_of_a_machine_that_gives_signs_of_life_is_refused_and_a_rebooted_machine_is_not(world):
    world.join(A1, A2)
    await world.run(2)
    copied = pb.HeartbeatHello(node=A1, boot_id="boot-of-the-copy")
    with pytest.raises(FailedPrecondition) as refused:
        world.campaign.session.hello(copied)
    assert refused.value.reason == "NODE_RUNS_TWICE" and "b1" in str(refused.value)
    world.agents[A1].silent = True  # its host went down without a word: the stream stands until the transport notices
    await world.run(4)
    world.campaign.session.hello(copied)


@pytest.mark.parametrize("behind_s", [299, -299])
async def test_the_times_of_an_agent_whose_clock_is_wrong_are_read_by_its_clock(world, behind_s):
    """An Xid that was seen now counts, one that was seen long ago does not, five minutes either way."""
    world.join(A1, A2)
    await world.run(1)
    for name, age_s in ((A1, 60), (A2, 1)):
        agent, shown = world.agents[name], world.clock.now() - timedelta(seconds=behind_s)
        world.campaign.session.hello(pb.HeartbeatHello(node=name, boot_id="b1", time=shown))
        seen = shown - timedelta(seconds=age_s)
        agent.say(observation={"id": "x/1", "kind": "XID", "code": 79, "gpu_index": 0, "time": seen})
    await world.run(0.5)
    assert (await world.report(node=A1, epoch=1, nodes=[A1])).kind == pb.INCIDENT_KIND_PROCESS_EXIT
    assert (await world.report(node=A2, epoch=2, nodes=[A2])).kind == pb.INCIDENT_KIND_GPU_FAULT


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
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(7)
    leader = await world.store.get(keys.LEADERS + "health_monitor")
    assert leader is not None and await world.phase(A1) == "UNREACHABLE"
    await next_leader(world, A2, B1, B2)
    await world.run(4)
    assert await world.phase(A1) == "UNREACHABLE"
    assert await world.phase(C1) == "READY"  # not heard yet, and not judged yet
    await world.run(6)
    assert await world.phase(C1) != "READY"
    assert await world.phase(B1) == "READY"


async def test_the_next_leader_shows_how_many_nodes_are_in_which_phase_before_any_changes(world):
    world.join(*FIVE)
    await world.run(2)
    await next_leader(world, *FIVE)
    assert [shown("whaleflux_nodes", site=site, phase="READY") for site in "abc"] == [2, 2, 1]
    assert [shown("whaleflux_nodes", site=site, phase="UNREACHABLE") for site in "abc"] == [0, 0, 0]


async def test_a_site_that_is_cut_off_is_shown_until_it_is_back_and_one_that_is_gone_no_more(world):
    world.join(*FIVE)
    await world.run(2)
    assert [shown("whaleflux_sites_cut_off", site=site) for site in "abc"] == [0, 0, 0]
    await world.kill(A1, Probe.NO_ROUTE)
    await world.kill(A2, Probe.NO_ROUTE)
    await world.run(8)
    assert [shown("whaleflux_sites_cut_off", site=site) for site in "abc"] == [1, 0, 0]
    assert shown("whaleflux_nodes", site="a", phase="SUSPECT") == 2
    world.join(A1, A2)
    await world.run(2)
    assert [shown("whaleflux_sites_cut_off", site=site) for site in "abc"] == [0, 0, 0]
    world.nodes.put_nowait(ipb.WatchNodesResponse(deleted=C1))
    await world.run(1)
    assert [shown("whaleflux_sites_cut_off", site=site) for site in "abc"] == [0, 0, None]
    assert shown("whaleflux_nodes", site="c", phase="READY") is None


async def test_nodes_with_a_broken_gpu_are_shown_until_it_is_well(world):
    world.join(*FIVE)
    await world.run(2)
    assert [shown("whaleflux_nodes_with_broken_gpus", site=site) for site in "abc"] == [0, 0, 0]
    world.inventory_says(A1, facts=machine((2, "XID_48: reset the GPU")))
    await world.run(1)
    assert [shown("whaleflux_nodes_with_broken_gpus", site=site) for site in "abc"] == [1, 0, 0]
    world.inventory_says(A1, facts=machine())
    await world.run(1)
    assert [shown("whaleflux_nodes_with_broken_gpus", site=site) for site in "abc"] == [0, 0, 0]


@pytest.mark.parametrize(("code", "action"), [(94, "restart_work"), (48, "reset_gpu"), (79, "restart_host")])
async def test_an_xid_of_the_hardware_is_counted_by_what_the_gpu_needs(world, code, action):
    show_no_gpu_faults()
    before = shown("whaleflux_gpu_faults_total", action=action)
    world.join(*FIVE)
    await world.run(2)
    for seen in (code, 13):
        world.agents[A2].say(observation={"kind": "XID", "code": seen, "gpu_index": 3, "detail": "Xid"})
    await world.run(0.5)
    assert shown("whaleflux_gpu_faults_total", action=action) == before + 1


async def stopped_in_order(world, name, kind):
    """The agent says goodbye and goes when that is on record."""
    agent = world.agents.pop(name)
    agent.say(goodbye={"kind": kind})
    while not any(answer.goodbye_stored for answer in agent.answers):
        await world.clock.advance(0.01)
    await asyncio.wait({agent.task})
    world.outcome[name] = Probe.REFUSED


async def next_leader(world, *connected):
    """Another replica takes over; only these agents find it."""
    agents = dict(world.agents)
    world.task.cancel()
    await asyncio.wait({world.task})
    for agent in agents.values():
        await asyncio.wait({agent.task})
    world.agents.clear()
    world.task = asyncio.create_task(world.campaign.run())
    await world.clock.advance(0.2)
    world.join(*connected)


async def test_a_goodbye_is_on_record_before_it_is_acknowledged_and_survives_a_change_of_leader(world):
    world.join(*FIVE)
    await world.run(2)
    await stopped_in_order(world, A1, pb.STOP_KIND_AGENT_RESTART)
    announced = (await world.health(A1)).announced_stop
    assert announced.kind == pb.STOP_KIND_AGENT_RESTART
    assert announced.expire_time.ToSeconds() - announced.announce_time.ToSeconds() == 60
    await next_leader(world, A2, B1, B2, C1)
    await world.run(40)
    assert ((await world.health(A1)).reason, await world.phase(A1)) == ("AGENT_RESTARTING", "SUSPECT")
    world.outcome.pop(A1)
    world.join(A1)
    await world.run(1)
    assert await world.phase(A1) == "READY" and not (await world.health(A1)).HasField("announced_stop")


async def test_an_announced_restart_that_never_ends_expires_under_the_next_leader_too(world):
    world.join(*FIVE)
    await world.run(2)
    await stopped_in_order(world, A1, pb.STOP_KIND_AGENT_RESTART)
    await world.run(30)
    await next_leader(world, A2, B1, B2, C1)
    await world.run(25)
    assert await world.phase(A1) == "SUSPECT"
    await world.run(15)
    assert await world.phase(A1) == "UNREACHABLE" and not (await world.health(A1)).HasField("announced_stop")


async def test_a_host_that_shuts_down_is_fenced_soon_and_its_work_is_not_at_fault(world):
    world.join(*FIVE)
    await world.run(2)
    await stopped_in_order(world, A2, pb.STOP_KIND_HOST_SHUTDOWN)
    incident = await world.report(exit_code=-15)
    assert not incident.application_fault
    await world.run(7)
    assert await world.phase(A2) == "UNREACHABLE"


async def test_what_an_agent_refused_a_rank_is_in_the_audit_trail(world):
    world.join(A1)
    await world.until_ready(A1) if hasattr(world, "until_ready") else await asyncio.sleep(1)
    detail = (
        "confirm_intact NOT_OWNER: checkpoint: 'queues/q/jobs/other/...' is not one of queues/q/jobs/j (socket of t)"
    )
    world.agents[A1].say(observation={"id": "x/1", "kind": "RANK_REFUSED", "job": "queues/q/jobs/j", "detail": detail})
    await world.run(0.2)
    (written,) = world.trail
    assert (written.subject, written.method, written.reason, written.peer) == (
        "rank/queues/q/jobs/j",
        "rank socket confirm_intact",
        "NOT_OWNER",
        A1,
    )


async def test_observations_are_acknowledged_and_one_that_is_old_when_it_comes_says_nothing_of_now(world):
    world.join(*FIVE)
    await world.run(2)
    agent = world.agents[A2]
    old = Timestamp()
    old.FromDatetime(world.clock.now() - timedelta(seconds=60))
    agent.say(observation={"id": "x/1", "kind": "XID", "code": 79, "time": old})
    await world.run(0.2)
    assert agent.answers[-1].acknowledged_observation == "x/1"
    assert (await world.report()).kind == pb.INCIDENT_KIND_PROCESS_EXIT


async def test_a_stopping_monitor_takes_its_own_closing_for_no_evidence(world):
    world.join(*FIVE)
    await world.run(2)
    world.stopping.set()
    await world.kill(A1)
    await world.run(1)
    assert await world.phase(A1) == "READY"


async def test_a_second_machine_under_a_connected_nodes_name_is_refused_and_throws_nobody_out(world):
    world.join(A2, B1)
    first = world.agents[A1] = Agent(world, A1, machine="1" * 32)
    await world.run(2)
    second = Agent(world, A1, machine="2" * 32)
    await world.run(2)
    assert second.error.reason == "NODE_NAME_TAKEN" and "1" * 12 in str(second.error) and "2" * 12 in str(second.error)
    assert first.error is None and await world.phase(A1) == "READY"
    world.agents[A1] = Agent(world, A1, machine="1" * 32)  # the same machine's agent, started anew
    await world.run(2)
    assert world.agents[A1].error is None and len(world.agents[A1].answers) > 1
    first.task.cancel()


async def test_an_agent_speaks_for_itself_alone_and_says_hello_first(world):
    with auth.acting_as(auth.Identity("agent", "a/n2")):
        for first, error in (
            ({"hello": {"node": A1}}, PermissionDenied),
            ({"heartbeat": {"sequence": 1}}, InvalidArgument),
            ({"hello": {"node": "n1"}}, InvalidArgument),
            ({"hello": {"node": A2, "boot_id": "x" * 65}}, InvalidArgument),
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
    with pytest.raises(InvalidArgument):
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
    with pytest.raises(InvalidArgument):
        await world.rpc.ListIncidents(pb.ListIncidentsRequest(page_token="x"), None)


async def test_news_tell_each_phase_and_each_stage_of_an_incident_once(world):
    world.join(*FIVE)
    world.agents[A1].tasks = [running(0)]
    await world.run(2)
    await world.kill(A1, Probe.NO_ROUTE)
    await world.run(7)
    world.join(A1)
    await world.run(1)
    published, known = [], {}
    stream = world.store.watch(keys.ROOT, after=0)
    async with contextlib.aclosing(stream):
        async for batch in stream:
            if not batch.events:
                break
            for event in batch.events:
                change = EntryChange(event.key, known.get(event.key), event.entry, batch.revision)
                known[event.key] = event.entry
                describe = {keys.NODE_HEALTH: news.of_health, keys.INCIDENTS: news.of_incident}.get(
                    next((p for p in (keys.NODE_HEALTH, keys.INCIDENTS) if event.key.startswith(p)), "")
                )
                if describe and (item := describe(change, world.clock.now())):
                    said = events_pb2.Event.FromString(item.data)
                    if A1 in (said.resource, said.attributes["nodes"]):
                        published.append((item.subject.split(".")[3], said.what))
                        last = item
            if batch.revision >= (await world.store.list("")).revision:
                break
    assert published == [
        ("node", "READY"), ("incident", "OPENED"), ("node", "SUSPECT"), ("incident", "FENCED"),
        ("node", "UNREACHABLE"), ("incident", "CLOSED"), ("node", "READY"),
    ]  # fmt: skip
    assert last.subject == "wf.v1.hub.node.a_n1.phase"
