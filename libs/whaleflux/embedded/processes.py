"""Processes that outlive who started them, found by what they were given, and ended by pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_GRACE_S = 3.0
_LOOK_EVERY_S = 0.05
_SHIM_TOKEN = "WHALEFLUX_SHIM_TOKEN"


def with_variables(*markers: str) -> list[int]:
    """Pids of processes in whose environment each marker begins a variable (NAME=prefix of its value)."""
    wanted = [marker.encode() for marker in markers]
    found = []
    for pid, content in _each("environ"):
        variables = content.split(b"\0")
        if all(any(v.startswith(marker) for v in variables) for marker in wanted):
            found.append(pid)
    return found


def shims_below(folder: Path) -> dict[int, str]:
    """Parents of ranks (the agent's shim.py) whose task lies below `folder`: the task's token by pid.

    By what they are, not by the folder's name alone: that stands in the command line of whoever looks at a log there.
    """
    found = {}
    for pid, content in _each("cmdline"):
        *program, task = content.rstrip(b"\0").split(b"\0")
        if any(word.endswith(b"/shim.py") for word in program[-1:]) and task.startswith(f"{folder}/".encode()):
            found[pid] = _variable(pid, _SHIM_TOKEN)
    return found


def started_below(folder: Path, module: str) -> list[int]:
    """Pids of `python -m module FOLDER` for folders below `folder`."""
    found = []
    for pid, content in _each("cmdline"):
        words = content.rstrip(b"\0").split(b"\0")
        if words[-3:-1] == [b"-m", module.encode()] and words[-1].startswith(f"{folder}/".encode()):
            found.append(pid)
    return found


def _variable(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        for entry in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{name}=".encode()):
                return entry.partition(b"=")[2].decode(errors="replace")
    return ""


def _each(file: str) -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(folder.name), (folder / file).read_bytes()


async def end(find: Callable[[], Iterable[int]]) -> None:
    """Ends what `find` finds: SIGTERM, and SIGKILL to what is still there after three seconds."""
    _signal(find(), signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GRACE_S):
            while list(find()):
                await asyncio.sleep(_LOOK_EVERY_S)
    _signal(find(), signal.SIGKILL)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def forget_secrets(agents: Path) -> None:
    """Removes from memory what the tasks of agents below a folder were given, when these have ended and no agent is left to do it."""
    for link in agents.glob("*/secrets"):
        if link.is_symlink():
            shutil.rmtree(link.resolve(), ignore_errors=True)
            link.unlink()
