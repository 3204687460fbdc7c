"""Tasks as processes of the host: each rank a session of its own, all under a shim that outlives the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from whaleflux_agent.runtime import cgroups, procfs
from whaleflux_agent.runtime.api import UNKNOWN_EXIT, LaunchFailed, LaunchPlan, RankExit, Running
from whaleflux_agent.runtime.procfs import SHIM_TOKEN, TASK_TOKEN, Process

_SHIM = Path(__file__).with_name("shim.py")
_START_TIMEOUT_S = 20.0
_RECORD_TIMEOUT_S = 5.0  # between a rank's end and its record by a living shim
_POLL_S = 0.005


class ProcessRuntime:
    """Starts and adopts process tasks."""

    name = "process"

    def __init__(self, groups: cgroups.Cgroups | None = None) -> None:
        self._groups = groups

    async def prepare(self, plan: LaunchPlan) -> None:
        """Nothing to get."""

    async def start(self, plan: LaunchPlan) -> Running:
        folders = await asyncio.to_thread(self._write, plan)
        shim = await asyncio.to_thread(_spawn, plan)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not (plan.folder / "started.json").exists():
                    if shim.poll() is not None:
                        raise LaunchFailed(
                            f"the ranks' parent ended with {shim.returncode}; see {plan.folder}/shim.log"
                        )
                    await asyncio.sleep(_POLL_S)
        except (TimeoutError, LaunchFailed) as failure:
            await asyncio.to_thread(_clear, plan, shim, folders)
            if isinstance(failure, LaunchFailed):
                raise
            raise LaunchFailed(f"the ranks did not start within {_START_TIMEOUT_S:.0f} s") from None
        return ProcessRunning(plan, _read(plan.folder / "started.json"), folders, shim)

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        launch = _read(plan.folder / "launch.json")
        if not launch:
            return None
        if not (plan.folder / "started.json").exists() and not await self._still_starting(plan):
            return None
        folders = [Path(folder) for rank in launch["ranks"] for folder in rank["cgroups"]]
        started = _read(plan.folder / "started.json")
        if launch["boot_id"] != procfs.boot_id() or not started:
            started = {"shim": _NOBODY, "ranks": [_NOBODY] * len(plan.ranks)}  # pids of another boot name nobody
        return ProcessRunning(plan, started, folders, None)

    async def _still_starting(self, plan: LaunchPlan) -> bool:
        """True once the shim of an agent that died in the middle of a start has written its record."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if (plan.folder / "started.json").exists():
                return True
            if not await asyncio.to_thread(procfs.find, SHIM_TOKEN, plan.token):
                return (plan.folder / "started.json").exists()
            await asyncio.sleep(_POLL_S)
        return False

    def _write(self, plan: LaunchPlan) -> list[Path]:
        """Writes what the shim reads; the environment may hold secrets, so it is readable by the owner alone."""
        folders: list[Path] = []
        if self._groups is not None:
            with contextlib.suppress(OSError):  # the host's limit on groups: work is better than limits
                folders = self._groups.create(
                    plan.task,
                    len(plan.ranks),
                    cpu_millicores=plan.cpu_millicores_per_rank,
                    memory_bytes=plan.memory_bytes_per_rank,
                )
        ranks = [
            {
                "command": list(rank.command),
                "environment": dict(rank.environment),
                "log": str(rank.log),
                "cgroups": [str(folders[index])] if folders else [],
            }
            for index, rank in enumerate(plan.ranks)
        ]
        launch = {"boot_id": procfs.boot_id(), "working_directory": plan.working_directory, "ranks": ranks}
        write_private(plan.folder / "launch.json", json.dumps(launch))
        return folders


_NOBODY = {"pid": 0, "start_time": -1}


class ProcessRunning:
    """A task's shim and ranks."""

    def __init__(
        self,
        plan: LaunchPlan,
        started: Mapping[str, Any],
        folders: list[Path],
        shim: subprocess.Popen[bytes] | None,
    ) -> None:
        self._plan, self._folders, self._child = plan, folders, shim
        self._shim = Process(**started["shim"])
        self._ranks = [Process(**rank) for rank in started["ranks"]]
        self._ooms_seen = (procfs.oom_kills(), procfs.oom_kills())  # before the last look, at the last look
        self._ranks_gone_at: float | None = None

    def alive(self) -> bool:
        self._ooms_seen = (self._ooms_seen[1], procfs.oom_kills())
        return all(rank.alive() for rank in self._ranks)

    async def exits(self) -> AsyncGenerator[RankExit, None]:
        ended: asyncio.Queue[RankExit] = asyncio.Queue(len(self._ranks))
        waiting = [asyncio.ensure_future(self._wait(index, ended)) for index in range(len(self._ranks))]
        try:
            for _ in self._ranks:
                yield await ended.get()
        finally:
            for task in waiting:
                task.cancel()

    async def _wait(self, index: int, ended: asyncio.Queue[RankExit]) -> None:
        await until_ended(self._ranks[index])
        record = await self._record(index)
        code = int(record.get("code", UNKNOWN_EXIT))
        memory = code == -signal.SIGKILL and bool(record) and self._killed_for_memory(index)
        await ended.put(RankExit(self._plan.ranks[index].rank, code, memory, known=bool(record)))

    async def _record(self, index: int) -> dict[str, Any]:
        """What the shim wrote about a rank that has ended; empty when the shim is gone without a word."""
        path = self._plan.folder / f"exit-{index}.json"
        deadline = time.monotonic() + _RECORD_TIMEOUT_S
        while not path.exists() and self._shim.alive() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)  # written by another process
        return _read(path)

    def _killed_for_memory(self, index: int) -> bool:
        """By the rank's group where it has one, else: the kernel killed somebody within the last two beats."""
        if self._folders and (self._folders[index] / "memory.events").exists():
            return cgroups.out_of_memory(self._folders[index])
        return procfs.oom_kills() > self._ooms_seen[0]

    async def signal(self, number: int) -> None:
        await asyncio.to_thread(self._signal, number)

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.signal(number, group=True)
        if number == signal.SIGKILL:
            cgroups.kill(self._folders)
            procfs.signal_all(procfs.find(TASK_TOKEN, self._plan.token), number)
            if self._shim_stuck():
                self._shim.signal(number)

    def _shim_stuck(self) -> bool:
        """The shim ends by itself when its ranks have; one that was stopped does not."""
        if any(rank.alive() for rank in self._ranks):
            self._ranks_gone_at = None
            return False
        self._ranks_gone_at = self._ranks_gone_at or time.monotonic()
        return time.monotonic() - self._ranks_gone_at > _RECORD_TIMEOUT_S

    async def gone(self) -> bool:
        return await asyncio.to_thread(self._gone)

    def _gone(self) -> bool:
        if self._child is not None:
            self._child.poll()  # reaps it
        if self._shim.alive() or any(rank.alive() for rank in self._ranks) or cgroups.populated(self._folders):
            return False
        return not procfs.find(TASK_TOKEN, self._plan.token)

    async def release(self) -> None:
        await asyncio.to_thread(cgroups.release, self._folders)


async def until_ended(process: Process) -> None:
    """Returns when `process` has ended, at once when it had."""
    descriptor = process.pidfd()
    if descriptor is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _spawn(plan: LaunchPlan) -> subprocess.Popen[bytes]:
    """A session of its own, so that no signal to the agent's terminal or group reaches it."""
    with open(plan.folder / "shim.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SHIM), str(plan.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={SHIM_TOKEN: plan.token},
            start_new_session=True,
        )


def _clear(plan: LaunchPlan, shim: subprocess.Popen[bytes], folders: list[Path]) -> None:
    """Leaves nothing of a failed start behind."""
    shim.kill()
    cgroups.kill(folders)
    deadline = time.monotonic() + _RECORD_TIMEOUT_S
    while (left := procfs.find(TASK_TOKEN, plan.token)) and time.monotonic() < deadline:
        procfs.signal_all(left, signal.SIGKILL)
        time.sleep(_POLL_S)
    shim.wait(timeout=_RECORD_TIMEOUT_S)
    cgroups.release(folders)


def write_private(path: Path, text: str) -> None:
    """Atomic, durable, mode 0600."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
