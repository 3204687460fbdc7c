"""Where a node stands, and how that may change: the machine beside `NodePhase` in the contract."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Names as in the contract, without its prefix."""

    REGISTERED = "REGISTERED"
    READY = "READY"
    SUSPECT = "SUSPECT"
    UNREACHABLE = "UNREACHABLE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    QUARANTINED = "QUARANTINED"
    REPAIRING = "REPAIRING"
    TESTING = "TESTING"
    RETIRED = "RETIRED"


class Intent(Enum):
    """What the operator wants of a node, as inventory says."""

    ACTIVE = "ACTIVE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    RETIRED = "RETIRED"


ALIVE: dict[Intent, Phase] = {
    Intent.ACTIVE: Phase.READY,
    Intent.CORDONED: Phase.CORDONED,
    Intent.DRAINING: Phase.DRAINING,
    Intent.RETIRED: Phase.RETIRED,
}
"""The phase of a node that shows life, by its operator's intent."""

SERVICE = frozenset({Phase.QUARANTINED, Phase.REPAIRING, Phase.TESTING})
"""Out of use for repair: signs of life do not bring a node back from here, a passed test does."""

_IN_USE = frozenset({Phase.READY, Phase.CORDONED, Phase.DRAINING})

NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.REGISTERED: _IN_USE | {Phase.SUSPECT, Phase.RETIRED},
    Phase.READY: frozenset({Phase.SUSPECT, Phase.CORDONED, Phase.DRAINING, Phase.RETIRED}),
    Phase.CORDONED: frozenset({Phase.READY, Phase.DRAINING, Phase.SUSPECT, Phase.RETIRED}),
    Phase.DRAINING: frozenset({Phase.READY, Phase.CORDONED, Phase.SUSPECT, Phase.QUARANTINED, Phase.RETIRED}),
    Phase.SUSPECT: _IN_USE | {Phase.UNREACHABLE, Phase.RETIRED},
    Phase.UNREACHABLE: _IN_USE | {Phase.SUSPECT, Phase.QUARANTINED, Phase.RETIRED},
    Phase.QUARANTINED: frozenset({Phase.REPAIRING, Phase.RETIRED}),
    Phase.REPAIRING: frozenset({Phase.TESTING, Phase.RETIRED}),
    Phase.TESTING: frozenset({Phase.READY, Phase.QUARANTINED, Phase.RETIRED}),
    Phase.RETIRED: frozenset(),
}


def may_become(now: Phase, wanted: Phase) -> bool:
    """Whether the machine has this step; staying is always one."""
    return wanted is now or wanted in NEXT[now]
