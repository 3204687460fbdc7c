"""The node's folder of datasets for its event loop: one piece of work at a time, and who has to go for what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable
from typing import TypeVar

from whaleflux.data.sources import Source
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.dataset_pins import NodePins
from whaleflux_agent.dataset_reports import READY, CopyReports
from whaleflux_agent.dataset_store import Copy, DatasetStore, NoRoom
from whaleflux_agent.dataset_versions import Versions

T = TypeVar("T")


class Room:
    """`in_use` says which datasets tasks read now, `fetching` which are on their way; `open_here` opens a source as this node sees it."""

    def __init__(
        self,
        store: DatasetStore,
        pins: NodePins,
        versions: Versions,
        reports: CopyReports,
        in_use: Callable[[], frozenset[str]],
        fetching: Container[str],
        open_here: Callable[[inventory_pb2.Dataset], Source],
    ) -> None:
        self._store, self._pins, self._versions, self._reports = store, pins, versions, reports
        self._in_use, self._fetching, self._open_here = in_use, fetching, open_here
        self._one, self._opened = asyncio.Lock(), False

    async def do(self, work: Callable[..., T], *arguments: object) -> T:
        """Work on the folder, one at a time."""
        async with self._one:
            if not self._opened:
                await asyncio.to_thread(self._store.open)
                self._opened = True
            return await asyncio.to_thread(work, *arguments)

    def kept(self, dataset: str) -> bool:
        """Whether a copy stays; all do while it is not known which are pinned."""
        return self._pins.may_have(dataset) or self.busy(dataset)

    def busy(self, dataset: str) -> bool:
        """Whether a task reads it, or a fetch of it is under way."""
        return dataset in self._in_use() or dataset in self._fetching

    async def take(self, key: str, size_bytes: int, sparing: frozenset[str] = frozenset()) -> None:
        """Takes room, and tells which copies went for it: those of `sparing` only when no others will do. Raises NoRoom."""
        await self._pins.know()
        if sparing:
            try:
                return await self._taken(key, size_bytes, sparing)
            except NoRoom:
                pass
        await self._taken(key, size_bytes, frozenset())

    async def _taken(self, key: str, size_bytes: int, sparing: frozenset[str]) -> None:
        stay = set(sparing)

        def kept(dataset: str) -> bool:
            return dataset in stay or self.kept(dataset)

        while last := await self._last_ones(await self.do(self._store.leaving, key, size_bytes, kept)):
            stay |= last
        for copy in await self.do(self._store.reserve, key, size_bytes, kept):
            await self._reports.say(copy.dataset, READY)

    async def _last_ones(self, copies: Iterable[Copy]) -> set[str]:
        """Those of them that nobody could have again, as far as is known: no other node holds them, and no source gives them."""
        return {copy.dataset for copy in copies if not await self._versions.to_be_had(copy, self._open_here)}
