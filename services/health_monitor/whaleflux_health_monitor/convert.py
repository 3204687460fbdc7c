"""health_monitor's messages <-> its core."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from whaleflux.rpc.etags import etag_of
from whaleflux.store.api import Entry
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import inventory_pb2
from whaleflux_health_monitor.core.evidence import Running
from whaleflux_health_monitor.core.failures import Failure
from whaleflux_health_monitor.core.monitor import Known
from whaleflux_health_monitor.core.phases import Intent, Phase

_INTENTS: dict[inventory_pb2.NodeIntent, Intent] = {
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
    """The operator's intent; what is not known counts as ACTIVE."""
    return _INTENTS.get(node.intent, Intent.ACTIVE)


def phase_number(phase: Phase) -> pb.NodePhase:
    """The contract's number of a phase."""
    return _PHASES[phase]


def phase_of(health: pb.NodeHealth) -> Phase:
    """The phase of a record; what is not known counts as REGISTERED."""
    return _PHASES_BACK.get(health.phase, Phase.REGISTERED)


def known(health: pb.NodeHealth, now: datetime) -> Known:
    """What a new leader makes of a stored record."""
    age_s = (now - health.transition_time.ToDatetime(tzinfo=UTC)).total_seconds()
    return Known(health.name, phase_of(health), health.reason, health.boot_id, max(0.0, age_s))


def running(beat: pb.Beat) -> tuple[Running, ...]:
    """The tasks of a beat whose processes live."""
    return tuple(Running(t.task, t.job, t.epoch, t.step, t.traceparent) for t in beat.tasks if t.alive)


def failure_of(request: pb.ReportFailureRequest) -> Failure:
    """A reported failure."""
    return Failure(
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
