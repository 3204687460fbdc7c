"""One stub per service. Made from libs/whaleflux/services.py: change that, then `make generate`."""

from __future__ import annotations

from typing import Any

from whaleflux.v1.audit_pb2_grpc import AuditServiceStub
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.console_pb2_grpc import CostServiceStub
from whaleflux.v1.events_pb2_grpc import EventServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.identity_pb2_grpc import IdentityServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.router_pb2_grpc import RouterServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub


class Stubs:
    """All on one channel."""

    def __init__(self, channel: Any) -> None:
        self.audit = AuditServiceStub(channel)
        self.checkpoint = CheckpointServiceStub(channel)
        self.console = CostServiceStub(channel)
        self.events = EventServiceStub(channel)
        self.health = HealthServiceStub(channel)
        self.identity = IdentityServiceStub(channel)
        self.inventory = InventoryServiceStub(channel)
        self.router = RouterServiceStub(channel)
        self.scheduler = SchedulerServiceStub(channel)
        self.secrets = SecretServiceStub(channel)
