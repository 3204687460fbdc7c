"""The operator's intent of a node and how it may change: the machine beside `NodeIntent` in the contract."""

from __future__ import annotations

from enum import Enum

from whaleflux.errors import FailedPrecondition
from whaleflux.reasons import ErrorReason


class Intent(Enum):
    """What the operator wants of a node."""

    ACTIVE = "ACTIVE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    RETIRED = "RETIRED"


_NEXT: dict[Intent, frozenset[Intent]] = {
    Intent.ACTIVE: frozenset({Intent.CORDONED, Intent.DRAINING}),
    Intent.CORDONED: frozenset({Intent.ACTIVE, Intent.DRAINING, Intent.RETIRED}),
    Intent.DRAINING: frozenset({Intent.ACTIVE, Intent.CORDONED, Intent.RETIRED}),
    Intent.RETIRED: frozenset(),
}
_FIX = {
    Intent.ACTIVE: "drain it first",
    Intent.RETIRED: "retirement is final; join it again under another id",
}


def change(node: str, now: Intent, wanted: Intent, *, unreachable: bool = False) -> Intent:
    """The node's next intent. Asking for what is so already is fine; an unreachable node may retire at once.

    Raises FailedPrecondition (NODE_RETIRED, NODE_NOT_DRAINED) when `wanted` does not follow `now`.
    """
    allowed = _NEXT[now] | ({Intent.RETIRED} if unreachable and now is not Intent.RETIRED else frozenset[Intent]())
    if wanted is now or wanted in allowed:
        return wanted
    raise FailedPrecondition(
        f"{node} is {now.value} and cannot become {wanted.value}; {_FIX.get(now, 'undo that first')}",
        reason=ErrorReason.NODE_RETIRED if now is Intent.RETIRED else ErrorReason.NODE_NOT_DRAINED,
        metadata={"name": node, "intent": now.value, "wanted": wanted.value},
    )
