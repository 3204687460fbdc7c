"""Many silent nodes at once have one cause: which sites are cut off, whether we are, and how many may be fenced."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_health_monitor.core.evidence import REACHES_HOST, NodeState
from whaleflux_health_monitor.core.phases import Phase
from whaleflux_health_monitor.core.timing import Timing

SHARE = 0.8  # of a site's nodes: the rest may be on another uplink
_NOT_COUNTED = frozenset({Phase.REGISTERED, Phase.UNREACHABLE, Phase.RETIRED})


@dataclass(frozen=True, slots=True)
class Groups:
    """What is silent as a whole. While `fleet` is set the monitor takes itself for the one that is cut off."""

    sites: frozenset[str] = frozenset()
    fleet: bool = False

    def hold(self, node: NodeState) -> str:
        """Why this node must not be fenced by silence alone, or ""."""
        if node.site in self.sites:
            return "SITE_PARTITIONED"
        return "FLEET_SILENT" if self.fleet else ""


def silent_groups(nodes: Iterable[NodeState], now_s: float, before: Groups, together_s: float) -> Groups:
    """The groups of two or more nodes that fell silent together and whose hosts give no sign at all.

    A host that refuses a connection is reachable, so its agent is dead and its site is not cut off. A group that was
    silent before stays so until enough of it is heard again.
    """
    sites: dict[str, list[NodeState]] = defaultdict(list)
    for node in nodes:
        if node.phase not in _NOT_COUNTED:
            sites[node.site].append(node)
    fleet = [node for members in sites.values() for node in members]
    return Groups(
        frozenset(
            site
            for site, members in sites.items()
            if _silent_as_one(members, SHARE, now_s, together_s, lasting=site in before.sites)
        ),
        _silent_as_one(fleet, 1.0, now_s, together_s, lasting=before.fleet),
    )


def _silent_as_one(members: list[NodeState], share: float, now_s: float, together_s: float, *, lasting: bool) -> bool:
    if len(members) < 2:
        return False
    silent = [n.life_s for n in members if _gives_no_sign(n, now_s)]
    if len(silent) < share * len(members):
        return False
    return lasting or max(silent) - min(silent) <= together_s


def _gives_no_sign(node: NodeState, now_s: float) -> bool:
    unheard = node.silence_s(now_s) >= node.timing.suspect_s and node.announced_s is None
    return unheard and node.seen not in REACHES_HOST


def all_streams_lost(nodes: Iterable[NodeState], within_s: float) -> bool:
    """Whether every agent that this leader has heard lost its stream in the same moment: then the front door went."""
    lost: list[float] = []
    for node in nodes:
        if node.heard and node.phase not in _NOT_COUNTED:
            if node.lost_s is None:
                return False
            lost.append(node.lost_s)
    return len(lost) >= 2 and max(lost) - min(lost) <= within_s


class Breaker:
    """Bounds how much of the fleet may be fenced within a window; what came back does not count."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._fenced: deque[tuple[float, str]] = deque()

    def admits(self, fleet_size: int, now_s: float) -> bool:
        """Whether one more node may be fenced now."""
        while self._fenced and now_s - self._fenced[0][0] > self._timing.breaker_window_s:
            self._fenced.popleft()
        limit = max(self._timing.breaker_least, math.ceil(self._timing.breaker_share * fleet_size))
        return len(self._fenced) < limit

    def fenced(self, node: str, now_s: float) -> None:
        """Counts one."""
        self._fenced.append((now_s, node))
        self._fenced = deque(sorted(self._fenced))  # what a predecessor fenced is told in any order

    def came_back(self, node: str) -> None:
        """Its fencing did no lasting harm."""
        self._fenced = deque((at, name) for at, name in self._fenced if name != node)
