"""The monitor: takes evidence as it comes, says whom to probe, and at each tick which verdicts changed.

Pure and synchronous: every method takes the monotonic time. One `Monitor` serves one leadership; the next leader
begins with what the store says and a grace for agents that have not found it yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux import names
from whaleflux.reasons import NodeReason
from whaleflux_health_monitor.core import partitions
from whaleflux_health_monitor.core.evidence import REACHES_HOST, GpuFault, NodeState, Probe, Progress, Running, Stop
from whaleflux_health_monitor.core.fence_breaker import FenceBreaker
from whaleflux_health_monitor.core.liveness import FleetView, NodeVerdict, verdict_of
from whaleflux_health_monitor.core.partitions import Partitions
from whaleflux_health_monitor.core.phases import Intent, Phase, may_become
from whaleflux_health_monitor.core.suspicion import Suspicion
from whaleflux_health_monitor.core.timing import Arrivals, Timing

_FORGET_EVERY_S = 10.0
INDIRECT_PROBE_EVERY_S = 0.5  # a silent node is dialled by one neighbour at a time
INDIRECT_PROBES_AT_ONCE = 8
_WATCHED = frozenset(Phase) - {Phase.UNREACHABLE, Phase.RETIRED}  # in these an indirect probe may change something


@dataclass(frozen=True, slots=True)
class StoredHealth:
    """What the store says of a node when a leadership begins."""

    name: str
    phase: Phase
    reason: str = ""
    boot_id: str = ""
    age_s: float = 0.0  # since the phase began
    announced: Stop | None = None  # its agent said goodbye and is not back
    announced_age_s: float = 0.0


class Monitor:
    """See the module."""

    def __init__(self, now_s: float, timing: Timing | None = None, known: Iterable[StoredHealth] = ()) -> None:
        self.timing = timing or Timing()
        self.nodes: dict[str, NodeState] = {}
        self.progress = Progress()
        self.partitions = Partitions()
        self._breaker = FenceBreaker(self.timing)
        self._unreached: dict[str, deque[NodeState]] = {}  # by site, those first that were asked about longest ago
        self._ticked_s, self._forgot_s = now_s, now_s
        for each in known:
            node = self._node(each.name, now_s)
            node.phase, node.reason, node.boot_id = each.phase, each.reason, each.boot_id
            if each.announced is not None:
                node.announces(each.announced, now_s - each.announced_age_s)
            if each.phase is Phase.UNREACHABLE:
                self._breaker.fenced(each.name, now_s - each.age_s)

    # evidence

    def intent(self, name: str, intent: Intent, now_s: float, *, address: str = "") -> None:
        """What inventory says of a node; makes an unknown one known. The agent's own word on its address goes first."""
        node = self._node(name, now_s)
        node.intent = intent
        node.probe_address = node.probe_address or address

    def forget(self, name: str) -> None:
        """Inventory has no such node any more."""
        self.nodes.pop(name, None)

    def held_by(self, name: str, machine_id: str) -> str:
        """The other machine whose agent has the node's stream, "" when there is none."""
        node = self.nodes.get(name)
        other = node is not None and node.connected and machine_id != node.machine_id
        return node.machine_id if node is not None and other else ""

    def runs_as(self, name: str, boot_id: str, now_s: float) -> str:
        """The other boot from which signs of life arrive as this node, "" when there is none: one of the two is a copy.

        A machine that was rebooted was silent for longer than this.
        """
        node = self.nodes.get(name)
        if node is None or not (node.connected and node.boot_id and boot_id) or node.boot_id == boot_id:
            return ""
        return node.boot_id if now_s - node.heartbeat_s < node.timing.suspect_s else ""

    def hello(
        self,
        name: str,
        now_s: float,
        *,
        boot_id: str = "",
        machine_id: str = "",
        probe_address: str = "",
        interval_s: float = 0.5,
    ) -> int:
        """An agent opened a stream; returns the number by which its later messages are told from an older stream's."""
        node = self._node(name, now_s)
        node.stream += 1
        node.connected = True
        if boot_id != node.boot_id:
            node.tasks = ()
        node.boot_id, node.machine_id, node.probe_address = boot_id, machine_id, probe_address
        node.timing, node.arrivals = self.timing.scaled(interval_s), Arrivals(interval_s)
        node.heartbeat_s = now_s
        node.shows_life(now_s)
        return node.stream

    def heartbeat(self, name: str, stream: int, now_s: float, tasks: tuple[Running, ...] = ()) -> None:
        """A sign of life over `stream`; ignored when that is not the newest."""
        node = self.nodes.get(name)
        if node is None or node.stream != stream:
            return
        if (gap_s := now_s - node.heartbeat_s) < node.timing.suspect_s:
            node.arrivals.add(gap_s)
        node.heartbeat_s = now_s
        node.tasks = tasks
        node.shows_life(now_s)
        self.progress.note(name, tasks, now_s)

    def goodbye(self, name: str, stream: int, now_s: float, stop: Stop) -> bool:
        """The agent ends its stream on purpose; False when `stream` is not its newest, so that it means nothing."""
        node = self.nodes.get(name)
        if node is None or node.stream != stream:
            return False
        node.shows_life(now_s)
        node.announces(stop, now_s)
        return True

    def stream_ended(self, name: str, stream: int, now_s: float) -> None:
        """The newest stream of a node is over; without a goodbye that is a sign in itself."""
        node = self.nodes.get(name)
        if node is None or node.stream != stream or not node.connected:
            return
        node.connected = False
        node.lost_s, node.probed_s = now_s, float("-inf")
        node.probe = node.indirect_probe = None

    def peers_lost(self, suspects: Iterable[str], now_s: float) -> None:
        """Ranks elsewhere ended whose peers run on these nodes: look at those at once."""
        for name in suspects:
            if node := self.nodes.get(name):
                node.peer_exit_s = now_s
                node.urgent = True

    def gpu_failed(self, name: str, now_s: float, reason: str, message: str) -> None:
        """The hardware of one of its GPUs failed: work that ends there soon after did not end by itself."""
        self._node(name, now_s).gpu_fault = GpuFault(now_s, reason, message)

    def look_at(self, name: str) -> None:
        """Probe this node now, whatever its heartbeats say."""
        if node := self.nodes.get(name):
            node.urgent = True

    def probe_begins(self, name: str, now_s: float) -> None:
        """One probe of a node at a time."""
        if node := self.nodes.get(name):
            node.probing, node.urgent, node.probed_s = True, False, now_s

    def probed(self, name: str, outcome: Probe, now_s: float) -> None:
        """A probe came back. An answer is a sign of life like a heartbeat, except that the stream is still missing."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.probing, node.concluded_s = False, now_s
        if outcome is Probe.ANSWERED:
            node.life_s, node.reported, node.probe = now_s, True, outcome
        elif node.heartbeat_s < node.probed_s:  # else it was heard while the probe was under way
            node.probe = outcome

    def indirectly_probed(self, address: str, prober: str, outcome: Probe) -> None:
        """A node of the same site dialled `address` for us; what it saw counts where we asked it, and see nothing ourselves."""
        if outcome not in REACHES_HOST:
            return
        for node in self.nodes.values():
            if prober in node.asked_about_it and node.probe_address == address and node.probe is Probe.NO_ROUTE:
                node.indirect_probe = outcome

    # conclusions

    def probes_due(self, now_s: float) -> list[tuple[str, str]]:
        """Name and address of every node that is worth a probe now."""
        unsteady = (n for n in self.nodes.values() if not n.is_steady(now_s))
        return [(n.name, n.probe_address) for n in unsteady if n.wants_probe(now_s)]

    def indirect_probes_for(self, name: str, now_s: float) -> list[str]:
        """Addresses that `name`, which just reported, should dial for us: silent nodes of its site that we cannot reach."""
        by, asked = self.nodes[name], list[str]()
        waiting = self._unreached.get(by.site, deque())
        for _ in range(len(waiting)):
            node = waiting[0]
            if len(asked) == INDIRECT_PROBES_AT_ONCE or now_s - node.indirect_asked_s < INDIRECT_PROBE_EVERY_S:
                break
            waiting.rotate(-1)
            if node is not by:
                node.indirect_asked_s = now_s
                node.asked_about_it.add(name)
                asked.append(node.probe_address)
        return asked

    def tick(self, now_s: float) -> list[NodeVerdict]:
        """Judges everybody and returns what changed. Call it every 0.1 s; a long gap means that we slept."""
        self._forgive_own_sleep(now_s)
        unsteady = [node for node in self.nodes.values() if not node.is_steady(now_s)]
        self._unreached = _by_site(n for n in unsteady if n.probe is Probe.NO_ROUTE and n.phase in _WATCHED)
        changed = self._judge(unsteady, now_s) if unsteady or self.partitions != Partitions() else []
        if now_s - self._forgot_s >= _FORGET_EVERY_S:
            self._forgot_s = now_s
            self.progress.forget_but({(t.job, t.epoch) for n in self.nodes.values() for t in n.tasks})
        return changed

    def _judge(self, unsteady: list[NodeState], now_s: float) -> list[NodeVerdict]:
        self._find_partitions(now_s)
        lost = partitions.all_streams_lost(self.nodes.values(), self.timing.reconnect_s)
        view = FleetView(now_s, self.partitions, self.progress, front_door_lost=lost)
        return [v for node in unsteady if (v := self._judged(node, view))]

    def _judged(self, node: NodeState, view: FleetView) -> NodeVerdict | None:
        verdict = verdict_of(node, view)
        if verdict.phase is Phase.UNREACHABLE and node.phase is not Phase.UNREACHABLE:
            verdict = self._fenced_if_admitted(node, verdict, view)
        if (verdict.phase, verdict.reason) == (node.phase, node.reason):
            return None
        if not may_become(node.phase, verdict.phase):
            return None
        if node.phase is Phase.UNREACHABLE:
            self._breaker.came_back(node.name)
        node.phase, node.reason = verdict.phase, verdict.reason
        return verdict

    def _fenced_if_admitted(self, node: NodeState, verdict: NodeVerdict, view: FleetView) -> NodeVerdict:
        """The verdict, or suspicion where the step or the breaker forbids it."""
        fleet = sum(n.phase is not Phase.RETIRED for n in self.nodes.values())  # only in the rare tick that fences
        if self._breaker.admits(fleet, view.now_s):
            if node.phase is Phase.SUSPECT:
                self._breaker.fenced(node.name, view.now_s)
                return verdict
            shown = Suspicion(
                verdict.reason, verdict.message, verdict.confidence
            )  # suspect first, fenced at the next tick
        else:
            message = f"{verdict.message}; not fenced, too many were within a few minutes: drain or retire it by hand"
            shown = Suspicion(NodeReason.FENCE_BREAKER_OPEN, message, verdict.confidence)
        return NodeVerdict(node.name, Phase.SUSPECT, shown.reason, shown.message, shown.confidence, verdict.since_s)

    def _forgive_own_sleep(self, now_s: float) -> None:
        gap_s = now_s - self._ticked_s
        self._ticked_s = now_s
        if gap_s >= self.timing.pause_s:
            for node in self.nodes.values():
                if node.life_s < now_s:  # whoever was heard since needs no forgiveness
                    node.shift(min(gap_s, now_s - node.life_s))

    def _find_partitions(self, now_s: float) -> None:
        before = self.partitions
        self.partitions = partitions.find_partitions(self.nodes.values(), now_s, before, self.timing.together_s)
        if before != self.partitions:
            partitions.end_of_partition(self.nodes.values(), before, self.partitions, now_s)

    def _node(self, name: str, now_s: float) -> NodeState:
        node = self.nodes.get(name)
        if node is None:
            site = names.top(name)
            node = NodeState(name, site, now_s + self.timing.grace_s, self.timing)
            self.nodes[name] = node
        return node


def _by_site(nodes: Iterable[NodeState]) -> dict[str, deque[NodeState]]:
    found: dict[str, deque[NodeState]] = {}
    for node in sorted(nodes, key=lambda node: node.indirect_asked_s):
        found.setdefault(node.site, deque()).append(node)
    return found
