"""Whom a queue is for, and how important its jobs may be. Pure; who is meant by it is decided in `whaleflux.trust.ownership`."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux import names
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied
from whaleflux.manifests.values import number
from whaleflux.reasons import ErrorReason

MOST_MEMBERS = 1_000
MOST_PRIORITY = 1_000
MOST_SAID = 20


def check(members: Sequence[str], max_priority: int | None) -> None:
    """Raises InvalidArgument for what names nobody, and for a priority that no job can have."""
    found = [
        FieldViolation(f"queue.members[{i}]", f"{member[:80]!r} is neither users/NAME nor groups/NAME")
        for i, member in enumerate(members)
        if not names.is_member(member)
    ]
    if len(members) > MOST_MEMBERS:
        found.append(FieldViolation("queue.members", f"are {len(members)}; name at most {MOST_MEMBERS}, or a group"))
    found += number("queue.max_priority", max_priority or 0, 0, MOST_PRIORITY)
    if found:
        raise InvalidArgument(found[:MOST_SAID])


def changed(members: Sequence[str], add: Sequence[str], remove: Sequence[str], queue: str) -> list[str]:
    """The members after some came and went. Raises FailedPrecondition where the last would go, as that opens the queue to all."""
    left = [member for member in dict.fromkeys((*members, *add)) if member not in set(remove)]
    if members and remove and not left:
        raise FailedPrecondition(
            f"{queue} would have no members, and so be open to all users; say so with: whaleflux queue set {names.last(queue)} --open",
            reason=ErrorReason.LAST_MEMBER,
            metadata={"name": queue},
        )
    return left


def check_priority(priority: int, most: int, queue: str) -> None:
    """Raises PermissionDenied for a user who asks for more than the queue gives."""
    if priority > most:
        raise PermissionDenied(
            f"priority {priority} is above the {most} that users may give in {queue}; use at most that, or ask an operator, who may give "
            f"a job more (whaleflux set-priority JOB {priority}) and raise the limit (whaleflux queue set {names.last(queue)} --max-priority {priority})",
            reason=ErrorReason.PRIORITY_CAPPED,
            metadata={"priority": str(priority), "limit": str(most), "queue": queue},
        )
