"""Packing a folder: the same content gives the same archive, byte for byte, on any machine with the same zlib.

Sorted, without owners and times (all files are from 1980, which zip tools bear); of modes only "executable" is kept.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import posixpath
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from whaleflux.code.ignore import Found, LeftOut, walk
from whaleflux.code.limits import CHUNK_BYTES, MAX_FILES, MAX_PACKED_BYTES, MAX_UNPACKED_BYTES
from whaleflux.errors import FieldViolation, InvalidArgument

_TIME_S = 315_532_800  # 1980-01-01, UTC
_LEVEL = 5  # of gzip: nearly as small as 9 in half of the time
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Contents:
    """What of a folder travels, and what stays behind."""

    root: Path
    files: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def biggest(self, most: int = _SHOWN) -> list[Found]:
        """The largest files first."""
        return sorted(self.files, key=lambda file: (-file.size_bytes, file.path))[:most]


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive in a temporary file, which goes when it is closed."""

    digest: str  # sha256, hex
    size_bytes: int
    file: IO[bytes]

    def chunks(self, begin: int = 0) -> Iterator[bytes]:
        """The archive, piece by piece."""
        self.file.seek(begin)
        while chunk := self.file.read(CHUNK_BYTES):
            yield chunk


def contents(root: Path) -> Contents:
    """Looks at a folder. Raises InvalidArgument for links that lead out of it and for folders that are too large."""
    if not root.is_dir():
        raise InvalidArgument(FieldViolation("workdir", f"{root} is not a folder"))
    files: list[Found] = []
    left_out: list[LeftOut] = []
    size_bytes = 0
    for one in walk(root):
        if isinstance(one, LeftOut):
            left_out.append(one)
            continue
        _check_link(one)
        files.append(one)
        size_bytes += one.size_bytes
        if len(files) > 50 * MAX_FILES:  # somebody's whole disk: what was seen is enough to say so
            break
    if len(files) > MAX_FILES:
        raise _too_large(files, f"more than {MAX_FILES:,} files", count=True)
    if size_bytes > MAX_UNPACKED_BYTES:
        raise _too_large(files, f"{shown_size(size_bytes)}, at most {shown_size(MAX_UNPACKED_BYTES)}")
    return Contents(root, tuple(files), tuple(left_out))


def pack(found: Contents) -> Packed:
    """The archive. Raises InvalidArgument when it is too large, or a file changed or went meanwhile."""
    file = tempfile.TemporaryFile(prefix="whaleflux-code-")  # noqa: SIM115 - closed by whoever sends it
    try:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0) as compressed:
            with tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for one in found.files:
                    _add(archive, found.root, one)
                    _check_packed(found, file.tell())
        _check_packed(found, file.tell())
        return Packed(_digest(file), file.tell(), file)
    except BaseException:
        file.close()
        raise


def _add(archive: tarfile.TarFile, root: Path, one: Found) -> None:
    info = tarfile.TarInfo(one.path)
    info.mtime = _TIME_S
    if one.target is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, one.target, 0o777
        archive.addfile(info)
        return
    info.size, info.mode = one.size_bytes, 0o755 if one.executable else 0o644
    try:
        with open(root / one.path, "rb") as content:
            archive.addfile(info, content)
    except OSError as error:
        why = error.strerror or "it became shorter while it was read"
        raise InvalidArgument(FieldViolation("workdir", f"{one.path}: {why}; submit again")) from None


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    digest: Any = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return str(digest.hexdigest())


def _check_packed(found: Contents, packed_bytes: int) -> None:
    if packed_bytes > MAX_PACKED_BYTES:
        raise _too_large(found.files, f"more than {shown_size(MAX_PACKED_BYTES)} packed")


def _check_link(one: Found) -> None:
    if one.target is None:
        return
    target = posixpath.normpath(posixpath.join(posixpath.dirname(one.path), one.target))
    if os.path.isabs(one.target) or target == ".." or target.startswith("../"):
        fix = "use a relative link to something inside, or leave it out with a line in .whalefluxignore"
        raise InvalidArgument(
            FieldViolation("workdir", f"{one.path} is a link out of the folder, to {one.target}; {fix}")
        )


def _too_large(files: Iterable[Found], what: str, *, count: bool = False) -> InvalidArgument:
    """Names what takes most room, and the way out."""
    weight: Counter[str] = Counter()
    for file in files:
        top = file.path.split("/", 2)
        weight["/".join(top[:2]) + "/" if len(top) > 2 else file.path if len(top) == 1 else top[0] + "/"] += (
            1 if count else file.size_bytes
        )
    biggest = weight.most_common(_SHOWN)
    shown = ", ".join(
        f"{name} ({number:,} files)" if count else f"{name} ({shown_size(number)})" for name, number in biggest
    )
    fix = "leave out what the job does not need with lines in .whalefluxignore, or take data from a dataset"
    return InvalidArgument(FieldViolation("workdir", f"has {what}; most of it: {shown}; {fix}"))


def shown_size(size_bytes: int) -> str:
    """Bytes as people read them."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 10**5 else f"{size_bytes / 1e3:.1f} kB"


def summary(found: Contents) -> str:
    """Number and size, such as: 12 files, 0.3 MB."""
    count = len(found.files)
    return f"{count:,} file{'s' * (count != 1)}, {shown_size(found.size_bytes)}"


def ignored(left_out: Sequence[LeftOut]) -> str:
    """What stays behind, in one line; "" for nothing."""
    shown = ", ".join(one.path for one in left_out[:8])
    return shown + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
