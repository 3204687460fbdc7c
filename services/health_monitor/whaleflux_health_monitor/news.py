"""What health_monitor publishes: each change of a node's phase, and each incident as it opens, is fenced, and ends."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.changes import state_news
from whaleflux.events.publisher import Change, News
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import types_pb2

SOURCE = "health_monitor"


def of_health(change: Change, now: datetime) -> News | None:
    """The new phase; nothing when only details changed."""
    new = pb.NodeHealth.FromString(change.new.value) if change.new else None
    old = pb.NodeHealth.FromString(change.old.value) if change.old else None
    health = new or old or pb.NodeHealth()
    before, what = _phase(old) if old else "", _phase(new) if new else "DELETED"
    if before == what:
        return None
    return state_news(
        change,
        now,
        source=SOURCE,
        resource=health.name,
        what=what,
        previous=before,
        kind="phase",
        message=health.message if new else f"{health.name} was removed",
        site=health.name.split("/")[1],
        cause=types_pb2.Cause(resource=health.incident),
        attributes={"reason": health.reason, "confidence": f"{health.confidence:.2f}"},
    )


def of_incident(change: Change, now: datetime) -> News | None:
    """A failure: OPENED, FENCED, CLOSED; nothing for the same again, or when it is forgotten."""
    if change.new is None:
        return None
    incident = pb.Incident.FromString(change.new.value)
    before = _stage(pb.Incident.FromString(change.old.value)) if change.old else ""
    what = _stage(incident)
    if what == before:
        return None
    return state_news(
        change,
        now,
        source=SOURCE,
        resource=incident.name,
        what=what,
        previous=before,
        kind="failure",
        message=incident.message,
        epoch=max(incident.epochs.values(), default=0),
        cause=types_pb2.Cause(traceparent=next(iter(incident.traceparents.values()), "")),
        attributes={
            "kind": pb.IncidentKind.Name(incident.kind).removeprefix("INCIDENT_KIND_"),
            "nodes": ",".join(incident.nodes)[:1000],
            "jobs": ",".join(incident.jobs)[:1000],
            "application_fault": str(incident.application_fault).lower(),
        },
    )


def _phase(health: pb.NodeHealth) -> str:
    return pb.NodePhase.Name(health.phase).removeprefix("NODE_PHASE_")


def _stage(incident: pb.Incident) -> str:
    if incident.HasField("end_time") and incident.end_time != incident.detect_time:
        return "CLOSED"
    return "FENCED" if incident.HasField("fence_time") else "OPENED"
