"""What a dataset consists of: asked of inventory, or found out by one node of the site while the others wait for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from whaleflux import names
from whaleflux.data import manifest
from whaleflux.data.manifest import Manifest, ManifestWrong
from whaleflux.data.sources import Source, SourceFailed, SourceReplaced
from whaleflux.errors import NotFound, StatusError
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.dataset_peers import READY, peers_of
from whaleflux_agent.dataset_progress import Progress
from whaleflux_agent.dataset_pull import in_thread
from whaleflux_agent.dataset_reports import PULLING, CopyReports
from whaleflux_agent.dataset_store import Copy, made_of
from whaleflux_agent.dataset_wanted import Wanted, found_out

SAY_EVERY_S = 10.0  # by who makes a manifest
LOOK_EVERY_S = 2.0  # by who waits for one
SOON_S = 0.25  # when all that it read is here
SILENT_S = 45.0  # of a maker: then another one makes it
STUCK_S = 120.0  # of a pull, which says no more then that it makes it
_CALL_S = 10.0


def shareable(found: inventory_pb2.Dataset) -> bool:
    """Whether nodes give each other pieces of it without being asked who may have them."""
    return not found.members and not found.HasField("credentials")


async def _pause(all_here: asyncio.Event | None) -> None:
    """Between two looks at whether there is a manifest."""
    if all_here is None:
        await asyncio.sleep(LOOK_EVERY_S * (0.5 + random.random()))
    elif all_here.is_set():
        await asyncio.sleep(SOON_S)
    else:
        with suppress(TimeoutError):
            await asyncio.wait_for(all_here.wait(), LOOK_EVERY_S * (0.5 + random.random()))


def _is_whole(copy: inventory_pb2.DatasetCopy, found: inventory_pb2.Dataset) -> bool:
    return copy.state in READY and bool(copy.present_bytes) and copy.manifest_digest == found.manifest_digest


class Versions:
    """Of datasets, as this node needs them."""

    def __init__(self, inventory: inventory_pb2_grpc.InventoryServiceStub, reports: CopyReports) -> None:
        self._inventory, self._reports = inventory, reports

    async def wanted(self, found: inventory_pb2.Dataset, source: Source) -> Wanted:
        """What is to be pulled: as the manifest says, else as the source has it now. Raises SourceFailed, ManifestWrong, StatusError.

        A source that does not answer is not asked where nodes of the site hold all of it.
        """
        if not found.manifest_digest:
            return await in_thread(lambda: found_out(source))
        known = await self.manifest(found)
        try:
            there = await in_thread(lambda: found_out(source))
        except (SourceFailed, OSError):
            if not (shareable(found) and peers_of(found, self._reports.node)[0]):
                raise
            return Wanted(known)
        sizes = {file.path: file.size_bytes for file in there.manifest.files}
        if any(sizes.get(file.path) != file.size_bytes for file in known.files):
            raise SourceReplaced("it is not what it was")
        return Wanted(known, there.found)

    async def manifest(self, found: inventory_pb2.Dataset) -> Manifest:
        """What it consists of, where that is known. Raises SourceFailed, ManifestWrong, StatusError."""
        request = inventory_pb2.GetDatasetManifestRequest(name=found.name)
        known = manifest.from_proto(await self._inventory.GetDatasetManifest(request, timeout=_CALL_S))
        if known.digest != found.manifest_digest:
            raise SourceFailed("inventory has another manifest than it says; see: whaleflux datasets show")
        return known

    async def record(self, found: inventory_pb2.Dataset, made: Manifest) -> inventory_pb2.Dataset:
        """The dataset with the manifest that counts, which may be another node's."""
        request = inventory_pb2.SetDatasetManifestRequest(
            dataset=found.name, node=self._reports.node, manifest=made.to_proto()
        )
        if found.HasField("create_time"):
            request.dataset_create_time.CopyFrom(found.create_time)
        known: inventory_pb2.Dataset = await self._inventory.SetDatasetManifest(request, timeout=_CALL_S)
        return known

    async def unless_made(
        self, found: inventory_pb2.Dataset, progress: Progress, all_here: asyncio.Event | None = None
    ) -> inventory_pb2.Dataset:
        """Returns when its manifest is known, or no other node of the site makes it: what one node reads the others get from it.

        `all_here`: set when all that the maker read is here too, so that its manifest is about to be known. One that nodes do not give
        each other is read by each. Raises Stopped.
        """
        loop = asyncio.get_running_loop()
        heard, heard_s = inventory_pb2.DatasetMaker(), loop.time()
        while self.made_elsewhere(found):
            if (maker := self._maker(found)) != heard:
                heard, heard_s = maker, loop.time()
            if loop.time() - heard_s > SILENT_S:
                break
            progress.waits_for = maker.node
            await _pause(all_here)
            progress.check()
            with suppress(StatusError):
                request = inventory_pb2.GetDatasetRequest(name=found.name)
                found = await self._inventory.GetDataset(request, timeout=_CALL_S)
        progress.waits_for = ""
        return found

    async def to_be_had(self, copy: Copy, open_source: Callable[[inventory_pb2.Dataset], Source]) -> bool:
        """Whether this version could be had again if this copy went; what is not known is no."""
        request = inventory_pb2.GetDatasetRequest(name=copy.dataset)
        try:
            found = await self._inventory.GetDataset(request, timeout=_CALL_S)
        except StatusError as failed:
            return isinstance(failed, NotFound)  # forgotten
        same = (found.manifest_digest, made_of(found)) == (copy.manifest.digest, copy.made)
        if not same or found.HasField("credentials"):
            return True  # of an earlier dataset of the name; or only a task could ask
        if any(other.node != self._reports.node and _is_whole(other, found) for other in found.copies):
            return True
        try:
            there = await in_thread(lambda: found_out(open_source(found)))
        except (SourceFailed, ManifestWrong, OSError):
            return False
        return [(f.path, f.size_bytes) for f in there.manifest.files] == [
            (f.path, f.size_bytes) for f in copy.manifest.files
        ]

    def made_elsewhere(self, found: inventory_pb2.Dataset) -> bool:
        """Whether another node of the site is the one that reads it first."""
        if found.manifest_digest or not shareable(found):
            return False
        return self._maker(found).node not in ("", self._reports.node)

    def _maker(self, found: inventory_pb2.Dataset) -> inventory_pb2.DatasetMaker:
        """Of this node's site; an empty one: nobody."""
        site = names.top(self._reports.node)
        near = (maker for maker in found.makers if names.top(maker.node) == site)
        return next(near, inventory_pb2.DatasetMaker())

    @asynccontextmanager
    async def making(self, found: inventory_pb2.Dataset, progress: Progress) -> AsyncIterator[None]:
        """While this node reads it first: says so again and again, as long as it gets on."""
        saying = asyncio.create_task(self._say(found.name, progress))
        try:
            yield
        finally:
            saying.cancel()

    async def _say(self, dataset: str, progress: Progress) -> None:
        loop, done = asyncio.get_running_loop(), -1
        moved_s = loop.time()
        while True:
            await asyncio.sleep(SAY_EVERY_S)
            if progress.pulled_bytes != done:
                done, moved_s = progress.pulled_bytes, loop.time()
            if loop.time() - moved_s < STUCK_S:
                await self._reports.say(dataset, PULLING)
