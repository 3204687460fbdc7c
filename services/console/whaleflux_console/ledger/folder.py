"""Where the ledger's files lie: whole files that are written once, read and deleted, by path with `/` between folders.

A file that `write` returned from is there after a crash and a loss of power, and is whole: nobody ever sees half of one. What cannot be
reached is never taken for absent: `Absent` is proof, `Unavailable` is no answer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from whaleflux.errors import Unavailable

PARTIAL = ".partial"


class Absent(Exception):
    """There is no such file: the folder was reached and says so."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file as it lies there."""

    path: str
    bytes: int


class Folder(Protocol):
    """All calls block: call them in a thread. Raises Unavailable when there is no answer or no room."""

    def read(self, path: str) -> bytes:
        """The whole file. Raises Absent."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Returns when it is durable; one that is there is replaced at once."""
        ...

    def delete(self, path: str) -> None:
        """Removing what is not there is no error."""
        ...

    def list(self, prefix: str) -> tuple[Found, ...]:
        """Every whole file below the folder `prefix`, by path."""
        ...

    def local(self, path: str) -> Path | None:
        """Where other programs of this machine read the file; None: not on this machine."""
        ...


class LocalFolder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        with _explained(f"read {path}"):
            try:
                return (self._root / path).read_bytes()
            except FileNotFoundError:
                raise Absent(path) from None

    def write(self, path: str, content: bytes) -> None:
        target = self._root / path
        partial = target.with_name(target.name + PARTIAL)
        with _explained(f"write {path}"):
            self._make(target.parent)
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
            _sync(target.parent)

    def _make(self, folder: Path) -> None:
        """Makes a folder and those above it, each durable in its parent: a file is no more durable than the way to it."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)

    def delete(self, path: str) -> None:
        with _explained(f"delete {path}"):
            (self._root / path).unlink(missing_ok=True)

    def list(self, prefix: str) -> tuple[Found, ...]:
        with _explained(f"list {prefix}"):
            return tuple(sorted(self._walk(prefix), key=lambda found: found.path))

    def local(self, path: str) -> Path | None:
        return self._root / path

    def _walk(self, prefix: str) -> Iterator[Found]:
        for place, _, names in os.walk(self._root / prefix, onerror=_raise_unless_absent):
            for name in names:
                if not name.endswith(PARTIAL):
                    file = Path(place, name)
                    yield Found(str(PurePosixPath(file.relative_to(self._root))), file.stat().st_size)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"the ledger's folder: could not {what}: {error.strerror or error}; free room or mend the folder, it is tried again",
            retry_after_s=10.0,
        ) from error
