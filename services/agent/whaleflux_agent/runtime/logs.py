"""Logs of ranks: files that the ranks themselves append to, bounded by punching holes into their beginnings.

No pipe lies between a rank and its log, so that the agent may die without blocking anybody. A log keeps its newest
half of the bound or more; offsets never move, so followers are not disturbed. Where the file system cannot punch
holes, a log over the bound is emptied.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

CHUNK_BYTES = 64 * 1024
DEFAULT_LIMIT_BYTES = 64 << 20
_BLOCK_BYTES = 4096
_PUNCH_KEEPING_SIZE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def bound(path: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
    """Frees the oldest part of a log that occupies more than `limit_bytes` of disk."""
    try:
        found = os.stat(path)
    except OSError:
        return
    if found.st_blocks * 512 <= limit_bytes:
        return
    keep_from = (found.st_size - limit_bytes // 2) // _BLOCK_BYTES * _BLOCK_BYTES
    descriptor = os.open(path, os.O_RDWR)
    try:
        if keep_from > 0 and _libc.fallocate(descriptor, _PUNCH_KEEPING_SIZE, 0, keep_from) != 0:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def start_of(path: Path) -> int:
    """Offset of the first byte that is kept, at the next whole line when older ones were freed."""
    with open(path, "rb") as file:
        try:
            offset = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError:  # empty
            return 0
        if offset == 0:
            return 0
        file.seek(offset)
        return offset + len(file.readline(CHUNK_BYTES))


def tail_start(path: Path, lines: int) -> int:
    """Offset at which the last `lines` lines begin; all that is kept when there are fewer, or `lines` is 0."""
    first = start_of(path)
    if lines <= 0:
        return first
    with open(path, "rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        wanted = lines
        while position > first:
            size = min(CHUNK_BYTES, position - first)
            position -= size
            file.seek(position)
            block = file.read(size)
            if position + size == end and block.endswith(b"\n"):
                wanted += 1  # the newline that ends the last line begins none
            found = block.count(b"\n")
            if found >= wanted:
                return position + _nth_newline_from_end(block, wanted) + 1
            wanted -= found
    return first


def _nth_newline_from_end(block: bytes, number: int) -> int:
    at = len(block)
    for _ in range(number):
        at = block.rfind(b"\n", 0, at)
    return at


def last_text(path: Path, limit_chars: int = 2000) -> str:
    """The end of a log as text, whole lines where possible."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start_of(path), size - 4 * limit_chars))
            text = file.read().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""
    if len(text) <= limit_chars:
        return text
    cut = text[-limit_chars:]
    return cut.partition("\n")[2] or cut


async def follow(
    path: Path, *, tail_lines: int, more: Callable[[], bool], pause_s: float = 0.2
) -> AsyncGenerator[bytes, None]:
    """Chunks of at most 64 KiB from the tail on; goes on while `more()` says that the log may still grow."""
    offset = await asyncio.to_thread(_start, path, tail_lines)
    while True:
        growing = more()  # asked before reading: what was written before the end is still delivered
        chunk, offset = await asyncio.to_thread(_read, path, offset)
        if chunk:
            yield chunk
        elif growing:
            await asyncio.sleep(pause_s)
        else:
            return


def _start(path: Path, tail_lines: int) -> int:
    return tail_start(path, tail_lines) if path.exists() else 0


def _read(path: Path, offset: int) -> tuple[bytes, int]:
    """A chunk from `offset` on (or from the first byte kept, if that is later), cut at a line end if it is full."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if offset > size:  # emptied for want of holes
                offset = 0
            if size and offset < (first := os.lseek(file.fileno(), 0, os.SEEK_DATA)):
                offset = first
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
    except OSError:
        return b"", offset
    if len(chunk) == CHUNK_BYTES and b"\n" in chunk:
        chunk = chunk[: chunk.rindex(b"\n") + 1]
    return chunk, offset + len(chunk)
