"""The nodes that rented machines are: whether one has joined, its drain, and its end."""

from __future__ import annotations

import logging
from typing import Protocol

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.errors import NotFound, StatusError
from whaleflux.reasons import ConditionType
from whaleflux.store import keys
from whaleflux.store.api import Held, Store
from whaleflux_inventory import convert
from whaleflux_inventory.core.intents import Intent
from whaleflux_inventory.nodes import Dependencies, Nodes

log = logging.getLogger(__name__)


class RentedNodes(Protocol):
    """What the keeper of leases does with nodes, by their full name."""

    async def joined(self, node: str) -> bool: ...
    async def held(self, node: str) -> int | None:
        """GPUs of it that jobs hold; None: nobody knows now."""
        ...

    async def announced(self, node: str) -> tuple[float, str] | None:
        """When its machine is taken away (Unix seconds) and why, as its agent has heard it there; None: it stays."""
        ...

    async def drain(self, node: str, why: str) -> None:
        """Its work is moved away; nothing where it is so already."""
        ...

    async def retire(self, node: str, why: str) -> None:
        """Its machine is gone for good; nothing where it never joined."""
        ...


class InventoryNodes:
    """Inventory's own nodes. `held`: what is done to them is done by whoever leads."""

    def __init__(self, store: Store, nodes: Nodes, dependencies: Dependencies, held: Held) -> None:
        self._store, self._nodes, self._dependencies, self._held = store, nodes, dependencies, held

    async def joined(self, node: str) -> bool:
        return await self._store.get(keys.of_name(keys.NODES, node)) is not None

    async def held(self, node: str) -> int | None:
        try:
            return await self._dependencies.gpus_held(node)
        except StatusError:
            return None

    async def announced(self, node: str) -> tuple[float, str] | None:
        try:
            facts = (await self._nodes.get(node)).facts
        except NotFound:
            return None
        except DecodeError:  # what cannot be read keeps no lease from its end
            log.error("%s cannot be read: what its agent has heard of its machine is not known", node)
            return None
        said = next(
            (one.message or one.reason for one in facts.conditions if one.type == ConditionType.MACHINE_STAYS), ""
        )
        return (float(facts.taken_time.seconds), said) if facts.HasField("taken_time") else None

    async def drain(self, node: str, why: str) -> None:
        try:
            there = convert.intent_of(await self._nodes.get(node))
        except NotFound:
            return
        except DecodeError:
            log.error("%s cannot be read: its work is not moved away", node)
            return
        if there in (Intent.ACTIVE, Intent.CORDONED):
            await self._nodes.set_intent(node, Intent.DRAINING, why, "", [self._held])

    async def retire(self, node: str, why: str) -> None:
        if await self.joined(node):
            await self._nodes.retire_gone(node, why, [self._held])


def node_of(site: str, lease: str, attempt: int) -> str:
    """The name that the machine of a lease's attempt joins under: its own, since a retired node's name is never used again."""
    number = f"-{attempt}" if attempt > 1 else ""
    return names.node(names.last(site), f"{names.last(lease)}{number}")
