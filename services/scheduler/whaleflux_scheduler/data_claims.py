"""Data that nodes pull for jobs that are to start there: what each agent is told of claims, what it says of it, and that in words.

The claims are in the records of jobs; how far the data is, is kept in memory while its agent is connected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.quantities import shown_duration
from whaleflux.v1 import agent_pb2
from whaleflux_scheduler.core.model import Claim, Job

MOST_CLAIMS = 1_000  # of one node
MAX_MESSAGE = 512
MOST_NAMED = 3  # nodes in one sentence


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a job has pulled ahead: by the nodes of its claim."""

    job: str
    uid: str
    nodes: frozenset[str]
    datasets: tuple[str, ...]


def ahead_of(job: Job | None) -> Ahead | None:
    """What its record says; None: nothing."""
    if job is None or job.ended or job.claim is None or not job.claim.datasets:
        return None
    return Ahead(job.name, job.uid, frozenset(node for node, _ in job.claim.nodes), job.claim.datasets)


class DataClaims:
    """By job and by node. Lives as long as its leadership."""

    def __init__(self) -> None:
        self._of: dict[str, Ahead] = {}
        self._on_node: dict[str, dict[str, Ahead]] = {}

    def record(self, name: str, job: Job | None) -> frozenset[str]:
        """The job as it is in the store now; returns the nodes that are to be told."""
        if job is not None and not job.readable:  # nothing is concluded from it
            return frozenset()
        before, now = self._of.pop(name, None), ahead_of(job)
        if now is not None:
            self._of[name] = now
        if before == now:
            return frozenset()
        for node in before.nodes if before is not None else ():
            self._on_node[node].pop(name, None)
            if not self._on_node[node]:
                del self._on_node[node]
        for node in now.nodes if now is not None else ():
            self._on_node.setdefault(node, {})[name] = now  # type: ignore[assignment]
        return frozenset((before.nodes if before else frozenset()) | (now.nodes if now else frozenset()))

    def on(self, node: str) -> agent_pb2.DesiredData:
        """All that the node is to pull ahead, in the order of names."""
        there = sorted(self._on_node.get(node, {}).items())
        claims = [
            agent_pb2.DataClaim(dataset=name, job=one.job, job_uid=one.uid) for _, one in there for name in one.datasets
        ]
        return agent_pb2.DesiredData(claims=claims[:MOST_CLAIMS])


def checked(report: agent_pb2.DataReport) -> list[agent_pb2.DataProgress]:
    """What an agent says, where it can be. Raises InvalidArgument."""
    if len(report.datasets) > MOST_CLAIMS:
        raise InvalidArgument(
            FieldViolation("data.datasets", f"are {len(report.datasets)}; at most {MOST_CLAIMS} are asked for")
        )
    for at, one in enumerate(report.datasets):
        field = f"data.datasets[{at}]"
        names.split(one.dataset, "datasets", field=f"{field}.dataset")
        if not 0 <= one.done_bytes <= max(one.size_bytes, 0):
            raise InvalidArgument(
                FieldViolation(f"{field}.done_bytes", f"is {one.done_bytes}, of {one.size_bytes} in all")
            )
        if not (math.isfinite(one.bytes_per_s) and one.bytes_per_s >= 0):
            raise InvalidArgument(FieldViolation(f"{field}.bytes_per_s", f"is {one.bytes_per_s}; give a number from 0"))
        if len(one.message) > MAX_MESSAGE:
            raise InvalidArgument(FieldViolation(f"{field}.message", f"has over {MAX_MESSAGE} characters; shorten it"))
    return list(report.datasets)


def words(claim: Claim, said: Iterable[tuple[str, agent_pb2.DataProgress]]) -> list[str]:
    """How far the claim's data is, by node and what its agent said of it; [] where it has none, one sentence for each dataset."""
    known = list(said)
    return [
        text
        for name in claim.datasets
        if (text := _words(name, claim, [(n, p) for n, p in known if p.dataset == name]))
    ]


def _words(dataset: str, claim: Claim, said: list[tuple[str, agent_pb2.DataProgress]]) -> str:
    nodes = [node for node, _ in claim.nodes]
    where = ", ".join(nodes[:MOST_NAMED]) + (f" and {len(nodes) - MOST_NAMED} more" if len(nodes) > MOST_NAMED else "")
    ready = {node for node, one in said if one.ready}
    if ready >= set(nodes):
        return f"its data is there: {dataset} on {where}"
    for node, one in said:
        if one.message:
            return f"its data does not come to {node}: {dataset}: {one.message}; it is asked for again"
    known = [one for _, one in said if one.size_bytes]
    if not known:
        return f"its data is to be pulled to {where}: {dataset}"
    done, size = sum(one.done_bytes for one in known), sum(one.size_bytes for one in known)
    left_s = max((_left_s(one) for one in known), default=0.0)
    when = f", ready in about {shown_duration(left_s)}" if left_s else ""
    return f"its data is being pulled to {where}: {dataset} ({100 * done // max(1, size)} %{when})"


def _left_s(one: agent_pb2.DataProgress) -> float:
    return (one.size_bytes - one.done_bytes) / one.bytes_per_s if one.bytes_per_s > 0 else 0.0
