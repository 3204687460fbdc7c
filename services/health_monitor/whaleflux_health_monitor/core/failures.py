"""Whose fault was it? What the end of a task means for its job, from its exit and from what is known of its peers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from whaleflux_health_monitor.core.evidence import NodeState, Probe
from whaleflux_health_monitor.core.phases import Phase

_OUT_OF_MEMORY = re.compile(r"out of memory|\boom\b|oom[- _]?kill|cannot allocate memory", re.IGNORECASE)
LATE_BEATS_S = 1.0  # two beats missing: enough to believe a probe that came back with nothing


class Fault(Enum):
    """Names as in the contract's IncidentKind."""

    NODE_LOST = "NODE_LOST"  # the task's own node is gone
    PROCESS_EXIT = "PROCESS_EXIT"
    PEER_LOST = "PEER_LOST"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that ended badly, as the scheduler tells it. `exit_code` is -signal for a killed process."""

    job: str
    epoch: int
    task: str
    node: str
    exit_code: int
    message: str
    nodes: tuple[str, ...]
    disconnected: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[str, ...]:
        """The other nodes of the attempt."""
        return tuple(name for name in self.nodes if name != self.node)


@dataclass(frozen=True, slots=True)
class Blame:
    """`culprits` are the nodes to avoid; `application_fault` makes the restart count."""

    fault: Fault
    culprits: tuple[str, ...]
    application_fault: bool
    confidence: float
    message: str


def classify(failure: Failure, nodes: Sequence[NodeState], now_s: float) -> Blame:
    """The likeliest cause, given the states of the attempt's nodes."""
    lost = {node.name: weight for node in nodes if (weight := _lost(node, now_s))}
    for name in {*failure.disconnected} & {failure.node, *failure.nodes}:
        lost[name] = max(lost.get(name, 0.0), 0.8)
    if lost:
        names = tuple(sorted(lost))
        if failure.node in lost:
            told = f"task {failure.task} was lost with its node {failure.node}"
            return Blame(Fault.NODE_LOST, names, False, max(lost.values()), told)
        told = f"task {failure.task} ended ({_exit(failure)}) because {', '.join(names)} was lost"
        return Blame(Fault.PEER_LOST, names, False, max(lost.values()), told)
    if _OUT_OF_MEMORY.search(failure.message):
        told = f"task {failure.task} on {failure.node} ran out of memory ({_exit(failure)})"
        return Blame(Fault.OUT_OF_MEMORY, (), True, 0.9, told)
    told = f"task {failure.task} on {failure.node} ended by itself ({_exit(failure)})"
    return Blame(Fault.PROCESS_EXIT, (), True, 0.9, told)


def decided(failure: Failure, nodes: Sequence[NodeState], asked_s: float, now_s: float) -> bool:
    """Whether the answer will not change: a culprit is known, or every node was probed since `asked_s`."""
    if classify(failure, nodes, now_s).culprits:
        return True
    return all(node.concluded_s >= asked_s or not node.probe_address for node in nodes)


def _lost(node: NodeState, now_s: float) -> float:
    """How sure it is that this node is lost to its peers, 0 for not at all."""
    if node.phase is Phase.UNREACHABLE:
        return 0.99
    if node.announced_s is not None or node.reason == "AGENT_SILENT_RANKS_ALIVE":
        return 0.0  # its ranks run on without their agent
    missing = node.lost_s is not None or node.silence_s(now_s) >= LATE_BEATS_S
    if node.seen is Probe.REFUSED and missing:
        return 0.97
    if node.phase is Phase.SUSPECT:
        return 0.9
    if node.lost_s is not None and node.seen is not Probe.ANSWERED:
        return 0.85
    if node.seen is Probe.NO_ROUTE and missing:
        return 0.7
    return 0.0


def _exit(failure: Failure) -> str:
    code = failure.exit_code
    return f"signal {-code}" if code < 0 else f"exit code {code}"
