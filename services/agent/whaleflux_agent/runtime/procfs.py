"""What Linux knows of a process. A pid with its start time names a process for good; a pid alone does not."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass

TASK_TOKEN = "WHALEFLUX_TASK_TOKEN"  # name of a variable
SHIM_TOKEN = "WHALEFLUX_SHIM_TOKEN"


@dataclass(frozen=True, slots=True)
class Process:
    """One process, past or present."""

    pid: int
    start_time: int  # clock ticks since boot

    def alive(self) -> bool:
        """True while it runs or is stopped; false once it is a zombie, gone, or its pid is somebody else's."""
        fields = stat(self.pid)
        return fields is not None and fields.start_time == self.start_time and fields.state not in "ZXx"

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal, to its whole process group if asked; nothing when it is gone."""
        if not self.alive():
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def pidfd(self) -> int | None:
        """A descriptor that becomes readable when it ends; None when it has ended. The caller closes it."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive():  # asked after opening: the descriptor is of this process, not of a later owner of the pid
            return descriptor
        os.close(descriptor)
        return None


@dataclass(frozen=True, slots=True)
class Stat:
    """What we use of /proc/<pid>/stat."""

    state: str
    start_time: int


def stat(pid: int) -> Stat | None:
    """The process with this pid, None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may contain anything
    except OSError:
        return None
    return Stat(fields[0].decode(), int(fields[19])) if len(fields) > 19 else None


def find(variable: str, value: str) -> list[Process]:
    """Living processes with `variable=value` in the environment that they were started with; reads all of /proc."""
    marker = f"{variable}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and marker in environment(int(entry)):
            fields = stat(int(entry))
            if fields is not None and fields.state not in "ZXx":
                found.append(Process(int(entry), fields.start_time))
    return found


def environment(pid: int) -> list[bytes]:
    """NAME=value entries of the environment that `pid` was started with; empty for zombies and for other users'."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def signal_all(processes: list[Process], number: int) -> None:
    """Signals each of them by itself."""
    for process in processes:
        process.signal(number)


def boot_id() -> str:
    """Changes with each boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot, on the whole host; 0 where it does not say."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


SIGKILL = int(signal.SIGKILL)
