"""Starts child processes side by side, restarts those that end, stops all of them by pid in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux.errors import Unavailable
from whaleflux.retry import Backoff

_RETRY = Backoff(first_s=0.4, longest_s=5.0)
_STABLE_S = 10.0  # a child that lived this long starts again without a growing pause
_LOG_LIMIT_BYTES = 32 * 1024 * 1024
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep running. `ready` returns once it serves; it has `ready_timeout_s` for that."""

    name: str
    argv: Sequence[str]
    log: Path
    ready: Callable[[], Awaitable[None]]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 30.0
    stop_grace_s: float = 10.0


class Supervisor:
    """Keeps children running until `stop`; a pid file per child under `run_folder` says who is who.

    The file names the last process of the child, also while the next one is started; no file: none is known.
    """

    def __init__(self, run_folder: Path, say: Say = lambda _: None) -> None:
        self._run_folder, self._say = run_folder, say
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._words_from: dict[str, int] = {}  # where in its log the present run of a child begins
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._children: dict[str, Child] = {}

    async def start(self, children: Sequence[Child]) -> None:
        """Starts all at once, in their order, and returns when each is ready.

        Raises Unavailable for the first that never is, with its last words. What a child needs of another it waits for itself.
        """
        for child in children:
            self._children[child.name] = child
            await self._spawn(child)
        waiting = [asyncio.create_task(self._started(child), name=f"start {child.name}") for child in children]
        try:
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _started(self, child: Child) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(child.ready_timeout_s):
                await self._ready_or_dead(child)
        except TimeoutError:
            raise Unavailable(self._failure(child, f"not ready within {child.ready_timeout_s:g} s")) from None
        self._watchers[child.name] = asyncio.create_task(self._keep(child), name=f"keep {child.name}")
        self._say(f"{child.name} is ready ({time.monotonic() - began:.1f} s)")

    def pid(self, name: str) -> int:
        """Pid of a running child; 0 while it is down."""
        process = self._running.get(name)
        return process.pid if process and process.returncode is None else 0

    async def stop(self) -> None:
        """Ends all children, last started first: SIGTERM, then SIGKILL after each one's grace."""
        for task in self._watchers.values():
            task.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        for name in reversed(list(self._running)):
            await self._end(self._children[name], self._running[name])

    async def _spawn(self, child: Child) -> None:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        if child.log.exists() and child.log.stat().st_size > _LOG_LIMIT_BYTES:
            child.log.replace(child.log.with_suffix(".log.1"))
        with child.log.open("ab") as log:
            self._words_from[child.name] = log.tell()
            process = await asyncio.create_subprocess_exec(
                *child.argv,
                env={**os.environ, **child.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the children in order
                preexec_fn=end_with_parent,
            )
        self._running[child.name] = process
        self._write_pid(child, process.pid)

    def _write_pid(self, child: Child, pid: int) -> None:
        """In place of the pid before, for whoever reads it meanwhile; a disk that is full takes the file away, not the child."""
        file, part = self._pid_file(child), self._run_folder / f".{child.name}.part"
        try:
            part.write_text(str(pid))
            part.replace(file)
        except OSError as error:
            file.unlink(missing_ok=True)  # of the child before: its number may be another process's by now
            self._say(f"{file}: {error.strerror}; {child.name} runs as {pid}")

    def _pid_file(self, child: Child) -> Path:
        return self._run_folder / f"{child.name}.pid"

    async def _ready_or_dead(self, child: Child) -> None:
        ready = asyncio.ensure_future(child.ready())
        dead = asyncio.ensure_future(self._running[child.name].wait())
        try:
            await asyncio.wait({ready, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise Unavailable(self._failure(child, f"ended with code {dead.result()}"))
            await ready
        finally:
            for future in (ready, dead):
                future.cancel()
            await asyncio.gather(ready, dead, return_exceptions=True)

    async def _keep(self, child: Child) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            code = await self._running[child.name].wait()
            failures = 1 if time.monotonic() - started > _STABLE_S else failures + 1
            pause = _RETRY.pause_s(failures)
            self._say(f"{child.name} ended with code {code}; starting it again in {pause:.1f} s (log: {child.log})")
            await asyncio.sleep(pause)
            await self._spawn_at_last(child)

    async def _spawn_at_last(self, child: Child) -> None:
        """Whatever the system refuses (no space, no memory, no more files) may be given later."""
        failures = 0
        while True:
            try:
                return await self._spawn(child)
            except OSError as error:
                failures += 1
                self._pid_file(child).unlink(missing_ok=True)  # it may be down for long
                pause = _RETRY.pause_s(failures)
                self._say(f"{child.name} cannot be started ({error.strerror}); tried again in {pause:.1f} s")
                await asyncio.sleep(pause)

    async def _end(self, child: Child, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(child.stop_grace_s):
                    await process.wait()
            except TimeoutError:
                self._say(f"{child.name} did not stop within {child.stop_grace_s:g} s; killing it")
                process.kill()
                await process.wait()
        self._pid_file(child).unlink(missing_ok=True)

    def _failure(self, child: Child, what: str) -> str:
        said = child.log.read_bytes()[self._words_from.get(child.name, 0) :] if child.log.exists() else b""
        lines = said.decode(errors="replace").splitlines()[-5:]
        return f"{child.name}: {what}; its last words, from {child.log}:\n" + "\n".join(f"  {line}" for line in lines)


def end_with_parent() -> None:
    """In the child: the kernel sends SIGTERM when the supervisor dies, so that a killed suite leaves nothing behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
