"""The machine through NVML, behind deadlines: a driver that hangs is told apart from one that fails by its silence.

NVML lives in threads of its own, one for facts and one for events. A machine without a driver has host facts all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from whaleflux.clock import Clock, SystemClock
from whaleflux.fleet.model import Link
from whaleflux.reasons import ConditionType, NodeReason, What
from whaleflux_agent.core.gpu_health import GpuHealth, GpuReading
from whaleflux_agent.core.mig import links_between
from whaleflux_agent.devices import host
from whaleflux_agent.devices.nvml_events import NvmlEvents
from whaleflux_agent.devices.nvml_reader import NvmlReader
from whaleflux_agent.devices.source import DevicesUnreadable, GpuEvent, GpuMemory, Machine, MachineCondition

R = TypeVar("R")
_ANSWER_WITHIN_S = 10.0
_NO_DRIVER_PAUSE_S = 5.0
_LEAST_PAUSE_S = 0.02  # between two waits for events, whatever the driver does


class NvmlSource:
    """See the module. `nvml` is the pynvml module, or one that answers like it."""

    def __init__(self, nvml: Any, clock: Clock | None = None, *, answer_within_s: float = _ANSWER_WITHIN_S) -> None:
        self._nvml, self._clock, self._answer_within_s = nvml, clock or SystemClock(), answer_within_s
        self._reader, self._events, self._health = NvmlReader(nvml), NvmlEvents(nvml), GpuHealth()
        self._facts = ThreadPoolExecutor(1, thread_name_prefix="nvml")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="nvml-events")
        self._opened, self._pause_s = False, 0.0
        self._late: asyncio.Future[Any] | None = None  # a question that was given up, and may be answered yet

    async def read(self, name: str) -> Machine:
        """The whole machine; a driver that does not answer is a condition, and makes every GPU unhealthy."""
        node = await asyncio.to_thread(host.describe, name)
        try:
            readings, links, version = await self._asked(self._read)
        except DevicesUnreadable as error:
            condition = self._unreadable(str(error))
            gpus = self._health.unreadable(f"{condition.reason}: {error}")
            return Machine(replace(node, gpus=gpus), "", (condition,))
        gpus = self._health.judged(readings, self._clock.monotonic())
        conditions = (
            ()
            if gpus
            else (MachineCondition(ConditionType.DRIVER_WORKS, NodeReason.NO_GPU, "the driver lists no GPU"),)
        )
        return Machine(replace(node, gpus=gpus, links=links_between(links, gpus)), version, conditions)

    async def computing(self, gpu_uuids: Collection[str]) -> frozenset[int]:
        return await self._asked(lambda: self._opened_for(lambda: self._reader.computing(gpu_uuids)))

    async def memory_used(self, gpu_uuids: Collection[str]) -> GpuMemory:
        return await self._asked(lambda: self._opened_for(lambda: self._reader.memory_used(gpu_uuids)))

    def _opened_for(self, ask: Callable[[], R]) -> R:
        try:
            if not self._opened:
                self._reader.open()
                self._opened = True
            return ask()
        except self._nvml.NVMLError as error:
            raise DevicesUnreadable(f"NVML: {error}") from None

    def _unreadable(self, error: str) -> MachineCondition:
        if self._opened:
            return MachineCondition(
                ConditionType.DRIVER_WORKS,
                NodeReason.DRIVER_FAILS,
                f"{error}; restart the agent after replacing the driver",
            )
        devices = host.nvidia_devices()
        if devices:
            message = f"{error}; {devices} NVIDIA device(s) are on the PCI bus: install or load the driver"
            return MachineCondition(ConditionType.DRIVER_WORKS, NodeReason.NO_DRIVER, message)
        message = f"{error}; no NVIDIA device is on the PCI bus: this node offers CPUs only"
        return MachineCondition(ConditionType.DRIVER_WORKS, NodeReason.NO_GPU, message)

    def _read(self) -> tuple[list[GpuReading], tuple[Link, ...], str]:
        return self._opened_for(lambda: (*self._reader.read(), self._reader.driver_version()))

    async def _asked(self, ask: Callable[[], R]) -> R:
        """Runs `ask` in NVML's thread, in its turn. One that hangs keeps the thread; later readers are refused at once."""
        if self._late is not None and not self._late.done():
            raise DevicesUnreadable("NVML has not answered an earlier question yet")
        waiting = asyncio.get_running_loop().run_in_executor(self._facts, ask)
        try:
            async with asyncio.timeout(self._answer_within_s):
                return await asyncio.shield(waiting)
        except TimeoutError:
            waiting.add_done_callback(lambda done: done.exception())  # the answer comes too late for anybody
            self._late = waiting
            raise DevicesUnreadable(f"NVML did not answer within {self._answer_within_s:g} s") from None

    async def next_events(self) -> list[GpuEvent]:
        await self._clock.sleep(self._pause_s)
        if not self._opened:
            self._pause_s = _NO_DRIVER_PAUSE_S
            return []
        events, pause_s = await asyncio.get_running_loop().run_in_executor(self._waiter, self._events.next)
        self._pause_s = max(pause_s, _LEAST_PAUSE_S)
        for event in events:
            if event.kind == What.XID:
                self._health.xid(event.gpu_index, event.code, self._clock.monotonic())
        return events

    async def close(self) -> None:
        """Frees the driver, unless it hangs: then its threads are left to the end of the process."""
        self._facts.shutdown(wait=False)
        self._waiter.shutdown(wait=False)


def open_nvml() -> NvmlSource:
    """NVML of this machine, through nvidia-ml-py."""
    import pynvml

    return NvmlSource(pynvml)
