"""Turns NVML's answers into readings, one probe per GPU: what one of them cannot say leaves the others alone.

Every call may be unsupported, and all of them may block while a GPU falls off the bus; deadlines are the caller's (`nvml`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from itertools import combinations
from typing import Any

from whaleflux.fleet.gpu_types import CATALOGUE, MAX_NVLINKS, NVLINK_GENERATIONS
from whaleflux.fleet.model import Gpu, Link
from whaleflux.reasons import NodeReason
from whaleflux_agent.core.gpu_health import UNKNOWN_MODEL, GpuReading
from whaleflux_agent.core.mig import instance
from whaleflux_agent.core.topology import GpuWires, NvLinkReading, best_links
from whaleflux_agent.devices import host

_SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
_RECOVERY_ACTION_FIELD = 230  # NVML_FI_DEV_GPU_RECOVERY_ACTION, from driver R565 on
_RECOVERY_ACTIONS = {
    1: NodeReason.RESET_GPU,
    2: NodeReason.RESTART_HOST,
    3: NodeReason.DRAIN_PEERS,
    4: NodeReason.DRAIN_AND_RESET,
}
_MIG_PROFILE = re.compile(r"MIG\s+(\S+)")
_GONE = {"GpuIsLost": NodeReason.GPU_LOST, "ResetRequired": NodeReason.RESET_REQUIRED}
_HAS_NONE = frozenset({"NotSupported", "FunctionNotFound", "NotFound"})


class GpuProbe:
    """Questions to one GPU. `reason` says why it is unhealthy, "" while nothing does; the first cause counts."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self.reason = nvml, ""

    def must(self, what: str, ask: Callable[[], Any], *, unsupported: Any, failed: Any) -> Any:
        """An answer that every GPU owes; `unsupported` is for the kinds that have none."""
        try:
            return ask()
        except self._nvml.NVMLError as error:
            if kind_of(error) in _HAS_NONE:
                return unsupported
            self.fails(f"{_GONE.get(kind_of(error), NodeReason.UNREADABLE)}: {what}: {error}")
            return failed

    def owes(self, what: str, ask: Callable[[], Any], otherwise: Any) -> Any:
        """As `must`, where an older pynvml has no such question, or there is nothing at that place."""
        try:
            return self.must(what, ask, unsupported=otherwise, failed=otherwise)
        except AttributeError:
            return otherwise

    def may(self, ask: Callable[[], Any], otherwise: Any) -> Any:
        """An answer, or `otherwise` where this GPU or driver has none."""
        try:
            return ask()
        except AttributeError:  # an older pynvml
            return otherwise
        except self._nvml.NVMLError as error:
            if kind_of(error) in _GONE:
                self.fails(f"{_GONE[kind_of(error)]}: {error}")
            return otherwise

    def fails(self, reason: str) -> None:
        """Takes the GPU out of use."""
        self.reason = self.reason or reason


class NvmlReader:
    """The blocking part. `nvml` is the pynvml module, or one that answers like it."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def open(self) -> None:
        """Raises pynvml.NVMLError where there is no driver."""
        self._nvml.nvmlInit()

    def driver_version(self) -> str:
        """As the driver says, "unknown" where it does not."""
        return _text(GpuProbe(self._nvml).may(self._nvml.nvmlSystemGetDriverVersion, "unknown"))

    def read(self) -> tuple[list[GpuReading], tuple[Link, ...]]:
        """Every GPU with what is wrong with it, and the links between those that can be asked.

        Raises pynvml.NVMLError only where the driver does not even say how many there are.
        """
        handles: dict[int, Any] = {}
        readings = [self._gpu(index, handles) for index in range(self._nvml.nvmlDeviceGetCount())]
        wires = [self._wires(index, handle) for index, handle in handles.items()]
        return readings, best_links(wires, self._ancestors(handles))

    def computing(self, gpu_uuids: Collection[str]) -> frozenset[int]:
        """Pids with work on these GPUs; none from a driver that does not offer the question. Raises NVMLError.

        Nothing runs on a GPU that is lost, and nobody is given it before it was reset: it must not hold the others.
        """
        return frozenset(int(process.pid) for uuid in gpu_uuids for process in self._computing(uuid))

    def memory_used(self, gpu_uuids: Collection[str]) -> dict[str, dict[int, int]]:
        """Bytes of each GPU by pid, as far as the driver says. Raises NVMLError, as `computing`."""
        return {
            uuid: {int(one.pid): int(one.usedGpuMemory) for one in self._computing(uuid) if one.usedGpuMemory}
            for uuid in gpu_uuids
        }

    def _computing(self, uuid: str) -> list[Any]:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        except AttributeError:  # an older pynvml
            return []
        except self._nvml.NVMLError as error:
            if kind_of(error) in _HAS_NONE or kind_of(error) == "GpuIsLost":
                return []
            raise

    def _gpu(self, index: int, handles: dict[int, Any]) -> GpuReading:
        probe, nvml = GpuProbe(self._nvml), self._nvml
        handle = probe.must("handle", lambda: nvml.nvmlDeviceGetHandleByIndex(index), unsupported=None, failed=None)
        if handle is None:
            reason = probe.reason or f"{NodeReason.UNREADABLE}: the driver has no handle for it"
            return GpuReading(Gpu(index, "", UNKNOWN_MODEL, 0, healthy=False, unhealthy_reason=reason))
        handles[index] = handle
        # A GPU without a memory of its own (GB10) shares the host's.
        memory_bytes = probe.must(
            "memory",
            lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            unsupported=host.memory_bytes(),
            failed=0,
        )
        uuid = _text(probe.must("uuid", lambda: nvml.nvmlDeviceGetUUID(handle), unsupported="", failed=""))
        if not uuid:
            probe.fails(f"{NodeReason.NO_UUID}: the driver gives it no UUID, so that no program can be bound to it")
        action = self._recovery_action(probe, handle)
        self._rows(probe, handle)
        model = self._model(probe, handle, memory_bytes)
        capability = probe.may(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), (0, 0))
        mig, instances = self._instances(probe, handle)
        if mig and not instances:
            probe.fails(f"{NodeReason.NO_MIG_INSTANCE}: MIG is on and has no instance, so that no program can use it")
        gpu = Gpu(
            index=index,
            uuid=uuid,
            model=model,
            memory_bytes=memory_bytes,
            compute_capability=(int(capability[0]), int(capability[1])),
            pci_bus_id=self._bus_id(probe, handle),
            numa_node=int(probe.may(lambda: nvml.nvmlDeviceGetNumaNodeId(handle), -1)),
            healthy=not probe.reason,
            unhealthy_reason=probe.reason,
        )
        return GpuReading(gpu, action, tuple(self._instance(gpu, part, profile) for part, profile in instances))

    def _model(self, probe: GpuProbe, handle: Any, memory_bytes: int) -> str:
        ask = partial(self._nvml.nvmlDeviceGetName, handle)
        product = _text(probe.must("name", ask, unsupported="", failed=""))
        return CATALOGUE.name_of(product, memory_bytes) if product else UNKNOWN_MODEL

    def _bus_id(self, probe: GpuProbe, handle: Any) -> str:
        return _text(probe.may(lambda: self._nvml.nvmlDeviceGetPciInfo(handle).busId, ""))

    def _rows(self, probe: GpuProbe, handle: Any) -> None:
        _, _, _, failed = probe.may(lambda: self._nvml.nvmlDeviceGetRemappedRows(handle), (0, 0, 0, 0))
        if failed:
            probe.fails(
                f"{NodeReason.ROW_REMAP_FAILED}: broken rows of its memory could not be replaced; have the GPU exchanged"
            )

    def _recovery_action(self, probe: GpuProbe, handle: Any) -> int | None:
        """What the driver itself asks for, 0 for nothing; None where it does not say."""
        values = probe.may(lambda: self._nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION_FIELD]), [])
        if not values or values[0].nvmlReturn != 0:
            return None
        action = int(values[0].value.uiVal)
        if action:
            wanted = _RECOVERY_ACTIONS.get(action, f"RECOVERY_ACTION_{action}")
            probe.fails(f"{wanted}: the driver asks for it before the GPU is used again")
        return action

    def _instances(self, probe: GpuProbe, handle: Any) -> tuple[bool, list[tuple[Any, str]]]:
        """Whether MIG is on, and the instances that exist: handle and profile.

        Where that is not known the GPU is unhealthy: offered whole it would be given away under its instances.
        """
        nvml, asked = self._nvml, GpuProbe(self._nvml)
        current, _ = asked.owes("MIG mode", lambda: nvml.nvmlDeviceGetMigMode(handle), (0, 0))
        found = []
        for at in range(asked.owes("MIG", lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0) if current else 0):
            part = asked.owes("MIG instance", partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, at), None)
            name = "" if part is None else _text(asked.owes("MIG name", partial(nvml.nvmlDeviceGetName, part), ""))
            if profile := _MIG_PROFILE.search(name):
                found.append((part, profile.group(1)))
        if asked.reason:
            probe.fails(asked.reason)
        return bool(current), [] if asked.reason else found

    def _instance(self, parent: Gpu, part: Any, profile: str) -> Gpu:
        """One MIG instance; what it cannot say of itself makes it unhealthy alone."""
        probe, nvml = GpuProbe(self._nvml), self._nvml
        uuid = _text(probe.must("uuid", lambda: nvml.nvmlDeviceGetUUID(part), unsupported="", failed=""))
        if not uuid:
            probe.fails(f"{NodeReason.NO_UUID}: the driver gives it no UUID, so that no program can be bound to it")
        memory_bytes = probe.must(
            "memory", lambda: int(nvml.nvmlDeviceGetMemoryInfo(part).total), unsupported=0, failed=0
        )
        if not memory_bytes:
            probe.fails(f"{NodeReason.UNREADABLE}: the driver does not say how much memory it has")
        return instance(parent, uuid, profile, memory_bytes, healthy=not probe.reason, unhealthy_reason=probe.reason)

    def _wires(self, index: int, handle: Any) -> GpuWires:
        """The widest and fastest that the slot allows: an idle GPU lowers its PCIe generation to save power."""
        probe, nvml = GpuProbe(self._nvml), self._nvml
        return GpuWires(
            index=index,
            bus_id=self._bus_id(probe, handle),
            nvlinks=tuple(filter(None, (self._nvlink(probe, handle, link) for link in range(MAX_NVLINKS)))),
            pcie_generation=int(probe.may(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), 0)),
            pcie_width=int(probe.may(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle), 0)),
        )

    def _nvlink(self, probe: GpuProbe, handle: Any, link: int) -> NvLinkReading | None:
        nvml = self._nvml
        if probe.may(lambda: nvml.nvmlDeviceGetNvLinkState(handle, link), 0) != 1:
            return None
        remote = probe.may(lambda: nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link), 0)
        bus = probe.may(lambda: nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId, "")
        version = probe.may(lambda: nvml.nvmlDeviceGetNvLinkVersion(handle, link), 0)
        return NvLinkReading(NVLINK_GENERATIONS.get(int(version), 4), int(remote) == _SWITCH, _text(bus))

    def _ancestors(self, handles: dict[int, Any]) -> dict[tuple[int, int], int]:
        probe = GpuProbe(self._nvml)
        levels = {
            (a, b): probe.may(partial(self._nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b]), -1)
            for a, b in combinations(handles, 2)
        }
        return {pair: int(level) for pair, level in levels.items() if level >= 0}


def kind_of(error: Exception) -> str:
    """NVML's name of an error: "GpuIsLost", "NotSupported", "Timeout"."""
    return type(error).__name__.removeprefix("NVMLError_")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
