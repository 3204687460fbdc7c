"""The monitor: takes evidence as it comes, says whom to probe, and at each tick which verdicts changed.

Pure and synchronous: every method takes the monotonic time. One `Monitor` serves one leadership; the next leader
begins with what the store says and a grace for agents that have not found it yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_health_monitor.core import groups
from whaleflux_health_monitor.core.evidence import REACHES_HOST, NodeState, Probe, Progress, Running
from whaleflux_health_monitor.core.groups import Breaker, Groups
from whaleflux_health_monitor.core.judge import Doubt, Verdict, View, judge
from whaleflux_health_monitor.core.phases import Intent, Phase, may_become
from whaleflux_health_monitor.core.timing import Arrivals, Timing

_FORGET_EVERY_S = 10.0
WITNESS_EVERY_S = 0.5  # a silent node is dialled by one witness at a time
WITNESS_AT_ONCE = 8
_WATCHED = frozenset(Phase) - {Phase.UNREACHABLE, Phase.RETIRED}  # in these a neighbour's look may change something


@dataclass(frozen=True, slots=True)
class Known:
    """What the store says of a node when a leadership begins."""

    name: str
    phase: Phase
    reason: str = ""
    boot_id: str = ""
    age_s: float = 0.0  # since the phase began


class Monitor:
    """See the module."""

    def __init__(self, now_s: float, timing: Timing | None = None, known: Iterable[Known] = ()) -> None:
        self.timing = timing or Timing()
        self.nodes: dict[str, NodeState] = {}
        self.progress = Progress()
        self.groups = Groups()
        self._breaker = Breaker(self.timing)
        self._unreached: list[NodeState] = []
        self._ticked_s, self._forgot_s = now_s, now_s
        for each in known:
            node = self._node(each.name, now_s)
            node.phase, node.reason, node.boot_id = each.phase, each.reason, each.boot_id
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

    def hello(
        self, name: str, now_s: float, *, boot_id: str = "", probe_address: str = "", interval_s: float = 0.5
    ) -> int:
        """An agent opened a stream; returns the number by which its later messages are told from an older stream's."""
        node = self._node(name, now_s)
        node.stream += 1
        node.connected = True
        if boot_id != node.boot_id:
            node.tasks = ()
        node.boot_id, node.probe_address = boot_id, probe_address
        node.timing, node.arrivals = self.timing.scaled(interval_s), Arrivals(interval_s)
        node.beat_s = now_s
        node.lives(now_s)
        return node.stream

    def beat(self, name: str, stream: int, now_s: float, tasks: tuple[Running, ...] = ()) -> None:
        """A sign of life over `stream`; ignored when that is not the newest."""
        node = self.nodes.get(name)
        if node is None or node.stream != stream:
            return
        if (gap_s := now_s - node.beat_s) < node.timing.suspect_s:
            node.arrivals.add(gap_s)
        node.beat_s = now_s
        node.tasks = tasks
        node.lives(now_s)
        self.progress.note(name, tasks, now_s)

    def goodbye(self, name: str, stream: int, now_s: float, *, restarting: bool) -> None:
        """The agent ends its stream on purpose."""
        node = self.nodes.get(name)
        if node is not None and node.stream == stream:
            node.lives(now_s)
            node.connected = False
            node.announced_s = now_s if restarting else None
            node.stopped = not restarting

    def stream_ended(self, name: str, stream: int, now_s: float) -> None:
        """The newest stream of a node is over; without a goodbye that is a sign in itself."""
        node = self.nodes.get(name)
        if node is None or node.stream != stream or not node.connected:
            return
        node.connected = False
        node.lost_s, node.probed_s = now_s, float("-inf")
        node.probe = node.witnessed = None

    def peers_lost(self, suspects: Iterable[str], now_s: float) -> None:
        """Ranks elsewhere ended whose peers run on these nodes: look at those at once."""
        for name in suspects:
            if node := self.nodes.get(name):
                node.peer_exit_s = now_s
                node.urgent = True

    def look_at(self, name: str) -> None:
        """Probe this node now, whatever its beats say."""
        if node := self.nodes.get(name):
            node.urgent = True

    def probe_begins(self, name: str, now_s: float) -> None:
        """One probe of a node at a time."""
        if node := self.nodes.get(name):
            node.probing, node.urgent, node.probed_s = True, False, now_s

    def probed(self, name: str, outcome: Probe, now_s: float) -> None:
        """A probe came back. An answer is a sign of life like a beat, except that the stream is still missing."""
        node = self.nodes.get(name)
        if node is None:
            return
        node.probing, node.concluded_s = False, now_s
        if outcome is Probe.ANSWERED:
            node.life_s, node.heard, node.probe = now_s, True, outcome
        elif node.beat_s < node.probed_s:  # else it was heard while the probe was under way
            node.probe = outcome

    def witnessed(self, address: str, witness: str, outcome: Probe) -> None:
        """A node of the same site dialled `address` for us; what it saw counts where we see nothing ourselves."""
        by = self.nodes.get(witness)
        if by is None or outcome not in REACHES_HOST:
            return
        for node in self.nodes.values():
            neighbour = node is not by and node.site == by.site
            if neighbour and node.probe_address == address and node.probe is Probe.NO_ROUTE:
                node.witnessed = outcome

    # conclusions

    def probes_due(self, now_s: float) -> list[tuple[str, str]]:
        """Name and address of every node that is worth a probe now."""
        restless = (n for n in self.nodes.values() if not n.calm(now_s))
        return [(n.name, n.probe_address) for n in restless if n.wants_probe(now_s)]

    def witness_for(self, name: str, now_s: float) -> list[str]:
        """Addresses that `name`, which just beat, should dial for us: silent nodes of its site that we cannot reach."""
        by = self.nodes[name]
        asked: list[str] = []
        for node in self._unreached:
            if node.site == by.site and node is not by and now_s - node.witness_s >= WITNESS_EVERY_S:
                node.witness_s = now_s
                asked.append(node.probe_address)
        return asked[:WITNESS_AT_ONCE]

    def tick(self, now_s: float) -> list[Verdict]:
        """Judges everybody and returns what changed. Call it every 0.1 s; a long gap means that we slept."""
        self._forgive_own_sleep(now_s)
        restless = [node for node in self.nodes.values() if not node.calm(now_s)]
        self._unreached = [n for n in restless if n.probe is Probe.NO_ROUTE and n.phase in _WATCHED]
        changed = self._judge(restless, now_s) if restless or self.groups != Groups() else []
        if now_s - self._forgot_s >= _FORGET_EVERY_S:
            self._forgot_s = now_s
            self.progress.forget_but({(t.job, t.epoch) for n in self.nodes.values() for t in n.tasks})
        return changed

    def _judge(self, restless: list[NodeState], now_s: float) -> list[Verdict]:
        self._regroup(now_s)
        lost = groups.all_streams_lost(self.nodes.values(), self.timing.reconnect_s)
        view = View(now_s, self.groups, self.progress, front_door_lost=lost)
        return [v for node in restless if (v := self._judged(node, view))]

    def _judged(self, node: NodeState, view: View) -> Verdict | None:
        verdict = judge(node, view)
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

    def _fenced_if_admitted(self, node: NodeState, verdict: Verdict, view: View) -> Verdict:
        """The verdict, or suspicion where the step or the breaker forbids it."""
        fleet = sum(n.phase is not Phase.RETIRED for n in self.nodes.values())  # only in the rare tick that fences
        if self._breaker.admits(fleet, view.now_s):
            if node.phase is Phase.SUSPECT:
                self._breaker.fenced(node.name, view.now_s)
                return verdict
            held = Doubt(verdict.reason, verdict.message, verdict.confidence)  # suspicion first, fence at the next tick
        else:
            told = f"{verdict.message}; not fenced, too many were within a few minutes: drain or retire it by hand"
            held = Doubt("FENCE_BREAKER_OPEN", told, verdict.confidence)
        return Verdict(node.name, Phase.SUSPECT, held.reason, held.message, held.confidence, verdict.since_s)

    def _forgive_own_sleep(self, now_s: float) -> None:
        gap_s = now_s - self._ticked_s
        self._ticked_s = now_s
        if gap_s >= self.timing.pause_s:
            for node in self.nodes.values():
                if node.life_s < now_s:  # whoever was heard since needs no forgiveness
                    node.shift(min(gap_s, now_s - node.life_s))

    def _regroup(self, now_s: float) -> None:
        before = self.groups
        self.groups = groups.silent_groups(self.nodes.values(), now_s, before, self.timing.together_s)
        if before != self.groups:
            for node in self.nodes.values():
                if before.hold(node) and not self.groups.hold(node):
                    # It could not be heard while the group was cut off: from now on its silence is its own.
                    node.life_s = max(node.life_s, now_s - node.timing.suspect_s)

    def _node(self, name: str, now_s: float) -> NodeState:
        node = self.nodes.get(name)
        if node is None:
            site = name.split("/")[1]
            node = NodeState(name, site, now_s + self.timing.grace_s, self.timing)
            self.nodes[name] = node
        return node
