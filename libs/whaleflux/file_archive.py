"""Files and folders as a tar stream (`whaleflux cp`): what is packed stays within its folder, and so does what is unpacked.

One top-level entry, called CONTENT, holds the file or folder. Regular files, folders, and links that lead to a place within
what is sent; whatever else there is, is left out and counted. Unpacking writes below a fresh folder: links are made last, so
that nothing is ever written through one.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from whaleflux import tar_members

CONTENT = "content"
MAX_ENTRIES = 1_000_000
CHUNK_BYTES = 64 << 10  # most that `write` is given at once
_COPY_BYTES = 1 << 20


class BadArchive(ValueError):  # named for what is wrong
    """The stream is no such archive, or would write outside of its folder; the text says why."""


@dataclass(slots=True)
class Totals:
    """What was carried."""

    files: int = 0
    size_bytes: int = 0
    left_out: int = 0  # sockets, devices, links that lead outside, what may not be read


def size_of(path: Path) -> int:
    """Bytes of the regular files that `pack` would send. Raises OSError when there is nothing, ValueError for what is no file."""
    with opened(path) as descriptor:
        return size_of_opened(descriptor)


def size_of_opened(descriptor: int) -> int:
    """As `size_of`, of what `opened` has opened."""
    found = os.fstat(descriptor)
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size
    return sum(
        _size_bytes(name, folder) for _, _, names, folder in os.fwalk(".", dir_fd=descriptor) for name in sorted(names)
    )


def _size_bytes(name: str, folder: int) -> int:
    try:
        found = os.lstat(name, dir_fd=folder)
    except FileNotFoundError:  # it went while we looked
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder, never of what would wait for somebody. Raises OSError, and ValueError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise ValueError(f"{path.name!r} is neither a file nor a folder")
        yield descriptor
    finally:
        os.close(descriptor)


def pack(path: Path, write: Callable[[bytes], Any]) -> Totals:
    """Writes the archive of a file or folder. Blocks.

    Raises OSError; ValueError when it is neither, or a file shrinks while it is read.
    """
    with opened(path) as descriptor:
        return pack_opened(descriptor, write)


def pack_opened(descriptor: int, write: Callable[[bytes], Any]) -> Totals:
    """As `pack`, of what `opened` has opened."""
    totals = Totals()
    with tarfile.open(fileobj=_Writer(write), mode="w|", bufsize=CHUNK_BYTES, copybufsize=CHUNK_BYTES) as tar:  # type: ignore[call-overload]
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            _pack_folder(tar, descriptor, totals)
        else:
            with open(descriptor, "rb", closefd=False) as file:
                _add_file(tar, CONTENT, file, totals)
    return totals


def _pack_folder(tar: tarfile.TarFile, top: int, totals: Totals) -> None:
    for folder, folders, names, descriptor in os.fwalk(".", dir_fd=top, follow_symlinks=False):
        inside = posixpath.normpath(posixpath.join(CONTENT, folder))
        folders.sort()
        entry = _entry(inside, os.fstat(descriptor), tarfile.DIRTYPE)
        tar.addfile(entry)
        links = [name for name in folders if stat.S_ISLNK(os.lstat(name, dir_fd=descriptor).st_mode)]
        for name in sorted((*names, *links)):
            _add(tar, f"{inside}/{name}", name, descriptor, totals)


def _add(tar: tarfile.TarFile, inside: str, name: str, folder: int, totals: Totals) -> None:
    """One entry of a folder, by the folder's descriptor: what is put in its place meanwhile leads nowhere else."""
    try:
        found = os.lstat(name, dir_fd=folder)
        if stat.S_ISLNK(found.st_mode):
            _add_link(tar, inside, os.readlink(name, dir_fd=folder), found, totals)
        elif stat.S_ISREG(found.st_mode):
            with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
                _add_file(tar, inside, file, totals)
        else:
            totals.left_out += 1
    except (FileNotFoundError, PermissionError):  # it went while we looked, or is somebody else's
        totals.left_out += 1


def _add_file(tar: tarfile.TarFile, inside: str, file: IO[bytes], totals: Totals) -> None:
    """As long as it was when it was opened; a log may grow meanwhile."""
    entry = _entry(inside, os.fstat(file.fileno()), tarfile.REGTYPE)
    try:
        tar.addfile(entry, file)
    except OSError as error:
        if "unexpected end" not in str(error):
            raise
        raise ValueError(f"{inside.removeprefix(CONTENT).strip('/')} shrank while it was read; try again") from None
    totals.files, totals.size_bytes = totals.files + 1, totals.size_bytes + entry.size


def _add_link(tar: tarfile.TarFile, inside: str, target: str, found: os.stat_result, totals: Totals) -> None:
    if _leads_outside(inside, target):
        totals.left_out += 1
        return
    entry = _entry(inside, found, tarfile.SYMTYPE)
    entry.linkname = target
    tar.addfile(entry)


def _entry(inside: str, found: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(inside)
    entry.type, entry.mtime = kind, int(found.st_mtime)
    entry.mode = stat.S_IMODE(found.st_mode) & 0o755 | 0o600
    entry.size = found.st_size if kind == tarfile.REGTYPE else 0
    return entry


def _leads_outside(inside: str, target: str) -> bool:
    """Whether a link might lead out of the content: absolute, too many "..", or ".." behind a name, which may be a link itself."""
    parts = target.split("/")
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return target.startswith("/") or ups > inside.count("/") - 1 or ".." in parts[ups:]


def unpack(file: IO[bytes], into: Path) -> tuple[Path, Totals]:
    """Unpacks below the empty folder `into`, and returns where the content is. Blocks. Raises BadArchive, OSError."""
    totals, links = Totals(), list[tuple[str, str]]()
    try:
        for number, (tar, entry) in enumerate(tar_members.members(file)):
            if number >= MAX_ENTRIES:
                raise BadArchive(f"it has more than {MAX_ENTRIES} entries")
            _unpack(tar, entry, into, links, totals)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise BadArchive(f"it is no whole archive: {error}") from None
    made = {name for name, _ in links}
    for name, target in links:
        if any(str(parent) in made for parent in Path(name).parents):
            raise BadArchive(f"{name!r} lies behind a link")
        os.symlink(target, into / name)
    if not os.path.lexists(into / CONTENT):
        raise BadArchive("it is empty")
    return into / CONTENT, totals


def _unpack(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, into: Path, links: list[tuple[str, str]], totals: Totals
) -> None:
    parts = entry.name.split("/")
    if parts[0] != CONTENT or {"", ".", ".."} & set(parts) or "\0" in entry.name:
        raise BadArchive(f"{entry.name!r} is no name in such an archive")
    path = into / entry.name
    if entry.isdir():
        path.mkdir(mode=0o700 | (entry.mode & 0o755))
    elif entry.issym():
        if _leads_outside(entry.name, entry.linkname):
            raise BadArchive(f"{entry.name!r} is a link that leads outside")
        links.append((entry.name, entry.linkname))
    elif entry.isreg():
        _unpack_file(tar, entry, path)
        totals.files, totals.size_bytes = totals.files + 1, totals.size_bytes + entry.size
    else:
        raise BadArchive(f"{entry.name!r} is neither a file nor a folder nor a link")


def _unpack_file(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(entry)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600 | (entry.mode & 0o755))
    with open(descriptor, "wb") as target:
        if source is not None:
            shutil.copyfileobj(source, target, _COPY_BYTES)
        if target.tell() != entry.size:
            raise BadArchive(f"{entry.name!r} has {target.tell()} bytes of {entry.size}")
    os.utime(path, (entry.mtime, entry.mtime))


def put_in_place(content: Path, target: Path, *, replace: bool) -> None:
    """Moves what was unpacked beside `target` to it, whole or not at all. Raises FileExistsError for what may not be replaced."""
    if not os.path.lexists(target) or not (target.is_dir() and not target.is_symlink()):
        if content.is_dir() and os.path.lexists(target):
            raise FileExistsError(f"{target} is a file, what is copied is a folder")
        os.replace(content, target)
        return
    if not replace:
        raise FileExistsError(f"{target} exists already")
    aside = content.parent / "replaced"
    os.rename(target, aside)
    try:
        os.rename(content, target)
    except OSError:
        os.rename(aside, target)
        raise


class _Writer:
    """What tarfile takes for a file."""

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(data)
        return len(data)


def reader_of(blocks: Iterator[bytes]) -> IO[bytes]:
    """A file that reads these blocks, for `unpack`."""
    return io.BufferedReader(_Blocks(blocks), _COPY_BYTES)


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._rest = block
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
