"""`python -m tests.support.nvml_agent HARDWARE`: the real agent over a stand-in for NVML that follows a file.

HARDWARE is JSON, read at each question: {"gpus": [UUID in the order of the bus, ...], "lost": [UUID, ...]}. A lost GPU answers no
question, as one that fell off the bus. Only the module `pynvml` is replaced; everything above it is the agent's own code.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As nvidia-ml-py's."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801  # its own name
    """This GPU has no such thing."""


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801
    """It fell off the bus."""


class StandIn(ModuleType):
    """What the agent asks of `pynvml`; questions that are not here are unsupported (AttributeError, as in an old driver)."""

    NVMLError, NVMLError_NotSupported, NVMLError_GpuIsLost = NVMLError, NVMLError_NotSupported, NVMLError_GpuIsLost

    def __init__(self, hardware: Path) -> None:
        super().__init__("pynvml")
        self._hardware = hardware

    def _now(self) -> dict[str, list[str]]:
        while True:
            try:
                found: dict[str, list[str]] = json.loads(self._hardware.read_text())
            except ValueError:  # it is being written
                time.sleep(0.005)
            else:
                return found

    def _asked(self, uuid: str) -> str:
        if uuid in self._now()["lost"]:
            raise NVMLError_GpuIsLost("GPU is lost")
        return uuid

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._now()["gpus"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._now()["gpus"][index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str | bytes) -> str:
        asked = uuid.decode() if isinstance(uuid, bytes) else uuid
        if asked not in self._now()["gpus"]:
            raise NVMLError("Not Found")
        return self._asked(asked)

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return self._now()["gpus"].index(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._asked(handle)
        return SimpleNamespace(total=40 << 30, used=0)

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return self._asked(handle)

    def nvmlDeviceGetName(self, handle: str) -> str:
        self._asked(handle)
        return "NVIDIA A100-SXM4-40GB"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        self._asked(handle)
        return (8, 0)

    def nvmlDeviceGetPciInfo(self, handle: str) -> Any:
        return SimpleNamespace(busId=f"00000000:{self._now()['gpus'].index(handle) + 1:02X}:00.0")

    def nvmlDeviceGetRemappedRows(self, handle: str) -> tuple[int, int, int, int]:
        self._asked(handle)
        return (0, 0, 0, 0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._asked(handle)
        return []

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: object) -> None:
        self._asked(handle)

    def nvmlEventSetWait_v2(self, events: object, wait_ms: int) -> Any:
        """Nothing happens, except that a lost GPU ends each wait at once, as real drivers have it."""
        if self._now()["lost"]:
            raise NVMLError_GpuIsLost("GPU is lost")
        time.sleep(wait_ms / 1000)
        raise NVMLError("Timeout")

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> int:
        return 16

    def nvmlDeviceGetTopologyCommonAncestor(self, a: str, b: str) -> int:
        return 40


if __name__ == "__main__":
    sys.modules["pynvml"] = StandIn(Path(sys.argv.pop(1)))
    runpy.run_module("whaleflux_agent", run_name="__main__", alter_sys=True)
