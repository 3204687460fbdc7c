"""One leadership of the health monitor: evidence in, verdicts out, written down under its fence.

`Watch` holds everything of one leadership and is thrown away with it; `Leading` campaigns, and gives servicers the
current watch or the refusal that sends callers to the leader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Refusal, Unavailable
from whaleflux.rpc.watching import follow
from whaleflux.store import keys
from whaleflux.store.api import Leadership, Store
from whaleflux.store.election import Leader, lead, leader_of
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2
from whaleflux_health_monitor import convert
from whaleflux_health_monitor.core.evidence import NodeState, Probe
from whaleflux_health_monitor.core.failures import Failure, classify, decided
from whaleflux_health_monitor.core.judge import Verdict
from whaleflux_health_monitor.core.monitor import Monitor
from whaleflux_health_monitor.core.phases import Phase
from whaleflux_health_monitor.core.timing import BEAT_S, LONGEST_BEAT_S, Timing
from whaleflux_health_monitor.ledger import EmitSpan, Ledger
from whaleflux_health_monitor.recorder import Recorder

NAME = "health_monitor"
TICK_S = 0.1
PROBES_AT_ONCE = 64
DECIDE_WITHIN_S = 0.2  # of a reported failure; then the best guess counts
_LOOK_EVERY_S = 0.01
_RETRY_S = 0.2

ProbeNode = Callable[[str, str], Awaitable[Probe]]
OpenWatch = Callable[[int], AsyncIterator[inventory_pb2.WatchNodesResponse]]
_log = telemetry.get_logger("whaleflux.health_monitor")


@dataclass(frozen=True, slots=True)
class Tools:
    """What a watch works with."""

    store: Store
    clock: Clock
    probe: ProbeNode
    watch_nodes: OpenWatch  # inventory's WatchNodes, from a resource version on
    timing: Timing
    emit: EmitSpan


class Watch:
    """One leadership."""

    def __init__(self, tools: Tools, leader: Leadership, monitor: Monitor, ledger: Ledger) -> None:
        self._tools, self.monitor, self._ledger = tools, monitor, ledger
        self._recorder = Recorder(tools.store, leader, tools.clock)
        self._hurry = asyncio.Event()
        self._probes = asyncio.Semaphore(PROBES_AT_ONCE)
        self._reporting = asyncio.Lock()
        self.ended = asyncio.Event()

    @classmethod
    async def begin(cls, tools: Tools, leader: Leadership) -> Watch:
        """Reads what earlier leaders wrote."""
        healths = await tools.store.list(keys.NODE_HEALTH)
        incidents = await tools.store.list(keys.INCIDENTS)
        records = [pb.NodeHealth.FromString(entry.value) for entry in healths.entries]
        known = [convert.known(record, tools.clock.now()) for record in records]
        monitor = Monitor(tools.clock.monotonic(), tools.timing, known)
        past = [pb.Incident.FromString(entry.value) for entry in incidents.entries]
        return cls(tools, leader, monitor, Ledger(tools.clock, tools.emit, records, past))

    async def run(self) -> None:
        """Until cancelled, or Fenced."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._recorder.run())
                group.create_task(self._follow_inventory())
                group.create_task(self._judge(group))
        finally:
            self.ended.set()

    # evidence, from the servicer

    def hello(self, hello: pb.HeartbeatHello) -> int:
        """An agent opened its stream."""
        interval_s = hello.interval.ToMilliseconds() / 1000 or BEAT_S
        self._recorder.submit(self._ledger.booted(hello.node, hello.boot_id))
        stream = self.monitor.hello(
            hello.node,
            self._tools.clock.monotonic(),
            boot_id=hello.boot_id,
            probe_address=hello.probe_address,
            interval_s=min(max(interval_s, BEAT_S), LONGEST_BEAT_S),
        )
        self._hurry.set()
        return stream

    def beat(self, node: str, stream: int, beat: pb.Beat) -> list[str]:
        """A sign of life; returns addresses that the agent should dial for us."""
        now_s = self._tools.clock.monotonic()
        self.monitor.beat(node, stream, now_s, convert.running(beat))
        return self.monitor.witness_for(node, now_s)

    def goodbye(self, node: str, stream: int, *, restarting: bool) -> None:
        """The agent ends its stream on purpose."""
        self.monitor.goodbye(node, stream, self._tools.clock.monotonic(), restarting=restarting)
        self._hurry.set()

    def stream_ended(self, node: str, stream: int) -> None:
        """A stream is over, for whatever reason."""
        self.monitor.stream_ended(node, stream, self._tools.clock.monotonic())
        self._hurry.set()

    def observed(self, node: str, seen: pb.Observation) -> None:
        """Something that an agent saw: a neighbour that it dialled for us, or a fault of its own machine."""
        if outcome := _WITNESSED.get(seen.kind):
            self.monitor.witnessed(seen.detail, node, outcome)
        elif about := _CONDITIONS.get(seen.kind):
            reason = f"XID_{seen.code}" if seen.kind == "XID" else seen.kind
            where = f"GPU {seen.gpu_index}: " if seen.gpu_index >= 0 else ""
            self._recorder.submit(self._ledger.condition(node, about, reason, f"{where}{seen.detail[:300]}"))

    async def failed(self, failure: Failure, traceparent: str) -> pb.Incident:
        """Whose fault a task's end is. Idempotent per job and epoch; decided within 0.2 s."""
        if known := self._ledger.of_failure(failure.job, failure.epoch):
            return known
        begun_s = self._tools.clock.monotonic()
        self.monitor.peers_lost(failure.others, begun_s)
        self.monitor.look_at(failure.node)
        self._hurry.set()
        while not self._decided(failure, begun_s):
            await self._tools.clock.sleep(_LOOK_EVERY_S)
        if known := self._ledger.of_failure(failure.job, failure.epoch):  # reported twice at once
            return known
        blame = classify(failure, self._states(failure), self._tools.clock.monotonic())
        incident, writes = self._ledger.failure(failure, blame, traceparent, begun_s)
        _log.info(Event.JOB_FAILED, job=failure.job, epoch=failure.epoch, reason=blame.message)
        await self._in_effect(self._recorder.submit(writes))
        return incident

    def _decided(self, failure: Failure, begun_s: float) -> bool:
        now_s = self._tools.clock.monotonic()
        return now_s - begun_s >= DECIDE_WITHIN_S or decided(failure, self._states(failure), begun_s, now_s)

    def _states(self, failure: Failure) -> list[NodeState]:
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
            now_s = self._tools.clock.monotonic()
            for name, address in self.monitor.probes_due(now_s):
                self.monitor.probe_begins(name, now_s)
                group.create_task(self._probe(name, address))
            if verdicts := self.monitor.tick(now_s):
                for verdict in verdicts:
                    self._record(verdict)
                self._count()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next tick, or until something happened that should not wait for it."""
        tick = asyncio.ensure_future(self._tools.clock.sleep(TICK_S))
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({tick, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tick.cancel()
            hurry.cancel()
        self._hurry.clear()

    async def _probe(self, name: str, address: str) -> None:
        async with self._probes:
            outcome = await self._tools.probe(name, address)
        self.monitor.probed(name, outcome, self._tools.clock.monotonic())
        self._hurry.set()

    def _record(self, verdict: Verdict) -> None:
        state = self.monitor.nodes[verdict.node]
        self._recorder.submit(self._ledger.verdict(verdict, state))
        since_s = self._tools.clock.monotonic() - verdict.since_s
        event = _EVENTS.get(verdict.phase, Event.NODE_RECOVERED)
        _log.info(event, node=verdict.node, phase=verdict.phase.value, reason=verdict.reason, after_s=round(since_s, 3))
        if verdict.phase in _EVENTS:
            telemetry.histogram(Metric.DETECTION_DURATION).labels(verdict.phase.value).observe(since_s)

    def _count(self) -> None:
        counts = Counter(node.phase for node in self.monitor.nodes.values())
        for phase in Phase:
            telemetry.gauge(Metric.NODES).labels(phase.value).set(counts[phase])

    async def _follow_inventory(self) -> None:
        def on_broken(refusal: Refusal) -> None:
            _log.info(Event.STREAM_BROKEN, stream="inventory", reason=refusal.message)

        async with contextlib.aclosing(
            follow(self._tools.watch_nodes, clock=self._tools.clock, on_broken=on_broken)
        ) as followed:
            async for told in followed:
                if told.value is not None:
                    address = told.value.facts.address
                    now_s = self._tools.clock.monotonic()
                    self.monitor.intent(told.name, convert.intent_of(told.value), now_s, address=address)
                elif told.name:
                    self.monitor.forget(told.name)
                    self._recorder.submit(self._ledger.forget(told.name))


_EVENTS = {Phase.SUSPECT: Event.NODE_SUSPECTED, Phase.UNREACHABLE: Event.NODE_FENCED}
_WITNESSED = {
    "PEER_CONNECTED": Probe.CONNECTS,
    "PEER_REFUSED": Probe.REFUSED,
    "PEER_SILENT": Probe.NO_ROUTE,
}
_CONDITIONS = {"XID": "GpuHealthy", "GPU_LOST": "GpuHealthy", "LINK_DOWN": "LinksHealthy"}


class Leading:
    """Campaigns for ever; `watch` is set while this replica leads."""

    def __init__(self, tools: Tools, identity: str) -> None:
        self._tools, self._identity = tools, identity
        self.watch: Watch | None = None

    async def run(self) -> None:
        """The loop to run beside the server."""
        await lead(self._tools.store, NAME, self._identity, self._work)

    async def _work(self, leader: Leader) -> None:
        telemetry.gauge(Metric.LEADER).labels(NAME).set(1)
        try:
            self.watch = await self._begun(leader)
            await self.watch.run()
        finally:
            self.watch = None
            telemetry.gauge(Metric.LEADER).labels(NAME).set(0)

    async def _begun(self, leader: Leader) -> Watch:
        while True:  # until the leadership is lost, which cancels
            try:
                return await Watch.begin(self._tools, leader)
            except Unavailable as outage:
                _log.warning(Event.STORE_UNREACHABLE, reason=outage.message)
                await self._tools.clock.sleep(_RETRY_S)

    async def leading(self) -> Watch:
        """The current watch; refuses with NOT_LEADER, naming the leader if it is known, on every other replica."""
        if self.watch is None:
            raise not_leader(await leader_of(self._tools.store, NAME))
        return self.watch


def not_leader(leader: str) -> Unavailable:
    """What a follower answers."""
    return Unavailable(
        "this replica of health_monitor does not lead; dial again" + (f", the leader is {leader}" if leader else ""),
        reason="NOT_LEADER",
        metadata={"leader": leader},
        retry_after_s=0.2,
    )
