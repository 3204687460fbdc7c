"""What a call must answer, from the two tables alone: `rpc.roles.TABLE` (which role) and `rpc.owners.TABLE` (whose things). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import grpc

from whaleflux.rpc import owners, roles


class Answer(Enum):
    """As what a status counts."""

    NOBODY = "nobody"  # UNAUTHENTICATED: the caller is not known, or not admitted any more
    DENIED = "denied"  # PERMISSION_DENIED
    NOT_THERE = "not there"  # NOT_FOUND
    CLOSED = "closed"  # UNAVAILABLE: the front door did not even shake hands
    ADMITTED = "admitted"  # anything else that a right server says, also that the request is wrong
    BROKEN = "broken"  # INTERNAL, UNKNOWN, UNIMPLEMENTED: never right


class Relation(Enum):
    """What an object is to a caller."""

    NONE = "none"  # the request is about no object
    OWN = "own"  # theirs, or their team's
    SEEN = "seen"  # somebody else's that they may know of
    HIDDEN = "hidden"  # somebody else's that is not there for them
    ABSENT = "absent"  # nobody's


@dataclass(frozen=True, slots=True)
class Caller:
    """One kind of principal. `admitted`: false for certificates of those who were disabled or revoked; `ours`: of our authority."""

    label: str
    role: str
    name: str
    groups: frozenset[str] = frozenset()
    admitted: bool = True
    ours: bool = True

    @property
    def above(self) -> bool:
        """Whoever runs the fleet, and its parts: owners are not asked of them."""
        return self.role in roles.OPERATORS | roles.SERVICES


_NO_HANDSHAKE = re.compile("handshake|SSL|TSI|Socket closed|recvmsg|connect")
_FENCED = "a newer attempt runs"
_BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
_ANSWERS = {
    grpc.StatusCode.UNAUTHENTICATED: Answer.NOBODY,
    grpc.StatusCode.PERMISSION_DENIED: Answer.DENIED,
    grpc.StatusCode.NOT_FOUND: Answer.NOT_THERE,
    grpc.StatusCode.UNAVAILABLE: Answer.CLOSED,
    **dict.fromkeys(_BROKEN, Answer.BROKEN),
}


def answer_of(code: grpc.StatusCode, details: str = "") -> Answer:
    """As what a status counts. `details` tell a connection that was refused from a server that was not ready."""
    if code is grpc.StatusCode.UNAVAILABLE and not _NO_HANDSHAKE.search(details):
        return Answer.ADMITTED
    if code is grpc.StatusCode.ABORTED and _FENCED in details:
        return Answer.DENIED  # how a zombie is told to stop: nothing was done
    return _ANSWERS.get(code, Answer.ADMITTED)


def expected(method: str, caller: Caller, relation: Relation) -> frozenset[Answer]:
    """The answers that are right; more than one only where an absent object may be told in two ways."""
    allowed = roles.allowed(method, roles.TABLE)
    if not caller.ours:
        return frozenset({Answer.CLOSED})
    if not caller.admitted:
        return frozenset({Answer.NOBODY})
    if caller.role not in allowed:
        return frozenset({Answer.NOBODY if caller.role == roles.ANONYMOUS and allowed else Answer.DENIED})
    answers = _by_owner(owners.rule_of(method), caller, relation)
    return (
        answers | {Answer.NOBODY} if roles.ANONYMOUS in allowed else answers
    )  # a credential in the request is judged instead


def _by_owner(rule: owners.OwnerRule, caller: Caller, relation: Relation) -> frozenset[Answer]:
    if rule.asks is owners.Asks.NOBODY or relation is Relation.NONE:
        return frozenset({Answer.ADMITTED, Answer.NOT_THERE})
    if caller.role == roles.AGENT and relation is not Relation.OWN:
        return frozenset(
            {Answer.DENIED, Answer.NOT_THERE}
        )  # of a hidden thing and of one that is not: the same (`matrix` compares)
    if rule.asks is owners.Asks.BOUNDARY:
        return frozenset({Answer.ADMITTED, Answer.NOT_THERE})
    if relation is Relation.ABSENT:
        return frozenset({Answer.NOT_THERE})
    if caller.above or relation is Relation.OWN:
        return frozenset({Answer.ADMITTED})
    if relation is Relation.HIDDEN:
        return frozenset({Answer.NOT_THERE})
    return frozenset({Answer.ADMITTED if rule is owners.LEAVES_OUT else Answer.DENIED})
