"""What NVML counts of each device, interval by interval: what one of them cannot say leaves the others alone.

Without GPM (before Hopper, or where an exporter has the counters) there is no word on tensor cores: `busy_ppm` is the time in which any
kernel ran, which tells idle from not idle and no more. PCIe has no counter that can be trusted then: NVML's wraps within 80 ms at full
speed. All calls block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from whaleflux_agent.core import usage
from whaleflux_agent.core.usage import DeviceUsage, IdlePower
from whaleflux_agent.usage import gpm
from whaleflux_agent.usage.gpm import Gpm

_ALL_LINKS = 0xFFFFFFFF
_NVLINK_SENT, _NVLINK_RECEIVED = 138, 139  # NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _RX: KiB since the driver was loaded
_KIB = 1 << 10
_SM_CLOCK = 1  # NVML_CLOCK_SM


@dataclass(slots=True)
class _Cumulative:
    nvlink_sent: int | None = None
    nvlink_received: int | None = None


@dataclass(slots=True)
class _Device:
    """What is kept of a device between two readings."""

    handle: Any
    gpu: Any  # the whole GPU's, where `handle` is a MIG instance's
    instance: int | None
    place: tuple[str, int | None]  # UUID of the GPU, and the instance
    gpm: Gpm
    idle: IdlePower = field(default_factory=IdlePower)
    highest_clock: int = 0  # asked once: the driver takes 2 ms for it
    clocks: list[float] = field(default_factory=list)  # over the highest, of each tick
    powers_mw: list[float] = field(default_factory=list)  # a mean of ticks: the energy counter takes the driver 4 ms
    busy: list[float] = field(default_factory=list)
    last: _Cumulative = field(default_factory=_Cumulative)


class NvmlCounters:
    """`nvml` is the pynvml module, or one that answers like it."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._opened = nvml, False
        self._devices: dict[str, _Device] = {}

    def tick(self) -> None:
        """Clock and utilisation of the moment."""
        for device in self._devices.values():
            self._tick(device)

    def take(self, devices: Sequence[str], interval_s: float, *, with_gpm: bool) -> list[DeviceUsage]:
        """What each did since the last call; those that cannot be found are left out."""
        if not self._open():
            return []
        for gone in self._devices.keys() - set(devices):
            self._devices.pop(gone).gpm.free()
        found = [(uuid, self._found(uuid)) for uuid in devices]
        return [self._taken(uuid, one, interval_s, with_gpm) for uuid, one in found if one is not None]

    def place_of(self, device: str) -> tuple[str, int | None] | None:
        """The GPU's UUID and, of a MIG instance, its number there, as exporters name it; None: not read yet."""
        known = self._devices.get(device)
        return known.place if known else None

    def close(self) -> None:
        """Frees the driver's samples."""
        for device in self._devices.values():
            device.gpm.free()
        self._devices.clear()

    def _open(self) -> bool:
        try:
            if not self._opened:
                self._nvml.nvmlInit()
                self._opened = True
        except self._nvml.NVMLError:
            return False
        return True

    def _may(self, ask: Callable[[], Any]) -> Any:
        """An answer; None where this GPU, driver or pynvml has none."""
        try:
            return ask()
        except (AttributeError, self._nvml.NVMLError):
            return None

    def _found(self, uuid: str) -> _Device | None:
        if uuid not in self._devices:
            nvml = self._nvml
            handle = self._may(lambda: nvml.nvmlDeviceGetHandleByUUID(uuid))
            if handle is None:
                return None
            is_part = uuid.startswith("MIG-")
            gpu = self._may(lambda: nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)) if is_part else handle
            instance = self._may(lambda: nvml.nvmlDeviceGetGpuInstanceId(handle)) if is_part else None
            if gpu is None or (is_part and instance is None):
                return None
            place = (uuid, None) if not is_part else (_text(self._may(lambda: nvml.nvmlDeviceGetUUID(gpu))), instance)
            self._devices[uuid] = _Device(handle, gpu, instance, place, Gpm(nvml, gpu, instance))
        return self._devices[uuid]

    def _tick(self, device: _Device) -> None:
        nvml = self._nvml
        clock = self._may(lambda: nvml.nvmlDeviceGetClockInfo(device.gpu, _SM_CLOCK))
        if not device.highest_clock:
            device.highest_clock = self._may(lambda: nvml.nvmlDeviceGetMaxClockInfo(device.gpu, _SM_CLOCK)) or 0
        if clock is not None and device.highest_clock:
            device.clocks.append(clock / device.highest_clock)
        power = None if device.instance is not None else self._may(lambda: nvml.nvmlDeviceGetPowerUsage(device.gpu))
        if power is not None:
            device.powers_mw.append(power)
        busy = self._may(lambda: nvml.nvmlDeviceGetUtilizationRates(device.handle))
        if busy is not None:
            device.busy.append(busy.gpu / 100)

    def _taken(self, uuid: str, device: _Device, interval_s: float, with_gpm: bool) -> DeviceUsage:
        if not device.clocks:
            self._tick(device)
        counted = device.gpm.read() if with_gpm else {}
        if not with_gpm:
            device.gpm.free()
        share = {metric: usage.ppm(value / 100) for metric, value in counted.items()}
        rate = {metric: value * gpm.MIB for metric, value in counted.items()}
        clock = usage.ppm(usage.mean(device.clocks))
        busy = share.get(gpm.GRAPHICS, usage.ppm(usage.mean(device.busy)))
        mean_mw = usage.mean(device.powers_mw)
        power = None if mean_mw is None else round(mean_mw)
        device.clocks, device.busy, device.powers_mw = [], [], []
        moved = self._moved(device)
        memory = self._may(lambda: self._nvml.nvmlDeviceGetMemoryInfo(device.handle))
        return DeviceUsage(
            device=uuid,
            source="gpm" if counted else "nvml",
            tensor_ppm=usage.times(share.get(gpm.TENSOR), clock),
            sm_active_ppm=share.get(gpm.SM),
            dram_active_ppm=share.get(gpm.DRAM),
            busy_ppm=busy,
            clock_ppm=clock,
            power_mw=power,
            idle_power=device.idle.judged(power, busy),
            memory_used_bytes=None if memory is None else int(memory.used),
            nvlink_sent_bytes=moved.nvlink_sent,
            nvlink_received_bytes=moved.nvlink_received,
            pcie_sent_bytes=usage.amount(rate.get(gpm.PCIE_SENT), interval_s),
            pcie_received_bytes=usage.amount(rate.get(gpm.PCIE_RECEIVED), interval_s),
        )

    def _moved(self, device: _Device) -> _Cumulative:
        """How much each counter has grown; a MIG instance has none of its own."""
        if device.instance is not None:
            return _Cumulative()
        sent, received = self._nvlink(device.gpu)
        before, device.last = device.last, _Cumulative(sent, received)
        return _Cumulative(
            usage.grown(before.nvlink_sent, sent),
            usage.grown(before.nvlink_received, received),
        )

    def _nvlink(self, gpu: Any) -> tuple[int | None, int | None]:
        """Bytes sent and received over all links since the driver was loaded."""
        asked = [(_NVLINK_SENT, _ALL_LINKS), (_NVLINK_RECEIVED, _ALL_LINKS)]
        values = self._may(lambda: self._nvml.nvmlDeviceGetFieldValues(gpu, asked))
        if values is None:
            return None, None
        sent, received = (int(one.value.ullVal) * _KIB if one.nvmlReturn == 0 else None for one in values)
        return sent, received


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
