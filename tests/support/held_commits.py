"""A store that is busy for as long as a test wants: what comes meanwhile waits."""

from __future__ import annotations

import asyncio


class HeldCommits:
    """Holds back what `store` is asked to write, and with it all that wait behind it, until `release`."""

    def __init__(self, store):
        self._commit, self._open = store.commit, asyncio.Event()
        self.waiting = 0
        store.commit = self._slow

    async def _slow(self, *writes, when=()):
        self.waiting += 1
        await self._open.wait()
        return await self._commit(*writes, when=when)

    def release(self):
        self._open.set()
