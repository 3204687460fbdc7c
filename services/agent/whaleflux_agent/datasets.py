"""The node's cache of datasets: pulled when a task needs them, given to nobody before they are whole, evicted when others need the room."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from whaleflux import names, telemetry
from whaleflux.data import sources
from whaleflux.data.manifest import Manifest, ManifestWrong
from whaleflux.data.sources import Source, SourceChanged, SourceFailed
from whaleflux.errors import InvalidArgument, NotFound, StatusError
from whaleflux.retry import worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent import dataset_pull
from whaleflux_agent.core.work import Work
from whaleflux_agent.dataset_fetch import Fetch, MadeElsewhere, Unkept, running
from whaleflux_agent.dataset_parts import Parts, reads_parts
from whaleflux_agent.dataset_peers import Peers, following, swarm_of
from whaleflux_agent.dataset_pins import NodePins
from whaleflux_agent.dataset_pull import Pace, Progress, Pull, Wanted
from whaleflux_agent.dataset_reports import FAILED, PARTIAL, PULLING, READY, CopyReports
from whaleflux_agent.dataset_store import Copy, DatasetStore, Held, NoRoom, key_of
from whaleflux_agent.dataset_versions import Versions, shareable
from whaleflux_agent.runtime.acting import as_user
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.secret_access import Tell

T = TypeVar("T")
_CALL_S = 10.0
_TELL_EVERY_S = 2.0
_PIN_AGAIN_S = 60.0
_VERSIONS = 2  # of one dataset that a fetch tries: what it finds out, and what another node found out before
_log = telemetry.get_logger("whaleflux.agent")

Header = Callable[[Work, inventory_pb2.Dataset, Tell], Awaitable[str]]
"""What a task shows to the server of a dataset (`SecretAccess.header`)."""
OpenSource = Callable[[str, str, sources.ActAs], Source]


def _ahead_key(found: inventory_pb2.Dataset) -> str:
    """The partial copy of what its maker has, while its version is not known: nothing that this node answers for."""
    return f"{names.last(found.name)}@ahead"


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
        self._store, self._node, self._stub, self._in_use = DatasetStore(root, limit_bytes), node, stub, in_use
        self._reports, self._peers = CopyReports(node, address, stub, self._stays), peers
        self._versions = Versions(stub, self._reports)
        self._pulls: dict[tuple[str, str], Pull] = {}  # those of a known version, by dataset and digest
        self._reader, self._header, self._pace, self._open_source = reader, header, pace or Pace(), open_source
        self._fetching: dict[str, Fetch] = {}
        self._pins = NodePins(node, stub)
        self._told_pins = frozenset[str]()  # those that inventory has heard of from here
        self._not_before_s: dict[str, float] = {}  # when a pin that failed is tried again
        self._storing, self._opened = asyncio.Lock(), False
        self._parts = Parts(
            self._store, self._in_store, self._reserved, self._kept, self._reports, self._pace, self._reader
        )

    async def fetch(self, dataset: str, work: Work | None = None, tell: Tell | None = None) -> str:
        """Where the task of `work` reads `dataset` (datasets/{dataset}). Says by `tell` how far it is. Raises LaunchFailed.

        A folder, pulled if need be; its source where the node has no room for it and the job does not insist (`require_local_data`).
        """
        try:
            names.split(dataset, "datasets", field="datasets")
        except InvalidArgument as wrong:
            raise LaunchFailed(wrong.message) from None
        fetch = self._fetch_once(dataset, work, tell)
        try:
            while not (await asyncio.wait({fetch.task}, timeout=_TELL_EVERY_S))[0]:
                if tell:
                    await tell(fetch.words(dataset))
            copy = fetch.task.result()
            if copy.part and fetch.unkept and not reads_parts(work):
                raise fetch.unkept
        except Unkept as unkept:
            return await self._from_source(unkept, work, tell)
        await self._in_store(self._store.touch, copy)
        return str(copy.folder)

    def _fetch_once(self, dataset: str, work: Work | None, tell: Tell | None) -> Fetch:
        """One fetch of a dataset at a time: it goes on when the task that asked for it has gone, others may wait for it."""
        known = self._fetching.get(dataset)
        if known is None:
            known = self._fetching[dataset] = Fetch()
            known.task = asyncio.create_task(self._bring(dataset, known, work, tell))
            known.task.add_done_callback(lambda done: self._fetched(dataset, done))
        return known

    def _fetched(self, dataset: str, done: asyncio.Task[Copy]) -> None:
        del self._fetching[dataset]
        if not done.cancelled():
            done.exception()  # whoever still waits hears of it

    async def _bring(self, dataset: str, fetch: Fetch, work: Work | None, tell: Tell | None) -> Copy:
        found = inventory_pb2.Dataset(name=dataset)
        try:
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
            except StatusError as failed:
                here = await self._in_store(self._store.find, dataset) if worth_repeating(failed) else None
                if here is None:
                    raise
                return here  # whole, and nobody says that it is of another time
            try:
                return await self._brought(found, fetch, work, tell)
            except Unkept as unkept:
                fetch.unkept = unkept
                if work is not None and (part := await self._parts.bring(unkept, fetch.progress)):
                    return part
                raise
        except (SourceFailed, ManifestWrong, OSError) as failure:
            await self._reports.say(dataset, FAILED, message=str(failure))
            raise LaunchFailed(f"{dataset}: cannot fetch {found.uri or 'it'}: {failure}") from None
        except StatusError as failed:
            raise LaunchFailed(f"{dataset}: {failed.message}") from None
        except dataset_pull.Stopped:
            raise LaunchFailed(f"{dataset}: the agent stops") from None

    async def _brought(self, found: inventory_pb2.Dataset, fetch: Fetch, work: Work | None, tell: Tell | None) -> Copy:
        source: Source | None = None
        tried = 0
        while tried < _VERSIONS:
            if found.manifest_digest and (here := await self._find(found)):
                return here
            source = source or self._open_source(found.uri, await self._shown(found, work, tell), self._acting)
            if self._versions.made_elsewhere(found):
                found = await self._wait_for_maker(found, source, fetch)
            digest = found.manifest_digest
            wanted = await self._versions.wanted(found, source)
            if digest:
                ahead, partial = self._store.partial(_ahead_key(found)), self._store.partial(key_of(found.name, digest))
                await self._in_store(dataset_pull.go_on_with, ahead, partial, wanted)
            try:
                made = await self._pulled(found, wanted, source, fetch)
                tried += 1
                found = found if digest else await self._versions.record(found, made)
                if found.manifest_digest == made.digest:
                    return await self._published(found, made, key_of(found.name, digest), fetch.progress)
            except MadeElsewhere as made_elsewhere:
                found = made_elsewhere.dataset
            finally:
                self._pulls = {of: pull for of, pull in self._pulls.items() if of[0] != found.name}
        raise SourceChanged("its source was another one when another node read it")

    async def _find(self, found: inventory_pb2.Dataset) -> Copy | None:
        return await self._in_store(self._store.find, found.name, found.manifest_digest)

    async def _wait_for_maker(
        self, found: inventory_pb2.Dataset, source: Source, fetch: Fetch
    ) -> inventory_pb2.Dataset:
        """Until its manifest is known, or nobody makes it. Meanwhile comes what the maker has, if there is room."""
        key, wanted = _ahead_key(found), await dataset_pull.in_thread(lambda: dataset_pull.found_out(source))
        try:
            await self._reserved(key, wanted)
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
                async with following(swarm, pull), running(pull):
                    return await self._versions.unless_made(found, fetch.progress)
        finally:
            self._store.release(key)

    async def _reserved(self, key: str, wanted: Wanted) -> None:
        """Takes its room, and tells which copies went for it. Raises NoRoom."""
        await self._pins.know()
        size, stay = wanted.manifest.size_bytes, set[str]()

        def kept(dataset: str) -> bool:
            return dataset in stay or self._kept(dataset)

        while last := await self._last_ones(await self._in_store(self._store.leaving, key, size, kept)):
            stay |= last
        for copy in await self._in_store(self._store.reserve, key, size, kept):
            await self._reports.say(copy.dataset, READY)

    async def _last_ones(self, copies: Iterable[Copy]) -> set[str]:
        """Those of them that nobody could have again, as far as is known: no other node holds them, and no source gives them."""
        return {copy.dataset for copy in copies if not await self._versions.to_be_had(copy, self._open_here)}

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
        key = key_of(found.name, found.manifest_digest)
        try:
            await self._reserved(key, wanted)
            found = await self._reports.say(found.name, PULLING, digest=found.manifest_digest) or found
            if not wanted.known and self._versions.made_elsewhere(found):
                raise MadeElsewhere(found)
            return await self._run_pull(found, wanted, source, self._store.partial(key), fetch.progress)
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
        self, found: inventory_pb2.Dataset, wanted: Wanted, source: Source, partial: Path, progress: Progress
    ) -> Manifest:
        """From peers first, where its version is known; else others are told that it is this node which reads it."""
        if not wanted.known:
            first = self._pulls[found.name, ""] = Pull(wanted, source, partial, pace=self._pace, progress=progress)
            async with self._versions.making(found, progress):
                made = await dataset_pull.in_thread(first.run)
            self._pulls[found.name, made.digest] = first  # given to others from the moment that they can know of it
            return made
        async with swarm_of(self._peers if shareable(found) or self._pins.has(found.name) else None, found) as swarm:
            pull = Pull(
                wanted,
                source,
                partial,
                pace=self._pace,
                progress=progress,
                me=self._node,
                peer=swarm.source if swarm else None,
            )
            self._pulls[found.name, wanted.manifest.digest] = pull
            if swarm is None:
                return await dataset_pull.in_thread(pull.run)
            pull.seen(*await swarm.look())
            async with following(swarm, pull):
                return await dataset_pull.in_thread(pull.run)

    def held(self, dataset: str, digest: str) -> Held | None:
        """What is here of a version, each chunk compared: all of a whole copy, or the part that a pull has."""
        if copy := self._store.known(dataset, digest):
            return Held(copy.manifest, copy.folder, (1 << copy.manifest.chunk_count) - 1, settled=True)
        if pull := self._pulls.get((dataset, digest)):
            return Held(pull.manifest, pull.files, pull.pieces, settled=False)
        return None

    def _stays(self, dataset: str) -> bool:
        """Whether a whole copy is held because it is needed."""
        return self._pins.has(dataset) or dataset in self._in_use()

    def _kept(self, dataset: str) -> bool:
        """Whether a copy stays; all do while it is not known which are pinned."""
        return self._pins.may_have(dataset) or dataset in self._in_use() or dataset in self._fetching

    async def follow_pins(self) -> None:
        """Asks which datasets this node is to hold, and begins to pull what is missing; what failed is tried again in a minute."""
        before = self._told_pins
        if (wanted := await self._pins.ask()) is None:
            return
        self._told_pins = frozenset(wanted)
        self._not_before_s = {name: at_s for name, at_s in self._not_before_s.items() if name in wanted}
        now_s = asyncio.get_running_loop().time()
        for name, found in wanted.items():
            if name in self._fetching or self._not_before_s.get(name, now_s) > now_s:
                continue
            copy = await self._holding(name, found.manifest_digest) if found.manifest_digest else None
            if copy is None and not found.HasField("credentials"):  # a secret is given for a task only
                self._not_before_s[name] = now_s + _PIN_AGAIN_S
                self._fetch_once(name, None, None)
            elif copy and name not in before:
                await self._report_here(copy)
        for name in before - self._told_pins:
            if copy := await self._holding(name):
                await self._report_here(copy)

    async def _holding(self, dataset: str, digest: str = "") -> Copy | None:
        return await self._in_store(self._store.holding, dataset, digest)

    async def _report_here(self, copy: Copy) -> None:
        await self._reports.say(copy.dataset, READY, copy.size_bytes, copy.manifest.digest)

    async def _published(self, found: inventory_pb2.Dataset, made: Manifest, key: str, progress: Progress) -> Copy:
        partial = self._store.partial(key)
        copy = await self._in_store(self._store.publish, found.name, made, partial, self._reader, progress.cost)
        _log.info(
            Event.DATASET_CACHED,
            dataset=found.name,
            bytes=made.size_bytes,
            pulled=progress.pulled_bytes,
            peers=progress.peer_bytes,
        )
        for node, why in progress.liars.items():
            _log.warning(Event.DATASET_PEER_WRONG, dataset=found.name, node=node, reason=why)
        told = "; ".join(f"{node} gave wrong bytes: {why}" for node, why in progress.liars.items())
        await self._reports.say(found.name, READY, made.size_bytes, made.digest, message=told)
        return copy

    async def _from_source(self, unkept: Unkept, work: Work | None, tell: Tell | None) -> str:
        """Where its original is, for a job that does not insist on a copy."""
        found, why = unkept.dataset, str(unkept)
        if work is None or work.spec.require_local_data:
            raise LaunchFailed(f"{found.name}: {why}", unfit=True)
        if found.HasField("credentials"):
            raise LaunchFailed(
                f"{found.name}: {why}; its source is shown a secret, so no task reads it there", unfit=True
            )
        if tell:
            await tell(f"{found.name}, which is read where it is: {why}")
        return unkept.source.home()

    async def _in_store(self, do: Callable[..., T], *arguments: object) -> T:
        """Work on the folder, one at a time."""
        async with self._storing:
            if not self._opened:
                await asyncio.to_thread(self._store.open)
                self._opened = True
            return await asyncio.to_thread(do, *arguments)

    async def tidy(self) -> None:
        """Tells what is here (an agent may have died before it could), and removes what is forgotten, or of an earlier dataset of the name."""
        await self._pins.know()
        for copy in await self._in_store(self._store.copies):
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=copy.dataset), timeout=_CALL_S)
            except NotFound:
                await self._remove(copy)
                continue
            except StatusError:
                return  # not now
            if copy.part:
                await self._reports.say(copy.dataset, PARTIAL, copy.size_bytes)
            elif found.manifest_digest != copy.manifest.digest:
                await self._remove(copy)
            elif await self._as_left(copy):
                await self._report_here(copy)

    async def _as_left(self, copy: Copy) -> bool:
        """Whether nobody wrote to it; one that somebody did is taken out, and that is told. What a task reads is left to it."""
        if copy.dataset in self._in_use() or copy.dataset in self._fetching:
            return True
        try:
            if await self._in_store(self._store.find, copy.dataset, copy.manifest.digest):
                return True
        except OSError:
            return False  # not known: nothing is told
        await self._reports.say(copy.dataset, READY)
        return False

    async def _remove(self, copy: Copy) -> None:
        if not self._kept(copy.dataset):
            await self._in_store(self._store.remove, copy)

    async def close(self) -> None:
        """The agent stops: what is on its way is gone on with by the next one."""
        for fetch in list(self._fetching.values()):
            fetch.progress.stop.set()
            await asyncio.wait({fetch.task}, timeout=_CALL_S)
