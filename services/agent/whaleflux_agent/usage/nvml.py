"""Counters of real GPUs: NVML's, and an exporter's where one runs. A thread for each, and a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.telemetry import Event
from whaleflux_agent.core.usage import DeviceUsage
from whaleflux_agent.usage.dcgm import ANSWER_WITHIN_S, Exporter, Place, with_counters
from whaleflux_agent.usage.nvml_counters import NvmlCounters

_log = telemetry.get_logger("whaleflux.agent")
R = TypeVar("R")
NVML_WITHIN_S = 5.0


class _Worker:
    """One thread. A question that hangs keeps it; later ones are not asked until it is answered."""

    def __init__(self, name: str, within_s: float) -> None:
        self._thread, self._within_s = ThreadPoolExecutor(1, thread_name_prefix=name), within_s
        self._asked: asyncio.Future[Any] | None = None
        self._said = ""

    async def ask(self, question: Callable[[], R], otherwise: R) -> R:
        """The answer, or `otherwise`: what a driver's surprise costs is the knowledge of an interval, never the agent."""
        if self._asked is not None and not self._asked.done():
            return otherwise
        self._asked = asked = asyncio.get_running_loop().run_in_executor(self._thread, question)
        done, _ = await asyncio.wait({asked}, timeout=self._within_s)
        if not done:
            return otherwise
        if (error := asked.exception()) is not None:
            if self._said != (said := f"{type(error).__name__}: {error}"):
                self._said = said
                _log.error(Event.USAGE_UNREADABLE, reason=said, exc_info=error)
            return otherwise
        self._said = ""
        return asked.result()

    def close(self) -> None:
        """A thread that hangs is left to the end of the process."""
        self._thread.shutdown(wait=False)


class NvmlUsage:
    """See the module. `nvml` is the pynvml module, or one that answers like it."""

    def __init__(self, nvml: Any, exporter: Exporter, clock: Clock, *, within_s: float = NVML_WITHIN_S) -> None:
        self._counters, self._exporter, self._clock = NvmlCounters(nvml), exporter, clock
        self._nvml, self._http = _Worker("usage", within_s), _Worker("dcgm", 2 * ANSWER_WITHIN_S)
        self._last_s = clock.monotonic()
        self._is_exported = False  # by the last answer: one that is late leaves the counters to the exporter

    async def tick(self) -> None:
        await self._nvml.ask(self._counters.tick, None)

    async def sample(self, devices: Sequence[str], held: Collection[str]) -> list[DeviceUsage]:
        answer = await self._http.ask(self._exporter.read, None)
        if answer is not None:
            self._is_exported = bool(answer)
        exported, with_gpm = answer or {}, not self._is_exported
        now_s = self._clock.monotonic()
        interval_s, self._last_s = max(0.001, now_s - self._last_s), now_s

        def take() -> list[DeviceUsage]:
            seen = self._counters.take(devices, interval_s, with_gpm=with_gpm)
            return [with_counters(one, self._exported(one.device, exported)) for one in seen]

        return await self._nvml.ask(take, [])

    def _exported(self, device: str, exported: Mapping[Place, Mapping[str, float]]) -> Mapping[str, float] | None:
        place = self._counters.place_of(device)
        return exported.get(place) if place else None

    async def close(self) -> None:
        await self._nvml.ask(self._counters.close, None)
        self._nvml.close()
        self._http.close()


def open_nvml_usage(exporter: Exporter, clock: Clock) -> NvmlUsage:
    """NVML of this machine, through nvidia-ml-py."""
    import pynvml

    return NvmlUsage(pynvml, exporter, clock)
