"""The code of jobs on this node: pulled once from the scheduler, kept by its digest, unpacked afresh for each attempt."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.code.limits import DIGEST, MAX_PACKED_BYTES
from whaleflux.code.unpack import UnpackError, digest_of, unpack
from whaleflux.errors import StatusError, Unavailable
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import scheduler_pb2, scheduler_pb2_grpc
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.api import LaunchFailed

RETRY = Backoff(first_s=0.5, longest_s=10.0)
STREAM_S = 600.0  # of one download, which goes on behind what came
LONGEST_S = 3600.0  # of all of them together
_DAMAGED = 3  # downloads in a row that were not what they should be
_log = telemetry.get_logger("whaleflux.agent")

Tell = Callable[[str], Awaitable[None]]
"""Says what is waited for."""


@dataclass(slots=True)
class _Pull:
    """A download under way, and who waits for it."""

    task: asyncio.Task[None]
    waiting: list[Tell] = field(default_factory=list)
    said: str = ""  # an outage is one report, not one per try


class CodeCache:
    """Archives in `root`, at most `limit_bytes`; what was used longest ago goes first. What is open while it goes stays readable."""

    def __init__(
        self, root: Path, limit_bytes: int, stub: scheduler_pb2_grpc.SchedulerServiceStub, clock: Clock
    ) -> None:
        self._root, self._limit_bytes, self._stub, self._clock = root, limit_bytes, stub, clock
        self._pulls: dict[str, _Pull] = {}

    async def unpack(self, work: Work, folder: Path, tell: Tell) -> None:
        """Makes `folder` hold the code of the task, and nothing else. Raises LaunchFailed when it cannot be had here."""
        while not await self._unpacked(await self._fetch(work, tell), work, folder):
            pass

    async def _unpacked(self, archive: Path, work: Work, folder: Path) -> bool:
        """False: another pull took it away to make room, so it is to be fetched again."""
        try:
            await asyncio.to_thread(unpack, archive, folder)
            return True
        except FileNotFoundError:
            if await asyncio.to_thread(archive.exists):
                raise LaunchFailed(f"the folder {folder} went while code was unpacked into it") from None
            return False
        except UnpackError as damaged:
            raise LaunchFailed(f"the code of {work.job} cannot be unpacked: {damaged}") from None
        except OSError as error:
            raise LaunchFailed(_no_room(error, folder)) from None

    async def _fetch(self, work: Work, tell: Tell) -> Path:
        digest = work.spec.code
        if not DIGEST.fullmatch(digest):
            raise LaunchFailed(f"code {digest[:80]!r} is no sha256")
        archive = self._root / digest
        while not await asyncio.to_thread(_is_whole, archive, digest):
            ours = digest not in self._pulls
            try:
                await self._join(work, tell)
            except LaunchFailed:
                if ours:  # another job's pull may have failed for reasons of that job
                    raise
        return archive

    async def _join(self, work: Work, tell: Tell) -> None:
        """Waits for the one pull of this digest; it ends when nobody waits any more."""
        digest = work.spec.code
        pull = self._pulls.get(digest)
        if pull is None:
            pull = self._pulls[digest] = _Pull(asyncio.create_task(self._pull(work)))
        pull.waiting.append(tell)
        try:
            await asyncio.shield(pull.task)
        finally:
            pull.waiting.remove(tell)
            if (not pull.waiting or pull.task.done()) and self._pulls.get(digest) is pull:
                del self._pulls[digest]  # whoever comes now begins anew
                pull.task.cancel()

    async def _pull(self, work: Work) -> None:
        """Until the archive is there: outages are waited out, what came is kept, and a broken download goes on behind it.

        Raises LaunchFailed after `LONGEST_S`.
        """
        failures, damaged, began_s = 0, 0, self._clock.monotonic()
        partial = self._root / f".{work.spec.code}.partial"
        while True:
            try:
                await self._download(work, partial)
                if await asyncio.to_thread(self._keep, partial, work.spec.code):
                    _log.info(Event.CODE_CACHED, digest=work.spec.code, job=work.job)
                    return
                damaged += 1
                if damaged >= _DAMAGED:
                    raise LaunchFailed(f"the code of {work.job} came damaged {damaged} times")
            except StatusError as error:
                if not worth_repeating(error):
                    await asyncio.to_thread(partial.unlink, missing_ok=True)  # it may be what is wrong
                    raise LaunchFailed(f"the code of {work.job}: {error.message}") from None
                if self._clock.monotonic() - began_s >= LONGEST_S:
                    raise LaunchFailed(_not_in_time(work, error.message)) from None
                failures += 1
                await self._say(work.spec.code, f"code, which cannot be had now ({error.message}) and is tried again,")
            except OSError as error:
                raise LaunchFailed(_no_room(error, self._root)) from None
            await self._clock.sleep(RETRY.pause_s(failures + damaged))

    async def _say(self, digest: str, text: str) -> None:
        pull = self._pulls.get(digest)
        if pull is None or pull.said == text:
            return
        pull.said = text
        for tell in list(pull.waiting):
            await tell(text)

    async def _download(self, work: Work, partial: Path) -> None:
        have = await asyncio.to_thread(self._begin, partial)
        request = scheduler_pb2.DownloadCodeRequest(job=work.job, epoch=work.epoch, offset=have)
        try:
            async with asyncio.timeout(STREAM_S), self._stub.DownloadCode(request) as answers:
                async for answer in answers:
                    have += len(answer.data)
                    if have > MAX_PACKED_BYTES:
                        raise LaunchFailed(f"the code of {work.job} is larger than {MAX_PACKED_BYTES} bytes")
                    await asyncio.to_thread(_write, partial, have - len(answer.data), answer.data)
        except TimeoutError:
            raise Unavailable(f"the scheduler did not send all of it within {STREAM_S:.0f} s") from None

    def _begin(self, partial: Path) -> int:
        """Makes the folder and room; returns how many bytes an earlier try has left."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room()
        return partial.stat().st_size if partial.exists() else 0

    def _keep(self, partial: Path, digest: str) -> bool:
        """Whether the whole archive is what it should be; then it is in its place, else it is gone."""
        if not partial.exists() or digest_of(partial) != digest:
            partial.unlink(missing_ok=True)
            return False
        partial.rename(self._root / digest)
        return True

    def _make_room(self) -> None:
        """Lets the largest archive in."""
        known = sorted(self._archives(), key=lambda one: one[1].st_mtime)
        held = sum(found.st_size for _, found in known)
        for archive, found in known:
            if held + MAX_PACKED_BYTES <= self._limit_bytes:
                return
            archive.unlink(missing_ok=True)
            held -= found.st_size

    def _archives(self) -> list[tuple[Path, os.stat_result]]:
        """Whole ones, and what is left of downloads that nobody waits for."""
        under_way = {
            f".{digest}.partial" for digest in list(self._pulls)
        }  # at once: the loop goes on beside this thread
        found = []
        for file in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another pull makes room, too
                if file.name not in under_way and file.is_file():
                    found.append((file, file.stat()))
        return found


def _is_whole(archive: Path, digest: str) -> bool:
    """Whether it is there and what it was when it came; what a disk or a power cut has damaged is deleted. Counts as used."""
    try:
        whole = digest_of(archive) == digest
        if whole:
            os.utime(archive)  # used last: goes last
        else:
            archive.unlink()
    except FileNotFoundError:
        return False
    return whole


def _write(file: Path, at: int, data: Any) -> None:
    """At its place: a write that outlives its download does no harm to the next."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
    finally:
        os.close(descriptor)


def _not_in_time(work: Work, why: str) -> str:
    return (
        f"the code of {work.job} could not be had within {LONGEST_S / 60:.0f} minutes ({why}); see whether NATS and the scheduler answer, and "
        "submit it again"
    )


def _no_room(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room for the job's code in {folder}: the disk is full; make room there"
    return f"the job's code cannot be written to {folder}: {error.strerror}"
