"""What the driver reports by itself: errors (Xid) of single GPUs. Blocking; pauses are the caller's to keep."""

from __future__ import annotations

from typing import Any

from whaleflux.reasons import NodeReason, What
from whaleflux.retry import Backoff
from whaleflux_agent.devices.nvml_reader import GpuProbe, kind_of
from whaleflux_agent.devices.source import GpuEvent

_WAIT_MS = 2000
_XID_EVENT = 0x8
_NO_EVENTS_PAUSE_S = 60.0  # no GPU here reports anything: asked again in case that one is replaced
_RETRY = Backoff(first_s=2.0, longest_s=60.0)


class NvmlEvents:
    """One set of events, made anew without the GPUs that have gone whenever waiting for it fails."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._set: Any = None
        self._failures = 0

    def next(self) -> tuple[list[GpuEvent], float]:
        """Events since the last call, waiting at most two seconds, and how long to pause before the next call.

        Waiting returns at once where a GPU is lost or the driver fails, so every such answer asks for a pause; a loss is
        reported once, until waiting works again.
        """
        self._set = self._set or self._registered()
        if self._set is None:
            return [], _NO_EVENTS_PAUSE_S
        try:
            seen = self._nvml.nvmlEventSetWait_v2(self._set, _WAIT_MS)
        except self._nvml.NVMLError as error:
            return self._failed(error)
        self._failures = 0
        index = int(GpuProbe(self._nvml).may(lambda: self._nvml.nvmlDeviceGetIndex(seen.device), -1))
        return [GpuEvent(What.XID, index, int(seen.eventData), f"Xid {seen.eventData} on GPU {index}")], 0.0

    def _failed(self, error: Exception) -> tuple[list[GpuEvent], float]:
        if kind_of(error) == "Timeout":
            self._failures = 0
            return [], 0.0
        self._free()
        self._failures += 1
        lost = kind_of(error) == "GpuIsLost" and self._failures == 1
        return ([GpuEvent(NodeReason.GPU_LOST, -1, 0, str(error))] if lost else []), _RETRY.pause_s(self._failures)

    def _free(self) -> None:
        events, self._set = self._set, None
        GpuProbe(self._nvml).may(lambda: self._nvml.nvmlEventSetFree(events), None)

    def _registered(self) -> Any:
        """Asks for the Xids of every GPU that reports them; None where none does."""
        nvml, probe = self._nvml, GpuProbe(self._nvml)
        events = probe.may(nvml.nvmlEventSetCreate, None) if hasattr(nvml, "nvmlEventSetCreate") else None
        if events is None:
            return None
        known = [self._register(events, index) for index in range(probe.may(nvml.nvmlDeviceGetCount, 0))]
        return events if any(known) else None

    def _register(self, events: Any, index: int) -> bool:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml.nvmlDeviceRegisterEvents(handle, _XID_EVENT, events)
        except self._nvml.NVMLError:
            return False
        return True
