"""What speaks against the life of one node: its silence, or a stream that broke."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux.reasons import NodeReason
from whaleflux_health_monitor.core.evidence import NodeState, Probe

SURE = 0.99


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why a node may be dead. `confidence` is 0 to 1."""

    reason: str
    message: str
    confidence: float


def suspicion_of(node: NodeState, now_s: float, *, front_door_lost: bool = False) -> Suspicion | None:
    """What speaks against the node's life, if enough does. `front_door_lost`: every stream broke in the same moment."""
    silence_s = node.silence_s(now_s)
    if node.stopped:
        return Suspicion(NodeReason.AGENT_STOPPED, f"the agent of {node.name} said goodbye", SURE)
    if silence_s >= node.timing.suspect_s:
        return _silent(node, silence_s)
    if node.lost_s is None or node.announced_s is not None or front_door_lost:
        return None
    return _stream_lost(node, now_s)


def _silent(node: NodeState, silence_s: float) -> Suspicion:
    silence = f"no sign of life for {silence_s:.1f} s"
    if node.announced_s is not None:
        return Suspicion(NodeReason.AGENT_RESTARTING, f"{silence}; the agent of {node.name} announced a restart", 0.3)
    if node.seen is Probe.REFUSED:
        return Suspicion(NodeReason.HOST_REFUSES, f"{silence}, and the host of {node.name} refuses connections", 0.95)
    if node.seen is Probe.CONNECTS:
        return Suspicion(NodeReason.AGENT_HUNG, f"{silence}, though something listens at {node.probe_address}", 0.7)
    return Suspicion(NodeReason.HEARTBEAT_LOST, f"{silence} from {node.name}", 0.8)


def _stream_lost(node: NodeState, now_s: float) -> Suspicion | None:
    """The agent's stream ended without a goodbye: dead, or about to dial again? A probe tells, or a moment does."""
    assert node.lost_s is not None
    if node.seen is Probe.REFUSED:
        return Suspicion(
            NodeReason.HOST_REFUSES, f"the stream of {node.name} broke and its host refuses connections", 0.9
        )
    without_s = now_s - max(node.lost_s, node.life_s)
    if node.seen is Probe.ANSWERED:  # only its way to us is broken; its silence is judged as ever
        return None
    undecided = node.seen is None and node.probe_address
    patience_s = node.timing.probe_answer_s if undecided else node.timing.reconnect_s
    if without_s < patience_s:
        return None
    return Suspicion(
        NodeReason.STREAM_LOST, f"the stream of {node.name} broke {without_s:.1f} s ago and did not return", 0.6
    )
