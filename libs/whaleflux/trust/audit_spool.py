"""Where records wait until the bus has them. On disk they survive the process.

A change that was answered is in the trail, whatever kills the process next. Records are in the kernel's hands before the answer is sent,
not on the platter: a power cut takes the last moments of them, as it does of logs.

    <folder>/<role>-<replica>/<start>/<number>.spool     4 bytes of length, then a link; the highest bit: a head, up to which all is shipped;
                                                         a length of 0: nothing more

A start takes what other starts of the same replica left, once nobody holds their lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from whaleflux.trust.audit_chain import head_of
from whaleflux.v1 import audit_pb2 as pb

SEGMENT_BYTES = 1 << 20  # of disk that each process takes at its start
_HEAD = 1 << 31
_LOCK = "lock"


class Spool(Protocol):
    """First in, first out."""

    @property
    def size_bytes(self) -> int:
        """Of what waits."""

    def append(self, link: bytes) -> None:
        """Keeps it; raises OSError where there is no room."""

    def peek(self, most: int, most_bytes: int) -> list[bytes]:
        """The first ones, at least one if there is any; they stay."""

    def drop(self, count: int, shipped: pb.AuditHead) -> None:
        """Forgets the first `count`: the bus has them, up to `shipped`."""

    def close(self) -> None:
        """What waits stays where it is."""


class MemorySpool:
    """Lost with the process."""

    def __init__(self) -> None:
        self._links: deque[bytes] = deque()
        self.size_bytes = 0

    def append(self, link: bytes) -> None:
        self._links.append(link)
        self.size_bytes += len(link)

    def peek(self, most: int, most_bytes: int) -> list[bytes]:
        return first_of(self._links, most, most_bytes)

    def drop(self, count: int, shipped: pb.AuditHead) -> None:
        for _ in range(count):
            self.size_bytes -= len(self._links.popleft())

    def close(self) -> None:
        pass


class FileSpool:
    """One start's folder. What is read back is kept in memory only while the bus is asked to take it.

    Segments are mapped, so that a record is in the kernel's hands without a system call: one would let other threads of the process run first.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700)
        self._folder = folder
        self._lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._segments: deque[Path] = deque()
        self._made = self.size_bytes = self._length = 0
        self._read: deque[bytes] = deque()  # of the first segment, not dropped yet
        self._offset = 0  # up to which the first segment was read
        self._fd, self._map = self._next_segment(0)

    def append(self, link: bytes) -> None:
        self._write(len(link), link)
        self.size_bytes += len(link)

    def peek(self, most: int, most_bytes: int) -> list[bytes]:
        if not self._read:
            self._fill()
        return first_of(self._read, most, most_bytes)

    def drop(self, count: int, shipped: pb.AuditHead) -> None:
        for _ in range(count):
            self.size_bytes -= len(self._read.popleft())
        if not self.size_bytes:
            self._empty()
        mark = shipped.SerializeToString()
        with contextlib.suppress(OSError):  # then it is shipped again, and known as the same
            self._write(_HEAD | len(mark), mark)

    def close(self) -> None:
        self._end_segment()
        os.close(self._lock)

    def _write(self, begin: int, frame: bytes) -> None:
        """The length last: a frame of which it is missing was not written."""
        end = self._length + 4 + len(frame)
        if end > len(self._map):
            following = self._next_segment(4 + len(frame))
            self._end_segment()
            self._fd, self._map = following
            self._length, end = 0, 4 + len(frame)
        self._map[self._length + 4 : end] = frame
        self._map[self._length : self._length + 4] = begin.to_bytes(4, "big")
        self._length = end

    def _next_segment(self, least: int) -> tuple[int, mmap.mmap]:
        """Raises OSError where there is no room: what is written into a mapping has to have its blocks before."""
        path = self._folder / f"{self._made + 1:08d}.spool"
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(fd, 0, size := max(SEGMENT_BYTES, least))
            mapped = mmap.mmap(fd, size)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        self._made += 1
        self._segments.append(path)
        return fd, mapped

    def _end_segment(self) -> None:
        self._map.close()
        os.ftruncate(self._fd, self._length)
        os.close(self._fd)

    def _fill(self) -> None:
        """Reads on in the first segment that has more; those that were read whole are deleted."""
        while True:
            whole = 0
            for end, is_head, frame in _frames(self._unread()):
                whole = end
                if not is_head:
                    self._read.append(frame)
            self._offset += whole
            if self._read or len(self._segments) == 1:
                return
            self._segments.popleft().unlink()
            self._offset = 0

    def _unread(self) -> bytes:
        if len(self._segments) == 1:
            return self._map[self._offset : self._length]
        with self._segments[0].open("rb") as segment:
            segment.seek(self._offset)
            return segment.read()

    def _empty(self) -> None:
        """Nothing waits: the segments are given up, so that the folder stays small."""
        while len(self._segments) > 1:
            self._segments.popleft().unlink()
        self._map[:4] = bytes(4)  # first, so that no frame of before follows one of after
        self._map[: self._length] = bytes(self._length)
        self._length = self._offset = 0


class Left:
    """What one start of the replica left: its links that may not have been shipped, and its head."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder, self._lock = folder, lock
        self.head: pb.AuditHead | None = None
        found: list[tuple[int, bytes]] = []
        shipped = 0
        for is_head, frame in _all_frames(folder):
            with contextlib.suppress(DecodeError):
                head = pb.AuditHead.FromString(frame) if is_head else head_of(frame)
                self.head = head if self.head is None or head.sequence >= self.head.sequence else self.head
                if is_head:
                    shipped = max(shipped, head.sequence)
                else:
                    found.append((head.sequence, frame))
        self.links = deque(link for sequence, link in found if sequence > shipped)

    def forget(self) -> None:
        """All of it is shipped."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def left_behind(folder: Path) -> Iterator[Left]:
    """What earlier starts left below the replica's folder, oldest first; not those that are still running."""
    for start in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            lock = os.open(start / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            yield Left(start, lock)


def _all_frames(folder: Path) -> Iterator[tuple[bool, bytes]]:
    for segment in sorted(folder.glob("*.spool")):
        for _, is_head, frame in _frames(segment.read_bytes()):
            yield is_head, frame


def _frames(content: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """Each whole frame with where it ends; what a killed process began to write is none."""
    at = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if not length:  # room that was never written to
            return
        end = at + 4 + (length & ~_HEAD)
        if end > len(content):
            return
        yield end, bool(length & _HEAD), content[at + 4 : end]
        at = end


def first_of(links: deque[bytes], most: int, most_bytes: int) -> list[bytes]:
    """The first ones that fit into a message, at least one if there is any; they stay."""
    found: list[bytes] = []
    size = 0
    for link in links:
        size += len(link)
        if found and (len(found) >= most or size > most_bytes):
            break
        found.append(link)
    return found
