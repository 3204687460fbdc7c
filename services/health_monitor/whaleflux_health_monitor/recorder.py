"""Writes down what the leader decides, in order, fenced by its leadership."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.clock import Clock
from whaleflux.errors import Unavailable
from whaleflux.retry import Backoff
from whaleflux.store.api import Held, Leadership, Store, Write

AT_ONCE = 60  # writes of one transaction
RETRY = Backoff()


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    writes: tuple[Write, ...]
    done: asyncio.Future[None]


class Recorder:
    """One writer per leadership. The backlog lasts as long as the leadership, which ends soon after the store does."""

    def __init__(self, store: Store, leader: Leadership, clock: Clock) -> None:
        self._store, self._leader, self._clock = store, leader, clock
        self._backlog: deque[_Waiting] = deque()
        self._some = asyncio.Event()

    def submit(self, writes: Sequence[Write]) -> asyncio.Future[None]:
        """Commits these together, after everything submitted before; the future is done when they are in effect."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not writes:
            done.set_result(None)
            return done
        self._backlog.append(_Waiting(tuple(writes), done))
        self._some.set()
        return done

    async def run(self) -> None:
        """Until cancelled, or Fenced. Puts under one leadership may be repeated, so an unanswered commit is."""
        try:
            while True:
                await self._some.wait()
                self._some.clear()
                while self._backlog:
                    batch = self._take()
                    await self._commit(batch)
        finally:
            for waiting in self._backlog:
                waiting.done.cancel()

    def _take(self) -> list[_Waiting]:
        """The next submissions that fit into one transaction and write no key twice: each change stays visible."""
        batch, keys, count = [self._backlog.popleft()], set[str](), 0
        keys.update(write.key for write in batch[0].writes)
        count = len(batch[0].writes)
        while self._backlog and count + len(self._backlog[0].writes) <= AT_ONCE:
            following = {write.key for write in self._backlog[0].writes}
            if following & keys:
                break
            keys |= following
            count += len(following)
            batch.append(self._backlog.popleft())
        return batch

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        writes = [write for waiting in batch for write in waiting.writes]
        failures = 0
        try:
            while True:
                try:
                    await self._store.commit(*writes, when=[Held(self._leader)])
                    break
                except Unavailable:
                    failures += 1
                    await self._clock.sleep(RETRY.pause_s(failures))
        except BaseException:
            for waiting in batch:
                waiting.done.cancel()
            raise
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_result(None)
