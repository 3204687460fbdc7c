"""What health_monitor publishes: each change of a node's phase, and each incident as it opens, is fenced, and ends."""

from __future__ import annotations

from datetime import datetime

from whaleflux.events.publisher import Change, News
from whaleflux.events.subjects import HUB, Subject, change_id
from whaleflux.v1 import events_pb2
from whaleflux.v1 import health_pb2 as pb

SOURCE = "health_monitor"


def of_health(change: Change, now: datetime) -> News | None:
    """The new phase; nothing when only details changed."""
    new = pb.NodeHealth.FromString(change.new.value) if change.new else None
    old = pb.NodeHealth.FromString(change.old.value) if change.old else None
    health = new or old or pb.NodeHealth()
    before, what = _phase(old) if old else "", _phase(new) if new else "DELETED"
    if before == what:
        return None
    event = _event(change, now, health.name, what, before, health.message if new else f"{health.name} was removed")
    event.site = health.name.split("/")[1]
    event.cause.resource = health.incident
    event.attributes["reason"] = health.reason
    event.attributes["confidence"] = f"{health.confidence:.2f}"
    return News(str(Subject.of(health.name, "phase")), event.SerializeToString())


def of_incident(change: Change, now: datetime) -> News | None:
    """A failure: OPENED, FENCED, CLOSED; nothing for the same again, or when it is forgotten."""
    if change.new is None:
        return None
    incident = pb.Incident.FromString(change.new.value)
    before = _stage(pb.Incident.FromString(change.old.value)) if change.old else ""
    what = _stage(incident)
    if what == before:
        return None
    event = _event(change, now, incident.name, what, before, incident.message)
    event.attributes["kind"] = pb.IncidentKind.Name(incident.kind).removeprefix("INCIDENT_KIND_")
    event.attributes["nodes"] = ",".join(incident.nodes)[:1000]
    event.attributes["jobs"] = ",".join(incident.jobs)[:1000]
    event.attributes["application_fault"] = str(incident.application_fault).lower()
    event.epoch = max(incident.epochs.values(), default=0)
    trace = next(iter(incident.traceparents.values()), "")
    event.cause.traceparent = trace
    headers = {"traceparent": trace} if trace else None
    return News(str(Subject.of(incident.name, "failure")), event.SerializeToString(), headers)


def _phase(health: pb.NodeHealth) -> str:
    return pb.NodePhase.Name(health.phase).removeprefix("NODE_PHASE_")


def _stage(incident: pb.Incident) -> str:
    if incident.HasField("end_time") and incident.end_time != incident.detect_time:
        return "CLOSED"
    return "FENCED" if incident.HasField("fence_time") else "OPENED"


def _event(change: Change, now: datetime, resource: str, what: str, previous: str, message: str) -> events_pb2.Event:
    event = events_pb2.Event(
        id=change_id(change.key, change.revision),
        resource=resource,
        what=what,
        previous=previous,
        revision=change.revision,
        message=message,
        source=SOURCE,
        site=HUB,
    )
    event.time.FromDatetime(now)
    return event
