"""One commit of the ledger: files, then the manifest that names them, then the head; only what the head reaches counts.

Each step is durable before the next begins, so a crash leaves files that nothing names, or a whole manifest that goes on from the head and
is taken up when the ledger is opened again (`opening`). Names hold the commit's number and the leadership, and are never used twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whaleflux.errors import Unavailable
from whaleflux.store.api import Entry, Store
from whaleflux.store.election import Leader
from whaleflux_console.ledger import manifest
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.head import Head, swap_head
from whaleflux_console.ledger.manifest import Checkpoint, Delta, File, Kind, Named, Position, State

log = logging.getLogger(__name__)

CHECKPOINT_EVERY = 64  # commits; reading the chain at a start costs as many files


@dataclass(frozen=True, slots=True)
class New:
    """A file to be: its content, and what its manifest's line says."""

    kind: Kind
    start_ms: int
    table: Any  # Arrow
    stem: str
    version: int = 0
    made_of: int = 0
    first: int = 0
    last: int = 0


class Writer:
    """Commits one after the other. After one whose end is not known it refuses all others: open the ledger anew."""

    def __init__(
        self, folder: Folder, store: Store, leader: Leader, state: State, head: Head, entry: Entry | None
    ) -> None:
        self.state = state
        self._folder, self._store, self._leader = folder, store, leader
        self._head, self._entry = head, entry
        self._lock = asyncio.Lock()
        self._broken = False
        self._lists: dict[str, Named] = {}
        self.by = f"{leader.created:x}"

    @property
    def folder_id(self) -> str:
        """Which folder's files they are: one that began anew has another."""
        return self._head.folder

    def knows(self, checkpoint: Checkpoint | None) -> None:
        """The checkpoint that the state was read from: lists of days that do not change are named again."""
        self._lists = dict(checkpoint.days) if checkpoint else {}

    async def commit(
        self,
        new: Sequence[New] = (),
        removed: Sequence[str] = (),
        *,
        watermark_ms: int | None = None,
        position: Position | None = None,
    ) -> tuple[File, ...]:
        """Returns when it can't get lost any more. Raises Fenced when another leads, Unavailable when it is not done, or not known to be."""
        async with self._lock:
            if self._broken:
                raise Unavailable("the end of the ledger's last commit is not known; it is opened anew")
            number = self.state.number + 1
            files = await asyncio.to_thread(self._write, number, new)
            mark = max(self.state.watermark_ms, watermark_ms or 0)
            at = self.state.at
            delta = Delta(
                number, self.by, at.path, at.sha256, mark, position or self.state.position, files, tuple(removed)
            )
            await self._name(delta)
            if number - manifest.number_of(self._head.checkpoint.path) >= CHECKPOINT_EVERY:
                await self._checkpoint()
            return files

    def _write(self, number: int, new: Sequence[New]) -> tuple[File, ...]:
        written: list[File] = []
        try:
            for each in new:
                written.append(self._write_one(number, each))
        except Unavailable:
            with contextlib.suppress(Unavailable):
                for file in written:
                    self._folder.delete(file.path)
            raise
        return tuple(written)

    def _write_one(self, number: int, new: New) -> File:
        path = manifest.place(new.kind, new.start_ms, f"{new.stem}.{manifest.commit_id(number, self.by)}")
        content = parquet(new.table)
        self._folder.write(path, content)
        return File(
            path, new.kind, new.start_ms, new.table.num_rows, len(content), manifest.digest(content), number,
            new.version, new.made_of, new.first, new.last,
        )  # fmt: skip

    async def _name(self, delta: Delta) -> None:
        content = manifest.encoded(delta)
        named = Named(delta.path, manifest.digest(content))
        self._broken = True  # until the head is known to name it
        await asyncio.to_thread(self._folder.write, delta.path, content)
        await self._swap(replace(self._head, number=delta.number, at=named))
        self.state.apply(delta, named)
        self._broken = False

    async def _swap(self, head: Head) -> None:
        self._entry = await swap_head(self._store, self._leader, head, self._entry)
        self._head = head

    async def _checkpoint(self) -> None:
        """Lists of the days that changed, the checkpoint that names all, the head that names it; then what nobody reads any more goes."""
        try:
            named, lists = await asyncio.to_thread(self._write_checkpoint)
        except Unavailable as reason:  # the commit itself is done; the next one tries again
            log.warning("ledger: no checkpoint at manifest %s: %s", self.state.number, reason)
            return
        before, days = self._head.checkpoint, set(self.state.changed_days)
        self._broken = True
        await self._swap(replace(self._head, checkpoint=named))
        self._broken = False
        self._lists = lists
        self.state.changed_days -= days
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._forget_before, manifest.number_of(before.path), days)

    def _write_checkpoint(self) -> tuple[Named, dict[str, Named]]:
        state, stem, lists = self.state, manifest.commit_id(self.state.number, self.by), dict(self._lists)
        for day_ms in sorted(state.changed_days):
            day, files = manifest.date(day_ms), state.of_day(day_ms)
            lists.pop(day, None)
            if files:
                lists[day] = self._write_own(f"{manifest.LISTS}/date={day}/{stem}.json", manifest.encoded(files))
        record = Checkpoint(state.number, state.at, state.watermark_ms, state.position, lists)
        return self._write_own(f"{manifest.CHECKPOINTS}/{stem}.json", manifest.encoded(record)), lists

    def _write_own(self, path: str, content: bytes) -> Named:
        self._folder.write(path, content)
        return Named(path, manifest.digest(content))

    def _forget_before(self, number: int, days: set[int]) -> None:
        """Deletes manifests, checkpoints and these days' lists that are older than the checkpoint `number`, which readers may still be at."""
        own = (found.path for found in self._folder.list(manifest.FOLDER) if not found.path.startswith(manifest.LISTS))
        self._forget([path for path in own if 0 < manifest.number_of(path) < number])
        for day_ms in days:
            lists = [found.path for found in self._folder.list(f"{manifest.LISTS}/date={manifest.date(day_ms)}")]
            self._forget([path for path in lists if manifest.number_of(path) <= number][:-1])

    def _forget(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._folder.delete(path)

    async def remove(self, paths: Sequence[str]) -> None:
        """Deletes files that no manifest names any more. What cannot be deleted now is swept later."""
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._forget, paths)


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=131_072)
    return sink.getvalue()
