"""The node's cache of datasets: pulled when a task needs them, given to nobody before they are whole, evicted when others need the room."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from whaleflux import names, telemetry
from whaleflux.data import manifest, sources
from whaleflux.data.manifest import Manifest, ManifestWrong
from whaleflux.data.sources import Source, SourceChanged, SourceFailed
from whaleflux.errors import InvalidArgument, NotFound, StatusError
from whaleflux.quantities import shown_bytes
from whaleflux.retry import worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent import dataset_pull
from whaleflux_agent.core.work import Work
from whaleflux_agent.dataset_pull import Pace, Progress, Pull, Wanted
from whaleflux_agent.dataset_store import Copy, DatasetStore, NoRoom, key_of
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


class _Unkept(Exception):
    """It cannot be kept here; who may reads it where it is: `home`."""

    def __init__(self, dataset: inventory_pb2.Dataset, home: str, why: str) -> None:
        super().__init__(why)
        self.dataset, self.home = dataset, home


@dataclass(slots=True)
class _Fetch:
    """One fetch of a dataset, for all who wait for it."""

    progress: Progress = field(default_factory=Progress)
    task: asyncio.Task[Copy] = field(init=False)
    looked: tuple[float, int] = (0.0, 0)  # when, and at how many bytes

    def words(self, dataset: str) -> str:
        """How far it is, and how fast since the last look."""
        now_s, (then_s, before) = asyncio.get_running_loop().time(), self.looked
        self.looked = now_s, self.progress.pulled_bytes
        if not self.progress.total_bytes:
            return dataset
        rate = (self.progress.pulled_bytes - before) / max(now_s - then_s, 0.001) if then_s else 0
        done, total = shown_bytes(self.progress.done_bytes), shown_bytes(self.progress.total_bytes)
        return f"{dataset} ({done} of {total}" + (f", {shown_bytes(rate)}/s)" if rate else ")")


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
    ) -> None:
        self._store, self._node, self._stub, self._in_use = DatasetStore(root, limit_bytes), node, stub, in_use
        self._reader, self._header, self._pace, self._open_source = reader, header, pace or Pace(), open_source
        self._fetching: dict[str, _Fetch] = {}
        self._pins: frozenset[str] | None = (
            None  # datasets/{dataset}, held also while no task reads them; None: not known yet
        )
        self._told_pins = frozenset[str]()  # those that inventory has heard of from here
        self._not_before_s: dict[str, float] = {}  # when a pin that failed is tried again
        self._storing, self._opened = asyncio.Lock(), False

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
        except _Unkept as unkept:
            return await self._from_source(unkept, work, tell)
        await self._in_store(self._store.touch, copy)
        return str(copy.folder)

    def _fetch_once(self, dataset: str, work: Work | None, tell: Tell | None) -> _Fetch:
        """One fetch of a dataset at a time: it goes on when the task that asked for it has gone, others may wait for it."""
        known = self._fetching.get(dataset)
        if known is None:
            known = self._fetching[dataset] = _Fetch()
            known.task = asyncio.create_task(self._bring(dataset, known, work, tell))
            known.task.add_done_callback(lambda done: self._fetched(dataset, done))
        return known

    def _fetched(self, dataset: str, done: asyncio.Task[Copy]) -> None:
        del self._fetching[dataset]
        if not done.cancelled():
            done.exception()  # whoever still waits hears of it

    async def _bring(self, dataset: str, fetch: _Fetch, work: Work | None, tell: Tell | None) -> Copy:
        found = inventory_pb2.Dataset(name=dataset)
        try:
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
            except StatusError as failed:
                here = await self._in_store(self._store.find, dataset) if worth_repeating(failed) else None
                if here is None:
                    raise
                return here  # whole, and nobody says that it is of another time
            return await self._brought(found, fetch, work, tell)
        except (SourceFailed, ManifestWrong, OSError) as failure:
            await self._report(dataset, inventory_pb2.DATASET_COPY_STATE_FAILED, message=str(failure))
            raise LaunchFailed(f"{dataset}: cannot fetch {found.uri or 'it'}: {failure}") from None
        except StatusError as failed:
            raise LaunchFailed(f"{dataset}: {failed.message}") from None
        except dataset_pull.Stopped:
            raise LaunchFailed(f"{dataset}: the agent stops") from None

    async def _brought(self, found: inventory_pb2.Dataset, fetch: _Fetch, work: Work | None, tell: Tell | None) -> Copy:
        source: Source | None = None
        for _ in range(_VERSIONS):
            digest = found.manifest_digest
            if digest and (here := await self._in_store(self._store.find, found.name, digest)):
                return here
            source = source or self._open_source(found.uri, await self._shown(found, work, tell), self._acting)
            wanted = await self._wanted(found, source)
            made = await self._pulled(found, wanted, source, fetch)
            if not digest:
                request = inventory_pb2.SetDatasetManifestRequest(
                    dataset=found.name, node=self._node, manifest=made.to_proto()
                )
                found = await self._stub.SetDatasetManifest(request, timeout=_CALL_S)
            if found.manifest_digest == made.digest:
                return await self._published(found, made, key_of(found.name, digest))
        raise SourceChanged("its source was another one when another node read it")

    def _acting(self) -> AbstractContextManager[None]:
        return as_user(self._reader, self._reader)

    async def _shown(self, found: inventory_pb2.Dataset, work: Work | None, tell: Tell | None) -> str:
        """The header that the dataset's server wants; "" where nobody said so."""
        if not found.HasField("credentials"):
            return ""
        if work is None or tell is None or self._header is None:
            raise LaunchFailed(f"{found.name} is fetched with a secret, which only a task can be given")
        return await self._header(work, found, tell)

    async def _wanted(self, found: inventory_pb2.Dataset, source: Source) -> Wanted:
        """What is to be pulled: as the manifest says, else as the source has it now."""
        there = await asyncio.to_thread(dataset_pull.found_out, source)
        if not found.manifest_digest:
            return there
        request = inventory_pb2.GetDatasetManifestRequest(name=found.name)
        known = manifest.from_proto(await self._stub.GetDatasetManifest(request, timeout=_CALL_S))
        sizes = {file.path: file.size_bytes for file in there.manifest.files}
        if known.digest != found.manifest_digest or any(sizes.get(f.path) != f.size_bytes for f in known.files):
            raise SourceChanged("it is not what it was when it was first read; declare it under another name")
        return Wanted(known, there.found)

    async def _pulled(self, found: inventory_pb2.Dataset, wanted: Wanted, source: Source, fetch: _Fetch) -> Manifest:
        """All bytes, in the partial copy. Raises _Unkept where there is no room."""
        key, size = key_of(found.name, found.manifest_digest), wanted.manifest.size_bytes
        try:
            await self._know_pins()
            gone = await self._in_store(self._store.reserve, key, size, self._kept)
            for copy in gone:
                await self._report(copy.dataset, inventory_pb2.DATASET_COPY_STATE_READY)
            await self._report(found.name, inventory_pb2.DATASET_COPY_STATE_PULLING, digest=found.manifest_digest)
            pull = Pull(wanted, source, self._store.partial(key), pace=self._pace, progress=fetch.progress)
            return await asyncio.to_thread(pull.run)
        except (NoRoom, OSError) as failure:
            if isinstance(failure, OSError) and failure.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = str(failure) if isinstance(failure, NoRoom) else "the disk of its cache is full"
            _log.warning(Event.DISK_FULL, folder=str(self._store.root), reason=f"{found.name}: {why}")
            await self._report(found.name, inventory_pb2.DATASET_COPY_STATE_FAILED, message=why)
            raise _Unkept(found, source.home(), why) from None
        finally:
            self._store.release(key)

    def _kept(self, dataset: str) -> bool:
        """Whether a copy stays; all do while it is not known which are pinned."""
        return self._pins is None or dataset in self._pins or dataset in self._in_use() or dataset in self._fetching

    async def _know_pins(self) -> None:
        """Before anything is removed: an agent that has just started does not know what is pinned."""
        if self._pins is None:
            await self._ask_pins()

    async def _ask_pins(self) -> dict[str, inventory_pb2.Dataset] | None:
        """What this node is to hold; None, and what was pinned stays so, when nobody answers."""
        request = inventory_pb2.ListNodePinsRequest(node=self._node)
        try:
            wanted = {found.name: found for found in (await self._stub.ListNodePins(request, timeout=_CALL_S)).datasets}
        except StatusError as error:
            _log.info(Event.RPC_FAILED, method="ListNodePins", reason=error.message)
            return None
        self._pins = frozenset(wanted)
        return wanted

    async def follow_pins(self) -> None:
        """Asks which datasets this node is to hold, and begins to pull what is missing; what failed is tried again in a minute."""
        before = self._told_pins
        if (wanted := await self._ask_pins()) is None:
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
        await self._report(copy.dataset, inventory_pb2.DATASET_COPY_STATE_READY, copy.size_bytes, copy.manifest.digest)

    async def _published(self, found: inventory_pb2.Dataset, made: Manifest, key: str) -> Copy:
        partial = self._store.partial(key)
        copy = await self._in_store(self._store.publish, found.name, made, partial, self._reader)
        _log.info(Event.DATASET_CACHED, dataset=found.name, bytes=made.size_bytes)
        await self._report(found.name, inventory_pb2.DATASET_COPY_STATE_READY, made.size_bytes, made.digest)
        return copy

    async def _from_source(self, unkept: _Unkept, work: Work | None, tell: Tell | None) -> str:
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
        return unkept.home

    async def _report(
        self, dataset: str, state: int, present_bytes: int = 0, digest: str = "", message: str = ""
    ) -> None:
        """Inventory's view is a hint for placement: a report that fails is not worth holding the task for. READY without bytes: none."""
        copy = inventory_pb2.DatasetCopy(
            node=self._node,
            present_bytes=present_bytes,
            pinned=bool(present_bytes) and (dataset in (self._pins or ()) or dataset in self._in_use()),
            state=state,  # type: ignore[arg-type]
            manifest_digest=digest,
            message=message[:512],
        )
        request = inventory_pb2.ReportCachedDatasetRequest(dataset=dataset, copy=copy)
        try:
            await self._stub.ReportCachedDataset(request, timeout=_CALL_S)
        except StatusError as error:
            _log.info(Event.RPC_FAILED, method="ReportCachedDataset", reason=error.message)

    async def _in_store(self, do: Callable[..., T], *arguments: object) -> T:
        """Work on the folder, one at a time."""
        async with self._storing:
            if not self._opened:
                await asyncio.to_thread(self._store.open)
                self._opened = True
            return await asyncio.to_thread(do, *arguments)

    async def tidy(self) -> None:
        """Tells what is here (an agent may have died before it could), and removes what is forgotten, or of an earlier dataset of the name."""
        await self._know_pins()
        for copy in await self._in_store(self._store.copies):
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=copy.dataset), timeout=_CALL_S)
            except NotFound:
                await self._remove(copy)
                continue
            except StatusError:
                return  # not now
            if found.manifest_digest != copy.manifest.digest:
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
        await self._report(copy.dataset, inventory_pb2.DATASET_COPY_STATE_READY)
        return False

    async def _remove(self, copy: Copy) -> None:
        if not self._kept(copy.dataset):
            await self._in_store(self._store.remove, copy)

    async def close(self) -> None:
        """The agent stops: what is on its way is gone on with by the next one."""
        for fetch in list(self._fetching.values()):
            fetch.progress.stop.set()
            await asyncio.wait({fetch.task}, timeout=_CALL_S)
