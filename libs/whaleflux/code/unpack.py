"""Opening an archive that nobody is trusted to have made: nothing of it lands outside of its folder, or grows without bound."""

from __future__ import annotations

import gzip
import hashlib
import os
import posixpath
import shutil
import tarfile
from pathlib import Path
from typing import IO, cast

from whaleflux import tar_members
from whaleflux.code.limits import MAX_FILES, MAX_UNPACKED_BYTES

_MAX_MEMBERS = 2 * MAX_FILES  # folders come beside files
_DAMAGED = (
    gzip.BadGzipFile,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)  # all else that is an OSError is the disk's


class UnpackError(Exception):
    """The archive is damaged, or holds what may not be in one; the text says what."""


def digest_of(archive: Path) -> str:
    """sha256 of a file, hex. Blocks."""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Makes `folder` hold what the archive holds, and nothing else; whole or not at all. Blocks.

    Raises UnpackError, and OSError where the disk does not take it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (partial, folder):  # of an agent that went in the middle, or before anything ran
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o755)
    try:
        _extract(archive, partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _extract(archive: Path, folder: Path) -> None:
    with gzip.open(archive) as content:
        try:
            _extract_members(cast("IO[bytes]", content), folder)
        except Exception as error:  # what tarfile and zlib make of such an archive is not for them to say in advance
            if isinstance(error, UnpackError) or (isinstance(error, OSError) and not isinstance(error, _DAMAGED)):
                raise
            raise UnpackError(f"{type(error).__name__}: {error}"[:300]) from None


def _extract_members(content: IO[bytes], folder: Path) -> None:
    """Links are made last, so that nothing is written through one."""
    links: dict[str, str] = {}
    count = size_bytes = 0
    for packed, member in tar_members.members(content):
        count, size_bytes = count + 1, size_bytes + member.size
        if count > _MAX_MEMBERS or size_bytes > MAX_UNPACKED_BYTES:
            raise UnpackError(f"holds more than {MAX_FILES:,} files or {MAX_UNPACKED_BYTES:,} bytes")
        if not (member.isreg() or member.isdir() or member.issym()):
            raise UnpackError(f"{member.name[:200]!r} is neither a file nor a folder nor a symbolic link")
        name = _inside(member.name, member.name)
        if member.issym():
            links[name] = _checked_target(name, member.linkname)
        elif member.isdir():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name).chmod(member.mode & 0o755 | 0o700)
        else:
            _write(packed, member, folder / name)
    for name, target in links.items():
        if not links.keys().isdisjoint(map(str, Path(name).parents)):
            raise UnpackError(f"{name[:200]!r} lies behind a link")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, folder / name)


def _inside(path: str, member: str) -> str:
    """The path in its shortest form. Raises UnpackError where it leads out of the folder: tarfile's own filter came with 3.11.4."""
    shortest = posixpath.normpath(path)
    if posixpath.isabs(path) or shortest.split("/", 1)[0] == "..":
        raise UnpackError(f"{member[:200]!r} leads out of its folder")
    return shortest


def _checked_target(name: str, target: str) -> str:
    """Where a link may lead. Behind another link ".." is not the folder that the text says, so it stands at the beginning only."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    climbs = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    if posixpath.isabs(target) or ".." in parts[climbs:]:
        raise UnpackError(f"{name[:200]!r} is a link that leads out of its folder, or may")
    _inside(posixpath.join(posixpath.dirname(name), target), name)
    return target


def _write(packed: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """A file that is the extractor's own, whatever owner or special bits the archive says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = packed.extractfile(member)
    assert content is not None  # of a regular file
    with path.open("xb") as file:
        shutil.copyfileobj(content, file)
    path.chmod(member.mode & 0o755 | 0o600)
    os.utime(path, (member.mtime, member.mtime))
