"""Sessions that read files of a job, or write some: below its working directory, and nowhere else on the node."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from whaleflux import file_archive
from whaleflux.file_archive import BadArchive, Totals
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.attach_link import Link, Refused
from whaleflux_agent.core.work import Stage
from whaleflux_agent.task_runner import Task

_COPIES = ThreadPoolExecutor(8, thread_name_prefix="copy")  # they wait for slow callers: not the agent's other work
T = TypeVar("T")


async def read_files(link: Link, task: Task, asked: pb.AttachPath, begun: pb.AttachOpened) -> pb.AttachResult:
    """Sends an archive. Raises Refused, CallerGone, OSError."""
    path = await _in_thread(task, lambda: _existing(task, asked.path))
    loop = asyncio.get_running_loop()

    def send(response: pb.AttachJobResponse) -> None:
        asyncio.run_coroutine_threadsafe(link.send(response), loop).result()

    try:
        totals = await _in_thread(task, lambda: _read(task, path, begun, send))
    except ValueError as changed:
        raise Refused(str(changed)) from None
    await link.send(pb.AttachJobResponse(end={}))
    return _result(totals, path)


def _read(task: Task, path: Path, begun: pb.AttachOpened, send: Callable[[pb.AttachJobResponse], None]) -> Totals:
    """Looks again once it is open: the job may have put a link in the way meanwhile."""
    with file_archive.opened(path) as descriptor:
        _inside(task, os.readlink(f"/proc/self/fd/{descriptor}"))
        begun.size_bytes = file_archive.size_of_opened(descriptor)
        send(pb.AttachJobResponse(opened=begun))
        return file_archive.pack_opened(descriptor, lambda data: send(pb.AttachJobResponse(data=data)))


async def write_files(link: Link, task: Task, asked: pb.AttachPath, begun: pb.AttachOpened) -> pb.AttachResult:
    """Takes an archive and puts it in place, whole or not at all. Raises Refused, CallerGone, OSError."""
    target = await _in_thread(task, lambda: _target(task, asked))
    await link.send(pb.AttachJobResponse(opened=begun))
    loop = asyncio.get_running_loop()
    blocks = link.input()

    async def block() -> bytes:
        return await anext(blocks, b"")

    def pieces() -> Iterator[bytes]:
        while data := asyncio.run_coroutine_threadsafe(block(), loop).result():
            yield data

    try:
        totals = await _in_thread(task, lambda: _unpack(pieces(), target, asked.replace))
    except BadArchive as bad:
        raise Refused(f"what was sent is damaged: {bad}") from None
    except FileExistsError as exists:
        raise Refused(f"{exists}; choose another place, or: whaleflux cp --replace") from None
    return _result(totals, target)


def _unpack(pieces: Iterator[bytes], target: Path, replace: bool) -> Totals:
    """Beside the target first: what is not whole never has its name."""
    folder = Path(tempfile.mkdtemp(prefix=".whaleflux-cp-", dir=target.parent))
    try:
        content, totals = file_archive.unpack(file_archive.reader_of(pieces), folder)
        for _ in pieces:  # what follows the archive's end
            pass
        file_archive.put_in_place(content, target, replace=replace)
        return totals
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _result(totals: Totals, path: Path) -> pb.AttachResult:
    return pb.AttachResult(files=totals.files, size_bytes=totals.size_bytes, left_out=totals.left_out, path=str(path))


async def _in_thread(task: Task, function: Callable[[], T]) -> T:
    """As the user of the task: no link that the job has made, and no race with it, reaches more than its ranks do."""

    def act() -> T:
        with task.acting():
            return function()

    return await asyncio.get_running_loop().run_in_executor(_COPIES, act)


def folder_of(task: Task) -> str:
    """The job's folder on this node, real path. Raises Refused when it is not there any more."""
    folder = task.meta.working_directory
    if not folder or not os.path.isdir(folder):
        what = f"its folder {folder} was cleaned up" if folder else "it had no folder there"
        raise Refused(f"{task.work.job} has no files on this node any more: {what}", ErrorReason.FILES_GONE)
    return os.path.realpath(folder)


def _inside(task: Task, path: str) -> str:
    """The real path of `path`, which must lie in the job's folder, also behind all links."""
    folder = folder_of(task)
    real = os.path.realpath(os.path.join(task.meta.working_directory, path))
    if os.path.commonpath((folder, real)) != folder:
        raise Refused(
            f"{path!r} is outside of the folder of {task.work.job} ({folder}); only what is in it is carried, see: whaleflux cp --help"
        )
    return real


def _existing(task: Task, path: str) -> Path:
    real = _inside(task, path)
    if not os.path.exists(real):
        see = f"exec {task.work.job} -- ls" if task.stage is Stage.RUNNING else f"cp {task.work.job}:. everything"
        raise Refused(
            f"{path!r} is not in the folder of {task.work.job} ({folder_of(task)}); see what is with: whaleflux {see}",
            ErrorReason.FILES_GONE,
        )
    return Path(real)


def _target(task: Task, asked: pb.AttachPath) -> Path:
    """Where what comes is put: into a folder under its own name, else under the path's."""
    real = _inside(task, asked.path)
    if os.path.isdir(real) or asked.path.endswith("/"):
        real = os.path.join(real, asked.base_name)
    if not os.path.isdir(os.path.dirname(real)):
        raise Refused(f"{os.path.dirname(asked.path)!r} is no folder of {task.work.job}; make it first")
    return Path(real)
