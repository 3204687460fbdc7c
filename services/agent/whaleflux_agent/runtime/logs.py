"""Logs of ranks: files that the ranks themselves append to, bounded by punching holes into their beginnings.

No pipe lies between a rank and its log, so that the agent may die without blocking anybody. A log keeps its newest
half of the bound or more; offsets never move, so followers are not disturbed. Where the file system cannot punch
holes, a log over the bound is emptied.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from whaleflux_agent.core.line_times import Mark, end_before, mark_of
from whaleflux_agent.core.log_lines import MAX_LINE_BYTES, LineCutter
from whaleflux_agent.runtime.job_files import opener

CHUNK_BYTES = 64 * 1024
DEFAULT_LIMIT_BYTES = 64 << 20
_BLOCK_BYTES = 4096
_ROOM_BYTES = 1024  # for the newlines that cutting adds
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
    descriptor = opener(str(path), os.O_RDWR)
    try:
        if keep_from > 0 and _libc.fallocate(descriptor, _PUNCH_KEEPING_SIZE, 0, keep_from) != 0:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def start_of(path: Path) -> int:
    """Offset of the first byte that is kept, at the next whole line when older ones were freed."""
    with open(path, "rb", opener=opener) as file:
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
    with open(path, "rb", opener=opener) as file:
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
        with open(path, "rb", opener=opener) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start_of(path), size - 4 * limit_chars))
            text = file.read().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""
    if len(text) <= limit_chars:
        return text
    cut = text[-limit_chars:]
    return cut.partition("\n")[2] or cut


class Lines(NamedTuple):
    """Whole lines, at most 64 KiB."""

    data: bytes
    behind: int  # offset where what comes behind them begins
    at_ns: int = 0  # Unix time by which they had been written; 0: not asked for
    progress: bool = False  # one state of a progress bar, which what comes next replaces


async def follow(
    path: Path,
    *,
    more: Callable[[], bool],
    tail_lines: int = 0,
    after: int | None = None,
    since_ns: int = 0,
    times: Callable[[], Sequence[Mark]] | None = None,
    pause_s: float = 0.2,
    progress_every_s: float = 1.0,
) -> AsyncGenerator[Lines, None]:
    """The lines of a log as they come.

    From the tail, or from what was written at `since_ns` on, or from `after` on, which is the offset behind what is known; goes on
    while `more()` says that the log may still grow. With `times` the lines of each piece were written at one time. States of a
    progress bar come one in `progress_every_s`.
    """
    cutter, now_s = LineCutter(), asyncio.get_running_loop().time
    marks = await asyncio.to_thread(times) if times else ()
    offset = after if after is not None else await asyncio.to_thread(_start, path, tail_lines, marks, since_ns)
    progress_at_s, at_ns = now_s(), 0
    while True:
        growing = more()  # asked before reading: what was written before the end is still delivered
        marks = await asyncio.to_thread(times) if times else ()
        written = mark_of(marks, offset + 1)
        data, offset, gap = await asyncio.to_thread(_read, path, offset, written)
        at_ns = written.at_ns if written and data else at_ns
        lines = (cutter.flush() if gap else b"") + cutter.feed(data)
        if not data and not growing:
            lines += cutter.flush()
        if lines:
            yield Lines(lines, offset - cutter.held_bytes, at_ns)
        if growing and now_s() >= progress_at_s:
            progress_at_s = now_s() + progress_every_s
            if state := cutter.progress():
                yield Lines(state, offset - cutter.held_bytes, at_ns, progress=True)
        if not data and not growing:
            return
        if not data:
            await asyncio.sleep(pause_s)


def _start(path: Path, tail_lines: int, marks: Sequence[Mark], since_ns: int) -> int:
    if not path.exists():
        return 0
    first = tail_start(path, tail_lines)
    return max(first, line_start(path, end_before(marks, since_ns))) if since_ns else first


def line_start(path: Path, offset: int) -> int:
    """Where the line begins that goes on at `offset`; `offset` itself where a line begins there, or one is too long."""
    with open(path, "rb", opener=opener) as file:
        begin = max(0, offset - MAX_LINE_BYTES)
        file.seek(begin)
        before = file.read(offset - begin)
    if (newline := before.rfind(b"\n")) >= 0:
        return begin + newline + 1
    return 0 if begin == 0 else offset


def _read(path: Path, offset: int, written: Mark | None = None) -> tuple[bytes, int, bool]:
    """Bytes from `offset` on, of `written` only, where the next begin, and whether some were freed before they were read.

    After such a gap the bytes begin with a whole line.
    """
    gap = False
    try:
        with open(path, "rb", opener=opener) as file:
            size = file.seek(0, os.SEEK_END)
            if offset > size:  # emptied for want of holes
                offset, gap = 0, True
            if size and offset < os.lseek(file.fileno(), 0, os.SEEK_DATA):
                offset, gap = start_of(path), True
            file.seek(offset)
            most = CHUNK_BYTES - MAX_LINE_BYTES - _ROOM_BYTES
            data = file.read(min(most, max(0, written.end_bytes - offset)) if written else most)
    except OSError:
        return b"", offset, False
    return data, offset + len(data), gap
