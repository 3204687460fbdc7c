"""Whose fault was it? What the end of a task means for its job, from its exit and from what is known of its peers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from whaleflux.manifests.shell_text import signal_name
from whaleflux.reasons import NodeReason
from whaleflux_health_monitor.core.evidence import NodeState, Probe
from whaleflux_health_monitor.core.phases import Phase

_OUT_OF_MEMORY = re.compile(r"out of memory|\boom\b|oom[- _]?kill|cannot allocate memory", re.IGNORECASE)
# What CUDA and the driver print when the hardware failed; their own words, so that a program need not be believed for more.
_HARDWARE = re.compile(
    r"uncorrectable (ECC|NVLink) error|fallen off the bus|GPU is lost|cuda(ErrorECC|ErrorNvlink)Uncorrectable",
    re.IGNORECASE,
)
_GPU_WORDS = re.compile(r"cuda|nccl|nvlink|\becc\b|\bxid\b", re.IGNORECASE)  # worth waiting for the driver's own report
GPU_FAULT_WITHIN_S = 30.0  # NCCL and CUDA may take this long to end a program whose GPU has failed
# Killed, or the exit code of a program that heeded the signal: hang-up, interrupt, kill, terminate.
ENDED_FROM_OUTSIDE = frozenset({-1, -2, -9, -15, 129, 130, 137, 143})
STOPPING_S = 30.0  # a shutdown gives its programs this long, and an agent that is back needs some time to report
LATE_HEARTBEATS_S = 1.0  # two heartbeats missing: enough to believe a probe that came back with nothing


class Fault(Enum):
    """Names as in the contract's IncidentKind."""

    NODE_LOST = "NODE_LOST"  # the task's own node is gone
    PROCESS_EXIT = "PROCESS_EXIT"
    PEER_LOST = "PEER_LOST"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    GPU_FAULT = "GPU_FAULT"


@dataclass(frozen=True, slots=True)
class TaskFailure:
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
class Attribution:
    """`culprits` are the nodes to avoid; `application_fault` makes the restart count."""

    fault: Fault
    culprits: tuple[str, ...]
    application_fault: bool
    confidence: float
    message: str


def attribute(failure: TaskFailure, nodes: Sequence[NodeState], now_s: float) -> Attribution:
    """The likeliest cause, given the states of the attempt's nodes."""
    lost = {node.name: weight for node in nodes if (weight := _lost(node, now_s))}
    for name in {*failure.disconnected} & {failure.node, *failure.nodes}:
        lost[name] = max(lost.get(name, 0.0), 0.8)
    if lost:
        names = tuple(sorted(lost))
        if failure.node in lost:
            message = f"task {failure.task} was lost with its node {failure.node}"
            return Attribution(Fault.NODE_LOST, names, False, max(lost.values()), message)
        message = f"task {failure.task} ended ({_exit(failure)}) because {', '.join(names)} was lost"
        return Attribution(Fault.PEER_LOST, names, False, max(lost.values()), message)
    if any(node.name == failure.node and _was_stopped(failure, node, now_s) for node in nodes):
        message = f"task {failure.task} was ended ({_exit(failure)}) while its node {failure.node} stopped in order"
        return Attribution(Fault.NODE_LOST, (failure.node,), False, 0.9, message)
    if by_gpu := _gpu_fault(failure, nodes, now_s):
        return by_gpu
    if _OUT_OF_MEMORY.search(failure.message):
        message = f"task {failure.task} on {failure.node} ran out of memory ({_exit(failure)})"
        return Attribution(Fault.OUT_OF_MEMORY, (), True, 0.9, message)
    message = f"task {failure.task} on {failure.node} ended by itself ({_exit(failure)})"
    return Attribution(Fault.PROCESS_EXIT, (), True, 0.9, message)


def _was_stopped(failure: TaskFailure, node: NodeState, now_s: float) -> bool:
    """Whether the task was ended from outside around the time at which its node's agent said goodbye."""
    if failure.exit_code not in ENDED_FROM_OUTSIDE or node.goodbye_s is None:
        return False
    return now_s - node.goodbye_s <= node.timing.restart_s + STOPPING_S


def _gpu_fault(failure: TaskFailure, nodes: Sequence[NodeState], now_s: float) -> Attribution | None:
    """A GPU that failed under the attempt, by its driver's report or, where there is none, by the words of CUDA."""
    recent = {
        node.name: node.gpu_fault.message
        for node in nodes
        if node.gpu_fault is not None and now_s - node.gpu_fault.at_s <= GPU_FAULT_WITHIN_S
    }
    ended = f"task {failure.task} on {failure.node} ended ({_exit(failure)})"
    if recent:
        causes = "; ".join(f"{name}: {message}" for name, message in sorted(recent.items()))
        return Attribution(
            Fault.GPU_FAULT, tuple(sorted(recent)), False, 0.95, f"{ended} because a GPU failed: {causes}"
        )
    if words := _HARDWARE.search(failure.message):
        message = f'{ended} and said "{words.group(0)}": the fault of a GPU'
        return Attribution(Fault.GPU_FAULT, (failure.node,), False, 0.7, message)
    return None


def is_settled(failure: TaskFailure, nodes: Sequence[NodeState], asked_s: float, now_s: float) -> bool:
    """Whether the answer will not change: a culprit is known, or every node was probed since `asked_s`.

    An end that speaks of the GPU waits for what the driver reports of it, and one from outside for a goodbye of the node's
    agent: both may come after the exit.
    """
    if attribute(failure, nodes, now_s).culprits:
        return True
    if _GPU_WORDS.search(failure.message) or failure.exit_code in ENDED_FROM_OUTSIDE:
        return False
    return all(node.concluded_s >= asked_s or not node.probe_address for node in nodes)


def _lost(node: NodeState, now_s: float) -> float:
    """How sure it is that this node is lost to its peers, 0 for not at all."""
    if node.phase is Phase.UNREACHABLE:
        return 0.99
    if node.announced_s is not None or node.reason == NodeReason.AGENT_SILENT_RANKS_ALIVE:
        return 0.0  # its ranks run on without their agent
    missing = node.lost_s is not None or node.silence_s(now_s) >= LATE_HEARTBEATS_S
    if node.seen is Probe.REFUSED and missing:
        return 0.97
    if node.phase is Phase.SUSPECT:
        return 0.9
    if node.lost_s is not None and node.seen is not Probe.ANSWERED:
        return 0.85
    if node.seen is Probe.NO_ROUTE and missing:
        return 0.7
    return 0.0


def _exit(failure: TaskFailure) -> str:
    code = failure.exit_code
    return signal_name(-code) if code < 0 else f"exit code {code}"
