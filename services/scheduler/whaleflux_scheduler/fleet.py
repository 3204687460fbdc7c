"""The fleet as the scheduler sees it: inventory's facts and intents, health's verdicts, and whose agents are connected.

A node takes work when its intent is ACTIVE, its phase READY and its agent connected here. While nothing is known of its health (the
health monitor has not answered yet, or has no record of the node), a connected agent counts as proof enough of life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from whaleflux import telemetry
from whaleflux.convert import node_from_proto
from whaleflux.errors import Invalid, Refusal
from whaleflux.fleet.model import Node
from whaleflux.rpc.watching import follow
from whaleflux.telemetry import Event
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler.convert import instant
from whaleflux_scheduler.core.observed import IN_ORDER, Standing

_log = telemetry.get_logger("whaleflux.scheduler")
PARTITIONED = "SITE_PARTITIONED"
_ACTIVE = (inventory_pb2.NODE_INTENT_UNSPECIFIED, inventory_pb2.NODE_INTENT_ACTIVE)


@dataclass(slots=True)
class Changed:
    """What the planner has not heard of yet."""

    nodes: dict[str, Node] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)  # their standing may differ


class Fleet:
    """See the module. `on_change` is called after every change."""

    def __init__(self, connected: Mapping[str, object]) -> None:
        self._connected = connected
        self.on_change: Callable[[], None] = lambda: None
        self._nodes: dict[str, inventory_pb2.Node] = {}
        self._health: dict[str, health_pb2.NodeHealth] = {}
        self._changed = Changed()

    async def follow_inventory(self, stub: InventoryServiceStub) -> None:
        """Keeps facts and intents current, for ever."""

        def broken(refusal: Refusal) -> None:
            _log.info(Event.FEED_BROKEN, feed="inventory", reason=refusal.reason)

        async for told in follow(
            lambda since: stub.WatchNodes(inventory_pb2.WatchNodesRequest(resource_version=since)), on_broken=broken
        ):
            if told.name:
                self.set_node(told.name, told.value)

    async def follow_health(self, stub: HealthServiceStub) -> None:
        """Keeps phases current, for ever."""

        def broken(refusal: Refusal) -> None:
            _log.info(Event.FEED_BROKEN, feed="health_monitor", reason=refusal.reason)

        async for told in follow(
            lambda since: stub.WatchNodeHealth(health_pb2.WatchNodeHealthRequest(resource_version=since)),
            on_broken=broken,
        ):
            if told.name:
                self.set_health(told.name, told.value)

    def set_node(self, name: str, node: inventory_pb2.Node | None) -> None:
        """New facts or intent; None: inventory has forgotten it."""
        if node is None:
            self._nodes.pop(name, None)
            self._changed.nodes.pop(name, None)
            self._changed.removed.add(name)
        else:
            try:
                fact = node_from_proto(node)
            except Invalid as strange:
                _log.error(Event.FEED_BROKEN, feed="inventory", node=name, reason=str(strange))
                return
            self._nodes[name] = node
            self._changed.removed.discard(name)
            self._changed.nodes[name] = fact
        self.touch(name)

    def set_health(self, name: str, health: health_pb2.NodeHealth | None) -> None:
        """A new phase; None: the health monitor has forgotten it."""
        if health is None:
            self._health.pop(name, None)
        else:
            self._health[name] = health
        self.touch(name)

    def touch(self, name: str) -> None:
        """Something about the node changed, such as its agent's connection."""
        self._changed.touched.add(name)
        self.on_change()

    def take(self) -> Changed:
        """What changed since the last call."""
        taken, self._changed = self._changed, Changed()
        return taken

    def closed(self, name: str) -> str:
        """Why the node takes no work, "" when it does."""
        node = self._nodes.get(name)
        if node is None:
            return "not in the inventory"
        if node.intent not in _ACTIVE:
            return inventory_pb2.NodeIntent.Name(node.intent).removeprefix("NODE_INTENT_").lower()
        health = self._health.get(name)
        if health is not None and health.phase != health_pb2.NODE_PHASE_READY:
            return health_pb2.NodePhase.Name(health.phase).removeprefix("NODE_PHASE_").lower()
        return "" if name in self._connected else "its agent is not connected"

    def standing(self, name: str) -> Standing:
        """What the node's condition means for tasks on it."""
        node, health = self._nodes.get(name), self._health.get(name)
        retired = node is not None and node.intent == inventory_pb2.NODE_INTENT_RETIRED
        draining = node is not None and node.intent == inventory_pb2.NODE_INTENT_DRAINING
        why = (node.intent_reason or "no reason given") if node is not None and draining else ""
        if health is None:
            return Standing(retired=retired, draining=why) if retired or why else IN_ORDER
        unreachable = health.phase == health_pb2.NODE_PHASE_UNREACHABLE
        partitioned = health.phase == health_pb2.NODE_PHASE_SUSPECT and health.reason == PARTITIONED
        return Standing(
            unreachable=(health.message or health.reason or "unreachable") if unreachable else "",
            retired=retired or health.phase == health_pb2.NODE_PHASE_RETIRED,
            draining=why,
            partitioned_since=instant(health, "transition_time") if partitioned else None,
        )
