"""A stand-in for pynvml with counters: GPUs are dictionaries whose values tests change between readings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.support.fake_nvml import FakeNvml, error

KIB = 1 << 10


def counting(index: int, **more: Any) -> dict[str, Any]:
    """An H200 with performance counters. `percent` and `mib_s` are by GPM metric, what they were since the sample before."""
    return {
        "uuid": f"GPU-{index}", "memory": 141 << 30, "used": 1 << 30, "gpm": True, "clock": 1980, "max_clock": 1980, "busy": 0,
        "power_mw": 80_000, "sent_kib": 0, "received_kib": 0, "percent": {}, "instances": [], "gi": None, "parent": None,
    } | more  # fmt: skip


class _Metrics:
    """pynvml's c_nvmlGpmMetricsGet_t."""

    def __init__(self) -> None:
        self.version = self.numMetrics = 0
        self.sample1 = self.sample2 = None
        self.metrics = [SimpleNamespace(metricId=0, value=0.0, nvmlReturn=0) for _ in range(32)]


class CountingNvml(FakeNvml):
    """`samples` are those that the driver has not got back. `reads` counts questions to performance counters."""

    NVML_GPM_METRICS_GET_VERSION = 1
    c_nvmlGpmMetricsGet_t = _Metrics  # noqa: N815  # pynvml's name

    def __init__(self, gpus: list[dict[str, Any]]) -> None:
        super().__init__(gpus)
        self.samples: set[int] = set()
        self.reads = self._made = 0

    def _all(self) -> list[dict[str, Any]]:
        return [one for gpu in self.gpus for one in (gpu, *gpu["instances"])]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        found = next((one for one in self._all() if one["uuid"] == uuid), None)
        if found is None:
            raise error("NotFound")
        self._answer(found, "handle", None)
        return found

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Any:
        return next(gpu for gpu in self.gpus if handle in gpu["instances"])

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        return int(handle["gi"])

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        return int(self._answer(handle, "clock"))

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int) -> int:
        return int(self._answer(handle, "max_clock"))

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        if handle["gi"] is not None:
            raise error("NotSupported")
        return SimpleNamespace(gpu=self._answer(handle, "busy"))

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return int(self._answer(handle, "power_mw"))

    def nvmlDeviceGetFieldValues(self, handle: Any, ids: list[Any]) -> Any:
        kib = {138: handle["sent_kib"], 139: handle["received_kib"]}
        return [
            SimpleNamespace(
                nvmlReturn=0 if kib[field] is not None else 3, value=SimpleNamespace(ullVal=kib[field] or 0)
            )
            for field, _ in ids
        ]

    # performance counters

    def nvmlGpmQueryDeviceSupport(self, handle: Any) -> Any:
        return SimpleNamespace(isSupportedDevice=int(handle["gpm"]))

    def nvmlGpmSampleAlloc(self) -> Any:
        self._made += 1
        self.samples.add(self._made)
        return SimpleNamespace(id=self._made, of=None)

    def nvmlGpmSampleFree(self, sample: Any) -> None:
        self.samples.remove(sample.id)

    def nvmlGpmSampleGet(self, handle: Any, sample: Any) -> None:
        self.reads += 1
        self._answer(handle, "gpm_error", None)
        sample.of = handle

    def nvmlGpmMigSampleGet(self, handle: Any, instance: int, sample: Any) -> None:
        self.reads += 1
        sample.of = next(one for one in handle["instances"] if one["gi"] == instance)

    def nvmlGpmMetricsGet(self, asked: Any) -> None:
        assert asked.sample1.of is asked.sample2.of
        percent = asked.sample2.of["percent"]
        for one in asked.metrics[: asked.numMetrics]:
            one.value, one.nvmlReturn = percent.get(one.metricId, 0.0), 0 if one.metricId in percent else 3
