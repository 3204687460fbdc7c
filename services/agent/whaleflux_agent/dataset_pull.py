"""Pulls one version of a dataset into a folder: in chunks, by several lanes, each chunk compared before it counts. For threads.

    partial/files/...     each file at its whole size from the first byte on, so that a full disk is known before anything is pulled
    partial/plan          which files of which versions, and their chunks: another plan begins anew
    partial/journal       one record for each chunk that was written and compared

Whoever was killed goes on from the journal, and believes none of it before it has read those chunks again. What was pulled is nobody's
before `finish` has written all of it to the disk; then the folder is moved to where it is found, which happens whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from whaleflux.data import manifest
from whaleflux.data.manifest import Chunk, Manifest
from whaleflux.data.sources import Found, Source, SourceChanged, SourceFailed

LANES = 4
RUN_BYTES = 64 << 20  # asked of a source at once
_PIECE_BYTES = 1 << 20
_TRIES = 3  # of a stretch that does not come, or not as it should
PAUSE_S = 0.5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # ours, not the source's
_RECORD = struct.Struct(">I32s")
FIXED_NS = 978307200 * 10**9  # when every file was last written, as far as its times say: a later write shows


class Stopped(Exception):
    """Nobody wants it any more; what is there stays for the next pull."""


class Corrupt(SourceFailed):
    """A source gives other bytes than the manifest says."""


class Pace:
    """Bytes for each second that all lanes of all pulls have together; 0: as many as come."""

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s, self._lock, self._free_at_s = bytes_per_s, threading.Lock(), 0.0

    def wait(self, count: int, stop: threading.Event) -> None:
        """Returns when `count` bytes more, which have come, do not make too many; or `stop` is set."""
        if not self._bytes_per_s:
            return
        with self._lock:
            begins_s = max(self._free_at_s, time.monotonic())
            self._free_at_s = begins_s + count / self._bytes_per_s
        stop.wait(max(0.0, begins_s - time.monotonic()))


@dataclass(slots=True)
class Progress:
    """What is known of a pull while it runs; read by others. `here`: bytes that were there before."""

    total_bytes: int = 0
    done_bytes: int = 0
    here_bytes: int = 0
    pulled_bytes: int = 0  # from sources, those in vain included
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, slots=True)
class Wanted:
    """`manifest` without digests: what it consists of is found out, provided that the source stays as `found` says meanwhile."""

    manifest: Manifest
    found: tuple[Found, ...] = ()  # of the source, by path

    @property
    def known(self) -> bool:
        return all(file.chunks for file in self.manifest.files if file.size_bytes)

    def identity(self) -> str:
        """What a partial copy must be of to be gone on with."""
        versions = [] if self.known else [[one.path, one.size_bytes, one.version] for one in self.found]
        return json.dumps([self.manifest.digest, versions])


class Pull:
    """One pull into `partial`, from `source`."""

    def __init__(
        self,
        wanted: Wanted,
        source: Source,
        partial: Path,
        *,
        pace: Pace | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._wanted, self._source, self._partial = wanted, source, partial
        self._pace, self.progress = pace or Pace(), progress or Progress()
        self._found = {one.path: one for one in wanted.found}
        self._chunks = tuple(wanted.manifest.chunks())
        self._digests: dict[int, bytes] = {}
        self._writing = threading.Lock()
        self.progress.total_bytes = wanted.manifest.size_bytes

    def run(self) -> Manifest:
        """Pulls what is missing and returns what it is; `finish` makes it last. Raises SourceFailed, Stopped, OSError (ENOSPC)."""
        self._begin()
        with open(self._partial / "journal", "r+b", buffering=0) as journal:
            self._go_on(journal)
            self._fetch(self._runs(), journal)
        if not self._wanted.known and tuple(by_path(self._source.scan())) != self._wanted.found:
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
                _reserve(self._partial / "files" / file.path, file.size_bytes)
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

    def _runs(self) -> Iterator[Sequence[Chunk]]:
        """Missing chunks that follow one another in a file, as far as one request goes."""
        limit = RUN_BYTES if self._source.ranged else 1 << 62
        run: list[Chunk] = []
        for chunk in (chunk for chunk in self._chunks if chunk.index not in self._digests):
            follows = run and run[-1].index + 1 == chunk.index and run[-1].file == chunk.file
            if run and (not follows or sum(one.size_bytes for one in run) + chunk.size_bytes > limit):
                yield run
                run = []
            run.append(chunk)
        if run:
            yield run

    def _fetch(self, runs: Iterable[Sequence[Chunk]], journal: BinaryIO) -> None:
        waiting, lock, wrong = iter(list(runs)), threading.Lock(), list[BaseException]()

        def lane() -> None:
            while not wrong:
                with lock:
                    run = next(waiting, None)
                if run is None:
                    return
                try:
                    self._bring(run, journal)
                except BaseException as error:
                    wrong.append(error)

        with ThreadPoolExecutor(LANES if self._source.ranged else 1, thread_name_prefix="dataset") as pool:
            for _ in range(LANES):
                pool.submit(lane)
        if wrong:
            raise wrong[0]

    def _bring(self, run: Sequence[Chunk], journal: BinaryIO) -> None:
        """All chunks of a run, with some tries."""
        for tried in range(1, _TRIES + 1):
            try:
                return self._stream([chunk for chunk in run if chunk.index not in self._digests], journal)
            except (SourceChanged, Stopped):
                raise
            except (SourceFailed, OSError) as failed:
                if tried == _TRIES or (isinstance(failed, OSError) and failed.errno in _DISK):
                    raise
                self.progress.stop.wait(PAUSE_S * tried)
                self.progress.check()

    def _stream(self, run: Sequence[Chunk], journal: BinaryIO) -> None:
        path = self._wanted.manifest.files[run[0].file].path
        length = sum(chunk.size_bytes for chunk in run)
        found = self._found.get(path) or Found(path, self._wanted.manifest.files[run[0].file].size_bytes)
        with (
            self._source.open(found, run[0].offset, length) as stream,
            open(self._path(run[0]), "r+b") as file,
        ):
            for chunk in run:
                file.seek(chunk.offset)
                digest = self._copy(stream, file, chunk)
                if chunk.sha256 not in (b"", digest):
                    raise Corrupt(
                        f"{path}: bytes {chunk.offset} to {chunk.offset + chunk.size_bytes} are not what its manifest says"
                    )
                self._note(journal, chunk, digest)

    def _copy(self, stream: BinaryIO, file: BinaryIO, chunk: Chunk) -> bytes:
        digest, left = hashlib.sha256(), chunk.size_bytes
        while left:
            self.progress.check()
            data = stream.read(min(left, _PIECE_BYTES))
            if not data:
                raise SourceFailed("it ended before its end")
            self._pace.wait(len(data), self.progress.stop)
            digest.update(data)
            file.write(data)
            left -= len(data)
            self.progress.pulled_bytes += len(data)
        file.flush()
        return digest.digest()

    def _note(self, journal: BinaryIO, chunk: Chunk, digest: bytes) -> None:
        with self._writing:
            self._digests[chunk.index] = digest
            journal.write(_RECORD.pack(chunk.index, digest))
            self.progress.done_bytes += chunk.size_bytes

    def _path(self, chunk: Chunk) -> Path:
        return self._partial / "files" / self._wanted.manifest.files[chunk.file].path


def by_path(found: Iterable[Found]) -> list[Found]:
    """In the order of a manifest."""
    return sorted(found, key=lambda one: one.path)


def found_out(source: Source) -> Wanted:
    """What a source has now, digests to come. Raises SourceFailed, ManifestWrong."""
    found = tuple(by_path(source.scan()))
    return Wanted(manifest.draft((one.path, one.size_bytes) for one in found), found)


def finish(partial: Path, target: Path, reader: int = 0) -> None:
    """Moves what was pulled to `target`, once all of it is on the disk; `reader`: the group that may read it, 0: everybody."""
    files = partial / "files"
    for root, _, found in os.walk(files, topdown=False):
        for name in found:
            _settle(Path(root, name), reader)
        if reader:
            os.chown(root, -1, reader)
        os.chmod(root, 0o750 if reader else 0o755)
        sync(Path(root))
    shutil.rmtree(target, ignore_errors=True)
    files.rename(target)
    sync(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _settle(path: Path, reader: int) -> None:
    """On the disk, out of the page cache, and written never again."""
    with open(path, "rb") as file:
        number = file.fileno()
        if reader:
            os.fchown(number, -1, reader)
        os.fchmod(number, 0o440 if reader else 0o444)
        os.utime(number, ns=(FIXED_NS, FIXED_NS))
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def unchanged(folder: Path, expected: Manifest) -> bool:
    """Whether a finished copy is as it was left: each file there, of its size, and written by nobody since. Raises OSError (EIO)."""
    try:
        for file in expected.files:
            state = os.stat(folder / file.path, follow_symlinks=False)
            if (state.st_size, state.st_mtime_ns) != (file.size_bytes, FIXED_NS):
                return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def digest_of(path: Path, chunk: Chunk) -> bytes:
    """SHA-256 of a chunk of a file; of less where the file ends. Raises OSError."""
    digest, left = hashlib.sha256(), chunk.size_bytes
    with open(path, "rb", buffering=0) as file:
        file.seek(chunk.offset)
        while left and (data := file.read(min(left, _PIECE_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.digest()


def sync(folder: Path) -> None:
    """A folder's names, on the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reserve(path: Path, size_bytes: int) -> None:
    """A file with all of its room: a sparse one would hide that there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        if size_bytes:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
