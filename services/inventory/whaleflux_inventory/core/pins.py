"""Where a pinned dataset goes, and whether it fits beside what is pinned there. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux.errors import FailedPrecondition
from whaleflux.quantities import shown_bytes
from whaleflux.reasons import ErrorReason


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that takes work. `room_bytes`: most that its cache holds, 0: its agent does not say; `pinned_bytes`: of other datasets."""

    node: str
    room_bytes: int
    pinned_bytes: int = 0
    holds: bool = False  # a whole copy, already
    stays: bool = True  # as long as the pin: it is not rented, or for longer


def no_room(candidate: Candidate, size_bytes: int) -> str:
    """Why a dataset cannot be pinned there; "" when it can."""
    if candidate.holds and not candidate.room_bytes:
        return ""
    if not candidate.room_bytes:
        return f"{candidate.node} says nothing of a cache for datasets"
    if (free := candidate.room_bytes - candidate.pinned_bytes) < size_bytes:
        return (
            f"{candidate.node} has a cache of {shown_bytes(candidate.room_bytes)}, {shown_bytes(candidate.pinned_bytes)} of it pinned "
            f"to others: {shown_bytes(size_bytes - free)} are missing"
        )
    return ""


def choose(candidates: Iterable[Candidate], size_bytes: int, copies: int, dataset: str) -> list[str]:
    """Nodes for so many copies: those that stay first, of them those that hold it, then those with most room. Raises FailedPrecondition when there are too few."""
    known = list(candidates)
    fit = [one for one in known if not no_room(one, size_bytes)]
    if len(fit) < copies:
        raise does_not_fit(
            dataset,
            f"{copies} copies are asked for, and {len(fit)} of {len(known)} nodes have room for {shown_bytes(size_bytes)}",
        )
    best = sorted(fit, key=lambda one: (not one.stays, not one.holds, one.pinned_bytes - one.room_bytes, one.node))
    return sorted(one.node for one in best[:copies])


def does_not_fit(dataset: str, why: str) -> FailedPrecondition:
    """The refusal of a pin."""
    message = f"{dataset} cannot be pinned: {why}; unpin others (whaleflux datasets unpin), or give agents more (--dataset-bytes)"
    return FailedPrecondition(message, reason=ErrorReason.PIN_DOES_NOT_FIT, metadata={"name": dataset})
