"""A stand-in for pynvml: GPUs are dictionaries whose values are answers, or exceptions to raise."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """Like pynvml's: what went wrong is in the name of the class."""


def error(kind: str, text: str = "") -> NVMLError:
    """One of NVML's errors by its name: "GpuIsLost", "NotSupported", "Unknown", "Timeout"."""
    return type(f"NVMLError_{kind}", (NVMLError,), {})(text or kind)


def gpu(index: int, name: str = "NVIDIA A100-SXM4-40GB", gib: float = 40, **more: Any) -> dict[str, Any]:
    """A healthy A100; `more` replaces single answers: memory, uuid, name, pci, rows, fields, handle, mig, instances."""
    return {
        "uuid": f"GPU-0000000{index}", "name": name, "memory": int(gib * 2**30), "capability": (8, 0),
        "pci": f"00000000:{index + 1:02X}:00.0", "rows": (0, 0, 0, 0), "links": 12,
    } | more  # fmt: skip


def mig(index: int, profile: str, gib: float, **more: Any) -> dict[str, Any]:
    """One MIG instance, as an item of a GPU's `instances`."""
    name = f"NVIDIA A100-SXM4-40GB MIG {profile}"
    return {"uuid": f"MIG-0000000{index}", "name": name, "memory": int(gib * 2**30)} | more


def recovery(action: int) -> list[Any]:
    """The answer to the field that says what the driver wants done."""
    return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=action))]


class FakeNvml:
    """`events` are what waiting gives in turn (an Xid as (gpu index, code), or an exception); then it times out."""

    NVMLError = NVMLError

    def __init__(self, gpus: list[dict[str, Any]], *, no_driver: bool = False, wait_s: float = 0.01) -> None:
        self.gpus, self.no_driver, self._wait_s = gpus, no_driver, wait_s
        self.events: list[Any] = []
        self.waits = 0
        self.reports_events = True

    def nvmlInit(self) -> None:
        if self.no_driver:
            raise error("DriverNotLoaded", "Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        if self.no_driver:
            raise error("Uninitialized")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self._answer(self.gpus[index], "handle", None)
        return self.gpus[index]

    @staticmethod
    def _answer(handle: dict[str, Any], key: str, *otherwise: Any) -> Any:
        value = handle.get(key, otherwise[0] if otherwise else error("NotSupported"))
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=self._answer(handle, "memory"), used=handle.get("used", 0))

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId=self._answer(handle, "pci"))

    def nvmlDeviceGetMigMode(self, handle: Any) -> Any:
        return self._answer(handle, "mig", (0, 0))

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, at: int) -> Any:
        instances = self._answer(handle, "instances", [])
        if at >= len(instances):
            raise error("NotFound")
        return instances[at]

    def nvmlDeviceGetFieldValues(self, handle: Any, ids: list[int]) -> Any:
        return self._answer(handle, "fields")

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int:
        if link >= handle["links"]:
            raise error("NotSupported")
        return 1

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Any, link: int) -> int:
        return 2

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: Any, link: int) -> Any:
        return SimpleNamespace(busId="FFFFFFFF:FF:FF.0")

    def nvmlDeviceGetNvLinkVersion(self, handle: Any, link: int) -> int:
        return 4

    def nvmlDeviceGetTopologyCommonAncestor(self, a: Any, b: Any) -> int:
        return 40

    def __getattr__(self, name: str) -> Any:
        answers = {"nvmlDeviceGetUUID": "uuid", "nvmlDeviceGetName": "name", "nvmlDeviceGetRemappedRows": "rows",
                   "nvmlDeviceGetCudaComputeCapability": "capability", "nvmlDeviceGetNumaNodeId": "numa",
                   "nvmlDeviceGetMaxPcieLinkGeneration": "generation", "nvmlDeviceGetMaxPcieLinkWidth": "width"}  # fmt: skip
        if name not in answers:
            raise AttributeError(name)
        return lambda handle: self._answer(handle, answers[name])

    # events

    def nvmlEventSetCreate(self) -> Any:
        return object()

    def nvmlEventSetFree(self, events: Any) -> None:
        """Nothing is held."""

    def nvmlDeviceRegisterEvents(self, handle: Any, mask: int, events: Any) -> None:
        if not self.reports_events:
            raise error("NotSupported")

    def nvmlDeviceGetIndex(self, device: Any) -> int:
        return int(device)

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:
        self.waits += 1
        if not self.events:
            time.sleep(self._wait_s)  # instead of two seconds
            raise error("Timeout")
        event = (
            self.events[0] if len(self.events) == 1 and isinstance(self.events[0], Exception) else self.events.pop(0)
        )
        if isinstance(event, Exception):
            raise event
        return SimpleNamespace(device=event[0], eventData=event[1], eventType=8)
