"""The verdict about one node: a pure function of the evidence, the groups it belongs to, and the time."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux_health_monitor.core.evidence import NodeState, Probe, Progress
from whaleflux_health_monitor.core.groups import Groups
from whaleflux_health_monitor.core.phases import ALIVE, SERVICE, Intent, Phase

SURE = 0.99
PEERS_FIRST_S = 2.0  # ranks elsewhere may be heard to end before the stream of the dead agent is


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a node stands and why. `since_s` is the monotonic time of the first sign of it."""

    node: str
    phase: Phase
    reason: str
    message: str
    confidence: float
    since_s: float


@dataclass(frozen=True, slots=True)
class View:
    """What a verdict needs to know besides the node. `front_door_lost`: every stream broke in the same moment."""

    now_s: float
    groups: Groups
    progress: Progress
    front_door_lost: bool = False


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a node may be dead."""

    reason: str
    message: str
    confidence: float


def judge(node: NodeState, view: View) -> Verdict:
    """The verdict at `view.now_s`. UNREACHABLE still needs the breaker's consent, which is not asked here."""
    if node.phase is Phase.RETIRED or node.intent is Intent.RETIRED:
        return _verdict(node, Phase.RETIRED, "RETIRED", f"{node.name} was retired by its operator", 1.0, view)
    if node.phase in SERVICE:
        return _verdict(node, node.phase, node.reason, "", 1.0, view)
    if node.phase is Phase.REGISTERED and not node.heard:
        return _verdict(node, Phase.REGISTERED, "NEVER_HEARD", f"{node.name} has not reported yet", 1.0, view)
    doubt = doubt_of(node, view)
    if node.phase is Phase.UNREACHABLE and (doubt is not None or not node.heard):
        return _verdict(node, Phase.UNREACHABLE, node.reason, "", SURE, view)
    if doubt is None:
        if not node.heard and node.phase is Phase.SUSPECT:  # a new leader's grace: the old verdict stands
            return _verdict(node, node.phase, node.reason, "", SURE, view)
        return _alive(node, view)
    if fence := _fence(node, view):
        return _verdict(node, Phase.UNREACHABLE, fence.reason, fence.message, fence.confidence, view)
    held = _held(node, doubt, view)
    return _verdict(node, Phase.SUSPECT, held.reason, held.message, held.confidence, view)


def doubt_of(node: NodeState, view: View) -> Doubt | None:
    """What speaks against the node's life, if enough does."""
    silence_s = node.silence_s(view.now_s)
    if node.stopped:
        return Doubt("AGENT_STOPPED", f"the agent of {node.name} said goodbye", SURE)
    if silence_s >= node.timing.suspect_s:
        return _silent(node, silence_s)
    if node.lost_s is None or node.announced_s is not None or view.front_door_lost:
        return None
    return _stream_lost(node, view.now_s)


def _silent(node: NodeState, silence_s: float) -> Doubt:
    heard = f"no sign of life for {silence_s:.1f} s"
    if node.announced_s is not None:
        return Doubt("AGENT_RESTARTING", f"{heard}; the agent of {node.name} announced a restart", 0.3)
    if node.seen is Probe.REFUSED:
        return Doubt("HOST_REFUSES", f"{heard}, and the host of {node.name} refuses connections", 0.95)
    if node.seen is Probe.CONNECTS:
        return Doubt("AGENT_HUNG", f"{heard}, though something listens at {node.probe_address}", 0.7)
    return Doubt("HEARTBEAT_LOST", f"{heard} from {node.name}", 0.8)


def _stream_lost(node: NodeState, now_s: float) -> Doubt | None:
    """The agent's stream ended without a goodbye: dead, or about to dial again? A probe tells, or a moment does."""
    assert node.lost_s is not None
    if node.seen is Probe.REFUSED:
        return Doubt("HOST_REFUSES", f"the stream of {node.name} broke and its host refuses connections", 0.9)
    without_s = now_s - max(node.lost_s, node.life_s)
    if node.seen is Probe.ANSWERED:  # only its way to us is broken; silence is judged as ever
        return None
    undecided = node.seen is None and node.probe_address
    patience_s = node.timing.probe_answer_s if undecided else node.timing.reconnect_s
    if without_s < patience_s:
        return None
    return Doubt("STREAM_LOST", f"the stream of {node.name} broke {without_s:.1f} s ago and did not return", 0.6)


def _fence(node: NodeState, view: View) -> Doubt | None:
    """Why the node's attempts are over, if they provably or presumably are."""
    if provably_dead(node):
        told = f"{node.name} refuses connections and ranks elsewhere lost their peers on it"
        return Doubt("HOST_REFUSES", told, SURE)
    silence_s = node.silence_s(view.now_s)
    if silence_s < _patience_s(node, view) or view.groups.hold(node) or _ranks_alive(node, view):
        return None
    return Doubt("SILENT_TOO_LONG", f"no sign of life from {node.name} or its ranks for {silence_s:.1f} s", 0.95)


def provably_dead(node: NodeState) -> bool:
    """Nobody listens where the agent listened, and those who worked with its ranks lost them."""
    if node.announced_s is not None or node.lost_s is None or node.peer_exit_s is None:
        return False
    same_event = node.peer_exit_s >= node.lost_s - PEERS_FIRST_S
    return same_event and node.seen is Probe.REFUSED


def _patience_s(node: NodeState, view: View) -> float:
    if node.announced_s is not None:
        return node.timing.restart_s
    if node.seen is Probe.CONNECTS:  # its host lives: a slow step of its ranks is worth waiting for
        slow_s = min(3 * view.progress.step_s(node), node.timing.slowest_step_s)
        return max(node.timing.fence_s, slow_s)
    return node.timing.fence_s


def _ranks_alive(node: NodeState, view: View) -> bool:
    """Whether peers show that the ranks live.

    A stopped agent is waited for as long as they do; one that is gone or out of reach only as long as a restart may
    take, since work that does not need all its peers would hide a dead node for ever.
    """
    if node.seen is not Probe.CONNECTS and node.silence_s(view.now_s) >= node.timing.restart_s:
        return False
    return view.progress.alive_without(node, node.life_s, view.now_s)


def _held(node: NodeState, doubt: Doubt, view: View) -> Doubt:
    """The reason to show for a suspect that is not fenced."""
    if (hold := view.groups.hold(node)) == "SITE_PARTITIONED":
        return Doubt(hold, f"all of site {node.site} is silent as one: cut off, so its work goes on there", 0.8)
    if hold:
        return Doubt(hold, "every agent of the fleet is silent: this monitor may be the one cut off", 0.5)
    if node.announced_s is None and not node.stopped and _ranks_alive(node, view):
        told = f"the agent of {node.name} is silent, and ranks elsewhere still make progress with its ranks"
        return Doubt("AGENT_SILENT_RANKS_ALIVE", told, 0.7)
    return doubt


def _alive(node: NodeState, view: View) -> Verdict:
    phase = ALIVE[node.intent]
    reason = "ALIVE" if phase is Phase.READY else f"OPERATOR_{phase.value}"
    return _verdict(node, phase, reason, f"{node.name} reports", 1.0, view)


def _verdict(node: NodeState, phase: Phase, reason: str, message: str, confidence: float, view: View) -> Verdict:
    return Verdict(node.name, phase, reason, message, confidence, min(node.life_s, view.now_s))
