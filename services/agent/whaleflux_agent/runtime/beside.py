"""A command beside a rank: in its environment, working directory and control group, with pipes or a terminal of its own.

Its parent is `beside_shim.py`, which bears the task's token as such a parent: the attempt's end finds it, last, and it ends with its agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux_agent.runtime import beside_shim
from whaleflux_agent.runtime.api import UNKNOWN_EXIT
from whaleflux_agent.runtime.procfs import BESIDE_TOKEN
from whaleflux_agent.runtime.shim import given

SHIM = Path(beside_shim.__file__)
CHUNK_BYTES = 64 << 10
PIPE_BYTES = 64 << 10  # that a pipe holds, pipe(7)
_LOOK_S = 0.02
_SETTLE_S = 0.1  # for what is under way in a terminal when its command has ended
RANK_PID = "WHALEFLUX_RANK_PID"  # what a debugger is to look at: the rank's process, or its bash where a script has several commands
_SHELLS = ("/bin/bash", "/bin/sh")
_END_OF_INPUT = b"\x04"  # Ctrl-D, as terminals are set at first


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    token: str
    environment: dict[str, str]
    working_directory: str
    cgroups: tuple[str, ...] = ()
    wall: dict[str, Any] = field(default_factory=dict)  # what it has given up (`walls.py`)
    rank: dict[str, int] = field(default_factory=dict)  # its pid and start time


def place_of_rank(folder: Path, token: str, position: int) -> Place:
    """Of the rank at `position` on this node, as its task was started. Raises OSError, ValueError when there is no such record."""
    attempt = json.loads((folder / "attempt.json").read_text())
    process = min(position, len(attempt["ranks"]) - 1)
    rank = attempt["ranks"][process]
    started = json.loads((folder / "started.json").read_text())["ranks"][process]
    environment = rank["environment"] | given(rank.get("secrets", "")) | {RANK_PID: str(started["pid"])}
    return Place(
        token, environment, attempt["working_directory"], tuple(rank["cgroups"]), attempt.get("wall", {}), started
    )


def shell(environment: dict[str, str]) -> str:
    """The rank's $SHELL if it is there, else bash, else sh."""
    candidates = (environment.get("SHELL", ""), *_SHELLS)
    return next((path for path in candidates if os.path.isabs(path) and os.access(path, os.X_OK)), _SHELLS[-1])


class Command:
    """One that runs. `size` is rows and columns of its terminal, None: pipes."""

    def __init__(self, place: Place, argv: Sequence[str], size: tuple[int, int] | None, extra: dict[str, str]) -> None:
        self._plan: dict[str, Any] = {
            "command": list(argv),
            "environment": place.environment | extra,
            "directory": place.working_directory,
            "cgroups": list(place.cgroups),
            "terminal": size is not None,
            "wall": place.wall,
            "rank": place.rank,
        }
        self._token, self._size = place.token, size
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._control, self._theirs = socket.socketpair()  # our end, the shim's
        self._child: subprocess.Popen[bytes] | None = None
        self._spawning: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._ours: set[int] = set()
        self.stdin = self.stdout = self.stderr = -1  # our ends; a terminal has one for input and output, and no stderr

    async def start(self) -> None:
        """Raises OSError."""
        self._control.setblocking(False)
        # A thread that was begun goes on when this is cancelled: what it uses stays open until it has ended.
        self._spawning = asyncio.create_task(self._spawned(self._open()))
        await asyncio.shield(self._spawning)
        self._hearing = asyncio.create_task(self._hear())
        await asyncio.get_running_loop().sock_sendall(self._control, json.dumps(self._plan).encode() + b"\n")

    async def _spawned(self, ends: Sequence[int]) -> None:
        try:
            self._give(ends)
            self._child = await asyncio.to_thread(self._spawn, self._theirs.fileno(), ends)
        finally:
            self._theirs.close()
            _close(ends)

    def _give(self, ends: Sequence[int]) -> None:
        """The command may open again what it was given: /dev/stderr, its terminal."""
        wall = self._plan["wall"]
        if "uid" in wall:
            for descriptor in set(ends):
                os.fchown(descriptor, wall["uid"], wall["gid"])

    def _open(self) -> Sequence[int]:
        """Makes pipes, or a terminal; returns the command's ends, of input, output and errors. Raises OSError."""
        if self._size is not None:
            master, slave = os.openpty()
            self._keep(master)
            self.stdin = self.stdout = master
            self.resize(*self._size)
            return slave, slave, slave
        ends: list[int] = []
        try:
            in_, self.stdin = os.pipe()
            ends.append(in_)
            self._keep(self.stdin)
            self.stdout, out = os.pipe()
            ends.append(out)
            self._keep(self.stdout)
            self.stderr, err = os.pipe()
            ends.append(err)
            self._keep(self.stderr)
        except OSError:
            _close(ends)
            raise
        return ends

    def _keep(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._ours.add(descriptor)

    def _spawn(self, control: int, ends: Sequence[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(SHIM), str(control)],
            stdin=ends[0],
            stdout=ends[1],
            stderr=ends[2],
            pass_fds=(control,),
            env={BESIDE_TOKEN: self._token},
            start_new_session=True,
        )

    async def _hear(self) -> None:
        """Waits for the shim's word on how the command ended."""
        loop, heard = asyncio.get_running_loop(), b""
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._control, 4096):
                heard += data
                if heard.startswith(b"exit ") and heard.endswith(b"\n"):
                    self._exit.set_result(int(heard.split()[1]))
                    return
        self._exit.set_result(UNKNOWN_EXIT)

    async def exit_code(self) -> int:
        """Its exit code, or -signal, once it has ended."""
        return await asyncio.shield(self._exit)

    async def output(self, descriptor: int) -> AsyncGenerator[bytes, None]:
        """What it writes there, until nobody can write there any more; what it left running is not waited for."""
        left_bytes = PIPE_BYTES  # once it has ended: what it wrote itself is no more than that
        while left_bytes > 0:
            ended = self._exit.done()
            try:
                data = os.read(descriptor, CHUNK_BYTES)
            except BlockingIOError:
                if not await self._readable(descriptor):
                    return
                continue
            except OSError as error:
                if error.errno == errno.EIO:  # how a terminal says that nobody has it open
                    return
                raise
            if not data:
                return
            left_bytes -= len(data) if ended else 0
            yield data

    async def _readable(self, descriptor: int) -> bool:
        """False: the command has ended and nothing more comes."""
        ready = asyncio.ensure_future(_until(descriptor, writing=False))
        try:
            await asyncio.wait((ready, self._exit), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await asyncio.wait((ready,), timeout=_SETTLE_S)
            return ready.done()
        finally:
            ready.cancel()

    async def write(self, data: bytes) -> bool:
        """Input for it; False when it takes no more."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                await _until(self.stdin, writing=True)
            except OSError:  # it has closed its input, or has ended
                return False
        return True

    async def end_input(self) -> None:
        """No more input comes."""
        if self._size is not None:
            await self.write(_END_OF_INPUT)
        elif self.stdin in self._ours:
            self._ours.discard(self.stdin)
            os.close(self.stdin)

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size, of which the kernel tells it."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: int) -> None:
        """To the command and its process group."""
        if self._hearing is None:
            return
        with contextlib.suppress(OSError):  # it has ended
            self._control.send(f"signal {number}\n".encode())

    async def end(self) -> None:
        """Ends it with all that it started; returns when nothing of it is left."""
        try:
            if self._hearing is not None:  # it must not wait for a descriptor that is somebody else's already
                self._hearing.cancel()
                await asyncio.gather(self._hearing, return_exceptions=True)
        finally:
            self._control.close()
            if self._spawning is None:
                self._theirs.close()
            _close(self._ours)
            self._ours.clear()
        if self._spawning is not None:
            await asyncio.gather(self._spawning, return_exceptions=True)
        while self._child is not None and self._child.poll() is None:
            await asyncio.sleep(_LOOK_S)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in set(descriptors):
        os.close(descriptor)


async def _until(descriptor: int, *, writing: bool) -> None:
    """Returns when the descriptor is ready."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)
