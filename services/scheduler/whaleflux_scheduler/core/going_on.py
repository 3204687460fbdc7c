"""Where a job goes on that was suspended to do so: on exactly the GPUs that it claims, or, when one of them is lost, wherever there is room.

A job that grows, shrinks or moves has chosen its place before it stopped (`Claim`). It is placed there without a search. What happened
meanwhile undoes that: a GPU failed, its node closed, or the claim is over. A node that a new leader does not know well yet has not closed: it is waited for. Then it is a job that waits like any other, near its old nodes;
one that was moved for the good of others has its old place back, if there is no other room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from whaleflux_scheduler.core.attempt_failures import ended_by
from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.model import Attempt, ClaimPurpose, Job, JobState
from whaleflux_scheduler.core.observed import EndReason
from whaleflux_scheduler.core.placement.api import Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.exact import Where
from whaleflux_scheduler.core.state_machine import goes_on

Place = tuple[tuple[str, tuple[str, ...]], ...]
"""GPUs by node, in rank order."""


def claimed_place(job: Job, request: PlaceRequest, engine: Engine, holdings: Holdings) -> Placement | None:
    """The place that the waiting job claims to go on there; None when it claims none, or cannot have all of it."""
    if not goes_on(job) or holdings.claim(job.name) != job.claim or request.without_gpus:
        return None
    where = positions(job.claim.nodes if job.claim else (), holdings)
    if where is None:
        return None
    with holdings.without(job.name):
        placement = engine.place_on(request, where)
    return None if placement is None else replace(placement, reasons=(_why(job), *placement.reasons))


def awaited_nodes(
    job: Job, exclude: Collection[str], holdings: Holdings, may_open: Callable[[str], bool]
) -> tuple[str, ...]:
    """Nodes of the place that the waiting job claims to go on there, which take no work only for now; none when all of it is lost anyway."""
    claim = job.claim
    if claim is None or not goes_on(job) or holdings.claim(job.name) != claim:
        return ()
    taken = any(holder != job.name for _, uuids in claim.nodes for uuid in uuids for holder in holdings.holders(uuid))
    nodes = [node for node, _ in claim.nodes]
    away = tuple(node for node in nodes if may_open(node))
    lost = taken or any(node in exclude or (node not in holdings.devices.open and node not in away) for node in nodes)
    return () if lost else away


def way_back(job: Job, request: PlaceRequest, engine: Engine, holdings: Holdings) -> Placement | None:
    """The place that a job left to go on elsewhere, when that came to nothing: it may have it back, whoever claims it, but for higher priorities.

    Who was to get that place waits on, as it did before. None: the job did not leave for a move, or others run there by now.
    """
    if not left_for_a_move(job) or request.without_gpus:
        return None
    place = left_place(job)
    if (where := positions(place, holdings)) is None:
        return None
    others = holdings.claimants_of(uuid for _, uuids in place for uuid in uuids) - {job.name}
    if any(holdings.jobs[other].spec.priority > job.spec.priority for other in others):
        return None
    with holdings.without(job.name), holdings.without_claims(others):
        placement = engine.place_on(request, where)
    return None if placement is None else replace(placement, reasons=(_BACK, *placement.reasons))


MOVED_HERE = "it moved here from its checkpoint"
_UNDER_WAY = frozenset({JobState.QUEUED, JobState.STARTING, JobState.RECOVERING})
_BACK = "it is back where it was: the place that it was to move to is lost"


def left_for_a_move(job: Job) -> bool:
    """Whether it waits because it was to go on elsewhere."""
    return job.state is not JobState.STARTING and under_way(job)


def left_place(job: Job) -> Place:
    """The GPUs of the last attempt that ran."""
    left = last_that_ran(job)
    return tuple((task.node, task.gpus) for task in left.tasks) if left is not None else ()


def under_way(job: Job) -> bool:
    """Whether it has left its place to go on elsewhere, and does not run there yet: it may have to come back."""
    if job.state not in _UNDER_WAY:
        return False
    last = last_that_ran(job)
    return last is not None and ended_by(last) is EndReason.MOVED


def last_that_ran(job: Job) -> Attempt | None:
    return next((attempt for attempt in reversed(tuple(job.attempts())) if attempt.run_time is not None), None)


def positions(place: Place, holdings: Holdings) -> Where | None:
    """Where drivers count these GPUs now; None when a node does not report one of them."""
    where = [(node, holdings.devices.indices(node, uuids)) for node, uuids in place]
    whole = all(len(indices) == len(uuids) for (_, indices), (_, uuids) in zip(where, place, strict=True))
    return where if whole else None


def _why(job: Job) -> str:
    claim, last = job.claim, job.attempt
    assert claim is not None
    if claim.purpose is ClaimPurpose.MOVE or last is None:
        return MOVED_HERE
    return f"it goes on with {sum(len(uuids) for _, uuids in claim.nodes)} GPUs instead of {last.gpus}"
