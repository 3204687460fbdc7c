"""Where a job goes on that was suspended to do so: on exactly the GPUs that it claims, or, when one of them is lost, wherever there is room.

A job that grows, shrinks or moves has chosen its place before it stopped (`Claim`). It is placed there without a search. What happened
meanwhile undoes that: a GPU failed, its node closed, or the claim is over. Then it is a job that waits like any other, near its old nodes.
"""

from __future__ import annotations

from dataclasses import replace

from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.model import ClaimPurpose, Job
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.exact import Where
from whaleflux_scheduler.core.state_machine import goes_on


def claimed_place(job: Job, request: PlaceRequest, engine: Engine, holdings: Holdings) -> Placement | None:
    """The place that the waiting job claims to go on there; None when it claims none, or cannot have all of it."""
    if not goes_on(job) or holdings.claim(job.name) != job.claim or request.without_gpus:
        return None
    where = _positions(job, holdings)
    if where is None:
        return None
    with holdings.without(job.name):
        placement = engine.place_on(request, where)
    return None if placement is None else replace(placement, reasons=(_why(job), *placement.reasons))


def _positions(job: Job, holdings: Holdings) -> Where | None:
    """Where drivers count the claimed GPUs now; None when a node does not report one of them, or another job claims it too."""
    assert job.claim is not None
    where = []
    for node, uuids in job.claim.nodes:
        indices = holdings.devices.indices(node, uuids)
        if len(indices) != len(uuids):
            return None
        where.append((node, indices))
    return where


def _why(job: Job) -> str:
    claim, last = job.claim, job.attempt
    assert claim is not None
    if claim.purpose is ClaimPurpose.MOVE or last is None:
        return "it moved here from its checkpoint"
    return f"it goes on with {sum(len(uuids) for _, uuids in claim.nodes)} GPUs instead of {last.gpus}"
