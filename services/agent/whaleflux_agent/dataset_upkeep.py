"""What a node does for its copies of datasets while no task waits for one: pins, what is forgotten, and what somebody wrote to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from whaleflux.errors import NotFound, StatusError
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.dataset_pins import NodePins
from whaleflux_agent.dataset_reports import PARTIAL, READY, CopyReports
from whaleflux_agent.dataset_room import Room
from whaleflux_agent.dataset_store import RANKS, Copy, DatasetStore, made_of, ranks_key

_CALL_S = 10.0
_PIN_AGAIN_S = 60.0


class Upkeep:
    """`fetch` begins to pull a dataset, `fetching` says which are on their way."""

    def __init__(
        self,
        store: DatasetStore,
        room: Room,
        pins: NodePins,
        reports: CopyReports,
        inventory: inventory_pb2_grpc.InventoryServiceStub,
        fetching: Container[str],
        fetch: Callable[[str], object],
    ) -> None:
        self._store, self._room, self._pins, self._reports, self._inventory = store, room, pins, reports, inventory
        self._fetching, self._fetch = fetching, fetch
        self._told = frozenset[str]()  # pinned ones that inventory has heard of from here
        self._not_before_s: dict[str, float] = {}  # when a pin that failed is tried again

    async def follow_pins(self) -> None:
        """Asks which datasets this node is to hold, and begins to pull what is missing; what failed is tried again in a minute."""
        before = self._told
        if (wanted := await self._pins.ask()) is None:
            return
        self._told = frozenset(wanted)
        self._not_before_s = {name: at_s for name, at_s in self._not_before_s.items() if name in wanted}
        now_s = asyncio.get_running_loop().time()
        for name, found in wanted.items():
            if name in self._fetching or self._not_before_s.get(name, now_s) > now_s:
                continue
            copy = await self._holding(name, found.manifest_digest, made_of(found)) if found.manifest_digest else None
            if copy is None and not found.HasField("credentials"):  # a secret is given for a task only
                self._not_before_s[name] = now_s + _PIN_AGAIN_S
                self._fetch(name)
            elif copy and name not in before:
                await self._report(copy)
        for name in before - self._told:
            if copy := await self._holding(name):
                await self._report(copy)

    async def _holding(self, dataset: str, digest: str = "", made: str = "") -> Copy | None:
        return await self._room.do(self._store.holding, dataset, digest, made)

    async def tell(self, dataset: str) -> None:
        """What is here of it, be it nothing."""
        copies = [copy for copy in await self._room.do(self._store.copies) if copy.dataset == dataset]
        if copies:
            await self._report(min(copies, key=lambda copy: copy.part))
        else:
            await self._reports.say(dataset, READY)

    async def _report(self, copy: Copy) -> None:
        if copy.part:
            await self._reports.say(copy.dataset, PARTIAL, copy.size_bytes)
        else:
            await self._reports.say(copy.dataset, READY, copy.size_bytes, copy.manifest.digest)

    async def tidy(self) -> None:
        """Tells what is here (an agent may have died before it could), and removes what is forgotten, or of an earlier dataset of the name."""
        await self._pins.know()
        for copy in await self._room.do(self._store.copies):
            request = inventory_pb2.GetDatasetRequest(name=copy.dataset)
            try:
                found = await self._inventory.GetDataset(request, timeout=_CALL_S)
            except NotFound:
                await self._remove(copy)
                continue
            except StatusError:
                return  # not now
            if copy.folder.name.endswith(RANKS) and copy.folder.name != ranks_key(found):
                await self._remove(copy)
            elif copy.part:
                await self._report(copy)
            elif (found.manifest_digest, made_of(found)) != (copy.manifest.digest, copy.made):
                await self._remove(copy)
            elif await self._as_left(copy):
                await self._report(copy)

    async def _as_left(self, copy: Copy) -> bool:
        """Whether nobody wrote to it; one that somebody did is taken out, and that is told. What a task reads is left to it."""
        if self._room.busy(copy.dataset):
            return True
        try:
            if await self._room.do(self._store.find, copy.dataset, copy.manifest.digest, copy.made):
                return True
        except OSError:
            return False  # not known: nothing is told
        await self._reports.say(copy.dataset, READY)
        return False

    async def _remove(self, copy: Copy) -> None:
        if not self._room.kept(copy.dataset):
            await self._room.do(self._store.remove, copy)
