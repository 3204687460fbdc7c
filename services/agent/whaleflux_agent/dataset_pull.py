"""Pulls one version of a dataset into a folder: in chunks, by several lanes, each chunk compared before it counts. For threads.

    partial/files/...     each file at its whole size from the first byte on, so that a full disk is known before anything is pulled
    partial/plan          which files of which versions, and their chunks: another plan begins anew
    partial/journal       one record for each chunk that was written and compared

Whoever was killed goes on from the journal, and believes none of it before it has read those chunks again. What was pulled is nobody's
before `finish` has written all of it to the disk; then the folder is moved to where it is found, which happens whole or not at all.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from whaleflux.data.manifest import Chunk, Manifest
from whaleflux.data.sources import Found, Readable, Source, SourceBusy, SourceChanged, SourceFailed, SourceReplaced
from whaleflux_agent.dataset_donors import Place
from whaleflux_agent.dataset_files import PIECE_BYTES, copy_stretch, digest_of, reserve, write
from whaleflux_agent.dataset_progress import Pace, Progress, Stopped
from whaleflux_agent.dataset_wanted import Wanted
from whaleflux_agent.piece_order import PieceOrder, Take

T = TypeVar("T")

LANES = 4
RUN_BYTES = 64 << 20  # asked of a source at once
_RUNS = 32  # at least, that a version is asked for in: so that nodes can share them
_LOOK_S = 1.0  # after which a lane without work looks again
_TRIES = 3  # of a stretch that does not come, or not as it should
PAUSE_S = 0.5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # ours, not the source's
_RECORD = struct.Struct(">I32s")


class Corrupt(SourceFailed):
    """A source gives other bytes than the manifest says; `digest` is theirs."""

    def __init__(self, what: str, digest: bytes) -> None:
        super().__init__(what)
        self.digest = digest


_PULLS = ThreadPoolExecutor(
    16, thread_name_prefix="pull"
)  # they last for hours: not the threads of the agent's other work


async def in_thread(do: Callable[[], T]) -> T:
    """What asks a source, and may last. More than 16 at once wait for their turn."""
    return await asyncio.get_running_loop().run_in_executor(_PULLS, do)


class Pull:
    """One pull into `partial`, from `source`, and from the nodes that `seen` tells of: `peer` opens them, `me` is this one among them.

    `here`: where on this disk chunks are that other copies have, by SHA-256.
    `ahead`: from nodes only, before the version is known. Nothing of that is believed: `go_on_with` has it read again.
    """

    def __init__(
        self,
        wanted: Wanted,
        source: Source,
        partial: Path,
        *,
        pace: Pace | None = None,
        progress: Progress | None = None,
        me: str = "",
        peer: Callable[[str], Source] | None = None,
        ahead: bool = False,
        here: Mapping[bytes, Place] | None = None,
    ) -> None:
        self._here = here or {}
        self._wanted, self._source, self._partial, self._peer = wanted, source, partial, peer
        self._pace, self.progress = pace or Pace(), progress or Progress()
        self._found = {one.path: one for one in wanted.found}
        self._chunks = tuple(wanted.manifest.chunks())
        self._digests: dict[int, bytes] = {}
        self._turn = threading.Condition()
        self._order = PieceOrder(
            me,
            wanted.manifest.digest,
            self._chunks,
            lanes=LANES,
            run_bytes=min(RUN_BYTES, max(1, wanted.manifest.size_bytes // _RUNS)),
            ranged=source.ranged or ahead,
            source=not ahead,
        )
        self.pieces = 0  # a bitmap of the chunks that are here, each compared with the manifest
        self.progress.total_bytes, self.progress.done_bytes = (
            wanted.manifest.size_bytes,
            0,
        )  # of the last pull of a fetch

    @property
    def manifest(self) -> Manifest:
        return self._wanted.manifest

    @property
    def files(self) -> Path:
        """Where its files are on their way."""
        return self._partial / "files"

    def run(self) -> Manifest:
        """Pulls what is missing and returns what it is; `finish` makes it last. Raises SourceFailed, Stopped, OSError (ENOSPC)."""
        self._begin()
        with open(self._partial / "journal", "r+b", buffering=0) as journal:
            self._go_on(journal)
            self._take_here(journal)
            begun_s = time.monotonic()
            self._fetch(journal)
            self.progress.pulled_s += time.monotonic() - begun_s
        if not self._wanted.known and not self._wanted.still(self._source.scan()):
            raise SourceChanged("its source was changed while it was read; it is read again")
        return self._wanted.manifest.known([self._digests[chunk.index] for chunk in self._chunks])

    def _begin(self) -> None:
        """The partial copy of this plan, each file at its size. Raises OSError when there is no room, and leaves none of it."""
        plan = self._partial / "plan"
        identity = self._wanted.identity()
        if plan.exists() and plan.read_text() == identity:
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            for file in self._wanted.manifest.files:
                reserve(self._partial / "files" / file.path, file.size_bytes)
            (self._partial / "journal").touch()
            plan.write_text(identity)
        except OSError:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _go_on(self, journal: BinaryIO) -> None:
        """Reads again what was written before; what is not as it should be is pulled again."""
        records = journal.read()
        whole = len(records) - len(records) % _RECORD.size
        said = dict(_RECORD.iter_unpack(records[:whole]))
        kept = {
            i: digest for i, digest in said.items() if i < len(self._chunks) and self._is_there(self._chunks[i], digest)
        }
        journal.seek(0)
        journal.truncate()
        for index, digest in kept.items():
            self._note(journal, self._chunks[index], digest)
        self.progress.here_bytes = self.progress.done_bytes

    def _is_there(self, chunk: Chunk, digest: bytes) -> bool:
        self.progress.check()
        if chunk.sha256 not in (b"", digest):
            return False
        try:
            return digest_of(self._path(chunk), chunk) == digest
        except OSError:
            return False

    def _take_here(self, journal: BinaryIO) -> None:
        """What other copies on this disk have; what is not there as it should be stays missing."""
        there = [c for c in self._chunks if c.index not in self._digests and c.sha256 and c.sha256 in self._here]
        with ThreadPoolExecutor(LANES, thread_name_prefix="dataset") as pool:
            for _ in pool.map(lambda chunk: self._copied_here(chunk, journal), there):
                pass

    def _copied_here(self, chunk: Chunk, journal: BinaryIO) -> None:
        self.progress.check()
        place, path = self._here[chunk.sha256], self._path(chunk)
        try:
            copy_stretch(place.path, place.offset, path, chunk.offset, chunk.size_bytes)
            if digest_of(path, chunk) != chunk.sha256:
                return
        except OSError:
            return  # that copy has gone, or its disk does not give it
        self._note(journal, chunk, chunk.sha256)
        with self._turn:
            self.progress.copied_bytes += chunk.size_bytes

    def _fetch(self, journal: BinaryIO) -> None:
        """All that is missing, by some lanes; each brings what comes next until nothing is left, or one of them fails for good."""
        wrong = list[BaseException]()

        def lane() -> None:
            try:
                while not wrong and (take := self._next_take(wrong)):
                    self._bring(take, journal)
            except BaseException as error:
                with self._turn:
                    wrong.append(error)
                    self._turn.notify_all()

        with ThreadPoolExecutor(LANES, thread_name_prefix="dataset") as pool:
            for _ in range(LANES):
                pool.submit(lane)
        if wrong:
            raise wrong[0]

    def _next_take(self, wrong: list[BaseException]) -> Take | None:
        """Waits for it; None when all is here, or on its way by others."""
        with self._turn:
            while not wrong and not self._order.over:
                self.progress.check()
                if take := self._order.next(time.monotonic()):
                    return take
                self._turn.wait(_LOOK_S)
        return None

    def _bring(self, take: Take, journal: BinaryIO) -> None:
        """What a take is of, or as much as a peer gives of it."""
        try:
            if take.peer:
                self._bring_from_peer(take, journal)
            else:
                self._bring_from_source(take.chunks, journal)
        finally:
            with self._turn:
                self._order.ended(take, [chunk for chunk in take.chunks if chunk.index not in self._digests])
                self._turn.notify_all()

    def _bring_from_source(self, run: Sequence[Chunk], journal: BinaryIO) -> None:
        """All chunks of a run, with some tries. The same wrong bytes twice are no slip on the way: its files were rewritten. Raises SourceReplaced."""
        other = set[bytes]()
        for tried in range(1, _TRIES + 1):
            try:
                return self._stream(self._source, [one for one in run if one.index not in self._digests], journal)
            except (SourceChanged, Stopped):
                raise
            except (SourceFailed, OSError) as failed:
                if isinstance(failed, Corrupt):
                    if failed.digest in other:
                        raise SourceReplaced(f"{failed}: it is not what it was") from None
                    other.add(failed.digest)
                if tried == _TRIES or (isinstance(failed, OSError) and failed.errno in _DISK):
                    raise
                self.progress.stop.wait(PAUSE_S * tried)
                self.progress.check()

    def _bring_from_peer(self, take: Take, journal: BinaryIO) -> None:
        """One try: another peer, or the source, does it as well. Who gives wrong bytes is asked no more, and named."""
        assert self._peer is not None
        try:
            self._stream(self._peer(take.peer), take.chunks, journal)
            with self._turn:
                self.progress.peer_bytes += sum(chunk.size_bytes for chunk in take.chunks)
        except Corrupt as wrong:
            self.progress.liars[take.peer] = str(wrong)
            with self._turn:
                self._order.drop(take.peer)
        except SourceBusy:
            with self._turn:
                self._order.busy(take.peer, time.monotonic())
        except SourceFailed as failed:
            self.progress.failures[take.peer] = str(failed)
            with self._turn:
                self._order.rest(take.peer, time.monotonic())

    @property
    def coming(self) -> int:
        """A bitmap of the chunks that are read at the source now."""
        return self._order.coming

    def seen(self, pieces: Mapping[str, int], fellows: frozenset[str], coming: int = 0) -> None:
        """What peers have (bitmaps of chunks, by node), which nodes pull the same now, and what these read at the source."""
        with self._turn:
            self._order.seen(pieces, fellows, time.monotonic(), coming)
            self._turn.notify_all()

    def _stream(self, source: Source, run: Sequence[Chunk], journal: BinaryIO) -> None:
        path = self._wanted.manifest.files[run[0].file].path
        length = sum(chunk.size_bytes for chunk in run)
        found = self._found.get(path) or Found(path, self._wanted.manifest.files[run[0].file].size_bytes)
        buffer = memoryview(bytearray(PIECE_BYTES))  # one for all: the kernel would make new pages for each
        with (
            source.open(found, run[0].offset, length) as stream,
            open(self._path(run[0]), "r+b", buffering=0) as file,
        ):
            for chunk in run:
                digest = self._copy(stream, file.fileno(), chunk, buffer)
                if chunk.sha256 not in (b"", digest):
                    stretch = f"{path}: bytes {chunk.offset} to {chunk.offset + chunk.size_bytes}"
                    raise Corrupt(f"{stretch} are not what its manifest says", digest)
                self._note(journal, chunk, digest)
                # Begins to write it, so that not all waits for the end, and leaves the pages to the trainers.
                os.posix_fadvise(file.fileno(), chunk.offset, chunk.size_bytes, os.POSIX_FADV_DONTNEED)

    def _copy(self, stream: Readable, number: int, chunk: Chunk, buffer: memoryview) -> bytes:
        digest, at, end = hashlib.sha256(), chunk.offset, chunk.offset + chunk.size_bytes
        while at < end:
            self.progress.check()
            data = buffer[: stream.readinto(buffer[: end - at])]
            if not data:
                raise SourceFailed("it ended before its end")
            self._pace.wait(len(data), self.progress.stop)
            digest.update(data)
            write(number, data, at)
            at += len(data)
            self.progress.pulled_bytes += len(data)
        return digest.digest()

    def _note(self, journal: BinaryIO, chunk: Chunk, digest: bytes) -> None:
        with self._turn:
            self._digests[chunk.index] = digest
            journal.write(_RECORD.pack(chunk.index, digest))
            self.progress.done_bytes += chunk.size_bytes
            self.pieces |= 1 << chunk.index
            self._order.have(chunk.index)

    def _path(self, chunk: Chunk) -> Path:
        return self._partial / "files" / self._wanted.manifest.files[chunk.file].path
