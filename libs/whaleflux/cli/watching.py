"""One stream of lines out of the watches of several services."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any

from whaleflux.cli.output import enum_name
from whaleflux.errors import Refusal
from whaleflux.v1 import health_pb2, inventory_pb2, scheduler_pb2


@dataclass(frozen=True, slots=True)
class Told:
    """One thing that happened."""

    at_s: float
    kind: str
    name: str
    what: str
    message: str


Source = Callable[["Queue[Told | None]", bool], None]


def streams(client: Any) -> list[Source]:
    """One reader per kind of resource; each ends after what exists now, or goes on for ever."""
    return [
        _source(lambda: client.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest()), _job),
        _source(lambda: client.inventory.WatchNodes(inventory_pb2.WatchNodesRequest()), _node),
        _source(lambda: client.health.WatchNodeHealth(health_pb2.WatchNodeHealthRequest()), _health),
    ]


def _source(open_watch: Callable[[], Iterator[Any]], describe: Callable[[Any], Told]) -> Source:
    def read(told: Queue[Told | None], on: bool) -> None:
        last: dict[str, str] = {}
        while True:
            try:
                for change in open_watch():
                    which = change.WhichOneof("event")
                    if which == "bookmark" and not on:
                        break
                    if which in {"added", "modified"}:
                        event = describe(getattr(change, which))
                        if last.get(event.name) != event.what:  # progress alone is no event
                            last[event.name] = event.what
                            told.put(event)
                    elif which == "deleted":
                        told.put(Told(time.time(), "", change.deleted, "DELETED", ""))
            except Refusal as refusal:
                if not on:
                    told.put(Told(time.time(), "", "", "UNAVAILABLE", refusal.message))
            if not on:
                told.put(None)
                return
            time.sleep(0.5)

    return read


def _job(job: Any) -> Told:
    where = ", ".join(task.node for task in job.attempt.tasks)
    message = job.state_message or (f"on {where}" if where else "")
    return Told(time.time(), "job", job.name, enum_name(scheduler_pb2.JobState, job.state, "JOB_STATE_"), message)


def _node(node: Any) -> Told:
    what = enum_name(inventory_pb2.NodeIntent, node.intent, "NODE_INTENT_")
    return Told(time.time(), "node", node.name, what, node.intent_reason or f"{len(node.facts.gpus)} GPU(s)")


def _health(health: Any) -> Told:
    what = enum_name(health_pb2.NodePhase, health.phase, "NODE_PHASE_")
    at_s = health.transition_time.seconds + health.transition_time.nanos / 1e9 or time.time()
    return Told(at_s, "node_health", health.name, what, health.message or health.reason)
