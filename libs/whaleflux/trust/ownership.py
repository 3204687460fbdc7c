"""The owner rules, pure: what a principal may do to what somebody owns, in a queue that is for some.

An owner is a subject, as records name it ("user/ann"); people are known by name alone, so that a new role takes nobody's jobs away.
A group that a queue names is a team: its members see and change what is in that queue as their own. A queue that names nobody is
open: everybody's jobs are seen there, and only their owners' are changed or read.

Each question is noted (`asked`), so that the boundary can refuse to answer for a method that forgot to ask (`rpc.owners`).
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from whaleflux import names
from whaleflux.errors import NotFound, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Principal

DEFAULT_MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Access:
    """Whom a queue is for. `members`: "users/ann", "groups/research"; none: everybody. `max_priority`: of role user."""

    members: frozenset[str] = frozenset()
    max_priority: int = DEFAULT_MAX_PRIORITY


OPEN = Access()


class Asked:
    """Whether the owner was asked for while a call was served."""

    __slots__ = ("yes",)

    def __init__(self) -> None:
        self.yes = False


_asked: ContextVar[Asked | None] = ContextVar("whaleflux_owner_asked", default=None)


def watch_questions() -> Asked:
    """From now on in this task: whether one of the questions below was asked."""
    asked = Asked()
    _asked.set(asked)
    return asked


def note_asked() -> None:
    """Says that the owner was asked for: by the questions below, and by rules of other rooms (a task's node)."""
    if (asked := _asked.get()) is not None:
        asked.yes = True


def is_owner(principal: Principal, owner: str) -> bool:
    """Whether `owner` ("user/ann") is the principal; people keep what is theirs when their role changes."""
    role, _, name = owner.partition("/")
    if role in roles.HUMANS:
        return principal.role in roles.HUMANS and principal.name == name
    return principal.subject == owner


def is_team(principal: Principal, team: str) -> bool:
    """Whether `team` ("groups/research") is one of the principal's groups."""
    return team.startswith("groups/") and names.last(team) in principal.groups


def shares(principal: Principal, access: Access) -> bool:
    """Whether what is in the queue is the principal's as much as its owner's: through a group that the queue names."""
    return any(f"groups/{group}" in access.members for group in principal.groups)


def may_see(principal: Principal, access: Access) -> bool:
    """Whether what is in the queue is there for the principal at all."""
    note_asked()
    if principal.is_service or principal.is_operator or principal.role == roles.VIEWER or not access.members:
        return True
    return _is_named(principal, access) or shares(principal, access)


def may_use(principal: Principal, queue_id: str, access: Access) -> bool:
    """Whether the principal may submit to the queue."""
    if principal.queues is not None and queue_id not in principal.queues:
        note_asked()
        return False
    return may_see(principal, access) and principal.role != roles.VIEWER


def may_read(principal: Principal, owner: str, access: Access) -> bool:
    """Whether the principal may read what is private of a job: command, environment, code, output."""
    note_asked()
    return principal.is_service or principal.is_operator or is_owner(principal, owner) or shares(principal, access)


def may_change(principal: Principal, owner: str, access: Access) -> bool:
    """Whether the principal may end, hold, change, enter it."""
    return may_read(principal, owner, access) and principal.role != roles.VIEWER


def _is_named(principal: Principal, access: Access) -> bool:
    """Whether the queue names the principal; the same cost however many it names, since each request at the inference API asks."""
    return principal.role in roles.HUMANS and f"users/{principal.name}" in access.members


def require_seen(principal: Principal, access: Access, resource: str, name: str, hint: str) -> None:
    """What may not be seen is not there: the same answer as for an absent one."""
    if not may_see(principal, access):
        raise NotFound(resource, name, hint)


def require_change(principal: Principal, owner: str, access: Access, name: str) -> None:
    """Refuses who may see `name` and not change it."""
    if not may_change(principal, owner, access):
        raise not_owner(name, owner)


def not_owner(name: str, owner: str) -> PermissionDenied:
    """What somebody gets who may see `name` and no more."""
    whose = f"{owner}; ask them, an operator," if owner else "the fleet; ask an operator,"
    return PermissionDenied(
        f"{name} belongs to {whose} or to be put into a group that its queue names",
        reason=ErrorReason.NOT_OWNER,
        metadata={"name": name, "owner": owner},
    )
