"""Which datasets this node is to hold, as inventory says."""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc

_CALL_S = 10.0
_log = telemetry.get_logger("whaleflux.agent")


class NodePins:
    """`known`: datasets/{dataset}, held also while no task reads them; None: nobody has said yet, which is not none."""

    def __init__(self, node: str, inventory: inventory_pb2_grpc.InventoryServiceStub) -> None:
        self._node, self._inventory = node, inventory
        self.known: frozenset[str] | None = None

    def has(self, dataset: str) -> bool:
        """Whether it is known to be pinned."""
        return dataset in (self.known or ())

    def may_have(self, dataset: str) -> bool:
        """Whether it is pinned, or could be."""
        return self.known is None or dataset in self.known

    async def know(self) -> None:
        """Before anything is removed: an agent that has just started does not know what is pinned."""
        if self.known is None:
            await self.ask()

    async def ask(self) -> dict[str, inventory_pb2.Dataset] | None:
        """What this node is to hold; None, and what was pinned stays so, when nobody answers."""
        request = inventory_pb2.ListNodePinsRequest(node=self._node)
        try:
            wanted = {
                found.name: found for found in (await self._inventory.ListNodePins(request, timeout=_CALL_S)).datasets
            }
        except StatusError as error:
            _log.info(Event.RPC_FAILED, method="ListNodePins", reason=error.message)
            return None
        self.known = frozenset(wanted)
        return wanted
