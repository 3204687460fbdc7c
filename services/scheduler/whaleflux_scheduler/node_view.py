"""The nodes as the scheduler sees them: inventory's facts and intents, health's verdicts, and whose agents are connected.

A node takes work when its intent is ACTIVE, its phase READY and its agent connected here. A node of which health_monitor has not told
(it has not answered this leader yet, or has no record) takes none: unknown is never healthy. What runs there goes on. Only a
scheduler that has no health_monitor at all takes a connected agent for proof enough of life.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType

from whaleflux import names, telemetry
from whaleflux.convert import enum_name, node_from_proto
from whaleflux.errors import InvalidArgument, StatusError
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux.quantities import shown_bytes
from whaleflux.reasons import ConditionType, NodeReason
from whaleflux.rpc.watching import follow
from whaleflux.telemetry import Event
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler.convert import instant
from whaleflux_scheduler.core.known_fleet import HEALTH_UNKNOWN, NOT_CONNECTED, NOT_LISTED, PASSING
from whaleflux_scheduler.core.observed import IN_ORDER, NodeCondition

_log = telemetry.get_logger("whaleflux.scheduler")
_ACTIVE = (inventory_pb2.NODE_INTENT_UNSPECIFIED, inventory_pb2.NODE_INTENT_ACTIVE)


@dataclass(slots=True)
class NodeChanges:
    """What the planner was not told yet."""

    nodes: dict[str, Node] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)  # their condition may differ


class NodeView:
    """See the module. `on_change` is called after every change."""

    def __init__(self, connected: Mapping[str, object], *, monitored: bool = True) -> None:
        self._connected, self._monitored = connected, monitored
        self.on_change: Callable[[], None] = lambda: None
        self._told_all = False  # inventory has told of every node that it knows
        self._unknown: set[str] = set()  # nodes of which it is not known what they have
        self._nodes: dict[str, inventory_pb2.Node] = {}
        self._facts: dict[str, Node] = {}  # the same, as the planner takes them
        self._sites: Counter[str] = Counter()  # nodes of each
        self._health: dict[str, health_pb2.NodeHealth] = {}
        self._occupied: dict[str, set[str]] = {}  # node -> jobs on it of unreadable records: their GPUs are not known
        self._changed = NodeChanges()
        self._conditions: dict[str, NodeCondition | None] = {}  # as worked out since the node's last change

    @property
    def complete(self) -> bool:
        """Whether all that the fleet has is known."""
        return self._told_all and not self._unknown

    @property
    def sites(self) -> Set[str]:
        """Ids of all that have nodes."""
        return self._sites.keys()

    def begin(self, known: Mapping[str, Node] = MappingProxyType({})) -> None:
        """A leadership begins, whose plan knows these nodes: it is told of all others, and looks at all.

        What it is told of an agent's session and of unreadable records is its own.
        """
        self._occupied.clear()
        self._conditions.clear()
        nodes, removed = self.differing(known)
        self._changed = NodeChanges({node.name: node for node in nodes}, set(removed), {*self._facts, *self._health})
        self.on_change()

    def differing(self, known: Mapping[str, Node]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
        """Nodes that are not as in `known`, and those of it that are no more."""
        nodes = tuple(node for name, node in self._facts.items() if known.get(name) is not node)
        return nodes, tuple(name for name in known if name not in self._facts)

    async def follow_inventory(self, stub: InventoryServiceStub) -> None:
        """Keeps facts and intents current, for ever."""

        def failure(error: StatusError) -> None:
            _log.info(Event.FEED_BROKEN, feed="inventory", reason=error.reason)

        async for change in follow(
            lambda since: stub.WatchNodes(inventory_pb2.WatchNodesRequest(resource_version=since)), on_broken=failure
        ):
            if change.name:
                self.set_node(change.name, change.value)
            self._told_all |= change.synced

    async def follow_health(self, stub: HealthServiceStub) -> None:
        """Keeps phases current, for ever. Says so, once, when nodes have to wait for the first answer, and when it has come."""
        answered, waiting = False, False

        def failure(error: StatusError) -> None:
            nonlocal waiting
            _log.info(Event.FEED_BROKEN, feed="health_monitor", reason=error.reason)
            if not answered and not waiting:
                waiting = True
                _log.warning(Event.HEALTH_AWAITED, reason="no new work is placed until health_monitor has answered")

        async for change in follow(
            lambda since: stub.WatchNodeHealth(health_pb2.WatchNodeHealthRequest(resource_version=since)),
            on_broken=failure,
        ):
            if change.name:
                self.set_health(change.name, change.value)
            if change.synced and not answered:
                answered = True
                if waiting:
                    _log.info(Event.HEALTH_KNOWN, nodes=len(self._health))

    def set_node(self, name: str, node: inventory_pb2.Node | None) -> None:
        """New facts or intent; None: inventory has forgotten it."""
        self._unknown.discard(name)
        if node is None:
            self._nodes.pop(name, None)
            if self._facts.pop(name, None) is not None:
                self._left(names.top(name))
            self._changed.nodes.pop(name, None)
            self._changed.removed.add(name)
        else:
            try:
                fact = node_from_proto(node)
            except InvalidArgument as strange:
                _log.error(Event.FEED_BROKEN, feed="inventory", node=name, reason=str(strange))
                self._unknown.add(name)
                return
            if _gpus_unknown(node):
                self._unknown.add(name)
            self._nodes[name] = node
            self._changed.removed.discard(name)
            self._sites[names.top(name)] += name not in self._facts
            self._changed.nodes[name] = self._facts[name] = fact
        self.touch(name)

    def _left(self, site: str) -> None:
        self._sites[site] -= 1
        if not self._sites[site]:
            del self._sites[site]

    def limits_not_kept(self, spec: Spec, nodes: Iterable[str]) -> tuple[str, ...]:
        """What a user of these nodes should know of the limits in the spec, in sentences."""
        return (*self._share_not_kept(spec), *self._memory_not_kept(spec, nodes), *self._isolation(nodes))

    def _isolation(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """How ranks on these nodes are kept apart, the least first; of machines that are played it goes without saying."""
        facts = {name: self._nodes[name].facts for name in nodes if name in self._nodes}
        said = {name: isolation_words(found.isolation) for name, found in facts.items() if not found.simulated}
        apart = {name: words for name, words in said.items() if words}
        if not apart:
            return ()
        least = min(apart, key=lambda name: (facts[name].isolation.kind != "none", apart[name]))
        on = sum(words == apart[least] for words in apart.values())
        where = "" if on == len(apart) else f" on {least}" + (f" and {on - 1} more nodes" if on > 1 else "")
        return (f"isolation{where}: {apart[least]}",)

    def isolation_on(self, node: str) -> str:
        """How ranks are kept apart on a node, in words; "" where that is not said."""
        return isolation_words(self._nodes[node].facts.isolation) if node in self._nodes else ""

    @staticmethod
    def _share_not_kept(spec: Spec) -> tuple[str, ...]:
        if not spec.share_memory_bytes:
            return ()
        kept = f"the agent ends a rank that stays above its {shown_bytes(spec.share_memory_bytes)} of GPU memory"
        return (f"isolation of shares: none, watched: neighbours on a GPU compute side by side, and {kept}",)

    def _memory_not_kept(self, spec: Spec, nodes: Iterable[str]) -> tuple[str, ...]:
        if not spec.memory_bytes_per_rank or spec.image:  # container engines keep them
            return ()
        facts = {name: self._nodes[name].facts for name in nodes if name in self._nodes}
        watched = [name for name, found in facts.items() if found.memory_limits == "watched"]
        if not watched:
            return ()
        more = f" and {len(watched) - 1} more nodes" if len(watched) > 1 else ""
        return (
            (
                f"memory_per_rank is not limited by the kernel on {watched[0]}{more}: the agent there looks every few seconds"
                " and ends a rank that is over it"
            ),
        )

    def set_health(self, name: str, health: health_pb2.NodeHealth | None) -> None:
        """A new phase; None: the health monitor has forgotten it."""
        if health is None:
            self._health.pop(name, None)
        else:
            self._health[name] = health
        self.touch(name)

    def occupied_by(self, node: str, job: str) -> None:
        """Tasks of the job run there, and which GPUs they hold is not known."""
        self._occupied.setdefault(node, set()).add(job)
        self.touch(node)

    def not_occupied_by(self, job: str) -> None:
        """What the job holds is known, or nothing any more."""
        for node, jobs in self._occupied.items():
            if job in jobs:
                jobs.discard(job)
                self.touch(node)

    def touch(self, name: str) -> None:
        """Something about the node changed, such as its agent's session."""
        self._changed.touched.add(name)
        self._conditions.pop(name, None)
        self.on_change()

    def take_changes(self) -> NodeChanges:
        """What changed since the last call."""
        taken, self._changed = self._changed, NodeChanges()
        return taken

    def closed(self, name: str) -> str:
        """Why the node takes no work, "" when it does."""
        node = self._nodes.get(name)
        if node is None:
            return NOT_LISTED
        if node.intent not in _ACTIVE:
            return enum_name(inventory_pb2.NodeIntent, node.intent, "NODE_INTENT_").lower()
        if _leaves(node):
            return "draining"
        health = self._health.get(name)
        if health is None and self._monitored:
            return HEALTH_UNKNOWN
        if health is not None and health.phase != health_pb2.NODE_PHASE_READY:
            return enum_name(health_pb2.NodePhase, health.phase, "NODE_PHASE_").lower()
        if occupied := self._occupied.get(name):
            return f"runs {min(occupied)}, whose record cannot be read"
        return "" if name in self._connected else NOT_CONNECTED

    def may_open(self, name: str) -> bool:
        """Whether the node takes no work for a reason that passes, one way or the other."""
        return self.closed(name) in PASSING

    def condition(self, name: str) -> NodeCondition | None:
        """What the node's condition means for tasks on it; None: nobody has told, so nothing changes for them."""
        if name not in self._conditions:
            self._conditions[name] = self._condition(name)
        return self._conditions[name]

    def _condition(self, name: str) -> NodeCondition | None:
        node, health = self._nodes.get(name), self._health.get(name)
        retired = node is not None and node.intent == inventory_pb2.NODE_INTENT_RETIRED
        draining = node is not None and node.intent == inventory_pb2.NODE_INTENT_DRAINING
        why = (node.intent_reason or "no reason given") if node is not None and draining else ""
        why = why or (_leaves(node) if node is not None else "")
        if health is None and not (retired or why):
            return None if self._monitored else IN_ORDER
        if health is None:
            return NodeCondition(retired=retired, draining=why)
        unreachable = health.phase == health_pb2.NODE_PHASE_UNREACHABLE
        partitioned = health.phase == health_pb2.NODE_PHASE_SUSPECT and health.reason == NodeReason.SITE_PARTITIONED
        condition = NodeCondition(
            unreachable=(health.message or health.reason or "unreachable") if unreachable else "",
            retired=retired or health.phase == health_pb2.NODE_PHASE_RETIRED,
            draining=why,
            partitioned_since=instant(health, "transition_time") if partitioned else None,
        )
        return IN_ORDER if condition == IN_ORDER else condition


def _leaves(node: inventory_pb2.Node) -> str:
    """Why its machine is about to be taken away, as its agent has heard it there; "" while it stays."""
    conditions = node.facts.conditions  # of which agents list those that do not hold
    return next((one.message or one.reason for one in conditions if one.type == ConditionType.MACHINE_STAYS), "")


def isolation_words(found: inventory_pb2.NodeIsolation) -> str:
    """As an agent says it of a task, of all tasks of its node."""
    limits = "limits enforced" if found.limits == "enforced" else "memory watched"
    if found.kind == "uid":
        return f"a user for each queue, {'own folders, ' if found.private_folders else ''}{limits}"
    return f"none ({found.reason}), {limits}" if found.kind else ""


def _gpus_unknown(node: inventory_pb2.Node) -> bool:
    """Whether its driver did not tell the agent which GPUs it has, or what one of them is."""
    if node.intent == inventory_pb2.NODE_INTENT_RETIRED:
        return False
    if node.facts.gpus:
        return any(not gpu.memory_bytes for gpu in node.facts.gpus)
    return any(
        one.type == ConditionType.DRIVER_WORKS and one.reason != NodeReason.NO_GPU for one in node.facts.conditions
    )
