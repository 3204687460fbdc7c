"""Keeps inventory informed of what this machine is, and the agent of which GPUs may be used."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.convert import facts_to_proto
from whaleflux.errors import Refusal
from whaleflux.fleet.model import Node, Price
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.core.backoff import pause_s
from whaleflux_agent.devices.source import DeviceSource, DevicesUnreadable, Machine

_REREAD_EVERY_S = 30.0
_CALL_S = 10.0
_LONGEST_PAUSE_S = 5.0
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class About:
    """What the agent's settings and surroundings add to what its machine says."""

    node: str
    boot_id: str
    address: str  # host:port of the mTLS port
    host_address: str
    agent_version: str
    runtimes: tuple[str, ...]
    zone: str = ""
    spine: str = ""
    leaf: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    price: Price | None = None  # None: the machine's own


def facts(machine: Machine, about: About) -> inventory_pb2.NodeFacts:
    """What is registered. Pure."""
    node = replace(
        machine.node,
        zone=about.zone,
        spine=about.spine,
        leaf=about.leaf,
        labels=about.labels,
        price=about.price or machine.node.price,
    )
    found = facts_to_proto(node)
    found.address, found.host_address = about.address, about.host_address
    found.driver_version, found.agent_version = machine.driver_version, about.agent_version
    found.runtimes.extend(about.runtimes)
    return found


class Registration:
    """Reads the devices now and then; registers what changed, for as long as it takes."""

    def __init__(
        self,
        source: DeviceSource,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        about: About,
        clock: Clock,
        *,
        reread_every_s: float = _REREAD_EVERY_S,
    ) -> None:
        self._source, self._stub, self._about, self._clock = source, stub, about, clock
        self._reread_every_s = reread_every_s
        site = about.node.split("/")[1]
        self.machine = Machine(Node(name=about.node, site=site), "unreadable")
        self.registered = asyncio.Event()

    @property
    def simulated(self) -> bool:
        return self.machine.node.simulated

    def healthy_gpus(self) -> frozenset[int]:
        """Indices of the GPUs that work may use."""
        return frozenset(gpu.index for gpu in self.machine.node.gpus if gpu.healthy)

    def gpu_uuid(self, index: int) -> str:
        """What CUDA_VISIBLE_DEVICES calls the GPU; "" where it is only played."""
        if self.simulated:
            return ""
        return next((gpu.uuid for gpu in self.machine.node.gpus if gpu.index == index), "")

    async def read(self) -> None:
        """Looks at the machine; what was known stays when it cannot be read."""
        try:
            self.machine = await self._source.read(self._about.node)
        except DevicesUnreadable as silence:
            _log.warning(Event.DEVICES_UNREADABLE, reason=str(silence))

    async def run(self) -> None:
        """Registers what was read, then reads again, for ever."""
        known: inventory_pb2.NodeFacts | None = None
        while True:
            found = facts(self.machine, self._about)
            if found != known:
                await self._register(found)
                known = found
            await self._clock.sleep(self._reread_every_s)
            await self.read()

    async def _register(self, found: inventory_pb2.NodeFacts) -> None:
        request = inventory_pb2.RegisterNodeRequest(name=self._about.node, facts=found, boot_id=self._about.boot_id)
        failures = 0
        while True:
            try:
                await self._stub.RegisterNode(request, timeout=_CALL_S)
            except Refusal as refusal:
                failures += 1
                level = _log.warning if failures in (1, 10) or failures % 100 == 0 else _log.debug
                level(Event.RPC_FAILED, method="RegisterNode", reason=refusal.message, failures=failures)
            else:
                self.registered.set()
                _log.info(Event.NODE_JOINED, node=self._about.node, gpus=len(found.gpus), simulated=found.simulated)
                return
            await self._clock.sleep(pause_s(failures, random.random(), longest_s=_LONGEST_PAUSE_S))
