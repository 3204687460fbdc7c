"""What health_monitor publishes: each change of a node's phase, and each incident as it opens, is fenced, and ends."""

from __future__ import annotations

from datetime import UTC, datetime

from whaleflux import names
from whaleflux.convert import enum_name
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import state_event
from whaleflux.reasons import What
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import types_pb2

SOURCE = "health_monitor"


def of_health(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """The new phase; nothing when only details changed."""
    new = pb.NodeHealth.FromString(change.new.value) if change.new else None
    old = pb.NodeHealth.FromString(change.old.value) if change.old else None
    health = new or old or pb.NodeHealth()
    before, what = _phase(old) if old else "", _phase(new) if new else What.DELETED
    if before == what:
        return None
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=health.name,
        what=what,
        previous=before,
        kind="phase",
        message=health.message if new else f"{health.name} was removed",
        site=names.top(health.name),
        cause=types_pb2.Cause(resource=health.incident, actor=_rule(health.reason)),
        attributes={"reason": health.reason, "confidence": f"{health.confidence:.2f}", "incident": health.incident},
        at=health.transition_time.ToDatetime(tzinfo=UTC) if new and health.HasField("transition_time") else None,
    )


def of_incident(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """A failure: OPENED, FENCED, CLOSED; nothing for the same again, or when it is forgotten."""
    if change.new is None:
        return None
    incident = pb.Incident.FromString(change.new.value)
    before = _stage(pb.Incident.FromString(change.old.value)) if change.old else ""
    what = _stage(incident)
    if what == before:
        return None
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=incident.name,
        what=what,
        previous=before,
        kind="failure",
        message=incident.message,
        epoch=max(incident.epochs.values(), default=0),
        cause=types_pb2.Cause(
            traceparent=next(iter(incident.traceparents.values()), ""),
            actor=_rule(enum_name(pb.IncidentKind, incident.kind, "INCIDENT_KIND_")),
        ),
        at=_stage_time(incident, what),
        attributes={
            "kind": enum_name(pb.IncidentKind, incident.kind, "INCIDENT_KIND_"),
            "nodes": ",".join(incident.nodes)[:1000],
            "jobs": ",".join(incident.jobs)[:1000],
            "application_fault": str(incident.application_fault).lower(),
        },
    )


def _phase(health: pb.NodeHealth) -> str:
    return enum_name(pb.NodePhase, health.phase, "NODE_PHASE_")


def _rule(reason: str) -> str:
    """The rule of the health monitor as an actor: what it concluded."""
    return f"{SOURCE}/{reason.lower().replace('_', '-')}" if reason else SOURCE


def _stage_time(incident: pb.Incident, what: str) -> datetime | None:
    """When it came to that, as its record says."""
    if what == What.CLOSED:
        return incident.end_time.ToDatetime(tzinfo=UTC)
    if what == What.FENCED:
        return incident.fence_time.ToDatetime(tzinfo=UTC)
    return incident.detect_time.ToDatetime(tzinfo=UTC) if incident.HasField("detect_time") else None


def _stage(incident: pb.Incident) -> str:
    if incident.HasField("end_time") and incident.end_time != incident.detect_time:
        return What.CLOSED
    return What.FENCED if incident.HasField("fence_time") else What.OPENED
