"""Files of copies on the disk: their room taken, their bytes written and compared, and settled so that a later write shows. Blocking."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from whaleflux.data.manifest import Chunk, Manifest

PIECE_BYTES = 256 << 10  # read, hashed and written at once: it stays in a core's own cache
FIXED_NS = 978307200 * 10**9  # when every file was last written, as far as its times say: a later write shows


def finish(partial: Path, target: Path, reader: int = 0) -> None:
    """Moves what was pulled to `target`, once all of it is on the disk; `reader`: the group that may read it, 0: everybody."""
    files = partial / "files"
    _settle_all(files, reader)
    shutil.rmtree(target, ignore_errors=True)
    files.rename(target)
    sync(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


def finish_beside(partial: Path, target: Path, reader: int = 0) -> None:
    """The same for files that come to those which are in `target` already, each whole."""
    files = partial / "files"
    files.mkdir(parents=True, exist_ok=True)
    _settle_all(files, reader)
    for root, _, found in os.walk(files):
        folder = target / os.path.relpath(root, files)
        folder.mkdir(parents=True, exist_ok=True)
        for name in found:
            os.replace(os.path.join(root, name), folder / name)
    _settle_all(target, reader, files=False)
    sync(target.parent)
    shutil.rmtree(partial, ignore_errors=True)


def _settle_all(folder: Path, reader: int, *, files: bool = True) -> None:
    for root, _, found in os.walk(folder, topdown=False):
        for name in found if files else ():
            if not os.path.islink(os.path.join(root, name)):
                _settle(Path(root, name), reader)
        if reader:
            os.chown(root, -1, reader)
        os.chmod(root, 0o750 if reader else 0o755)
        sync(Path(root))


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
    digest, left, buffer = hashlib.sha256(), chunk.size_bytes, memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(chunk.offset)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def write(number: int, data: memoryview, at: int) -> None:
    """All of it there. Raises OSError."""
    while data:
        count = os.pwrite(number, data, at)
        data, at = data[count:], at + count


def copy_stretch(source: Path, source_at: int, target: Path, target_at: int, size_bytes: int) -> None:
    """Bytes of one file into another of the same disk, which shares them where it can (reflinks). Raises OSError, also where they end."""
    with open(source, "rb", buffering=0) as giving, open(target, "r+b", buffering=0) as taking:
        copied = 0
        while copied < size_bytes:
            at = (source_at + copied, target_at + copied)
            count = os.copy_file_range(giving.fileno(), taking.fileno(), size_bytes - copied, *at)
            if not count:
                raise OSError(errno.ENODATA, "ends before its end", str(source))
            copied += count


def sync(folder: Path) -> None:
    """A folder's names, on the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def reserve(path: Path, size_bytes: int) -> None:
    """A file with all of its room: a sparse one would hide that there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        if size_bytes:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
