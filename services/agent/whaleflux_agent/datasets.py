"""The node's cache of datasets: fetched when a task needs them, evicted when others need the room."""

from __future__ import annotations

import asyncio
import os
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from whaleflux import names, telemetry
from whaleflux.errors import Invalid, NotFound, Refusal
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.runtime.api import LaunchFailed

_CALL_S = 10.0
_STALLED_S = 60.0  # without a byte from a web server
_DONE = ".whaleflux-complete"
_log = telemetry.get_logger("whaleflux.agent")


class DatasetCache:
    """A folder per dataset below `root`; `in_use` says which are not to be evicted."""

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        node: str,
        stub: inventory_pb2_grpc.InventoryServiceStub,
        in_use: Callable[[], frozenset[str]],
    ) -> None:
        self._root, self._limit_bytes, self._node, self._stub, self._in_use = root, limit_bytes, node, stub, in_use
        self._fetching: dict[str, asyncio.Lock] = {}

    async def fetch(self, dataset: str) -> str:
        """Local path of `dataset` (datasets/{dataset}); fetched if need be. Raises LaunchFailed."""
        try:
            (id_,) = names.split(dataset, "datasets", field="datasets")
        except Invalid as wrong:
            raise LaunchFailed(wrong.message) from None
        folder = self._root / id_
        async with self._fetching.setdefault(id_, asyncio.Lock()):
            if not (folder / _DONE).exists():
                await self._fetch(dataset, folder)
            await asyncio.to_thread(os.utime, folder)  # used last: evicted last
        return str(folder)

    async def _fetch(self, dataset: str, folder: Path) -> None:
        try:
            found = await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=_CALL_S)
        except Refusal as refusal:
            raise LaunchFailed(f"{dataset}: {refusal.message}") from None
        if found.size_bytes > self._limit_bytes:
            raise LaunchFailed(
                f"{dataset} has {found.size_bytes} bytes, the cache {self._limit_bytes} (--dataset-bytes)"
            )
        for gone in await asyncio.to_thread(self._make_room, found.size_bytes):
            await self._tell(gone, 0)
        try:
            size = await asyncio.to_thread(_copy, found.uri, folder)
        except (OSError, ValueError) as error:
            raise LaunchFailed(f"{dataset}: cannot fetch {found.uri}: {error}") from None
        _log.info(Event.DATASET_CACHED, dataset=dataset, bytes=size)
        await self._tell(dataset, size)

    def _make_room(self, needed_bytes: int) -> list[str]:
        """Evicts what was used longest ago until `needed_bytes` more fit; returns the names."""
        self._root.mkdir(parents=True, exist_ok=True)
        folders = sorted((f for f in self._root.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
        sizes = {folder: size_bytes(folder) for folder in folders}
        held, gone = sum(sizes.values()), []
        for folder in folders:
            if held + needed_bytes <= self._limit_bytes:
                break
            name = f"datasets/{folder.name}"
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
        except Refusal as refusal:
            _log.info(Event.RPC_FAILED, method="ReportCachedDataset", reason=refusal.message)

    async def tidy(self) -> None:
        """Tells what is here (an agent may have died before it could), and removes what is forgotten."""
        folders = [f for f in self._root.iterdir() if (f / _DONE).exists()] if self._root.is_dir() else []
        for folder in folders:
            name = f"datasets/{folder.name}"
            try:
                await self._stub.GetDataset(inventory_pb2.GetDatasetRequest(name=name), timeout=_CALL_S)
                await self._tell(name, await asyncio.to_thread(size_bytes, folder))
            except NotFound:
                if name not in self._in_use():
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            except Refusal:
                return  # not now


def _copy(uri: str, folder: Path) -> int:
    """Copies a file, a folder or a web address into `folder`; whole or not at all. Returns its bytes."""
    url = urlsplit(uri)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if url.scheme in ("http", "https"):
        with urllib.request.urlopen(uri, timeout=_STALLED_S) as source:  # noqa: S310  # scheme checked above
            with open(partial / (Path(url.path).name or "data"), "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    elif url.scheme in ("", "file") and os.path.isabs(url.path):
        _copy_local(Path(url.path), partial)
    else:
        raise ValueError("use an absolute path, file:// or http(s)://")
    size = size_bytes(partial)
    (partial / _DONE).touch()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return size


def _copy_local(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target / source.name)


def size_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, found in os.walk(folder) for name in found)
