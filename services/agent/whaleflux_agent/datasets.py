"""The node's cache of datasets: pulled when a task needs them, given to nobody before they are whole, evicted when others need the room."""

from __future__ import annotations

import asyncio
import errno
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from whaleflux import names, telemetry
from whaleflux.data import sources
from whaleflux.data.manifest import Manifest
from whaleflux.data.sources import Source, SourceChanged, SourceFailed
from whaleflux.errors import InvalidArgument, StatusError
from whaleflux.retry import worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.core.work import Work
from whaleflux_agent.dataset_division import RankParts
from whaleflux_agent.dataset_donors import given
from whaleflux_agent.dataset_fetch import Fetch, MadeElsewhere, Unkept, running, said_of
from whaleflux_agent.dataset_parts import Parts, check_read_there, looked_at, reads_parts
from whaleflux_agent.dataset_peers import Peers, following, swarm_of
from whaleflux_agent.dataset_pins import NodePins
from whaleflux_agent.dataset_progress import Pace
from whaleflux_agent.dataset_pull import Pull, in_thread
from whaleflux_agent.dataset_reports import FAILED, PULLING, READY, CopyReports
from whaleflux_agent.dataset_room import Room
from whaleflux_agent.dataset_store import Copy, DatasetStore, Held, NoRoom, key_of, made_of
from whaleflux_agent.dataset_upkeep import Upkeep
from whaleflux_agent.dataset_versions import Versions, shareable
from whaleflux_agent.dataset_wanted import Wanted, found_out, go_on_with
from whaleflux_agent.runtime.acting import as_user
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.secret_access import Tell

_CALL_S = 10.0
_TELL_EVERY_S = 2.0
_OVER_QUOTA = "its queue holds as much data as it may"
_VERSIONS = 2  # of one dataset that a fetch tries: what it finds out, and what another node found out before
_log = telemetry.get_logger("whaleflux.agent")

Header = Callable[[Work, inventory_pb2.Dataset, Tell], Awaitable[str]]
"""What a task shows to the server of a dataset (`SecretAccess.header`)."""
OpenSource = Callable[[str, str, sources.ActAs], Source]


def _ahead_key(found: inventory_pb2.Dataset) -> str:
    """The partial copy of what its maker has, while its version is not known: nothing that this node answers for."""
    return key_of(found.name, "ahead", made_of(found))


def _key(found: inventory_pb2.Dataset) -> str:
    return key_of(found.name, found.manifest_digest, made_of(found))


class DatasetCache:
    """Versions of datasets below `root`; `in_use` says which datasets tasks read now, which are not evicted.

    `reader`: the id that may read what is copied of this node, and whose group may read the copies: whoever declares a dataset does not
    read with an agent's rights. 0: we.
    """

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        node: str,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        in_use: Callable[[], frozenset[str]],
        *,
        reader: int = 0,
        header: Header | None = None,
        pace: Pace | None = None,
        open_source: OpenSource = sources.open_source,
        address: str = "",
        peers: Peers | None = None,
    ) -> None:
        self._store, self._node, self._stub = DatasetStore(root, limit_bytes), node, stub
        self._pins = NodePins(node, stub)
        # Datasets that jobs will read which are to start here, and one such job of each.
        self.ahead: Mapping[str, str] = {}

        def needed() -> frozenset[str]:
            return in_use().union(self.ahead, self.rank_parts.fetching)

        self._needed = needed
        self._reports, self._peers = CopyReports(node, address, stub, self._stays), peers
        self._versions = Versions(stub, self._reports)
        # Those of a known version, by dataset and digest, and of which dataset of the name.
        self._pulls: dict[tuple[str, str], tuple[Pull, str]] = {}
        self._reader, self._header, self._pace, self._open_source = reader, header, pace or Pace(), open_source
        self._fetching: dict[str, Fetch] = {}
        self._waiting = Counter[str]()  # tasks, by dataset that is fetched for them
        self._lone_files: dict[str, str] = {}  # of datasets that are one file, read where it is: its path or URL
        self._for_job: dict[str, str] = {}  # by dataset that is fetched; "": for a pin
        self._room = Room(
            self._store, self._pins, self._versions, self._reports, needed, self._fetching, self._open_here
        )
        self._parts = Parts(self._store, self._room, self._reports, self._pace, self._reader)
        self.rank_parts = RankParts(
            self._store,
            self._room,
            self._reports,
            self._versions,
            stub,
            self._source_of,
            self._pace,
            self._reader,
            node,
            peers,
        )
        self.upkeep = Upkeep(
            self._store,
            self._room,
            self._pins,
            self._reports,
            stub,
            self._fetching,
            lambda dataset: self._fetch_once(dataset, None, None),
        )

    async def fetch(self, dataset: str, work: Work | None = None, tell: Tell | None = None) -> str:
        """Where the task of `work` reads `dataset` (datasets/{dataset}). Says by `tell` how far it is. Raises LaunchFailed.

        A folder, pulled if need be; its source where the node has no room for it and the job does not insist (`require_local_data`).
        """
        try:
            names.split(dataset, "datasets", field="datasets")
        except InvalidArgument as wrong:
            raise LaunchFailed(wrong.message) from None
        if work is not None and dataset in work.remote_datasets:
            return await self._where_it_is(dataset, work, tell)
        if work is not None and dataset in work.spec.datasets_by_rank:
            try:
                part = await self.rank_parts.fetch(dataset, work, tell)
            except Unkept as unkept:
                return await self._from_source(unkept, work, tell)
            if part is not None:
                await self._room.do(self._store.touch, part)
                return str(part.folder)
        while (given_up := self._fetching.get(dataset)) and given_up.progress.stop.is_set():
            await asyncio.wait({given_up.task})
        fetch = self._fetch_once(dataset, work, tell)
        self._waiting[dataset] += 1
        try:
            while not (await asyncio.wait({fetch.task}, timeout=_TELL_EVERY_S))[0]:
                if tell:
                    await tell(fetch.words(dataset))
            copy = fetch.task.result()
            if copy.part and fetch.unkept and not reads_parts(work, fetch.unkept.source):
                raise fetch.unkept
        except Unkept as unkept:
            return await self._from_source(unkept, work, tell)
        finally:
            self._waiting[dataset] -= 1
        await self._room.do(self._store.touch, copy)
        return str(copy.folder)

    def begin(self, dataset: str) -> Fetch:
        """Brings it here for nobody in particular, unless that has begun."""
        return self._fetch_once(dataset, None, None)

    async def give_up(self, dataset: str) -> None:
        """What comes for nobody stops, unless it is needed for something else; what came of it goes when its room is needed."""
        fetch = self._fetching.get(dataset)
        if fetch is None or self._waiting[dataset] > 0 or self._stays(dataset):
            return
        fetch.progress.stop.set()
        await asyncio.wait({fetch.task})
        if dataset not in self._fetching:
            await self.upkeep.tell(dataset)

    async def home_of(self, dataset: str, path: str, work: Work | None = None) -> str:
        """Where the rest is of what `fetch` gave of it, where that is a part, or the file where that is one in a folder with others; else "".

        Of one that the ranks of `work` share: the folder with the list of all of its files. Raises LaunchFailed.
        """
        if work is not None and dataset in work.spec.datasets_by_rank:
            return await self.rank_parts.listing(dataset)
        if (file := self._lone_files.get(dataset, "")).startswith(f"{path.rstrip('/')}/"):
            return file
        copies: list[Copy] = await self._room.do(self._store.copies)
        part = next((copy for copy in copies if copy.part and str(copy.folder) == path), None)
        try:
            return await self._room.do(self._store.home_of, part) if part else ""
        except OSError as error:
            raise LaunchFailed(f"where the rest of {path} is cannot be read: {error}") from None

    def _fetch_once(self, dataset: str, work: Work | None, tell: Tell | None) -> Fetch:
        """One fetch of a dataset at a time: it goes on when the task that asked for it has gone, others may wait for it."""
        known = self._fetching.get(dataset)
        if known is None:
            known = self._fetching[dataset] = Fetch()
            self._for_job[dataset] = work.job if work is not None else self.ahead.get(dataset, "")
            known.task = asyncio.create_task(self._bring(dataset, known, work, tell))
            known.task.add_done_callback(lambda done: self._fetched(dataset, done))
        return known

    def _fetched(self, dataset: str, done: asyncio.Task[Copy]) -> None:
        del self._fetching[dataset], self._for_job[dataset]
        if not done.cancelled():
            done.exception()  # whoever still waits hears of it

    async def _bring(self, dataset: str, fetch: Fetch, work: Work | None, tell: Tell | None) -> Copy:
        found = inventory_pb2.Dataset(name=dataset)
        async with said_of(dataset, self._reports, lambda: found.uri):
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
            except StatusError as failed:
                here = await self._room.do(self._store.find, dataset) if worth_repeating(failed) else None
                if here is None:
                    raise
                return here  # whole, and nobody says that it is of another time
            try:
                return await self._brought(found, fetch, work, tell)
            except Unkept as unkept:
                fetch.unkept = unkept
                if part := await self._parts.bring(unkept, work, fetch.progress):
                    return part
                raise
        raise AssertionError("unreachable")

    async def _brought(self, found: inventory_pb2.Dataset, fetch: Fetch, work: Work | None, tell: Tell | None) -> Copy:
        source: Source | None = None
        tried = 0
        while tried < _VERSIONS:
            if found.manifest_digest and (here := await self._find(found)):
                return here
            source = source or await self._source_of(found, work, tell)
            if self._versions.made_elsewhere(found):
                found = await self._wait_for_maker(found, source, fetch)
            digest, key = found.manifest_digest, _key(found)
            wanted = await self._versions.wanted(found, source)
            if digest:
                copies = await self._room.do(self._store.copies)
                fetch.given = await given(copies, found, wanted.manifest, self._stub)
                ahead, partial = self._store.partial(_ahead_key(found)), self._store.partial(_key(found))
                await self._room.do(go_on_with, ahead, partial, wanted)
            try:
                made = await self._pulled(found, wanted, source, fetch)
                tried += 1
                found = found if digest else await self._versions.record(found, made)
                if found.manifest_digest == made.digest:
                    return await self._published(found, made, key, fetch)
            except MadeElsewhere as made_elsewhere:
                found = made_elsewhere.dataset
            finally:
                self._pulls = {of: pull for of, pull in self._pulls.items() if of[0] != found.name}
        raise SourceChanged("its source was another one when another node read it")

    async def _find(self, found: inventory_pb2.Dataset) -> Copy | None:
        return await self._room.do(self._store.whole_of, found)

    async def _wait_for_maker(
        self, found: inventory_pb2.Dataset, source: Source, fetch: Fetch
    ) -> inventory_pb2.Dataset:
        """Until its manifest is known, or nobody makes it. Meanwhile comes what the maker has, if there is room."""
        key, wanted = _ahead_key(found), await in_thread(lambda: found_out(source))
        try:
            await self._room.take(key, wanted.manifest.size_bytes)
        except NoRoom:
            return await self._versions.unless_made(found, fetch.progress)
        try:
            async with swarm_of(self._peers, found) as swarm:
                if swarm is None:
                    return await self._versions.unless_made(found, fetch.progress)
                pull = Pull(
                    wanted,
                    source,
                    self._store.partial(key),
                    pace=self._pace,
                    me=self._node,
                    peer=swarm.source,
                    ahead=True,
                )
                async with following(swarm, pull), running(pull) as all_here:
                    return await self._versions.unless_made(found, fetch.progress, all_here)
        finally:
            self._store.release(key)

    async def _source_of(self, found: inventory_pb2.Dataset, work: Work | None, tell: Tell | None) -> Source:
        return await self._opened(found, await self._shown(found, work, tell))

    async def _opened(self, found: inventory_pb2.Dataset, header: str = "") -> Source:
        """Its source; drivers may take seconds to be imported."""
        return await in_thread(lambda: self._open_source(found.uri, header, self._acting))

    def _open_here(self, found: inventory_pb2.Dataset) -> Source:
        return self._open_source(found.uri, "", self._acting)

    def _acting(self) -> AbstractContextManager[None]:
        return as_user(self._reader, self._reader)

    async def _shown(self, found: inventory_pb2.Dataset, work: Work | None, tell: Tell | None) -> str:
        """The header that the dataset's server wants; "" where nobody said so."""
        if not found.HasField("credentials"):
            return ""
        if work is None or tell is None or self._header is None:
            raise LaunchFailed(f"{found.name} is fetched with a secret, which only a task can be given")
        return await self._header(work, found, tell)

    async def _pulled(self, found: inventory_pb2.Dataset, wanted: Wanted, source: Source, fetch: Fetch) -> Manifest:
        """All bytes, in the partial copy. Raises Unkept where there is no room."""
        key = _key(found)
        try:
            await self._room.take(key, wanted.manifest.size_bytes, fetch.given.datasets)
            found = await self._reports.say(found.name, PULLING, digest=found.manifest_digest) or found
            if not wanted.known and self._versions.made_elsewhere(found):
                raise MadeElsewhere(found)
            return await self._run_pull(found, wanted, source, self._store.partial(key), fetch)
        except (NoRoom, OSError) as failure:
            if isinstance(failure, OSError) and failure.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = str(failure) if isinstance(failure, NoRoom) else "the disk of its cache is full"
            _log.warning(Event.DISK_FULL, folder=str(self._store.root), reason=f"{found.name}: {why}")
            await self._reports.say(found.name, FAILED, message=why)
            raise Unkept(found, wanted, source, why) from None
        finally:
            self._store.release(key)

    async def _run_pull(
        self, found: inventory_pb2.Dataset, wanted: Wanted, source: Source, partial: Path, fetch: Fetch
    ) -> Manifest:
        """From peers first, where its version is known; else others are told that it is this node which reads it."""
        progress = fetch.progress
        if not wanted.known:
            first = Pull(wanted, source, partial, pace=self._pace, progress=progress)
            self._pulls[found.name, ""] = first, made_of(found)
            async with self._versions.making(found, progress):
                made = await in_thread(first.run)
            self._pulls[found.name, made.digest] = (
                first,
                made_of(found),
            )  # given to others from the moment that they can know of it
            return made
        job = self._for_job.get(found.name, "")
        given = shareable(found) or self._pins.has(found.name) or (bool(job) and not found.HasField("credentials"))
        async with swarm_of(self._peers if given else None, found, job) as swarm:
            pull = Pull(
                wanted,
                source,
                partial,
                pace=self._pace,
                progress=progress,
                me=self._node,
                peer=swarm.source if swarm else None,
                here=fetch.given.places,
            )
            self._pulls[found.name, wanted.manifest.digest] = pull, made_of(found)
            if swarm is None:
                return await in_thread(pull.run)
            pull.seen(*await swarm.look())
            async with following(swarm, pull):
                return await in_thread(pull.run)

    def held(self, dataset: str, digest: str) -> Held | None:
        """What is here of a version, each chunk compared: all of a whole copy, or the part that a pull has."""
        if copy := self._store.known(dataset, digest):
            have = (1 << copy.manifest.chunk_count) - 1
            return Held(copy.manifest, copy.folder, have, settled=True, made=copy.made)
        if (dataset, digest) not in self._pulls:
            return None
        pull, made = self._pulls[dataset, digest]
        return Held(pull.manifest, pull.files, pull.pieces, settled=False, coming=pull.coming, made=made)

    def _stays(self, dataset: str) -> bool:
        """Whether a whole copy is held because it is needed."""
        return self._pins.has(dataset) or dataset in self._needed()

    async def _published(self, found: inventory_pb2.Dataset, made: Manifest, key: str, fetch: Fetch) -> Copy:
        progress, partial, cost = fetch.progress, self._store.partial(key), max(fetch.progress.cost, fetch.given.cost)
        publish = functools.partial(self._store.publish, made=made_of(found))
        copy = await self._room.do(publish, found.name, made, partial, self._reader, cost)
        _log.info(
            Event.DATASET_CACHED,
            dataset=found.name,
            bytes=made.size_bytes,
            pulled=progress.pulled_bytes,
            peers=progress.peer_bytes,
            copied=progress.copied_bytes,
        )
        for node, why in progress.liars.items():
            _log.warning(Event.DATASET_PEER_WRONG, dataset=found.name, node=node, reason=why)
        told = "; ".join(f"{node} gave wrong bytes: {why}" for node, why in progress.liars.items())
        await self._reports.say(found.name, READY, made.size_bytes, made.digest, message=told)
        return copy

    async def _where_it_is(self, dataset: str, work: Work, tell: Tell | None) -> str:
        """A copy that is here for others, or its source: nothing is pulled for a task whose queue holds as much data as it may."""
        try:
            found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
            if found.manifest_digest and (here := await self._find(found)):
                return str(here.folder)
            check_read_there(found, _OVER_QUOTA, work)
            source = await self._opened(found)
            await in_thread(lambda: looked_at(source))
        except (StatusError, SourceFailed, OSError) as failed:
            raise LaunchFailed(f"{dataset}: {failed}") from None
        return await self._read_there(found, source, _OVER_QUOTA, work, tell)

    async def _from_source(self, unkept: Unkept, work: Work | None, tell: Tell | None) -> str:
        """Where its original is, for a job that does not insist on a copy."""
        return await self._read_there(unkept.dataset, unkept.source, str(unkept), work, tell)

    async def _read_there(
        self, found: inventory_pb2.Dataset, source: Source, why: str, work: Work | None, tell: Tell | None
    ) -> str:
        check_read_there(found, why, work)
        if tell:
            await tell(f"{found.name}, which is read where it is: {why}")
        self._lone_files[found.name] = source.lone_file()
        return source.home()

    async def close(self) -> None:
        """The agent stops: what is on its way is gone on with by the next one."""
        await self.rank_parts.close()
        for fetch in list(self._fetching.values()):
            fetch.progress.stop.set()
            await asyncio.wait({fetch.task}, timeout=_CALL_S)
