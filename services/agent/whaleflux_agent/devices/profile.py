"""Plays a machine that is not there: facts from a profile, no hardware behind them, labelled simulated everywhere."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from whaleflux import names
from whaleflux.clock import Clock, SystemClock
from whaleflux.fleet.activity import Spell
from whaleflux.fleet.gpu_types import MachineShape, MigProfile
from whaleflux.fleet.model import Gpu, Node
from whaleflux.fleet.profile import Profile
from whaleflux.fleet.sickness import Fault
from whaleflux.reasons import NodeReason, What
from whaleflux_agent.core import mig
from whaleflux_agent.devices.source import GpuEvent, GpuMemory, Machine

_EVENTS_PAUSE_S = 60.0
_LEAST_PAUSE_S = 0.1  # between two events


def merged(shapes: Sequence[MachineShape]) -> MachineShape:
    """One machine with the GPUs of all: the host of the largest, and the mean price, weighted by GPUs."""
    first, count, links = shapes[0], 0, []
    for shape in shapes:
        links += [replace(group, gpus=frozenset(gpu + count for gpu in group.gpus)) for group in shape.links]
        count += shape.count
    usd = sum(shape.price.usd_per_gpu_hour * shape.count for shape in shapes) / count
    return MachineShape(
        count=count,
        links=tuple(links),
        cpu_millicores=max(shape.cpu_millicores for shape in shapes),
        memory_bytes=max(shape.memory_bytes for shape in shapes),
        disks=first.disks,
        network_bytes_per_s=max(shape.network_bytes_per_s for shape in shapes),
        price=replace(first.price, usd_per_gpu_hour=round(usd, 4)),
    )


class ProfileSource:
    """A machine that exists in a table or a file. Its faults come at their times after the start."""

    def __init__(self, profile: Profile, clock: Clock | None = None) -> None:
        self.profile, self._clock = profile, clock or SystemClock()
        self._began_s = self._clock.monotonic()
        self._to_come = deque(sorted(_faults(profile), key=lambda fault: fault.after_s))

    async def read(self, name: str) -> Machine:
        shape = self.profile.shape if not self.profile.also else merged([part.shape for part in self.profile.parts])
        gpus = self._broken(self._gpus(name))
        devices = self._devices(gpus)
        node = Node(
            name=name,
            site=names.top(name),
            gpus=devices,
            links=mig.links_between(shape.all_links(), devices),
            cpu_millicores=shape.cpu_millicores,
            memory_bytes=shape.memory_bytes,
            disks=shape.disks,
            network_bytes_per_s=shape.network_bytes_per_s,
            price=shape.price,
            simulated=True,
        )
        return Machine(node, "simulated")

    def scripts(self, name: str) -> dict[str, tuple[Spell, ...]]:
        """What the devices of node `name` do while work has them, by UUID; MIG instances do as their GPU."""
        found = [(gpu, part) for part, own in self._by_part(self._gpus(name)) for gpu in own if part.usage]
        return {
            device.uuid: part.usage for gpu, part in found for device in (self._instances(gpu, part.mig or ()) or [gpu])
        }

    def _gpus(self, name: str) -> list[Gpu]:
        places = [(part, index) for part in self.profile.parts for index in range(part.shape.count)]
        return [self._gpu(part, name, index, of_part) for index, (part, of_part) in enumerate(places)]

    def _gpu(self, part: Profile, name: str, index: int, of_part: int) -> Gpu:
        return Gpu(
            index=index,
            uuid=played_uuid(name, index),
            model=part.model,
            memory_bytes=part.memory_bytes,
            compute_capability=part.compute_capability,
            pci_bus_id=f"00000000:{index + 1:02X}:00.0",
            numa_node=of_part * part.numa_nodes // part.shape.count if part.numa_nodes else -1,
        )

    def _by_part(self, gpus: Sequence[Gpu]) -> Iterator[tuple[Profile, list[Gpu]]]:
        begin = 0
        for part in self.profile.parts:
            yield part, list(gpus[begin : begin + part.shape.count])
            begin += part.shape.count

    def _broken(self, gpus: list[Gpu]) -> list[Gpu]:
        """Those whose time has come say why they cannot be used."""
        passed_s = self._clock.monotonic() - self._began_s
        due = [fault for fault in _faults(self.profile) if fault.after_s <= passed_s]
        reasons = {fault.gpu: fault.unhealthy_reason for fault in due if fault.unhealthy_reason}
        return [
            replace(gpu, healthy=False, unhealthy_reason=reasons[gpu.index]) if gpu.index in reasons else gpu
            for gpu in gpus
        ]

    def _devices(self, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
        """The GPUs, or the MIG instances that each is cut into."""
        why = f"{NodeReason.NO_MIG_INSTANCE}: MIG is on and has no instance, so that no program can use it"
        found = [(gpu, part.mig) for part, own in self._by_part(gpus) for gpu in own]
        listed = [replace(g, healthy=False, unhealthy_reason=why) if cut == () else g for g, cut in found]
        return mig.devices(listed, {gpu.uuid: self._instances(gpu, cut) for gpu, cut in found if cut})

    def _instances(self, gpu: Gpu, cut: Sequence[MigProfile]) -> list[Gpu]:
        return [
            mig.instance(
                gpu, f"MIG-{gpu.uuid.removeprefix('GPU-')}-{at}", one.name, gpu.memory_bytes * one.eighths // 8
            )
            for at, one in enumerate(cut)
        ]

    async def computing(self, gpu_uuids: Collection[str]) -> frozenset[int]:
        """Nobody: nothing is there to compute on."""
        return frozenset()

    async def memory_used(self, gpu_uuids: Collection[str]) -> GpuMemory:
        """None is used: nothing is there."""
        return {}

    async def next_events(self) -> list[GpuEvent]:
        """The next fault once its time has come; none where nothing is left to break."""
        left_s = self._to_come[0].after_s - (self._clock.monotonic() - self._began_s) if self._to_come else math.inf
        await self._clock.sleep(min(max(left_s, _LEAST_PAUSE_S), _EVENTS_PAUSE_S))
        if not self._to_come or left_s > _EVENTS_PAUSE_S:
            return []
        return [event_of(self._to_come.popleft())]

    async def close(self) -> None:
        """Nothing is held."""


def _faults(profile: Profile) -> Iterator[Fault]:
    """Of all parts, each GPU under its index in the machine."""
    begin = 0
    for part in profile.parts:
        for fault in part.faults:
            yield replace(fault, gpu=begin + fault.gpu)
        begin += part.shape.count


def event_of(fault: Fault) -> GpuEvent:
    """What the driver reports."""
    if not fault.xid:
        return GpuEvent(NodeReason.GPU_LOST, fault.gpu, 0, f"GPU {fault.gpu} fell off the bus (simulated)")
    return GpuEvent(What.XID, fault.gpu, fault.xid, f"Xid {fault.xid} on GPU {fault.gpu} (simulated)")


def played_uuid(name: str, index: int) -> str:
    """Looks like a driver's, is the same at each start, and says what it is."""
    digest = hashlib.sha256(f"{name}/{index}".encode()).hexdigest()
    return f"GPU-simulated-{digest[:8]}-{digest[8:12]}-{digest[12:24]}"
