"""What a dataset consists of: files in order, each in chunks named by their SHA-256. Pure.

A version of a dataset is its manifest, and the manifest's digest is the version's name: the same digest means the same bytes. Files
end chunks, so that a file that changes takes no other file's chunks with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from whaleflux.v1 import inventory_pb2 as pb

SHA256_BYTES = 32
MIN_CHUNK_BYTES = 8 << 20
MAX_CHUNKS = 24_000  # their digests are 750 KB, within one record of the store
MAX_PATH_BYTES = 1024
MAX_PATHS_BYTES = 2 << 20  # all paths together, before they are packed
MAX_PACKED_BYTES = 1 << 20


class ManifestWrong(ValueError):
    """It describes nothing that can be had: what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class File:
    """`chunks`: the SHA-256 of each chunk, in order; empty where they are not known yet."""

    path: str  # relative, with /
    size_bytes: int
    chunks: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of one file."""

    index: int  # of all chunks of the dataset
    file: int  # index of its file
    offset: int  # bytes from the file's begin
    size_bytes: int
    sha256: bytes = b""  # empty: not known yet


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files by path. `chunk_bytes`: of each chunk but the last of a file."""

    chunk_bytes: int
    files: tuple[File, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def chunk_count(self) -> int:
        return sum(chunks_of(file.size_bytes, self.chunk_bytes) for file in self.files)

    def chunks(self) -> Iterator[Chunk]:
        """All of them, in order."""
        index = 0
        for number, file in enumerate(self.files):
            for i, offset in enumerate(range(0, file.size_bytes, self.chunk_bytes)):
                size = min(self.chunk_bytes, file.size_bytes - offset)
                yield Chunk(index, number, offset, size, file.chunks[i] if file.chunks else b"")
                index += 1

    def known(self, digests: Sequence[bytes]) -> Manifest:
        """With the digest of each chunk, by its index."""
        files, first = [], 0
        for file in self.files:
            count = chunks_of(file.size_bytes, self.chunk_bytes)
            files.append(File(file.path, file.size_bytes, tuple(digests[first : first + count])))
            first += count
        return Manifest(self.chunk_bytes, tuple(files))

    def to_proto(self) -> pb.DatasetManifest:
        files = (
            pb.DatasetFile(path=f.path, size_bytes=f.size_bytes, chunk_sha256=b"".join(f.chunks)) for f in self.files
        )
        return pb.DatasetManifest(chunk_bytes=self.chunk_bytes, files=files)

    @property
    def digest(self) -> str:
        """Its name, 64 hexadecimal digits: SHA-256 over lengths and contents, whatever a serializer does."""
        found = hashlib.sha256(b"whaleflux dataset 1\n%d\n" % self.chunk_bytes)
        for file in self.files:
            path = file.path.encode()
            found.update(b"%d %d %d\n" % (len(path), file.size_bytes, len(file.chunks)) + path + b"".join(file.chunks))
        return found.hexdigest()


def chunks_of(size_bytes: int, chunk_bytes: int) -> int:
    """How many chunks a file has; an empty one has none."""
    return -(-size_bytes // chunk_bytes)


def draft(files: Iterable[tuple[str, int]]) -> Manifest:
    """Files of these paths and sizes, with digests to come; chunks as small as their number may be. Raises ManifestWrong."""
    sized = tuple(File(path, size) for path, size in sorted(files))
    chunk_bytes = MIN_CHUNK_BYTES
    nonempty = sum(file.size_bytes > 0 for file in sized)
    if nonempty > MAX_CHUNKS:
        raise ManifestWrong(
            f"has {nonempty} files, at most {MAX_CHUNKS} are possible; pack them (tar, parquet, WebDataset)"
        )
    while sum(chunks_of(file.size_bytes, chunk_bytes) for file in sized) > MAX_CHUNKS:
        chunk_bytes *= 2
    made = Manifest(chunk_bytes, sized)
    _check_files(made)
    return made


def from_proto(message: pb.DatasetManifest, *, part: bool = False) -> Manifest:
    """A manifest with all its digests; `part`: of some of the files, which may be none. Raises ManifestWrong."""
    size = message.chunk_bytes
    if not MIN_CHUNK_BYTES <= size <= 1 << 40 or size & (size - 1):
        raise ManifestWrong(f"has chunks of {size} bytes; use a power of two, at least {MIN_CHUNK_BYTES}")
    files = []
    for file in message.files:
        if file.size_bytes < 0 or len(file.chunk_sha256) != SHA256_BYTES * chunks_of(file.size_bytes, size):
            raise ManifestWrong(f"{file.path[:80]!r} has not one SHA-256 for each chunk of its {file.size_bytes} bytes")
        ends = range(0, len(file.chunk_sha256), SHA256_BYTES)
        digests = tuple(file.chunk_sha256[i : i + SHA256_BYTES] for i in ends)
        files.append(File(file.path, file.size_bytes, digests))
    made = Manifest(size, tuple(files))
    _check_files(made, part=part)
    return made


def _check_files(manifest: Manifest, *, part: bool = False) -> None:
    if not manifest.size_bytes and not part:
        raise ManifestWrong("holds no bytes")
    if manifest.chunk_count > MAX_CHUNKS:
        raise ManifestWrong(f"has {manifest.chunk_count} chunks, at most {MAX_CHUNKS} are possible; use larger chunks")
    before, taken, total = "", set[str](), 0
    for file in manifest.files:
        if problem := _problem(file.path):
            raise ManifestWrong(f"{file.path[:80]!r} {problem}")
        if (total := total + len(file.path.encode())) > MAX_PATHS_BYTES:
            raise ManifestWrong(f"has more than {MAX_PATHS_BYTES} bytes of paths; pack its files")
        if file.path <= before:
            raise ManifestWrong(f"{file.path[:80]!r} is not in order of paths, or there twice")
        if not taken.isdisjoint(str(p) for p in PurePosixPath(file.path).parents):
            raise ManifestWrong(f"{file.path[:80]!r} lies in what is a file")
        before = file.path
        taken.add(file.path)


def _problem(path: str) -> str:
    """Why a path cannot be that of a file below a dataset's folder; "" when it can."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path:
        return "leads out of its dataset; use relative paths without . and .."
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is no UTF-8, so no job could name it; rename it, or pack its files (tar)"
    if len(encoded) > MAX_PATH_BYTES or any(len(part.encode()) > 255 for part in parts):
        return f"is too long: {MAX_PATH_BYTES} bytes, and 255 for each part, are possible"
    return ""
