"""The node's cache of datasets: fetched when a task needs them, evicted when others need the room."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from whaleflux import names, telemetry
from whaleflux.errors import InvalidArgument, NotFound, StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.acting import as_user
from whaleflux_agent.runtime.api import LaunchFailed

_CALL_S = 10.0
_STALLED_S = 60.0  # without a byte from a web server
_DONE = ".whaleflux-complete"
_log = telemetry.get_logger("whaleflux.agent")


Tell = Callable[[str], Awaitable[None]]
Header = Callable[[Work, inventory_pb2.Dataset, Tell], Awaitable[str]]
"""What a task shows to the server of a dataset (`SecretAccess.header`)."""


async def _silent(_: str) -> None:
    """Nobody waits to be told."""


def copy(uri: str, folder: Path, authorization: str = "", *, reader: int = 0) -> int:
    """Copies a file, a folder or a web address into `folder`; whole or not at all. Returns its bytes.

    `authorization` is shown to the server of the address, and not to where it may send us on. `reader`: the id that may read what
    is copied of this node, and whose group may read the copy: whoever declares a dataset does not read with an agent's rights. 0: we.
    """
    url = urlsplit(uri)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if url.scheme in ("http", "https"):
        request = urllib.request.Request(uri)  # noqa: S310  # scheme checked above
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        with urllib.request.urlopen(request, timeout=_STALLED_S) as source:  # noqa: S310
            with open(partial / (Path(url.path).name or "data"), "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    elif url.scheme in ("", "file") and os.path.isabs(url.path):
        _copy_local(Path(url.path), partial, reader)
    else:
        raise ValueError("use an absolute path, file:// or http(s)://")
    if reader:
        _let_read(partial, reader)
    size = size_bytes(partial)
    (partial / _DONE).touch()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return size


def _copy_local(source: Path, target: Path, reader: int) -> None:
    if reader:
        os.chown(target, reader, reader)
    with as_user(reader, reader):
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target / source.name)


def _let_read(folder: Path, group: int) -> None:
    """The group may read what is there, whatever the source's modes were."""
    for _, folders, files, here in os.fwalk(folder):
        os.fchown(here, -1, group)
        os.fchmod(here, 0o750)
        for name in (*folders, *files):
            if not stat.S_ISLNK(mode := os.lstat(name, dir_fd=here).st_mode):
                os.chown(name, -1, group, dir_fd=here)
                os.chmod(name, mode & 0o777 | 0o040, dir_fd=here)


def size_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, found in os.walk(folder) for name in found)


class DatasetCache:
    """A folder per dataset below `root`; `in_use` says which are not to be evicted."""

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        node: str,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        in_use: Callable[[], frozenset[str]],
        copy: Callable[..., int] = copy,
        header: Header | None = None,
    ) -> None:
        self._root, self._limit_bytes, self._node, self._stub, self._in_use = root, limit_bytes, node, stub, in_use
        self._copy, self._header = copy, header
        self._fetching: dict[str, asyncio.Task[None]] = {}

    async def fetch(self, dataset: str, work: Work | None = None, tell: Tell = _silent) -> str:
        """Local path of `dataset` (datasets/{dataset}); fetched if need be, for the task of `work`. Raises LaunchFailed."""
        try:
            (id_,) = names.split(dataset, "datasets", field="datasets")
        except InvalidArgument as wrong:
            raise LaunchFailed(wrong.message) from None
        folder = self._root / id_
        if not (folder / _DONE).exists():
            await asyncio.shield(self._fetch_once(dataset, folder, work, tell))
        await asyncio.to_thread(os.utime, folder)  # used last: evicted last
        return str(folder)

    def _fetch_once(self, dataset: str, folder: Path, work: Work | None, tell: Tell) -> asyncio.Task[None]:
        """One fetch of a dataset at a time: it goes on when the task that asked for it has gone, for no thread can be stopped."""
        known = self._fetching.get(dataset)
        if known is None:
            known = self._fetching[dataset] = asyncio.create_task(self._fetch(dataset, folder, work, tell))
            known.add_done_callback(lambda done: self._fetched(dataset, done))
        return known

    def _fetched(self, dataset: str, done: asyncio.Task[None]) -> None:
        del self._fetching[dataset]
        if not done.cancelled():
            done.exception()  # whoever still waits hears of it

    async def _fetch(self, dataset: str, folder: Path, work: Work | None, tell: Tell) -> None:
        try:
            found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
        except StatusError as failed:
            raise LaunchFailed(f"{dataset}: {failed.message}") from None
        if found.size_bytes > self._limit_bytes:
            raise LaunchFailed(
                f"{dataset} has {found.size_bytes} bytes, the cache {self._limit_bytes} (--dataset-bytes)"
            )
        shown = await self._credentials(found, work, tell)
        for gone in await asyncio.to_thread(self._make_room, found.size_bytes):
            await self._tell(gone, 0)
        try:
            size = await asyncio.to_thread(self._copy, found.uri, folder, *shown)
        except (OSError, ValueError) as error:
            why = " (users of tasks must be able to read it)" if isinstance(error, PermissionError) else ""
            raise LaunchFailed(f"{dataset}: cannot fetch {found.uri}: {error}{why}") from None
        _log.info(Event.DATASET_CACHED, dataset=dataset, bytes=size)
        await self._tell(dataset, size)

    async def _credentials(self, found: inventory_pb2.Dataset, work: Work | None, tell: Tell) -> tuple[str, ...]:
        """The header that the dataset's server wants; none where nobody said so."""
        if not found.HasField("credentials"):
            return ()
        if work is None or self._header is None:
            raise LaunchFailed(f"{found.name} is fetched with a secret, which only a task can be given")
        return (await self._header(work, found, tell),)

    def _make_room(self, needed_bytes: int) -> list[str]:
        """Evicts what was used longest ago until `needed_bytes` more fit; returns the names."""
        folders = sorted(self._folders(), key=lambda f: f.stat().st_mtime)
        sizes = {folder: size_bytes(folder) for folder in folders}
        held, gone = sum(sizes.values()), []
        for folder in folders:
            if held + needed_bytes <= self._limit_bytes:
                break
            name = names.dataset(folder.name)
            if name not in self._in_use():
                shutil.rmtree(folder, ignore_errors=True)
                held -= sizes[folder]
                gone.append(name)
        return gone

    async def _tell(self, dataset: str, present_bytes: int) -> None:
        """Inventory's view is a hint for placement: a report that fails is not worth holding the task for."""
        copy = inventory_pb2.DatasetCopy(node=self._node, present_bytes=present_bytes, pinned=bool(present_bytes))
        request = inventory_pb2.ReportCachedDatasetRequest(dataset=dataset, copy=copy)
        try:
            await self._stub.ReportCachedDataset(request, timeout=_CALL_S)
        except StatusError as error:
            _log.info(Event.RPC_FAILED, method="ReportCachedDataset", reason=error.message)

    def _folders(self) -> list[Path]:
        """Folders of datasets, whole or in part; whatever else lies there is not ours."""
        self._root.mkdir(parents=True, exist_ok=True)
        return [f for f in self._root.iterdir() if f.is_dir() and names.ID_PATTERN.fullmatch(f.name)]

    async def tidy(self) -> None:
        """Tells what is here (an agent may have died before it could), and removes what is forgotten, or an earlier dataset's of the name."""
        for folder in (f for f in self._folders() if (f / _DONE).exists()):
            name = names.dataset(folder.name)
            try:
                found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=name), timeout=_CALL_S)
                if found.create_time.seconds <= (folder / _DONE).stat().st_mtime:
                    await self._tell(name, await asyncio.to_thread(size_bytes, folder))
                else:  # declared after this was copied: by somebody else, perhaps
                    await self._remove(name, folder)
            except NotFound:
                await self._remove(name, folder)
            except StatusError:
                return  # not now

    async def _remove(self, name: str, folder: Path) -> None:
        if name not in self._in_use():
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
