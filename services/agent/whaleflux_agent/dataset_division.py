"""Datasets that the ranks of a job divide among themselves (`whaleflux.data.division`): this node pulls the files of its own ranks alone.

Of each version there is one folder with all files that ranks here have read: those of another division come to those that are there, and only what
is missing is pulled, from neighbours that have the whole version first. It is a part: nobody takes it for the whole, no neighbour is given of it, and it
goes as one when its room is needed.
"""

from __future__ import annotations

import asyncio
import errno
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from whaleflux.data.division import part_of
from whaleflux.data.manifest import Manifest, chunks_of
from whaleflux.data.sources import Source
from whaleflux.quantities import shown_bytes
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.core.work import Work
from whaleflux_agent.dataset_donors import given
from whaleflux_agent.dataset_fetch import Fetch, Unkept, said_of
from whaleflux_agent.dataset_peers import Peers, Swarm, following, swarm_of
from whaleflux_agent.dataset_progress import Pace
from whaleflux_agent.dataset_pull import Pull, in_thread
from whaleflux_agent.dataset_reports import FAILED, PARTIAL, CopyReports
from whaleflux_agent.dataset_room import Room
from whaleflux_agent.dataset_store import Copy, DatasetStore, NoRoom, ranks_key
from whaleflux_agent.dataset_versions import Versions
from whaleflux_agent.secret_access import Tell

_CALL_S, _TELL_EVERY_S = 10.0, 2.0

Opened = Callable[[inventory_pb2.Dataset, Work | None, Tell | None], Awaitable[Source]]
"""The source of a dataset, with what its server is shown for the task."""


Span = tuple[int, int, int]
"""A run of chunks: where it begins in the whole and in the part, and how many they are."""


def spans(whole: Manifest, part: Manifest) -> list[Span]:
    """Where the chunks of a part are among those of the whole."""
    starts, at, found = dict[str, int](), 0, list[Span]()
    for file in whole.files:
        starts[file.path] = at
        at += chunks_of(file.size_bytes, whole.chunk_bytes)
    at = 0
    for file in part.files:
        start, count = starts[file.path], chunks_of(file.size_bytes, part.chunk_bytes)
        if found and found[-1][0] + found[-1][2] == start:
            found[-1] = found[-1][0], found[-1][1], found[-1][2] + count
        else:
            found.append((start, at, count))
        at += count
    return found


class OfPart:
    """Tells the pull of a part what neighbours have of the whole. They share nothing out with it: each has other files to bring."""

    def __init__(self, pull: Pull, where: Sequence[Span]) -> None:
        self._pull, self._where = pull, where

    def seen(self, pieces: Mapping[str, int], fellows: frozenset[str], coming: int = 0) -> None:
        theirs = {node: self._of(bits) for node, bits in pieces.items()}
        self._pull.seen({node: bits for node, bits in theirs.items() if bits}, frozenset(), self._of(coming))

    def _of(self, bits: int) -> int:
        return sum((bits >> start & (1 << count) - 1) << at for start, at, count in self._where)


class RankParts:
    """Brings them. `fetching`: datasets of which one is on its way."""

    def __init__(
        self,
        store: DatasetStore,
        room: Room,
        reports: CopyReports,
        versions: Versions,
        inventory: inventory_pb2_grpc.InventoryServiceStub,
        opened: Opened,
        pace: Pace,
        reader: int,
        node: str,
        peers: Peers | None,
    ) -> None:
        self._node, self._peers = node, peers
        self._store, self._room, self._reports, self._versions = store, room, reports, versions
        self._inventory, self._opened, self._pace, self._reader = inventory, opened, pace, reader
        self._one = defaultdict[str, asyncio.Lock](asyncio.Lock)
        self.fetches: dict[asyncio.Task[Copy | None], tuple[str, Fetch]] = {}

    @property
    def fetching(self) -> set[str]:
        return {dataset for dataset, _ in self.fetches.values()}

    async def fetch(self, dataset: str, work: Work, tell: Tell | None) -> Copy | None:
        """What has the files of the ranks here, be it a whole copy; None while its version is not known. Raises LaunchFailed, Unkept."""
        fetch = Fetch()
        bringing = asyncio.create_task(self._bring(dataset, work, tell, fetch))
        self.fetches[bringing] = dataset, fetch
        bringing.add_done_callback(self._ended)
        try:
            while not (await asyncio.wait({bringing}, timeout=_TELL_EVERY_S))[0]:
                if tell:
                    await tell(fetch.words(dataset))
            return bringing.result()
        finally:
            fetch.progress.stop.set()  # nobody else waits for it; what came of it is gone on with

    def _ended(self, task: asyncio.Task[Copy | None]) -> None:
        del self.fetches[task]
        if not task.cancelled():
            task.exception()  # whoever still waits hears of it

    async def listing(self, dataset: str) -> str:
        """The folder with the list of all its files; "" while its version is not known. Raises LaunchFailed."""
        async with said_of(dataset, self._reports):
            found = await self._found(dataset)
            if not found.manifest_digest:
                return ""
            key = ranks_key(found)
            if there := await self._room.do(self._store.listing, key, None, self._reader):
                return there
            paths = [file.path for file in (await self._versions.manifest(found)).files]
            return await self._room.do(self._store.listing, key, paths, self._reader)
        raise AssertionError("unreachable")

    async def _found(self, dataset: str) -> inventory_pb2.Dataset:
        request = inventory_pb2.GetDatasetRequest(name=dataset)
        found: inventory_pb2.Dataset = await self._inventory.GetDataset(request, timeout=_CALL_S)
        return found

    async def _bring(self, dataset: str, work: Work, tell: Tell | None, fetch: Fetch) -> Copy | None:
        found = inventory_pb2.Dataset(name=dataset)
        async with self._one[dataset], said_of(dataset, self._reports, lambda: found.uri):
            found = await self._found(dataset)
            if not found.manifest_digest:
                return None
            digest, key = found.manifest_digest, ranks_key(found)
            if whole := await self._room.do(self._store.whole_of, found):
                return whole
            files = (await self._versions.manifest(found)).files
            mine = {file.path for rank in work.ranks for file in part_of(files, rank, work.world_size)}
            here = await self._room.do(self._store.of_ranks, key)
            missing = mine - {file.path for file in here.manifest.files} if here else mine
            if here is None or missing:
                here = await self._pulled(found, frozenset(missing), work, tell, fetch)
            said = f"{shown_bytes(here.size_bytes)} of {shown_bytes(found.size_bytes)}: files of ranks that ran here"
            await self._reports.say(dataset, PARTIAL, here.size_bytes, digest, said)
            return here
        raise AssertionError("unreachable")

    async def _pulled(
        self, found: inventory_pb2.Dataset, missing: frozenset[str], work: Work, tell: Tell | None, fetch: Fetch
    ) -> Copy:
        """The folder with these files as well. Raises Unkept where there is no room for them."""
        source, key = await self._opened(found, work, tell), ranks_key(found)
        whole = await self._versions.wanted(found, source)
        wanted, partial = whole.only(missing), self._store.partial(key)
        copies = await self._room.do(self._store.copies)
        fetch.given = await given(copies, found, wanted.manifest, self._inventory)
        neighbours = None if found.HasField("credentials") else self._peers
        try:
            await self._room.take(key, wanted.manifest.size_bytes, fetch.given.datasets)
            async with swarm_of(neighbours, found, work.job) as swarm:
                pull = Pull(
                    wanted,
                    source,
                    partial,
                    pace=self._pace,
                    progress=fetch.progress,
                    me=self._node,
                    peer=swarm.source if swarm else None,
                    here=fetch.given.places,
                )
                made = await self._run(pull, swarm, whole.manifest) if missing else wanted.manifest
            cost = max(fetch.progress.cost, fetch.given.cost)
            return await self._room.do(self._store.add_for_ranks, key, found.name, made, partial, self._reader, cost)
        except (NoRoom, OSError) as failure:
            if isinstance(failure, OSError) and failure.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = str(failure) if isinstance(failure, NoRoom) else "the disk of its cache is full"
            await self._reports.say(found.name, FAILED, message=why)
            raise Unkept(found, wanted, source, why) from None
        finally:
            self._store.release(key)

    @staticmethod
    async def _run(pull: Pull, swarm: Swarm | None, whole: Manifest) -> Manifest:
        """Neighbours speak of the chunks of the whole."""
        if swarm is None:
            return await in_thread(pull.run)
        of_part = OfPart(pull, spans(whole, pull.manifest))
        of_part.seen(*await swarm.look())
        async with following(swarm, of_part):
            return await in_thread(pull.run)

    async def close(self) -> None:
        """The agent stops."""
        for task, (_, fetch) in list(self.fetches.items()):
            fetch.progress.stop.set()
            await asyncio.wait({task}, timeout=_CALL_S)
