"""NVML's performance counters (GPM), on Hopper and later: two samples per device, and what lies between them.

The counters are the GPU's only ones: whoever else reads them (DCGM, Nsight) disturbs and is disturbed. Percentages are of SM cycles,
not of time: `nvml_counters` multiplies by the clock. All calls block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GRAPHICS, SM, TENSOR, DRAM, PCIE_SENT, PCIE_RECEIVED = 1, 2, 5, 10, 20, 21  # NVML_GPM_METRIC_*
_METRICS = (GRAPHICS, SM, TENSOR, DRAM, PCIE_SENT, PCIE_RECEIVED)
MIB = 1 << 20  # of the rates


class Gpm:
    """Of one device: a GPU, or with `instance` (its GPU instance's id) a MIG instance of one."""

    def __init__(self, nvml: Any, gpu: Any, instance: int | None) -> None:
        self._nvml, self._gpu, self._instance = nvml, gpu, instance
        self._before: Any = None
        self._supported: bool | None = None

    def read(self) -> Mapping[int, float]:
        """By metric, between the last call and this one: percents, MiB/s. Empty at the first call, and where there are no counters."""
        if not self._is_supported():
            return {}
        now = self._taken()
        if now is None:
            self.free()  # what comes after a gap is not of one interval
            return {}
        before, self._before = self._before, now
        if before is None:
            return {}
        try:
            return self._between(before, now)
        except self._nvml.NVMLError:
            return {}
        finally:
            self._free(before)

    def free(self) -> None:
        """Gives the driver's memory back, and begins anew."""
        if self._before is not None:
            self._free(self._before)
            self._before = None

    def _is_supported(self) -> bool:
        if self._supported is None:
            try:
                self._supported = bool(self._nvml.nvmlGpmQueryDeviceSupport(self._gpu).isSupportedDevice)
            except (AttributeError, self._nvml.NVMLError):
                self._supported = False
        return self._supported

    def _taken(self) -> Any:
        """A sample of now; None where the driver gives none, as to who may not read counters."""
        nvml = self._nvml
        try:
            sample = nvml.nvmlGpmSampleAlloc()
        except nvml.NVMLError:
            return None
        try:
            if self._instance is None:
                nvml.nvmlGpmSampleGet(self._gpu, sample)
            else:
                nvml.nvmlGpmMigSampleGet(self._gpu, self._instance, sample)
        except nvml.NVMLError:
            self._free(sample)
            return None
        return sample

    def _between(self, before: Any, now: Any) -> Mapping[int, float]:
        asked = self._nvml.c_nvmlGpmMetricsGet_t()
        asked.version = self._nvml.NVML_GPM_METRICS_GET_VERSION
        asked.sample1, asked.sample2, asked.numMetrics = before, now, len(_METRICS)
        for at, metric in enumerate(_METRICS):
            asked.metrics[at].metricId = metric
        self._nvml.nvmlGpmMetricsGet(asked)
        answers = (asked.metrics[at] for at in range(len(_METRICS)))
        return {int(one.metricId): float(one.value) for one in answers if one.nvmlReturn == 0}

    def _free(self, sample: Any) -> None:
        try:
            self._nvml.nvmlGpmSampleFree(sample)
        except self._nvml.NVMLError:
            return  # of a GPU that is lost
