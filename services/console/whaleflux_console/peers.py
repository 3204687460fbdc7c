"""Those whose lists make the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.router_pb2_grpc import RouterServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub


@dataclass(frozen=True, slots=True)
class Peers:
    """Stubs of those who are asked."""

    inventory: Any
    health: Any
    scheduler: Any
    router: Any
    checkpoint: Any


def peers(channel: Callable[[str], Any]) -> Peers:
    """`channel` gives that of a service, by its name."""
    return Peers(
        InventoryServiceStub(channel("inventory")),
        HealthServiceStub(channel("health_monitor")),
        SchedulerServiceStub(channel("scheduler")),
        RouterServiceStub(channel("inference_router")),
        CheckpointServiceStub(channel("checkpoint")),
    )
