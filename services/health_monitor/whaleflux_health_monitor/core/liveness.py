"""Whether one node lives: the verdict is a pure function of its evidence, the partitions and the time."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux.reasons import NodeReason
from whaleflux_health_monitor.core.evidence import NodeState, Probe, Progress
from whaleflux_health_monitor.core.partitions import Partitions
from whaleflux_health_monitor.core.phases import ALIVE, SERVICE, Intent, Phase
from whaleflux_health_monitor.core.suspicion import SURE, Suspicion, suspicion_of

PEERS_FIRST_S = 2.0  # the end of ranks elsewhere may be reported before the stream of the dead agent breaks
PEERS_LATEST_S = 15.0  # an end of ranks elsewhere later than this has another cause


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """Where a node stands and why. `since_s` is the monotonic time of the first sign of it."""

    node: str
    phase: Phase
    reason: str
    message: str
    confidence: float
    since_s: float


@dataclass(frozen=True, slots=True)
class FleetView:
    """What a verdict needs to know besides the node. `front_door_lost`: every stream broke in the same moment."""

    now_s: float
    partitions: Partitions
    progress: Progress
    front_door_lost: bool = False


def verdict_of(node: NodeState, view: FleetView) -> NodeVerdict:
    """The verdict at `view.now_s`. UNREACHABLE still needs the breaker's consent, which is not asked here."""
    if node.phase is Phase.RETIRED or node.intent is Intent.RETIRED:
        return _verdict(node, Phase.RETIRED, NodeReason.RETIRED, f"{node.name} was retired by its operator", 1.0, view)
    if node.phase in SERVICE:
        return _verdict(node, node.phase, node.reason, "", 1.0, view)
    if node.phase is Phase.REGISTERED and not node.reported:
        return _verdict(node, Phase.REGISTERED, NodeReason.NEVER_HEARD, f"{node.name} has not reported yet", 1.0, view)
    suspicion = suspicion_of(node, view.now_s, front_door_lost=view.front_door_lost)
    if node.phase is Phase.UNREACHABLE and (suspicion is not None or not node.reported):
        return _verdict(node, Phase.UNREACHABLE, node.reason, "", SURE, view)
    if suspicion is None:
        if not node.reported and node.phase is Phase.SUSPECT:  # a new leader's grace: the old verdict stands
            return _verdict(node, node.phase, node.reason, "", SURE, view)
        return _alive(node, view)
    if fence := _fence(node, view):
        return _verdict(node, Phase.UNREACHABLE, fence.reason, fence.message, fence.confidence, view)
    shown = _shown(node, suspicion, view)
    return _verdict(node, Phase.SUSPECT, shown.reason, shown.message, shown.confidence, view)


def _fence(node: NodeState, view: FleetView) -> Suspicion | None:
    """Why the node's attempts are over, if they provably or presumably are."""
    if provably_dead(node):
        message = f"{node.name} refuses connections and ranks elsewhere lost their peers on it"
        return Suspicion(NodeReason.HOST_REFUSES, message, SURE)
    silence_s = node.silence_s(view.now_s)
    if silence_s < _patience_s(node, view) or _announcement_runs(node, view.now_s):
        return None
    if view.partitions.block_reason(node) or _ranks_alive(node, view):
        return None
    return Suspicion(
        NodeReason.SILENT_TOO_LONG, f"no sign of life from {node.name} or its ranks for {silence_s:.1f} s", 0.95
    )


def provably_dead(node: NodeState) -> bool:
    """Nobody listens where the agent listened, and those who worked with its ranks lost them at that time."""
    if node.announced_s is not None or node.lost_s is None or node.peer_exit_s is None:
        return False
    same_event = node.lost_s - PEERS_FIRST_S <= node.peer_exit_s <= node.lost_s + PEERS_LATEST_S
    return same_event and node.seen is Probe.REFUSED


def _announcement_runs(node: NodeState, now_s: float) -> bool:
    return node.announced_s is not None and now_s - node.announced_s < node.timing.restart_s


def _patience_s(node: NodeState, view: FleetView) -> float:
    """How much silence fences the node.

    A host that refuses lives, and only its agent is known to be dead: where no ranks elsewhere could miss the node's own,
    the agent is waited for as after an announced restart. Ranks that all stand still without it say that its ranks are gone.
    """
    if node.seen is Probe.CONNECTS:  # its host lives: a slow step of its ranks is worth waiting for
        slow_s = min(3 * view.progress.step_s(node), node.timing.slowest_step_s)
        return max(node.timing.fence_s, slow_s)
    meant = node.announced_s is not None or node.stopped  # what was announced has its own time
    if node.seen is Probe.REFUSED and not meant:
        stalled = view.progress.stalled_without(node, view.now_s, node.timing.fence_s)
        return node.timing.fence_s if stalled else node.timing.restart_s
    return node.timing.fence_s


def _ranks_alive(node: NodeState, view: FleetView) -> bool:
    """Whether peers show that the ranks live.

    A stopped agent is waited for as long as they do; one that is gone or out of reach only as long as a restart may
    take, since work that does not need all its peers would hide a dead node for ever.
    """
    if node.seen is not Probe.CONNECTS and node.silence_s(view.now_s) >= node.timing.restart_s:
        return False
    return view.progress.alive_without(node, node.life_s, view.now_s)


def _shown(node: NodeState, suspicion: Suspicion, view: FleetView) -> Suspicion:
    """What is said of a suspect that is not fenced."""
    if partitioned := view.partitions.suspicion(node):
        return partitioned
    if node.announced_s is None and not node.stopped and _ranks_alive(node, view):
        message = f"the agent of {node.name} is silent, and ranks elsewhere still make progress with its ranks"
        return Suspicion(NodeReason.AGENT_SILENT_RANKS_ALIVE, message, 0.7)
    return suspicion


def _alive(node: NodeState, view: FleetView) -> NodeVerdict:
    phase = ALIVE[node.intent]
    reason = NodeReason.ALIVE if phase is Phase.READY else f"OPERATOR_{phase.value}"
    return _verdict(node, phase, reason, f"{node.name} reports", 1.0, view)


def _verdict(
    node: NodeState, phase: Phase, reason: str, message: str, confidence: float, view: FleetView
) -> NodeVerdict:
    return NodeVerdict(node.name, phase, reason, message, confidence, min(node.life_s, view.now_s))
