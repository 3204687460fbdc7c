"""GPUs through NVML. Every call may be unsupported, and all of them may block while a GPU falls off the bus.

So NVML lives in a thread of its own: readers wait for it with a deadline, and one that hangs is told apart from one
that fails by its silence.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from whaleflux.fleet.model import Gpu, Node
from whaleflux_agent.core.topology import GpuWires, NvLinkReading, best_links
from whaleflux_agent.devices import host
from whaleflux_agent.devices.catalogue import catalogue_name
from whaleflux_agent.devices.source import DevicesUnreadable, GpuEvent, Machine

R = TypeVar("R")
_READ_TIMEOUT_S = 10.0
_EVENT_WAIT_MS = 2000
_MAX_LINKS = 18
_SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
_GENERATIONS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5}  # nvmlDeviceGetNvLinkVersion: 2 is "2.0", 4 is "3.0", ...
_RECOVERY_ACTION_FIELD = 230  # NVML_FI_DEV_GPU_RECOVERY_ACTION: 0 none, else reset, reboot, drain
_XID_EVENT = 0x8
_MIG_PROFILE = re.compile(r"MIG\s+(\S+)")
_GONE = "NVMLError_GpuIsLost"


class NvmlReader:
    """The blocking part: turns NVML's answers into facts. `nvml` is the pynvml module, or one that answers like it."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def open(self) -> None:
        """Raises pynvml.NVMLError where there is no driver."""
        self._nvml.nvmlInit()

    def close(self) -> None:
        self._may(self._nvml.nvmlShutdown, None)

    def machine(self, name: str) -> Machine:
        """All facts of this machine."""
        handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        wires = [self._wires(index, handle) for index, handle in enumerate(handles)]
        node = Node(
            name=name,
            site=name.split("/")[1],
            gpus=tuple(self._gpu(index, handle) for index, handle in enumerate(handles)),
            links=best_links(wires, self._ancestors(handles)),
            cpu_millicores=host.cpu_millicores(),
            memory_bytes=host.memory_bytes(),
            disks=host.disks(),
            network_bytes_per_s=host.network_bytes_per_s(),
        )
        return Machine(node, _text(self._may(self._nvml.nvmlSystemGetDriverVersion, "unknown")))

    def _gpu(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        capability = self._may(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), (0, 0))
        return Gpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            model=catalogue_name(_text(nvml.nvmlDeviceGetName(handle)), memory),
            memory_bytes=memory,
            compute_capability=(int(capability[0]), int(capability[1])),
            pci_bus_id=self._bus_id(handle),
            numa_node=int(self._may(lambda: nvml.nvmlDeviceGetNumaNodeId(handle), -1)),
            mig_profiles=self._mig_profiles(handle),
            healthy=self._healthy(handle),
        )

    def _bus_id(self, handle: Any) -> str:
        return _text(self._may(lambda: self._nvml.nvmlDeviceGetPciInfo(handle).busId, ""))

    def _healthy(self, handle: Any) -> bool:
        """False when rows could not be remapped, or when the driver itself asks for a reset or a reboot."""
        _, _, _, failed = self._may(lambda: self._nvml.nvmlDeviceGetRemappedRows(handle), (0, 0, 0, 0))
        return not failed and self._recovery_action(handle) == 0

    def _recovery_action(self, handle: Any) -> int:
        values = self._may(lambda: self._nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION_FIELD]), [])
        return int(values[0].value.uiVal) if values and values[0].nvmlReturn == 0 else 0

    def _mig_profiles(self, handle: Any) -> tuple[str, ...]:
        nvml = self._nvml
        current, _ = self._may(lambda: nvml.nvmlDeviceGetMigMode(handle), (0, 0))
        profiles = []
        for index in range(self._may(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0) if current else 0):
            part = self._may(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index), None)
            if part is not None and (found := _MIG_PROFILE.search(_text(nvml.nvmlDeviceGetName(part)))):
                profiles.append(found.group(1))
        return tuple(profiles)

    def _wires(self, index: int, handle: Any) -> GpuWires:
        """The widest and fastest that the slot allows: an idle GPU lowers its PCIe generation to save power."""
        nvml = self._nvml
        return GpuWires(
            index=index,
            bus_id=self._bus_id(handle),
            nvlinks=tuple(filter(None, (self._nvlink(handle, link) for link in range(_MAX_LINKS)))),
            pcie_generation=int(self._may(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), 0)),
            pcie_width=int(self._may(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle), 0)),
        )

    def _nvlink(self, handle: Any, link: int) -> NvLinkReading | None:
        nvml = self._nvml
        if self._may(lambda: nvml.nvmlDeviceGetNvLinkState(handle, link), 0) != 1:
            return None
        remote = self._may(lambda: nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link), 0)
        bus = self._may(lambda: nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId, "")
        version = self._may(lambda: nvml.nvmlDeviceGetNvLinkVersion(handle, link), 0)
        return NvLinkReading(_GENERATIONS.get(int(version), 4), int(remote) == _SWITCH, _text(bus))

    def _ancestors(self, handles: list[Any]) -> dict[tuple[int, int], int]:
        levels = {
            (a, b): self._may(partial(self._nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b]), -1)
            for a, b in combinations(range(len(handles)), 2)
        }
        return {pair: int(level) for pair, level in levels.items() if level >= 0}

    def _may(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        """The answer, or `otherwise` where this GPU or driver has none."""
        try:
            return ask()
        except (self._nvml.NVMLError, AttributeError):
            return otherwise

    def wait_for_events(self, events: Any) -> list[GpuEvent]:
        """Critical Xids since the last call; waits at most two seconds. `events` is from `register`."""
        try:
            seen = self._nvml.nvmlEventSetWait_v2(events, _EVENT_WAIT_MS)
        except self._nvml.NVMLError as error:
            if type(error).__name__ == _GONE:
                return [GpuEvent("GPU_LOST", -1, 0, str(error))]
            return []
        index = int(self._may(lambda: self._nvml.nvmlDeviceGetIndex(seen.device), -1))
        return [GpuEvent("XID", index, int(seen.eventData), f"Xid {seen.eventData} on GPU {index}")]

    def register(self) -> Any:
        """Asks for Xids of every GPU that reports them; None where none does."""
        nvml = self._nvml
        events = self._may(nvml.nvmlEventSetCreate, None)
        if events is None:
            return None
        known = False
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                nvml.nvmlDeviceRegisterEvents(nvml.nvmlDeviceGetHandleByIndex(index), _XID_EVENT, events)
                known = True
            except nvml.NVMLError:
                continue
        return events if known else None


class NvmlSource:
    """NVML behind deadlines: one thread for facts, one for events."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._reader = nvml, NvmlReader(nvml)
        self._facts = ThreadPoolExecutor(1, thread_name_prefix="nvml")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="nvml-events")
        self._opened, self._events, self._registered = False, None, False
        self._busy = threading.Lock()

    async def read(self, name: str) -> Machine:
        return await self._asked(lambda: self._machine(name))

    def _machine(self, name: str) -> Machine:
        try:
            if not self._opened:
                self._reader.open()
                self._opened = True
            return self._reader.machine(name)
        except self._nvml.NVMLError as error:
            raise DevicesUnreadable(f"NVML: {error}") from None

    async def _asked(self, ask: Callable[[], R]) -> R:
        """Runs `ask` in NVML's thread. One that hangs keeps the thread; later readers are refused at once."""
        if not self._busy.acquire(blocking=False):
            raise DevicesUnreadable("NVML has not answered an earlier question yet")

        def guarded() -> R:
            try:
                return ask()
            finally:
                self._busy.release()

        waiting = asyncio.get_running_loop().run_in_executor(self._facts, guarded)
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                return await asyncio.shield(waiting)
        except TimeoutError:
            waiting.add_done_callback(lambda done: done.exception())  # the answer comes too late for anybody
            raise DevicesUnreadable(f"NVML did not answer within {_READ_TIMEOUT_S:.0f} s") from None

    async def next_events(self) -> list[GpuEvent]:
        return await asyncio.get_running_loop().run_in_executor(self._waiter, self._wait_for_events)

    def _wait_for_events(self) -> list[GpuEvent]:
        if not self._opened:
            return []
        if not self._registered:
            self._events, self._registered = self._reader.register(), True
        return self._reader.wait_for_events(self._events) if self._events is not None else []

    async def close(self) -> None:
        """Frees the driver, unless it hangs: then its threads are left to the end of the process."""
        self._facts.shutdown(wait=False)
        self._waiter.shutdown(wait=False)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def open_nvml() -> NvmlSource:
    """NVML of this machine, through nvidia-ml-py."""
    import pynvml

    return NvmlSource(pynvml)
