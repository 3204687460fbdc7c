"""What a leader writes down: each node's health, and incidents with their beginning, fence and end.

In memory while a leadership lasts, begun from the store and written back through the `Recorder`; nobody else writes
these records. Every method returns the writes that its change needs, to be committed together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.reasons import NodeReason
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put, Write
from whaleflux.telemetry import Attribute
from whaleflux.v1 import health_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_health_monitor import convert
from whaleflux_health_monitor.core.attribution import Attribution, Fault, TaskFailure
from whaleflux_health_monitor.core.evidence import NodeState, Running
from whaleflux_health_monitor.core.liveness import NodeVerdict
from whaleflux_health_monitor.core.phases import Phase

SPAN = "health.failure"
KEPT_INCIDENTS = 1000
MAX_CONDITIONS = 16
JOB_INCIDENT = "incidents/f-"
MOST_SHARED = 100  # jobs of one incident of a loss: each writes all of its record; those beyond have their own
_LOSSES = frozenset({Fault.NODE_LOST, Fault.PEER_LOST})
_LOST_KINDS = frozenset({pb.INCIDENT_KIND_NODE_LOST, pb.INCIDENT_KIND_PEER_LOST, pb.INCIDENT_KIND_SITE_PARTITIONED})


class EmitSpan(Protocol):
    """`telemetry.emit_span`, or what a test puts in its place."""

    def __call__(
        self,
        name: str,
        start_time: datetime,
        end_time: datetime,
        *,
        parent: str = "",
        error: str = "",
        attributes: dict[Attribute, str | bool | int | float] | None = None,
    ) -> str: ...


class HealthRecords:
    """See the module. Times of the core are monotonic; `_at` turns them into instants."""

    def __init__(
        self,
        clock: Clock,
        emit: EmitSpan,
        healths: Iterable[pb.NodeHealth] = (),
        incidents: Iterable[pb.Incident] = (),
    ) -> None:
        self._clock, self._emit = clock, emit
        self.healths = {health.name: health for health in healths}
        self.incidents = {incident.name: incident for incident in incidents}

    # nodes

    def verdict(self, verdict: NodeVerdict, node: NodeState) -> list[Write]:
        """A node's phase or its reason changed."""
        now = self._clock.now()
        health = self.healths.setdefault(verdict.node, pb.NodeHealth(name=verdict.node))
        if convert.phase_of(health) is not verdict.phase or not health.HasField("transition_time"):
            health.transition_time.FromDatetime(now)
        health.phase = convert.phase_number(verdict.phase)
        health.reason, health.message, health.confidence = verdict.reason, verdict.message, verdict.confidence
        health.boot_id = node.boot_id
        if verdict.phase is Phase.UNREACHABLE:
            health.ClearField("announced_stop")
        if node.reported:
            health.last_seen_time.FromDatetime(self._at(node.life_s))
        touched = self._incidents_of(verdict, node, health)
        return [*self._puts(touched), _put(keys.NODE_HEALTH, health)]

    def agent_started(self, name: str, boot_id: str) -> list[Write]:
        """An agent opened a stream: perhaps its host booted anew, perhaps it is back from a stop that it announced."""
        health = self.healths.get(name)
        if health is None or _unjudged(health):
            return []  # its first verdict will bring it
        if health.boot_id == boot_id and not health.HasField("announced_stop"):
            return []
        health.boot_id = boot_id
        health.ClearField("announced_stop")
        return [_put(keys.NODE_HEALTH, health)]

    def announced(self, name: str, kind: pb.StopKind, expires_after_s: float) -> list[Write]:
        """An agent stops on purpose: kept until it is back, or until its node is fenced after `expires_after_s`."""
        now = self._clock.now()
        health = self.healths.setdefault(name, pb.NodeHealth(name=name))
        health.announced_stop.kind = kind
        health.announced_stop.announce_time.FromDatetime(now)
        health.announced_stop.expire_time.FromDatetime(now + timedelta(seconds=expires_after_s))
        return [] if _unjudged(health) else [_put(keys.NODE_HEALTH, health)]

    def conditions(self, name: str, failing: Mapping[str, tuple[str, str]]) -> list[Write]:
        """What does not hold on a node now: reason and message by type. A condition that is not named holds again."""
        health = self.healths.setdefault(name, pb.NodeHealth(name=name))
        known = {condition.type: condition for condition in health.conditions}
        changed = [self._failing(health, known.get(kind), kind, *failing[kind]) for kind in sorted(failing)]
        changed += [self._holds(condition) for kind, condition in known.items() if kind not in failing]
        if not any(changed) or _unjudged(health):  # its first verdict will bring them
            return []
        return [_put(keys.NODE_HEALTH, health)]

    def _failing(
        self, health: pb.NodeHealth, found: types_pb2.Condition | None, kind: str, reason: str, message: str
    ) -> bool:
        if found is None:
            if len(health.conditions) >= MAX_CONDITIONS:
                return False
            found = health.conditions.add(type=kind)
        before = (found.status, found.reason, found.message)
        if before == (types_pb2.CONDITION_STATUS_FALSE, reason, message):
            return False
        if found.status != types_pb2.CONDITION_STATUS_FALSE:
            found.last_transition_time.FromDatetime(self._clock.now())
        found.status, found.reason, found.message = types_pb2.CONDITION_STATUS_FALSE, reason, message
        return True

    def _holds(self, condition: types_pb2.Condition) -> bool:
        if condition.status == types_pb2.CONDITION_STATUS_TRUE:
            return False
        condition.status, condition.reason, condition.message = types_pb2.CONDITION_STATUS_TRUE, NodeReason.CLEARED, ""
        condition.last_transition_time.FromDatetime(self._clock.now())
        return True

    def forget(self, name: str) -> list[Write]:
        """Inventory has no such node any more."""
        health = self.healths.pop(name, None)
        if health is None:
            return []
        over = [*self._close(health, "the node was removed"), *self._absolve(name, "the node was removed")]
        return [*self._puts(over), Delete(keys.of_name(keys.NODE_HEALTH, name))]

    # failures of jobs

    def of_failure(self, job: str, epoch: int) -> pb.Incident | None:
        """The incident of a job's attempt, if its failure was reported before: its own, or that of the node's loss."""
        own = self.incidents.get(_name_of(job, epoch))
        return own or next((i for i in self.incidents.values() if i.failed.get(job) == epoch), None)

    def failure(
        self, failure: TaskFailure, attribution: Attribution, parent: str, begun_s: float
    ) -> tuple[pb.Incident, list[Write]]:
        """A task ended badly: its incident, with the failure span in the job's trace. All that one loss of a node ends shares one."""
        now, begun = self._clock.now(), self._at(begun_s)
        incident = self._of_loss(attribution) or pb.Incident(
            name=_name_of(failure.job, failure.epoch),
            kind=f"INCIDENT_KIND_{attribution.fault.value}",
            nodes=attribution.culprits,
            jobs=[failure.job],
            application_fault=attribution.application_fault,
            confidence=attribution.confidence,
            message=attribution.message,
            start_time=convert.stamp(begun),
            detect_time=convert.stamp(now),
            action="the restart counts" if attribution.application_fault else "restarts elsewhere, not counted",
            epochs={failure.job: failure.epoch},
        )
        _add_all(incident.jobs, [failure.job])
        incident.epochs[failure.job] = incident.failed[failure.job] = failure.epoch
        if not attribution.culprits or attribution.fault is Fault.GPU_FAULT:
            incident.end_time.FromDatetime(now)  # what stays broken is a condition of its node
        incident.traceparents[failure.job] = self._traced(failure.job, failure.epoch) or self._emit(
            SPAN,
            begun,
            now,
            parent=parent,
            error=attribution.fault.value,
            attributes={
                Attribute.JOB: failure.job,
                Attribute.EPOCH: failure.epoch,
                Attribute.TASK: failure.task,
                Attribute.NODE: failure.node,
                Attribute.INCIDENT: incident.name,
                Attribute.REASON: attribution.fault.value,
            },
        )
        self.incidents[incident.name] = incident
        return incident, self._puts([incident])

    def _of_loss(self, attribution: Attribution) -> pb.Incident | None:
        """The open incident of the loss that ended the task, whoever noticed it first."""
        culprits = {*attribution.culprits}
        if attribution.fault not in _LOSSES or not culprits:
            return None
        open_ = (i for i in self.incidents.values() if i.kind in _LOST_KINDS and not i.HasField("end_time"))
        return next((i for i in open_ if culprits <= {*i.nodes} and len(i.failed) < MOST_SHARED), None)

    # incidents of nodes

    def _incidents_of(self, verdict: NodeVerdict, node: NodeState, health: pb.NodeHealth) -> list[pb.Incident]:
        if verdict.phase not in {Phase.SUSPECT, Phase.UNREACHABLE}:
            return [*self._close(health, verdict.message), *self._absolve(health.name, verdict.message)]
        kind = (
            pb.INCIDENT_KIND_SITE_PARTITIONED
            if verdict.reason == NodeReason.SITE_PARTITIONED
            else pb.INCIDENT_KIND_NODE_LOST
        )
        touched: list[pb.Incident] = []
        incident = self.incidents.get(health.incident)
        if incident is None or incident.HasField("end_time") or incident.kind != kind:
            touched = self._close(health, f"now {verdict.reason}: {verdict.message}")
            incident = self._open(kind, node, verdict)
            health.incident = incident.name
        incident.message, incident.confidence = verdict.message, verdict.confidence
        _add_all(incident.jobs, (task.job for task in node.tasks))
        incident.epochs.update({task.job: task.epoch for task in node.tasks})
        if verdict.phase is Phase.UNREACHABLE:
            incident.fence_time.FromDatetime(self._clock.now())
            incident.action = "fenced: its attempts are over, its work restarts elsewhere"
            self._trace(incident, node.tasks, verdict)
        return [*touched, incident]

    def _open(self, kind: pb.IncidentKind, node: NodeState, verdict: NodeVerdict) -> pb.Incident:
        """A new incident, or the one that the node's whole site has already."""
        if kind == pb.INCIDENT_KIND_SITE_PARTITIONED:
            for other in self.incidents.values():
                here = any(names.top(name) == node.site for name in other.nodes)
                if other.kind == kind and here and not other.HasField("end_time"):
                    _add_all(other.nodes, [node.name])
                    return other
        elif (reported := self._reported(node.name)) is not None:
            reported.kind, reported.action = kind, "no new work there; waits for a sign of life"
            return reported
        now = self._clock.now()
        incident = pb.Incident(
            name=names.incident(names.ulid(now.timestamp())),
            kind=kind,
            nodes=[node.name],
            start_time=convert.stamp(self._at(verdict.since_s)),
            detect_time=convert.stamp(now),
            action="no new work there; waits for a sign of life",
        )
        self.incidents[incident.name] = incident
        return incident

    def _reported(self, name: str) -> pb.Incident | None:
        """The open incident of a job that was ended by the loss of this node alone, before the node was suspected."""
        return next(
            (
                incident
                for incident in self.incidents.values()
                if incident.kind in _LOST_KINDS and list(incident.nodes) == [name] and not incident.HasField("end_time")
            ),
            None,
        )

    def _close(self, health: pb.NodeHealth, message: str) -> list[pb.Incident]:
        """Ends the node's open incident, unless other nodes are in it still."""
        mine = self.incidents.get(health.incident)
        health.incident = ""
        if mine is None or mine.HasField("end_time"):
            return []
        if any(other.incident == mine.name for other in self.healths.values()):
            return []
        return [self._ended(mine, message)]

    def _absolve(self, name: str, message: str) -> list[pb.Incident]:
        """Ends the incidents of jobs that blamed this node alone."""
        return [
            self._ended(incident, message)
            for incident in self.incidents.values()
            if incident.name.startswith(JOB_INCIDENT)
            and list(incident.nodes) == [name]
            and not incident.HasField("end_time")
        ]

    def _ended(self, incident: pb.Incident, message: str) -> pb.Incident:
        incident.end_time.FromDatetime(self._clock.now())
        incident.action = f"over: {message}"
        return incident

    def _trace(self, incident: pb.Incident, tasks: Sequence[Running], verdict: NodeVerdict) -> None:
        """A failure span in the trace of every job that ran there, unless the job's own report has made it."""
        for task in tasks:
            attributes: dict[Attribute, str | bool | int | float] = {
                Attribute.JOB: task.job,
                Attribute.EPOCH: task.epoch,
                Attribute.TASK: task.task,
                Attribute.NODE: verdict.node,
                Attribute.INCIDENT: incident.name,
                Attribute.REASON: verdict.reason,
            }
            incident.traceparents[task.job] = self._traced(task.job, task.epoch) or self._emit(
                SPAN,
                self._at(verdict.since_s),
                self._clock.now(),
                parent=task.traceparent,
                error=verdict.reason,
                attributes=attributes,
            )

    def _traced(self, job: str, epoch: int) -> str:
        """The failure span of a job's attempt, if there is one."""
        for incident in self.incidents.values():
            if incident.epochs.get(job) == epoch and job in incident.traceparents:
                return incident.traceparents[job]
        return ""

    def _puts(self, touched: Sequence[pb.Incident]) -> list[Write]:
        """Writes these, and forgets the oldest incidents that are over."""
        return [*(_put(keys.INCIDENTS, i) for i in touched), *self._sweep({i.name for i in touched})]

    def _sweep(self, kept: set[str]) -> list[Write]:
        excess = len(self.incidents) - KEPT_INCIDENTS
        if excess <= 0:
            return []
        ended = [i for i in self.incidents.values() if i.HasField("end_time") and i.name not in kept]
        oldest = sorted(ended, key=lambda i: i.end_time.ToNanoseconds())[: min(excess, 32)]
        for incident in oldest:
            del self.incidents[incident.name]
        return [Delete(keys.of_name(keys.INCIDENTS, incident.name)) for incident in oldest]

    def _at(self, monotonic_s: float) -> datetime:
        return self._clock.now() - timedelta(seconds=self._clock.monotonic() - monotonic_s)


def _unjudged(health: pb.NodeHealth) -> bool:
    """Begun by what its facts say, before any verdict."""
    return health.phase == pb.NODE_PHASE_UNSPECIFIED


def _name_of(job: str, epoch: int) -> str:
    """The same for every report of one attempt, whoever leads."""
    return f"{JOB_INCIDENT}{hashlib.sha256(f'{job}@{epoch}'.encode()).hexdigest()[:24]}"


def _put(prefix: str, message: pb.NodeHealth | pb.Incident) -> Put:
    return Put(keys.of_name(prefix, message.name), message.SerializeToString(deterministic=True))


def _add_all(into: MutableSequence[str], items: Iterable[str]) -> None:
    for item in items:
        if item not in into:
            into.append(item)
