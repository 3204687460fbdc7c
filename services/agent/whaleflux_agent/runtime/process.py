"""Tasks as processes of the host: each rank a session of its own, all under a shim that outlives the agent.

An attempt is begun once. `attempt.json` is durable before the first fork; whoever finds it adopts what runs, or proves
that nothing does and never will: then the attempt is lost, not begun again.
"""

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
from whaleflux_agent.runtime.members import Origin, members, next_to_kill
from whaleflux_agent.runtime.memory_watch import used_bytes
from whaleflux_agent.runtime.procfs import SHIM_TOKEN, Process
from whaleflux_agent.runtime.shim import claim
from whaleflux_agent.state import write

SHIM = Path(__file__).with_name("shim.py")
_START_TIMEOUT_S = 20.0
_RECORD_TIMEOUT_S = 5.0  # between a rank's end and its record by a living shim
_POLL_S = 0.005
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # the rank itself, or the command that its script ran
MEMORY_EVERY_S = 2.0  # between two looks at the memory of ranks that the kernel does not limit


class ProcessRuntime:
    """Starts and adopts process tasks."""

    name = "process"

    def __init__(
        self, groups: cgroups.Cgroups | None = None, *, shim: Path = SHIM, memory_every_s: float = MEMORY_EVERY_S
    ) -> None:
        self._groups, self._shim, self._memory_every_s = groups, shim, memory_every_s

    @property
    def memory_limits(self) -> str:
        """Who sees to limits of memory: the "kernel" at once, or the agent, which has it "watched"."""
        return "kernel" if "memory" in self.limited_by else "watched"

    @property
    def limited_by(self) -> frozenset[str]:
        """What the kernel limits by control groups: "cpu", "memory", "pids"."""
        return self._groups.controllers if self._groups is not None else frozenset()

    async def prepare(self, image: str) -> None:
        """Nothing to get."""

    async def start(self, plan: LaunchPlan) -> Running:
        if (plan.folder / "attempt.json").exists():
            raise LaunchFailed("this attempt was begun before; it is never begun a second time")
        folders = await asyncio.to_thread(self._write, plan)
        shim = await asyncio.to_thread(_spawn, plan, self._shim)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (plan.folder / "started.json").exists():
            if shim.poll() is not None:
                why = f"the ranks' parent ended with {shim.returncode}; see {plan.folder}/shim.log"
                raise LaunchFailed(why, left=ProcessRunning(plan, _unstarted(plan, shim.pid), folders, shim))
            if time.monotonic() >= deadline:
                why = f"the ranks did not start within {_START_TIMEOUT_S:.0f} s"
                raise LaunchFailed(why, left=ProcessRunning(plan, _unstarted(plan, shim.pid), folders, shim))
            await asyncio.sleep(_POLL_S)
        started = _read(plan.folder / "started.json")
        return ProcessRunning(plan, started, folders, shim, memory_every_s=self._memory_every_s)

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        if not (plan.folder / "attempt.json").exists():
            return None
        attempt = _read(plan.folder / "attempt.json")
        folders = [Path(folder) for rank in attempt.get("ranks", ()) for folder in rank["cgroups"]]
        same_boot = attempt.get("boot_id") == procfs.boot_id()
        started = await self._started(plan) if same_boot else {}  # pids of another boot name nobody
        found = started or _unstarted(plan)
        return ProcessRunning(plan, found, folders, None, memory_every_s=self._memory_every_s)

    async def _started(self, plan: LaunchPlan) -> dict[str, Any]:
        """What the shim wrote once every rank existed; empty when it has not and never will."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (record := _read(plan.folder / "started.json")) and time.monotonic() < deadline:
            if not await asyncio.to_thread(procfs.find, SHIM_TOKEN, plan.token):
                # An agent may have died between its fork and the shim's first instruction: the claim ends that race.
                await asyncio.to_thread(claim, str(plan.folder))
                return _read(plan.folder / "started.json")
            await asyncio.sleep(_POLL_S)
        return record

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
                    processes=plan.processes_per_rank,
                )
        ranks = [
            {
                "command": list(rank.command),
                "environment": dict(rank.environment),
                "log": str(rank.log),
                "cgroups": [str(folders[index])] if folders else [],
                "secrets": f"{plan.secrets}/env"
                if plan.secrets
                else "",  # the folder; what is in it stands nowhere else
            }
            for index, rank in enumerate(plan.ranks)
        ]
        attempt = {
            "boot_id": procfs.boot_id(),
            "working_directory": plan.working_directory,
            "ranks": ranks,
            "wall": dict(plan.wall),
        }
        write(plan.folder / "attempt.json", json.dumps(attempt).encode())
        return folders


_NOBODY = {"pid": 0, "start_time": -1}


def _unstarted(plan: LaunchPlan, shim: int = 0) -> dict[str, Any]:
    """The record of a start that came to nothing."""
    found = procfs.stat(shim) if shim else None
    parent = {"pid": shim, "start_time": found.start_time} if found else _NOBODY
    return {"shim": parent, "ranks": [_NOBODY] * len(plan.ranks)}


class ProcessRunning:
    """A task's shim and ranks."""

    def __init__(
        self,
        plan: LaunchPlan,
        started: Mapping[str, Any],
        folders: list[Path],
        shim: subprocess.Popen[bytes] | None,
        *,
        memory_every_s: float = MEMORY_EVERY_S,
    ) -> None:
        self._memory_every_s, self._over_memory = memory_every_s, dict[int, str]()  # by position: what was said
        self._plan, self._folders, self._child = plan, folders, shim
        self._shim = Process(**started["shim"])
        self._ranks = [Process(**rank) for rank in started["ranks"]]
        self._origin = Origin(plan.token, self._shim, tuple(self._ranks), tuple(folders))
        self._ooms_seen = (procfs.oom_kills(), procfs.oom_kills())  # before the last look, at the last look
        self._childless_since: float | None = None

    def alive(self) -> bool:
        self._ooms_seen = (self._ooms_seen[1], procfs.oom_kills())
        return all(rank.alive() for rank in self._ranks)

    async def exits(self) -> AsyncGenerator[RankExit, None]:
        ended: asyncio.Queue[RankExit] = asyncio.Queue(len(self._ranks))
        waiting = [asyncio.ensure_future(self._wait(index, ended)) for index in range(len(self._ranks))]
        if self._plan.memory_bytes_per_rank and not any((f / "memory.max").exists() for f in self._folders):
            waiting.append(asyncio.ensure_future(self._watch_memory()))
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
        memory = code in _KILLED and bool(record) and self._killed_for_memory(index)
        why = self._over_memory.get(index, "") if memory else ""
        await ended.put(RankExit(self._plan.ranks[index].rank, code, memory, known=bool(record), why=why))

    async def _watch_memory(self) -> None:
        """Ends ranks that pass their limit. Each look rests for twenty times as long as it took: at most 5 % of a core."""
        while True:
            began_s = time.monotonic()
            for index, rank in enumerate(self._ranks):
                await asyncio.to_thread(self._limit_memory, index, rank)
            await asyncio.sleep(max(self._memory_every_s, 20 * (time.monotonic() - began_s)))

    def _limit_memory(self, index: int, rank: Process) -> None:
        limit = self._plan.memory_bytes_per_rank
        if rank.alive() and (used := used_bytes(rank, limit)) > limit:
            self._over_memory[index] = (
                f"was ended by its agent: it used {used / 1e9:.2f} GB of memory, memory_per_rank is {limit / 1e9:.2f} GB"
            )
            rank.signal(signal.SIGKILL, group=True)

    async def _record(self, index: int) -> dict[str, Any]:
        """What the shim wrote about a rank that has ended; empty when the shim is gone without a word."""
        path = self._plan.folder / f"exit-{index}.json"
        deadline = time.monotonic() + _RECORD_TIMEOUT_S
        while not path.exists() and self._shim.alive() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)  # written by another process
        return _read(path)

    def _killed_for_memory(self, index: int) -> bool:
        return index in self._over_memory or self._kernel_killed_for_memory(index)

    def _kernel_killed_for_memory(self, index: int) -> bool:
        """By the rank's group where it has one, else: the kernel killed somebody within the last two heartbeats."""
        if self._folders and (self._folders[index] / "memory.events").exists():
            return cgroups.out_of_memory(self._folders[index])
        return procfs.oom_kills() > self._ooms_seen[0]

    async def end(self, rank: int, why: str) -> None:
        index = self._plan.process_of(rank)
        self._over_memory[index] = why
        await asyncio.to_thread(self._ranks[index].signal, signal.SIGKILL, group=True)

    async def signal(self, number: int) -> None:
        await asyncio.to_thread(self._signal, number)

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.signal(number, group=True)
        if number != signal.SIGKILL:
            return
        if not self._begun:  # it would go on to fork
            self._shim.signal(number)
        cgroups.kill(self._folders)
        left = members(self._origin)
        procfs.signal_all(next_to_kill(left, self._plan.token), number)
        if self._shim_stuck(alone=not left):
            self._shim.signal(number)

    @property
    def _begun(self) -> bool:
        return any(rank.pid for rank in self._ranks)

    def _shim_stuck(self, *, alone: bool) -> bool:
        """The shim ends by itself when all its children have; one that was stopped does not."""
        if not alone:
            self._childless_since = None
            return False
        self._childless_since = self._childless_since or time.monotonic()
        return time.monotonic() - self._childless_since > _RECORD_TIMEOUT_S

    async def gone(self) -> bool:
        return await asyncio.to_thread(self._gone)

    def _gone(self) -> bool:
        if self._child is not None:
            self._child.poll()  # reaps it
        if self._shim.alive() or any(rank.alive() for rank in self._ranks) or cgroups.populated(self._folders):
            return False
        return not members(self._origin)

    async def remains(self) -> tuple[str, ...]:
        return await asyncio.to_thread(self._remains)

    def _remains(self) -> tuple[str, ...]:
        shim = [self._shim] if self._shim.alive() else []
        found = [procfs.describe(process.pid) for process in (*members(self._origin), *shim)]
        return tuple(found or (["its control group is not empty"] if cgroups.populated(self._folders) else []))

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


def _spawn(plan: LaunchPlan, shim: Path) -> subprocess.Popen[bytes]:
    """A session of its own, so that no signal to the agent's terminal or group reaches it."""
    with open(plan.folder / "shim.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(shim), str(plan.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={SHIM_TOKEN: plan.token},
            start_new_session=True,
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
