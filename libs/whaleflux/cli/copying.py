"""`whaleflux cp`: files of a job to this machine and back, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whaleflux import file_archive
from whaleflux.cli import output
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.file_archive import BadArchive, Totals
from whaleflux.names import last
from whaleflux.quantities import shown_bytes
from whaleflux.sdk.client import AsyncClient
from whaleflux.sdk.sessions import JobSession, SessionOver
from whaleflux.v1 import scheduler_pb2

_SHOW_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Remote:
    """JOB:PATH."""

    job: str
    path: str


def parse(text: str) -> Remote | None:
    """JOB:PATH, or None for a path of this machine: one that has no colon, or begins with / or . before it."""
    job, colon, path = text.partition(":")
    return Remote(job, path) if colon and job and job[0] not in "/.~" else None


class Progress:
    """Bytes so far on one line, where a terminal shows it."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._began_s = self._shown_s = time.monotonic()
        self._shown = False

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        now_s = time.monotonic()
        if now_s - self._shown_s >= _SHOW_EVERY_S and sys.stderr.isatty():
            self._shown_s, self._shown = now_s, True
            of = f" of {shown_bytes(self._total_bytes)}" if self._total_bytes else ""
            output.progress(f"{shown_bytes(self._done_bytes)}{of}, {self.rate()}")

    def rate(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._began_s)
        return f"{self._done_bytes / seconds / 1e6:.1f} MB/s"

    def clear(self) -> None:
        if self._shown:
            output.progress("")


async def fetch(client: AsyncClient, source: scheduler_pb2.AttachOpen, local: str, *, replace: bool) -> None:
    """From the job to this machine."""
    target = _local_target(source, local)
    folder = Path(tempfile.mkdtemp(prefix=".whaleflux-cp-", dir=target.parent))
    try:
        async with JobSession(client.scheduler, source) as session:
            progress = Progress(session.opened.size_bytes)
            content, totals = await asyncio.to_thread(_unpack, session, asyncio.get_running_loop(), folder, progress)
            progress.clear()
            _check_whole(totals, session.result)
            try:
                file_archive.put_in_place(content, target, replace=replace)
            except FileExistsError as exists:
                raise InvalidArgument(
                    FieldViolation("LOCAL", f"{exists}; choose another place, or say --replace")
                ) from None
            assert session.result is not None
            _say(totals, str(target), progress, session.result.left_out)
    except BadArchive as bad:
        raise FailedPrecondition(f"what came is damaged, nothing was kept: {bad}; run it again") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(
    session: JobSession, loop: asyncio.AbstractEventLoop, folder: Path, progress: Progress
) -> tuple[Path, Totals]:
    """In a thread."""
    blocks = _blocks(session, loop, progress)
    unpacked = file_archive.unpack(file_archive.reader_of(blocks), folder)
    for _ in blocks:  # up to the agent's last word
        pass
    return unpacked


def _blocks(session: JobSession, loop: asyncio.AbstractEventLoop, progress: Progress) -> Iterator[bytes]:
    responses = session.responses()

    async def block() -> bytes:
        async for response in responses:
            if response.data:
                return response.data
        return b""

    while data := asyncio.run_coroutine_threadsafe(block(), loop).result():
        progress.add(len(data))
        yield data


async def send(client: AsyncClient, local: str, target: scheduler_pb2.AttachOpen) -> None:
    """From this machine to the job."""
    source, loop = Path(os.path.realpath(local)), asyncio.get_running_loop()
    try:
        if source.exists() and not (source.is_file() or source.is_dir()):
            raise ValueError("neither a file nor a folder; write what comes out of it into a file first")
        total_bytes = await asyncio.to_thread(file_archive.size_of, source)
    except (OSError, ValueError) as error:
        raise _unreadable(local, error) from None
    async with JobSession(client.scheduler, target) as session:
        progress = Progress(total_bytes)
        receiving = asyncio.create_task(_until_over(session))

        def write(data: bytes) -> None:
            asyncio.run_coroutine_threadsafe(session.send(data), loop).result()
            progress.add(len(data))

        totals = Totals()
        with contextlib.suppress(SessionOver):  # `receiving` raises why
            try:
                totals = await asyncio.to_thread(file_archive.pack, source, write)
            except (OSError, ValueError) as error:
                raise _unreadable(local, error) from None
            await session.end_input()
        await receiving
        progress.clear()
        _check_whole(totals, session.result)
    assert session.result is not None
    _say(totals, f"{session.result.path} on {session.opened.node}", progress, totals.left_out)


def _unreadable(local: str, error: OSError | ValueError) -> InvalidArgument:
    why = getattr(error, "strerror", None) or error
    return InvalidArgument(FieldViolation("LOCAL", f"{local!r} cannot be read ({why})"))


async def _until_over(session: JobSession) -> None:
    async for _ in session.responses():
        pass


def _check_whole(totals: Totals, result: scheduler_pb2.AttachResult | None) -> None:
    """Raises BadArchive when the two sides counted differently."""
    if result is None or (totals.files, totals.size_bytes) != (result.files, result.size_bytes):
        raise BadArchive(f"{totals.files} files with {totals.size_bytes} bytes came, {result} were sent")


def _local_target(source: scheduler_pb2.AttachOpen, local: str) -> Path:
    """Where what comes is put: into a folder under its own name, else under the name given. Raises InvalidArgument."""
    target = Path(os.path.abspath(local))
    if target.is_dir() or local.endswith("/"):
        base = last(source.read.path.rstrip("/"))
        target /= last(source.name) if base in ("", ".", "..") else base
    if not target.parent.is_dir():
        raise InvalidArgument(FieldViolation("LOCAL", f"{str(target.parent)!r} is no folder; make it first"))
    return target


def _say(totals: Totals, where: str, progress: Progress, left_out: int) -> None:
    files = "1 file" if totals.files == 1 else f"{totals.files} files"
    without = f"; {left_out} left out (sockets, devices, links that lead outside)" if left_out else ""
    output.note(f"copied {files}, {shown_bytes(totals.size_bytes)}, {progress.rate()}, to {where}{without}")
