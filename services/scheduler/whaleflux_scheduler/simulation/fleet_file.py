"""An existing fleet as `whaleflux simulate --from-fleet` asks it: nodes as inventory lists them, queues and jobs as the scheduler does.

The file is JSON: lists of the contract's Node, NodeHealth, Queue and Job in protobuf's JSON form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from whaleflux import names
from whaleflux.convert import node_from_proto
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import running_time
from whaleflux_scheduler.core.model import Attempt, Job, JobState
from whaleflux_scheduler.simulation.cluster_file import Cluster
from whaleflux_scheduler.simulation.timeline import BEGIN
from whaleflux_scheduler.simulation.workload import Submission

M = TypeVar("M", bound=Message)
_OF_LIMIT = 0.9
_OPEN = (inventory_pb2.NODE_INTENT_UNSPECIFIED, inventory_pb2.NODE_INTENT_ACTIVE)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Nodes that take work now, who runs there with the seconds left, and who waits. Cordoned nodes are left out."""

    cluster: Cluster
    running: tuple[tuple[Job, Submission], ...]
    waiting: tuple[Submission, ...]


def read(path: Path, assume_s: float) -> Fleet:
    """`assume_s`: how long a job takes that says nothing of it. Raises InvalidArgument."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        nodes = _all(content, "nodes", inventory_pb2.Node)
        queues = _all(content, "queues", scheduler_pb2.Queue)
        jobs = [convert.job_of(one) for one in _all(content, "jobs", scheduler_pb2.Job)]
    except (OSError, ValueError, ParseError) as error:
        raise InvalidArgument(FieldViolation("--from-fleet", f"cannot read {path}: {error}")) from None
    shift = BEGIN - datetime.fromisoformat(content["time"]).astimezone(UTC)
    opened = tuple(node_from_proto(node) for node in nodes if node.intent in _OPEN and node.facts.gpus)
    cluster = Cluster(opened, {names.last(queue.name): convert.queue_of(queue) for queue in queues})
    running = tuple(_running(job, shift, assume_s) for job in jobs if _runs(job, {node.name for node in opened}))
    waiting = tuple(_waiting(job, assume_s) for job in sorted(jobs, key=lambda job: job.create_time) if _waits(job))
    return Fleet(cluster, running, waiting)


def _all(content: dict[str, Any], key: str, kind: type[M]) -> list[M]:
    return [ParseDict(one, kind(), ignore_unknown_fields=True) for one in content.get(key, ())]


def _runs(job: Job, nodes: set[str]) -> bool:
    return job.state is JobState.RUNNING and job.attempt is not None and nodes.issuperset(job.attempt.nodes)


def _waits(job: Job) -> bool:
    return job.state in (JobState.QUEUED, JobState.RECOVERING) and job.hold is None and not job.awaits


def _expected_s(job: Job, assume_s: float) -> float:
    """A job that says its limit alone is taken to use most of it: few are ended by it."""
    if said := getattr(job.spec, "expected_s", None):
        return float(said)
    return _OF_LIMIT * job.spec.time_limit_s if job.spec.time_limit_s else assume_s


def _running(job: Job, shift: timedelta, assume_s: float) -> tuple[Job, Submission]:
    """With its instants as the simulation counts them; one that is over its time already takes half as long again."""
    expected_s = _expected_s(job, assume_s)
    assert job.attempt is not None
    moved = replace(job, create_time=job.create_time + shift, attempt=_moved(job.attempt, shift), past_attempts=())
    ran_s = running_time.run_s(moved, BEGIN)
    left_s = expected_s - ran_s if ran_s < expected_s else expected_s / 2
    return moved, Submission(job.name, job.spec, 0.0, max(1.0, left_s), speed=None)


def _moved(attempt: Attempt, shift: timedelta) -> Attempt:
    run_time = attempt.run_time + shift if attempt.run_time else None
    return replace(attempt, allocate_time=attempt.allocate_time + shift, run_time=run_time)


def _waiting(job: Job, assume_s: float) -> Submission:
    return Submission(job.name, job.spec, 0.0, max(1.0, _expected_s(job, assume_s) - job.run_s))
