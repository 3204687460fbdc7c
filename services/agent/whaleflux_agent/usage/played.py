"""Counters of a machine that is played: what its profile says its GPUs do while work has them. Labelled simulated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from whaleflux.clock import Clock
from whaleflux.fleet.activity import Spell, busy_share, mean_share
from whaleflux_agent.core import usage
from whaleflux_agent.core.usage import DeviceUsage


class PlayedUsage:
    """`scripts`: what each device (UUID) does; of one without a script nothing is known."""

    def __init__(self, scripts: Mapping[str, Sequence[Spell]], clock: Clock) -> None:
        self._scripts, self._clock = scripts, clock
        self._last_s = clock.monotonic()
        self._since_s: dict[str, float] = {}  # when work got each device

    async def tick(self) -> None:
        """Nothing is there that changes between."""

    async def sample(self, devices: Sequence[str], held: Collection[str]) -> list[DeviceUsage]:
        start_s, end_s = self._last_s, self._clock.monotonic()
        self._last_s = end_s
        self._since_s = {uuid: self._since_s.get(uuid, start_s) for uuid in devices if uuid in held}
        return [self._played(uuid, self._scripts.get(uuid, ()), start_s, end_s) for uuid in devices]

    def _played(self, uuid: str, script: Sequence[Spell], start_s: float, end_s: float) -> DeviceUsage:
        if not script:
            return DeviceUsage(uuid, "simulated")
        since_s = self._since_s.get(uuid)
        tensor = busy = 0.0
        if since_s is not None:
            tensor, busy = (share(script, start_s - since_s, end_s - since_s) for share in (mean_share, busy_share))
        return DeviceUsage(
            uuid,
            "simulated",
            tensor_ppm=usage.ppm(tensor),
            sm_active_ppm=usage.ppm(busy),
            busy_ppm=usage.ppm(busy),
            clock_ppm=usage.PPM,
            idle_power=busy == 0,
        )

    async def close(self) -> None:
        """Nothing is held."""
