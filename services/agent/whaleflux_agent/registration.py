"""Keeps inventory informed of what this machine is, and the agent of which GPUs may be used."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.convert import facts_to_proto
from whaleflux.errors import StatusError
from whaleflux.fleet.model import Node, Price
from whaleflux.reasons import ConditionType, ErrorReason
from whaleflux.retry import Backoff
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc, types_pb2
from whaleflux_agent.core.machine_notices import Notice
from whaleflux_agent.devices.source import DeviceSource, Machine, MachineCondition

_REREAD_EVERY_S = 30.0
_LEAST_BETWEEN_READS_S = 1.0
_CALL_S = 10.0
_RETRY = Backoff(longest_s=5.0)
_MESSAGE_CHARS = 500
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """What the agent's settings and surroundings add to what its machine says."""

    node: str
    boot_id: str
    address: str  # host:port of the mTLS port
    host_address: str
    agent_version: str
    runtimes: tuple[str, ...]
    isolation: inventory_pb2.NodeIsolation | None = None  # None where nothing runs
    conditions: tuple[MachineCondition, ...] = ()  # that hold while this agent runs
    memory_limits: str = ""  # who sees to them: "kernel", "watched"; "" where nothing runs
    zone: str = ""
    spine: str = ""
    leaf: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    machine_id: str = ""
    dataset_cache_bytes: int = 0
    price: Price | None = None  # None: the machine's own


def facts(machine: Machine, description: NodeDescription, notice: Notice | None = None) -> inventory_pb2.NodeFacts:
    """What is registered. Pure."""
    node = replace(
        machine.node,
        zone=description.zone,
        spine=description.spine,
        leaf=description.leaf,
        labels=description.labels,
        price=description.price or machine.node.price,
    )
    found = facts_to_proto(node)
    found.address, found.host_address = description.address, description.host_address
    found.driver_version, found.agent_version = machine.driver_version, description.agent_version
    found.runtimes.extend(description.runtimes)
    found.memory_limits, found.dataset_cache_bytes = description.memory_limits, description.dataset_cache_bytes
    if description.isolation is not None:
        found.isolation.CopyFrom(description.isolation)
    if notice is not None:
        found.taken_time.FromSeconds(int(notice.taken_s))
    for condition in (*machine.conditions, *description.conditions, *_conditions(notice)):
        found.conditions.add(
            type=condition.type,
            status=types_pb2.CONDITION_STATUS_FALSE,
            reason=condition.reason,
            message=condition.message[:_MESSAGE_CHARS],
        )
    return found


def _conditions(notice: Notice | None) -> tuple[MachineCondition, ...]:
    return () if notice is None else (MachineCondition(ConditionType.MACHINE_STAYS, notice.reason, notice.message),)


class Registration:
    """Reads the devices now and then; registers what changed, for as long as it takes."""

    def __init__(
        self,
        source: DeviceSource,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        description: NodeDescription,
        clock: Clock,
        *,
        reread_every_s: float = _REREAD_EVERY_S,
    ) -> None:
        self._source, self._stub, self._description, self._clock = source, stub, description, clock
        self._reread_every_s = reread_every_s
        site = names.top(description.node)
        self.machine = Machine(Node(name=description.node, site=site), "unreadable")
        self._read_s = float("-inf")
        self._notice: Notice | None = None
        self.registered, self._soon = asyncio.Event(), asyncio.Event()

    @property
    def simulated(self) -> bool:
        return self.machine.node.simulated

    def healthy_gpus(self) -> frozenset[str]:
        """UUIDs of the GPUs that work may use."""
        return frozenset(gpu.uuid for gpu in self.machine.node.gpus if gpu.healthy and gpu.uuid)

    async def read(self) -> None:
        """Looks at the machine; what cannot be read says so itself."""
        self._read_s = self._clock.monotonic()
        before, self.machine = self.machine, await self._source.read(self._description.node)
        for condition in self.machine.conditions:
            if condition not in before.conditions:
                _log.warning(Event.DEVICES_UNREADABLE, reason=condition.reason, detail=condition.message)
        known = {gpu.uuid: gpu.unhealthy_reason for gpu in before.node.gpus}
        for gpu in self.machine.node.gpus:
            if not gpu.healthy and known.get(gpu.uuid) != gpu.unhealthy_reason:
                _log.warning(Event.GPU_UNHEALTHY, gpu=gpu.index, uuid=gpu.uuid, reason=gpu.unhealthy_reason)

    def read_soon(self) -> None:
        """Something happened to a GPU: reads the machine now, not at the next turn."""
        self._soon.set()

    def announce(self, notice: Notice | None) -> None:
        """The machine is taken away, which is registered now; None: it stays."""
        self._notice = notice
        self._soon.set()

    async def run(self) -> None:
        """Registers what was read, then reads again, for ever; only the newest reading is registered."""
        known: inventory_pb2.NodeFacts | None = None
        failures = 0
        while True:
            found = facts(self.machine, self._description, self._notice)
            if found == known or await self._registered(found, failures):
                known, failures = found, 0
                await self._next_turn(self._reread_every_s)
            else:
                failures += 1
                await self._next_turn(_RETRY.pause_s(failures))
            await self.read()

    async def _next_turn(self, longest_s: float) -> None:
        turn = asyncio.ensure_future(self._clock.sleep(longest_s))
        soon = asyncio.ensure_future(self._soon.wait())
        try:
            await asyncio.wait({turn, soon}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            soon.cancel()
        await self._clock.sleep(self._read_s + _LEAST_BETWEEN_READS_S - self._clock.monotonic())
        self._soon.clear()

    async def _registered(self, found: inventory_pb2.NodeFacts, failures: int) -> bool:
        request = inventory_pb2.RegisterNodeRequest(
            name=self._description.node,
            facts=found,
            boot_id=self._description.boot_id,
            machine_id=self._description.machine_id,
        )
        try:
            await self._stub.RegisterNode(request, timeout=_CALL_S)
        except StatusError as error:
            if error.reason == ErrorReason.NODE_NAME_TAKEN:  # no trying again helps: the agent stops and says why
                _log.error(Event.RPC_FAILED, method="RegisterNode", reason=error.message)
                raise
            level = _log.warning if failures in (0, 9) or failures % 100 == 99 else _log.debug
            level(Event.RPC_FAILED, method="RegisterNode", reason=error.message, failures=failures + 1)
            return False
        self.registered.set()
        _log.info(Event.NODE_JOINED, node=self._description.node, gpus=len(found.gpus), simulated=found.simulated)
        return True
