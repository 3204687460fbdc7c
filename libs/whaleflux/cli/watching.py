"""One stream of events out of what several services tell: jobs, nodes and their health, incidents, checkpoints.

Each source first tells what is known of the past, with the times that its owner stored, then (when asked to go on) each
change as it comes. Incidents and checkpoints have no watch: they are listed again every two seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any

from whaleflux.cli.output import enum_name
from whaleflux.cli.state import pages
from whaleflux.errors import Refusal
from whaleflux.v1 import checkpoint_pb2, health_pb2, inventory_pb2, scheduler_pb2

LIST_AGAIN_S = 2.0
OPEN_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Told:
    """One thing that happened; `at_s` is Unix time."""

    at_s: float
    kind: str
    name: str
    what: str
    message: str

    def is_about(self, wanted: str) -> bool:
        """`wanted`: "" for all, TYPE/NAME, or a part of a name."""
        kind, slash, name = wanted.partition("/")
        if slash and kind in {"job", "node", "incident", "checkpoint"}:
            return self.kind == kind and f"/{name}" in f"/{self.name}"
        return wanted in self.name


@dataclass(frozen=True, slots=True)
class Listed:
    """A source has told its past; `refusal`: why it could not."""

    refusal: Refusal | None = None


Events = Queue[Told | Listed]
Source = Callable[[Events, bool], None]
History = Callable[[Any], Iterable[Told]]


def sources(client: Any) -> list[Source]:
    """One reader per kind of resource; each ends after the past, or goes on for ever."""
    incidents = health_pb2.ListIncidentsRequest(show_ended=True, page_size=1000)
    checkpoints = checkpoint_pb2.ListCheckpointsRequest(parent="queues/-/jobs/-", page_size=1000)
    return [
        _watched(lambda: client.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest()), _job),
        _watched(lambda: client.inventory.WatchNodes(inventory_pb2.WatchNodesRequest()), _node),
        _watched(lambda: client.health.WatchNodeHealth(health_pb2.WatchNodeHealthRequest()), _health),
        _listed(lambda: pages(client.health.ListIncidents, incidents, "incidents"), _incident),
        _listed(lambda: pages(client.checkpoint.ListCheckpoints, checkpoints, "checkpoints"), _checkpoint),
    ]


def _watched(open_watch: Callable[[], Iterator[Any]], history: History) -> Source:
    def read(events: Events, on: bool) -> None:
        last: dict[str, str] = {}
        listed = False

        def tell(message: Any) -> None:
            past = list(history(message))
            if not listed:
                for told in past:
                    events.put(told)
            elif past and last.get(message.name) != past[-1].what:  # progress alone is no event
                events.put(Told(time.time(), past[-1].kind, message.name, past[-1].what, past[-1].message))
            last[message.name] = past[-1].what if past else ""

        while True:
            refused: Refusal | None = None
            try:
                for change in open_watch():
                    which = change.WhichOneof("event")
                    if which in {"added", "modified"}:
                        tell(getattr(change, which))
                    elif which == "deleted":
                        events.put(Told(time.time(), "", change.deleted, "DELETED", ""))
                    elif not listed:
                        listed = True
                        events.put(Listed())
                        if not on:
                            return
            except Refusal as refusal:
                refused = refusal
            if not listed:
                listed = True
                events.put(Listed(refused))
            if not on:
                return
            time.sleep(OPEN_AGAIN_S)

    return read


def _listed(list_all: Callable[[], list[Any]], history: History) -> Source:
    def read(events: Events, on: bool) -> None:
        seen: set[Told] = set()
        while True:
            refused: Refusal | None = None
            try:
                now = {told for message in list_all() for told in history(message)}
                for told in sorted(now - seen, key=lambda told: told.at_s):
                    events.put(told)
                seen = now
            except Refusal as refusal:
                refused = refusal
            events.put(Listed(refused))
            if not on:
                return
            time.sleep(LIST_AGAIN_S)

    return read


def _at(kind: str, name: str, *moments: tuple[Any, str, str]) -> Iterator[Told]:
    """The moments whose time is set, oldest first."""
    known = [(stamp.seconds + stamp.nanos / 1e9, what, message) for stamp, what, message in moments if stamp.seconds]
    for at_s, what, message in sorted(known, key=lambda moment: moment[0]):
        yield Told(at_s, kind, name, what, message)


def _job(job: Any) -> Iterable[Told]:
    state = enum_name(scheduler_pb2.JobState, job.state, "JOB_STATE_")
    where = ", ".join(task.node for task in job.attempt.tasks)
    now = job.state_message or (f"on {where}" if where else "")
    told = [
        *_at("job", job.name, (job.create_time, "SUBMITTED", f"by {job.submitter}" if job.submitter else ""),
             (job.attempt.allocate_time, "ALLOCATED", f"epoch {job.attempt.epoch} on {where}"),
             (job.attempt.run_time, "RUNNING", f"epoch {job.attempt.epoch}"), (job.end_time, state, now)),
    ]  # fmt: skip
    if not told or told[-1].what != state:
        told.append(Told(max((t.at_s for t in told), default=time.time()), "job", job.name, state, now))
    return told


def _node(node: Any) -> Iterable[Told]:
    intent = enum_name(inventory_pb2.NodeIntent, node.intent, "NODE_INTENT_")
    joined = f"{len(node.facts.gpus)} GPU(s)"
    told = list(
        _at("node", node.name, (node.create_time, "JOINED", joined), (node.register_time, "REGISTERED", joined))
    )
    if node.intent_reason or intent not in {"UNSPECIFIED", "ACTIVE", "SCHEDULE"}:
        told.append(Told(told[-1].at_s if told else time.time(), "node", node.name, intent, node.intent_reason))
    return told


def _health(health: Any) -> Iterable[Told]:
    what = enum_name(health_pb2.NodePhase, health.phase, "NODE_PHASE_")
    return _at("node", health.name, (health.transition_time, what, health.message or health.reason))


def _incident(incident: Any) -> Iterable[Told]:
    what = enum_name(health_pb2.IncidentKind, incident.kind, "INCIDENT_KIND_")
    return _at(
        "incident",
        incident.name,
        (incident.detect_time if incident.detect_time.seconds else incident.start_time, what, incident.message),
        (incident.fence_time, "FENCED", ", ".join(incident.nodes)),
        (incident.end_time, "OVER", incident.action),
    )


def _checkpoint(checkpoint: Any) -> Iterable[Told]:
    what = enum_name(checkpoint_pb2.CheckpointState, checkpoint.state, "CHECKPOINT_STATE_")
    stamp = checkpoint.commit_time if checkpoint.commit_time.seconds else checkpoint.create_time
    return _at("checkpoint", checkpoint.name, (stamp, what, f"step {checkpoint.step}"))
