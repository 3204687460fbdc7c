"""Whether a replica has made its first token: a real completion, asked beside the loop, since a cold engine takes its time for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from whaleflux.clock import Clock
from whaleflux_inference_router.engine_probe import EngineProbe

AGAIN_S = 1.0  # after a completion that went wrong
AT_ONCE = 64


class EngineProofs:
    """By replica and address; one question at a time of each."""

    def __init__(self, probe: EngineProbe, clock: Clock) -> None:
        self._probe, self._clock = probe, clock
        self._asked: dict[str, asyncio.Task[str]] = {}
        self._ended_s: dict[str, float] = {}
        self._asking = asyncio.Semaphore(AT_ONCE)

    def missing(self, key: str, address: str, model: str) -> str:
        """What keeps it from having answered; "" once it has. Asks where that is not known."""
        task, now_s = self._asked.get(key), self._clock.monotonic()
        if task is None:
            task = self._asked[key] = asyncio.create_task(self._ask(address, model))
        if not task.done():
            return "it makes its first token"
        wrong = task.result()
        if wrong and now_s - self._ended_s.setdefault(key, now_s) >= AGAIN_S:
            del self._asked[key], self._ended_s[key]
        return wrong

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets replicas that exist no more, and where they were before."""
        for gone in self._asked.keys() - set(keys):
            self._asked.pop(gone).cancel()
            self._ended_s.pop(gone, None)

    def again(self, key: str) -> None:
        """It is to show it once more: it is not READY for other reasons."""
        if (task := self._asked.get(key)) is not None and task.done():
            del self._asked[key]
            self._ended_s.pop(key, None)

    async def close(self) -> None:
        """Ends what is asked."""
        tasks = list(self._asked.values())
        self.keep_only(())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, address: str, model: str) -> str:
        async with self._asking:
            return await self._probe.first_token(address, model)
