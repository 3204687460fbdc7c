"""Ranks that have more of a GPU's memory than their share: no hardware stops them, so the agent looks and ends them.

Each rank of a task with shares is on a GPU of its own, so what processes with the task's token have of that GPU is the
rank's. A short peak is forgiven; whoever stays above is ended, since the next allocation of a neighbour would fail for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from whaleflux_agent.core.work import Work
from whaleflux_agent.devices.source import DevicesUnreadable, GpuMemory
from whaleflux_agent.runtime import procfs

LOOK_EVERY_S = 2.0
FORGIVEN_S = 6.0  # above its share for so long: a peak between two looks is not seen, one over three is meant

MemoryUsed = Callable[[Collection[str]], Awaitable[GpuMemory]]


class ShareWatch:
    """Of one task. `memory_used` is the driver's; times are monotonic seconds."""

    def __init__(self, work: Work, token: str, memory_used: MemoryUsed) -> None:
        self._work, self._token, self._memory_used = work, token, memory_used
        self._over_since_s: dict[str, float] = {}  # by GPU

    async def look(self, now_s: float) -> list[tuple[int, str]]:
        """Ranks that have been above their share for too long, and why they are ended; none while the driver is silent."""
        try:
            processes = await self._memory_used(self._work.gpu_uuids)
        except DevicesUnreadable:
            return []
        used = await asyncio.to_thread(self._own, processes)
        return [(rank, self._why(used[uuid])) for rank, uuid in self._ranks() if self._is_late(uuid, used[uuid], now_s)]

    def _ranks(self) -> list[tuple[int, str]]:
        return list(zip(self._work.ranks, self._work.gpu_uuids, strict=True))

    def _own(self, processes: GpuMemory) -> Mapping[str, int]:
        """Bytes of each GPU that the task's own processes have; those that show no environment are not its own."""
        used = {}
        for uuid in self._work.gpu_uuids:
            by_pid = processes.get(uuid, {})
            used[uuid] = sum(by_pid[pid] for pid in procfs.bearers(by_pid, self._token))
        return used

    def _is_late(self, uuid: str, used_bytes: int, now_s: float) -> bool:
        if used_bytes <= self._work.share_bytes:
            self._over_since_s.pop(uuid, None)
            return False
        return now_s - self._over_since_s.setdefault(uuid, now_s) >= FORGIVEN_S

    def _why(self, used_bytes: int) -> str:
        return (
            f"was ended by its agent: it used {used_bytes / 1e9:.2f} GB of GPU memory for {FORGIVEN_S:g} s, its share"
            f" (gpu.share) is {self._work.share_bytes / 1e9:.2f} GB"
        )
