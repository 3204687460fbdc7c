"""The file beside a log that says when its lines were written: `rank-0.times` beside `rank-0.log`, at most 256 KiB."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from whaleflux_agent.core.line_times import MAX_MARKS, Mark, thinned
from whaleflux_agent.runtime import logs
from whaleflux_agent.runtime.job_files import opener
from whaleflux_agent.state import write

_MARK = struct.Struct("<QQ")  # bytes, nanoseconds


def times_path(log: Path) -> Path:
    return log.with_suffix(".times")


def mark(log: Path) -> None:
    """Notes how long `log` is now and when it was last written to; nothing where that is known."""
    try:
        found = os.stat(log)
    except OSError:
        return
    path = times_path(log)
    marks, last = _size(path), _last(path)
    if last is not None and found.st_size < last.end_bytes:  # emptied for want of holes
        path.unlink()
    elif last is not None and found.st_size == last.end_bytes:
        return
    elif marks >= MAX_MARKS:
        _rewrite(path, thinned(_marks(path), logs.start_of(log)))
    if found.st_size:
        with open(path, "ab", opener=opener) as file:
            file.truncate(_size(path) * _MARK.size)  # of a mark that was cut off by a crash
            file.write(_MARK.pack(found.st_size, found.st_mtime_ns))


class LineTimes:
    """Reads the times of one log; again when there are more."""

    def __init__(self, log: Path) -> None:
        self._log, self._path = log, times_path(log)
        self._read_at = (0, 0)
        self._known: list[Mark] = []

    def marks(self) -> list[Mark]:
        """All that are known now, oldest first; the last one for what was written since. Blocks."""
        try:
            found = os.stat(self._path)
            if (found.st_ino, found.st_size) != self._read_at:
                self._read_at, self._known = (found.st_ino, found.st_size), _marks(self._path)
        except OSError:
            self._known = []
        return [*self._known, *self._newest()]

    def _newest(self) -> list[Mark]:
        try:
            found = os.stat(self._log)
        except OSError:
            return []
        newer = not self._known or found.st_size > self._known[-1].end_bytes
        return [Mark(found.st_size, found.st_mtime_ns)] if newer else []


def _size(path: Path) -> int:
    """In marks."""
    return path.stat().st_size // _MARK.size if path.exists() else 0


def _last(path: Path) -> Mark | None:
    if not (size := _size(path)):
        return None
    with open(path, "rb", opener=opener) as file:
        file.seek((size - 1) * _MARK.size)
        return Mark(*_MARK.unpack(file.read(_MARK.size)))


def _marks(path: Path) -> list[Mark]:
    with open(path, "rb", opener=opener) as file:
        whole = file.read(2 * MAX_MARKS * _MARK.size)
    return [Mark(*found) for found in _MARK.iter_unpack(whole[: len(whole) // _MARK.size * _MARK.size])]


def _rewrite(path: Path, marks: list[Mark]) -> None:
    write(path, b"".join(_MARK.pack(*mark) for mark in marks))
