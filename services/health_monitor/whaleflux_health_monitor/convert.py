"""health_monitor's messages <-> its core."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.reasons import ConditionType, NodeReason
from whaleflux.rpc.etags import etag_of
from whaleflux.store.api import Entry
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2, types_pb2
from whaleflux_health_monitor.core.attribution import TaskFailure
from whaleflux_health_monitor.core.evidence import Running, Stop
from whaleflux_health_monitor.core.monitor import StoredHealth
from whaleflux_health_monitor.core.phases import Intent, Phase

MAX_MESSAGE = 500
_INTENTS: dict[inventory_pb2.NodeIntent, Intent] = {
    inventory_pb2.NODE_INTENT_UNSPECIFIED: Intent.ACTIVE,
    inventory_pb2.NODE_INTENT_ACTIVE: Intent.ACTIVE,
    inventory_pb2.NODE_INTENT_CORDONED: Intent.CORDONED,
    inventory_pb2.NODE_INTENT_DRAINING: Intent.DRAINING,
    inventory_pb2.NODE_INTENT_RETIRED: Intent.RETIRED,
}
_PHASES: dict[Phase, pb.NodePhase] = {
    Phase.REGISTERED: pb.NODE_PHASE_REGISTERED,
    Phase.READY: pb.NODE_PHASE_READY,
    Phase.SUSPECT: pb.NODE_PHASE_SUSPECT,
    Phase.UNREACHABLE: pb.NODE_PHASE_UNREACHABLE,
    Phase.CORDONED: pb.NODE_PHASE_CORDONED,
    Phase.DRAINING: pb.NODE_PHASE_DRAINING,
    Phase.QUARANTINED: pb.NODE_PHASE_QUARANTINED,
    Phase.REPAIRING: pb.NODE_PHASE_REPAIRING,
    Phase.TESTING: pb.NODE_PHASE_TESTING,
    Phase.RETIRED: pb.NODE_PHASE_RETIRED,
}
_PHASES_BACK = {number: phase for phase, number in _PHASES.items()}


def health_of(entry: Entry) -> pb.NodeHealth:
    """A stored record with its etag."""
    health = pb.NodeHealth.FromString(entry.value)
    health.etag = etag_of(entry)
    return health


def incident_of(entry: Entry) -> pb.Incident:
    """A stored incident with its etag."""
    incident = pb.Incident.FromString(entry.value)
    incident.etag = etag_of(entry)
    return incident


def intent_of(node: inventory_pb2.Node) -> Intent:
    """The operator's intent; one of a newer version means at least that no new work comes."""
    return _INTENTS.get(node.intent, Intent.CORDONED)


def device_conditions(node: inventory_pb2.Node) -> dict[str, tuple[str, str]]:
    """What the agent's newest facts say does not hold: reason and message by the type of the condition."""
    found = {
        c.type: (c.reason, c.message) for c in node.facts.conditions if c.status == types_pb2.CONDITION_STATUS_FALSE
    }
    sick = [gpu for gpu in node.facts.gpus if not gpu.healthy]
    if sick:
        listed = "; ".join(f"GPU {gpu.index}: {gpu.unhealthy_reason or 'unhealthy'}" for gpu in sick)
        reason = sick[0].unhealthy_reason.partition(":")[0] or NodeReason.UNHEALTHY
        found[ConditionType.GPU_HEALTHY] = (reason, listed[:MAX_MESSAGE])
    return found


def phase_number(phase: Phase) -> pb.NodePhase:
    """The contract's number of a phase."""
    return _PHASES[phase]


def phase_of(health: pb.NodeHealth) -> Phase:
    """The phase of a record; what is not known counts as REGISTERED."""
    return _PHASES_BACK.get(health.phase, Phase.REGISTERED)


def stored_health(health: pb.NodeHealth, now: datetime) -> StoredHealth:
    """What a new leader makes of a stored record."""

    def age_s(at: Timestamp) -> float:
        return max(0.0, (now - at.ToDatetime(tzinfo=UTC)).total_seconds())

    announced = stop_of(health.announced_stop.kind) if health.HasField("announced_stop") else None
    return StoredHealth(
        health.name,
        phase_of(health),
        health.reason,
        health.boot_id,
        age_s(health.transition_time),
        announced,
        age_s(health.announced_stop.announce_time) if announced is not None else 0.0,
    )


def stop_of(kind: pb.StopKind) -> Stop:
    """What an agent announced; a kind that is not known counts as a restart of the agent."""
    return Stop.HOST_SHUTDOWN if kind == pb.STOP_KIND_HOST_SHUTDOWN else Stop.AGENT_RESTART


def running(heartbeat: pb.Heartbeat) -> tuple[Running, ...]:
    """The tasks of a heartbeat whose processes live."""
    return tuple(Running(t.task, t.job, t.epoch, t.step, t.traceparent) for t in heartbeat.tasks if t.alive)


def failure_of(request: pb.ReportFailureRequest) -> TaskFailure:
    """A reported failure."""
    return TaskFailure(
        job=request.job,
        epoch=request.epoch,
        task=request.task,
        node=request.node,
        exit_code=request.exit_code,
        message=request.message,
        nodes=tuple(request.nodes),
        disconnected=tuple(request.disconnected_nodes),
    )


def stamp(at: datetime) -> Timestamp:
    """A protobuf instant."""
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp
