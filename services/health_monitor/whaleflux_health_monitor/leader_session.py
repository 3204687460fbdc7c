"""One leadership of the health monitor: evidence in, verdicts out, written down under its fence.

It holds everything of one leadership and is thrown away with it; `campaign` stands for election.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError, Unavailable, node_name_taken, node_runs_twice
from whaleflux.fleet.xids import is_hardware_fault
from whaleflux.reasons import ConditionType, ErrorReason, What
from whaleflux.rpc.watching import follow
from whaleflux.store import keys, placements
from whaleflux.store.api import Leadership, Store, Write
from whaleflux.store.cache import Cache
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event, Metric
from whaleflux.trust import audit
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2
from whaleflux_health_monitor import convert
from whaleflux_health_monitor.core.attribution import TaskFailure, attribute, is_settled
from whaleflux_health_monitor.core.evidence import NodeState, Probe, Running
from whaleflux_health_monitor.core.liveness import NodeVerdict
from whaleflux_health_monitor.core.monitor import Monitor
from whaleflux_health_monitor.core.partitions import Partitions
from whaleflux_health_monitor.core.phases import Phase
from whaleflux_health_monitor.core.timing import HEARTBEAT_S, LONGEST_HEARTBEAT_S, Timing
from whaleflux_health_monitor.figures import FleetFigures, count_gpu_fault
from whaleflux_health_monitor.health_records import EmitSpan, HealthRecords
from whaleflux_health_monitor.recorder import AT_ONCE, Recorder

NAME = "health_monitor"
TICK_S = 0.1
PROBES_AT_ONCE = 64
DECIDE_WITHIN_S = 0.2  # of a reported failure; then the best guess counts
FRESH_S = 15.0  # of observations; clocks of hosts may differ by a few seconds
_POLL_EVERY_S = 0.01

ProbeNode = Callable[[str, str], Awaitable[Probe]]
OpenWatch = Callable[[int], AsyncIterator[inventory_pb2.WatchNodesResponse]]
_log = telemetry.get_logger("whaleflux.health_monitor")


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What a leadership works with."""

    store: Store
    clock: Clock
    probe: ProbeNode
    watch_nodes: OpenWatch  # inventory's WatchNodes, from a resource version on
    timing: Timing
    emit: EmitSpan


class LeaderSession:
    """One leadership."""

    def __init__(
        self, dependencies: Dependencies, leader: Leadership, monitor: Monitor, health_records: HealthRecords
    ) -> None:
        self._dependencies, self.monitor, self._records = dependencies, monitor, health_records
        self._recorder = Recorder(dependencies.store, leader, dependencies.clock)
        self._hurry = asyncio.Event()
        self._somebody = asyncio.Event()  # there is a node to judge
        self._figures = FleetFigures()
        self._recount = True  # nodes by phase may be others than are shown
        self._shown = Partitions()
        self._probes = asyncio.Semaphore(PROBES_AT_ONCE)
        self._reporting = asyncio.Lock()
        self._placements = Cache(dependencies.store, keys.JOB_PLACEMENTS, lambda entry: placements.read(entry.value))
        self._clocks: dict[str, float] = {}  # seconds by which agents' clocks are behind ours, as of their hello
        self._devices: dict[str, tuple[str, str] | None] = {}  # reason and message of what is wrong with a node's GPUs
        self.ended = asyncio.Event()

    @classmethod
    async def begin(cls, dependencies: Dependencies, leader: Leadership) -> LeaderSession:
        """Reads what earlier leaders wrote. A node whose record cannot be read is judged as one of which nothing is known."""
        healths = await dependencies.store.list(keys.NODE_HEALTH)
        incidents = await dependencies.store.list(keys.INCIDENTS)
        known = read_all(healths.entries, lambda entry: pb.NodeHealth.FromString(entry.value))
        records = [health for _, health in known.values]
        stored = [convert.stored_health(record, dependencies.clock.now()) for record in records]
        monitor = Monitor(dependencies.clock.monotonic(), dependencies.timing, stored)
        read = read_all(incidents.entries, lambda entry: pb.Incident.FromString(entry.value))
        past = [incident for _, incident in read.values]
        return cls(dependencies, leader, monitor, HealthRecords(dependencies.clock, dependencies.emit, records, past))

    async def run(self) -> None:
        """Until cancelled, or Fenced."""
        try:
            async with self._placements, asyncio.TaskGroup() as group:
                group.create_task(self._recorder.run())
                group.create_task(self._follow_inventory())
                group.create_task(self._judge(group))
        finally:
            self._figures.clear()
            self.ended.set()

    # evidence, from the servicer

    def hello(self, hello: pb.HeartbeatHello) -> int:
        """An agent opened its stream. Raises NODE_NAME_TAKEN while another machine has the node's, NODE_RUNS_TWICE while a copy of it has."""
        if holder := self.monitor.held_by(hello.node, hello.machine_id):
            raise node_name_taken(hello.node, holder, hello.machine_id)
        if other := self.monitor.runs_as(hello.node, hello.boot_id, self._dependencies.clock.monotonic()):
            raise node_runs_twice(hello.node, other, hello.boot_id)
        interval_s = hello.interval.ToMilliseconds() / 1000 or HEARTBEAT_S
        self._recorder.submit(self._records.agent_started(hello.node, hello.boot_id))
        self._clocks[hello.node] = self._behind_s(hello.time) if hello.HasField("time") else 0.0
        stream = self.monitor.hello(
            hello.node,
            self._dependencies.clock.monotonic(),
            boot_id=hello.boot_id,
            machine_id=hello.machine_id,
            probe_address=hello.probe_address,
            interval_s=min(max(interval_s, HEARTBEAT_S), LONGEST_HEARTBEAT_S),
        )
        self._somebody.set()
        self._hurry.set()
        return stream

    def heartbeat(self, node: str, stream: int, heartbeat: pb.Heartbeat) -> list[str]:
        """A sign of life; returns addresses that the agent should dial for us. Of its tasks those count that are placed there."""
        now_s = self._dependencies.clock.monotonic()
        tasks = tuple(task for task in convert.running(heartbeat) if self._is_placed(task, node))
        self.monitor.heartbeat(node, stream, now_s, tasks)
        return self.monitor.indirect_probes_for(node, now_s)

    def _is_placed(self, task: Running, node: str) -> bool:
        """Whether the scheduler has placed that attempt on the node. What an earlier one left there is no evidence any more."""
        known = self._placements.get(placements.key_of(task.job))
        if known is None or known.epoch != task.epoch:
            return False
        if node not in known.nodes:
            telemetry.counter(Metric.CLAIMS_REFUSED).labels("heartbeat").inc()
            audit.note_refused(task.job, ErrorReason.NOT_OWN_NODE)
        return node in known.nodes

    async def goodbye(self, node: str, stream: int, kind: pb.StopKind) -> None:
        """The agent ends its stream on purpose. Returns when that is on record, for the next leader too."""
        now_s, expires_after_s = self._dependencies.clock.monotonic(), self._dependencies.timing.restart_s
        if self.monitor.goodbye(node, stream, now_s, convert.stop_of(kind)):
            self._hurry.set()
            await self._in_effect(self._recorder.submit(self._records.announced(node, kind, expires_after_s)))

    def stream_ended(self, node: str, stream: int) -> None:
        """A stream is over, for whatever reason."""
        self.monitor.stream_ended(node, stream, self._dependencies.clock.monotonic())
        self._hurry.set()

    def observed(self, node: str, seen: pb.Observation) -> None:
        """Something that an agent saw: a neighbour that it dialled for us, or a fault of its own machine.

        Agents repeat what was not acknowledged; what is old by then says nothing of now.
        """
        if self._age_s(node, seen) > FRESH_S:
            return
        if outcome := _INDIRECT_OUTCOMES.get(seen.kind):
            self.monitor.indirectly_probed(seen.detail, node, outcome)
        elif seen.kind == What.XID and is_hardware_fault(seen.code):
            count_gpu_fault(seen.code)
            self._gpu_failed(node, f"XID_{seen.code}", f"GPU {seen.gpu_index}: {seen.detail[:300]}")

    def _age_s(self, node: str, seen: pb.Observation) -> float:
        if not seen.HasField("time"):
            return 0.0
        return self._behind_s(seen.time) - self._clocks.get(node, 0.0)

    def _behind_s(self, time: Timestamp) -> float:
        """By how much a clock that shows this is behind ours."""
        return (self._dependencies.clock.now() - time.ToDatetime(tzinfo=UTC)).total_seconds()

    def _gpu_failed(self, node: str, reason: str, message: str) -> None:
        self.monitor.gpu_failed(node, self._dependencies.clock.monotonic(), reason, message)
        self._hurry.set()

    async def failed(self, failure: TaskFailure, traceparent: str) -> pb.Incident:
        """Whose fault a task's end is. Idempotent per job and epoch; decided within 0.2 s."""
        if known := self._records.of_failure(failure.job, failure.epoch):
            return known
        begun_s = self._dependencies.clock.monotonic()
        self.monitor.peers_lost(failure.others, begun_s)
        self.monitor.look_at(failure.node)
        self._hurry.set()
        while not self._settled(failure, begun_s):
            await self._dependencies.clock.sleep(_POLL_EVERY_S)
        if known := self._records.of_failure(
            failure.job, failure.epoch
        ):  # another report of the same failure was faster
            return known
        attribution = attribute(failure, self._states(failure), self._dependencies.clock.monotonic())
        incident, writes = self._records.failure(failure, attribution, traceparent, begun_s)
        _log.info(Event.JOB_FAILED, job=failure.job, epoch=failure.epoch, reason=attribution.message)
        await self._in_effect(self._recorder.submit(writes))
        return incident

    def _settled(self, failure: TaskFailure, begun_s: float) -> bool:
        now_s = self._dependencies.clock.monotonic()
        return now_s - begun_s >= DECIDE_WITHIN_S or is_settled(failure, self._states(failure), begun_s, now_s)

    def _states(self, failure: TaskFailure) -> list[NodeState]:
        return [state for name in {failure.node, *failure.nodes} if (state := self.monitor.nodes.get(name))]

    @staticmethod
    async def _in_effect(done: asyncio.Future[None]) -> None:
        try:
            await done
        except asyncio.CancelledError:
            if done.cancelled():
                raise not_leader("") from None
            raise

    # loops

    async def _judge(self, group: asyncio.TaskGroup) -> None:
        while True:
            now_s = self._dependencies.clock.monotonic()
            for name, address in self.monitor.probes_due(now_s):
                self.monitor.probe_begins(name, now_s)
                group.create_task(self._probe(name, address))
            if verdicts := self.monitor.tick(now_s):
                self._record(verdicts)
            if verdicts or self._recount or self._shown != self.monitor.partitions:
                self._count()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next tick, or until something happened that should not wait for it."""
        if not self.monitor.nodes:
            self._somebody.clear()
            await self._somebody.wait()
        tick = asyncio.ensure_future(self._dependencies.clock.sleep(TICK_S))
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({tick, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tick.cancel()
            hurry.cancel()
        self._hurry.clear()

    async def _probe(self, name: str, address: str) -> None:
        async with self._probes:
            outcome = await self._dependencies.probe(name, address)
        self.monitor.probed(name, outcome, self._dependencies.clock.monotonic())
        self._hurry.set()

    def _record(self, verdicts: Sequence[NodeVerdict]) -> None:
        """Verdicts of one tick are written together: an incident that they share once, not once for each of its nodes."""
        writes: dict[str, Write] = {}
        for verdict in verdicts:
            writes.update({w.key: w for w in self._records.verdict(verdict, self.monitor.nodes[verdict.node])})
            self._log(verdict)
        every = list(writes.values())
        for begin in range(0, len(every), AT_ONCE):
            self._recorder.submit(every[begin : begin + AT_ONCE])

    def _log(self, verdict: NodeVerdict) -> None:
        since_s = self._dependencies.clock.monotonic() - verdict.since_s
        event = _EVENTS.get(verdict.phase, Event.NODE_RECOVERED)
        _log.info(event, node=verdict.node, phase=verdict.phase.value, reason=verdict.reason, after_s=round(since_s, 3))
        if verdict.phase in _EVENTS:
            telemetry.histogram(Metric.DETECTION_DURATION).labels(verdict.phase.value).observe(since_s)

    def _count(self) -> None:
        self._recount, self._shown = False, self.monitor.partitions
        sick = {name for name, wrong in self._devices.items() if wrong}
        self._figures.show(self.monitor.nodes.values(), self._shown.sites, sick)

    async def _follow_inventory(self) -> None:
        def on_broken(error: StatusError) -> None:
            _log.info(Event.STREAM_BROKEN, stream="inventory", reason=error.message)

        async with contextlib.aclosing(
            follow(self._dependencies.watch_nodes, clock=self._dependencies.clock, on_broken=on_broken)
        ) as followed:
            async for change in followed:
                self._recount = True
                if change.value is not None:
                    address = change.value.facts.address
                    now_s = self._dependencies.clock.monotonic()
                    self.monitor.intent(change.name, convert.intent_of(change.value), now_s, address=address)
                    self._somebody.set()
                    self._device_facts(change.name, convert.device_conditions(change.value))
                elif change.name:
                    self.monitor.forget(change.name)
                    self._devices.pop(change.name, None)
                    self._clocks.pop(change.name, None)
                    self._recorder.submit(self._records.forget(change.name))

    def _device_facts(self, node: str, failing: dict[str, tuple[str, str]]) -> None:
        """What the newest facts say of the machine; a GPU that has just become unhealthy may be why work ends."""
        sick = failing.get(ConditionType.GPU_HEALTHY)
        if sick and node in self._devices and self._devices[node] != sick:  # what a new leader finds may be old
            self._gpu_failed(node, *sick)
        self._devices[node] = sick
        self._recorder.submit(self._records.conditions(node, failing))


_EVENTS = {Phase.SUSPECT: Event.NODE_SUSPECTED, Phase.UNREACHABLE: Event.NODE_FENCED}
_INDIRECT_OUTCOMES: dict[str, Probe] = {
    What.PEER_CONNECTED: Probe.CONNECTS,
    What.PEER_REFUSED: Probe.REFUSED,
    What.PEER_SILENT: Probe.NO_ROUTE,
}


def not_leader(leader: str) -> Unavailable:
    """What a follower answers."""
    return Unavailable(
        "this replica of health_monitor does not lead; dial again" + (f", the leader is {leader}" if leader else ""),
        reason=ErrorReason.NOT_LEADER,
        metadata={"leader": leader},
        retry_after_s=0.2,
    )
