"""Control groups (v2), where we may make them: limits per rank, and a net that no process escapes.

Without the memory and cpu controllers (a hybrid host, no delegation) groups still hold a task's processes together,
so that `kill` and `populated` are exact; without any writable group the process runtime works by sessions and tokens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

_PERIOD_US = 100_000


class Cgroups:
    """The agent's subtree of the host's cgroups; one group per task, one below it per rank."""

    def __init__(self, root: Path, controllers: frozenset[str]) -> None:
        self.root, self.controllers = root, controllers

    @classmethod
    def find(cls, name: str) -> Cgroups | None:
        """A subtree called `name` below the agent's own group; None where that is not allowed. Made when it is needed."""
        own = own_group()
        if own is None:
            return None
        root = own / name
        try:
            root.mkdir(exist_ok=True)
            controllers = _delegate(own, root)
        except OSError:
            return None
        remove([root])
        return cls(root, controllers)

    def create(
        self, task: str, ranks: int, *, cpu_millicores: int, memory_bytes: int, processes: int = 0
    ) -> list[Path]:
        """Groups for `ranks` ranks with their limits (0: none). Raises OSError."""
        parent = self.root / task
        for folder in (self.root, parent):
            folder.mkdir(exist_ok=True)
            _enable(folder, self.controllers)
        return [self._rank(parent / f"r{index}", cpu_millicores, memory_bytes, processes) for index in range(ranks)]

    def _rank(self, folder: Path, cpu_millicores: int, memory_bytes: int, processes: int) -> Path:
        folder.mkdir(exist_ok=True)
        if processes and "pids" in self.controllers:
            (folder / "pids.max").write_text(str(processes))
        if cpu_millicores and "cpu" in self.controllers:
            (folder / "cpu.max").write_text(f"{cpu_millicores * _PERIOD_US // 1000} {_PERIOD_US}")
        if memory_bytes and "memory" in self.controllers:
            (folder / "memory.max").write_text(str(memory_bytes))
            with contextlib.suppress(OSError):  # swap accounting may be off
                (folder / "memory.swap.max").write_text("0")
        return folder


def own_group() -> Path | None:
    """The folder of the group that this process is in; None without cgroup v2."""
    mount = next((Path(m) for m in _mounts() if os.access(m, os.W_OK)), None)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::") and mount is not None:
                folder = mount / line[3:].lstrip("/")
                return folder if folder.is_dir() else None
    return None


def _mounts() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if " - cgroup2 " in line]
    return []


def _delegate(own: Path, root: Path) -> frozenset[str]:
    """Passes the controllers that we may use down to `root`, and returns them.

    A group that limits others may hold no process itself: when this process is alone in its group, it moves into a
    leaf beside `root`.
    """
    wanted = frozenset({"cpu", "memory", "pids"}) & frozenset((own / "cgroup.controllers").read_text().split())
    if not wanted:
        return frozenset()
    if not _enable(own, wanted):
        if (own / "cgroup.procs").read_text().split() != [str(os.getpid())]:
            return frozenset()
        leaf = own / "agent"
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        if not _enable(own, wanted):
            return frozenset()
    return wanted if _enable(root, wanted) else frozenset()


def _enable(folder: Path, controllers: frozenset[str]) -> bool:
    try:
        if controllers:
            (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(controllers)))
    except OSError:
        return False
    return True


def populated(folders: Sequence[Path]) -> bool:
    """True while a process lives in one of the groups."""
    return any("populated 1" in _read(folder / "cgroup.events") for folder in folders)


def kill(folders: Sequence[Path]) -> None:
    """Kills every process in the groups at once."""
    for folder in folders:
        with contextlib.suppress(OSError):
            (folder / "cgroup.kill").write_text("1")


def out_of_memory(folder: Path) -> bool:
    """True when the kernel killed a process of this group for the group's limit or the host's."""
    counts = dict(line.split() for line in _read(folder / "memory.events").splitlines())
    return int(counts.get("oom_kill", "0")) > 0


def release(folders: Sequence[Path]) -> None:
    """Removes the empty groups of a task's ranks, then the task's, then the subtree when this was its last task."""
    tasks = {folder.parent for folder in folders}
    remove([*folders, *tasks, *{task.parent for task in tasks}])


def remove(folders: Sequence[Path]) -> None:
    """Removes those groups that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
