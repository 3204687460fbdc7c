"""A silent site is not dead nodes: many silences that begin together have one cause.

Which sites are cut off, whether this monitor is the one that is cut off, and whether the front door broke every stream
at once. Nodes of such a group are SUSPECT and are not fenced for their silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux.reasons import NodeReason
from whaleflux_health_monitor.core.evidence import REACHES_HOST, NodeState
from whaleflux_health_monitor.core.phases import Phase
from whaleflux_health_monitor.core.suspicion import Suspicion

SHARE = 0.8  # of a site's nodes: the rest may be on another uplink
_NOT_COUNTED = frozenset({Phase.REGISTERED, Phase.UNREACHABLE, Phase.RETIRED})


@dataclass(frozen=True, slots=True)
class Partitions:
    """What is silent as a whole. While `fleet` is set the monitor takes itself for the one that is cut off."""

    sites: frozenset[str] = frozenset()
    fleet: bool = False

    def block_reason(self, node: NodeState) -> str:
        """Why this node must not be fenced by silence alone, or ""."""
        if node.site in self.sites:
            return NodeReason.SITE_PARTITIONED
        return NodeReason.FLEET_SILENT if self.fleet else ""

    def suspicion(self, node: NodeState) -> Suspicion | None:
        """What is said of a node that is not fenced because its group is silent; None for one of no such group."""
        reason = self.block_reason(node)
        if reason == NodeReason.SITE_PARTITIONED:
            return Suspicion(
                reason, f"all of site {node.site} is silent as one: cut off, so its work goes on there", 0.8
            )
        if reason == NodeReason.FLEET_SILENT:
            return Suspicion(reason, "every agent of the fleet is silent: this monitor may be the one cut off", 0.5)
        return None


def find_partitions(nodes: Iterable[NodeState], now_s: float, before: Partitions, together_s: float) -> Partitions:
    """The groups of nodes that fell silent together and whose hosts give no sign at all; a site of one node is one.

    A host that refuses a connection is reachable, so its agent is dead and its site is not cut off. A group that was
    silent before stays so until enough of it reports again.
    """
    sites: dict[str, list[NodeState]] = defaultdict(list)
    for node in nodes:
        if node.phase not in _NOT_COUNTED:
            sites[node.site].append(node)
    fleet = [node for members in sites.values() for node in members]
    return Partitions(
        frozenset(
            site
            for site, members in sites.items()
            if _silent_as_one(members, SHARE, now_s, together_s, lasting=site in before.sites)
        ),
        _silent_as_one(fleet, 1.0, now_s, together_s, lasting=before.fleet),
    )


def end_of_partition(nodes: Iterable[NodeState], before: Partitions, after: Partitions, now_s: float) -> None:
    """From the end of its group's silence on, a node's silence is its own.

    It could not be heard while the group was cut off, so it is judged as if it had just become suspect.
    """
    for node in nodes:
        if before.block_reason(node) and not after.block_reason(node):
            node.life_s = max(node.life_s, now_s - node.timing.suspect_s)


def _silent_as_one(members: list[NodeState], share: float, now_s: float, together_s: float, *, lasting: bool) -> bool:
    silent = [n.life_s for n in members if _gives_no_sign(n, now_s)]
    if not silent or len(silent) < share * len(members):
        return False
    return lasting or max(silent) - min(silent) <= together_s


def _gives_no_sign(node: NodeState, now_s: float) -> bool:
    meant = node.announced_s is not None or node.stopped
    return node.silence_s(now_s) >= node.timing.suspect_s and not meant and node.seen not in REACHES_HOST


def all_streams_lost(nodes: Iterable[NodeState], within_s: float) -> bool:
    """Whether every agent that reported to this leader lost its stream in the same moment: then the front door went."""
    lost: list[float] = []
    for node in nodes:
        if node.reported and node.phase not in _NOT_COUNTED:
            if node.lost_s is None:
                return False
            lost.append(node.lost_s)
    return len(lost) >= 2 and max(lost) - min(lost) <= within_s
