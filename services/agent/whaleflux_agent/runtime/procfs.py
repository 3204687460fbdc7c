"""What Linux knows of a process. A pid with its start time names a process for good; a pid alone does not."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass

TASK_TOKEN = "WHALEFLUX_TASK_TOKEN"  # name of a variable
SHIM_TOKEN = "WHALEFLUX_SHIM_TOKEN"
BESIDE_TOKEN = "WHALEFLUX_BESIDE_TOKEN"  # of the parent of a command beside a rank


@dataclass(frozen=True, slots=True)
class Process:
    """One process, past or present."""

    pid: int
    start_time: int  # clock ticks since boot

    def alive(self) -> bool:
        """True while a thread of it runs or is stopped; false once all have ended, or its pid is somebody else's."""
        found = stat(self.pid)
        return found is not None and found.start_time == self.start_time and living(self.pid, found)

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
        if self.pid <= 0:  # nobody's
            return None
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
    parent: int = 0
    group: int = 0
    session: int = 0


_ENDED = "ZXx"


def stat(pid: int, thread: int = 0) -> Stat | None:
    """The process with this pid, or one thread of it; None when there is none."""
    path = f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat"
    try:
        with open(path, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may contain anything
    except OSError:
        return None
    if len(fields) <= 19:
        return None
    return Stat(fields[0].decode(), int(fields[19]), int(fields[1]), int(fields[2]), int(fields[3]))


def threads(pid: int) -> list[int]:
    """Ids of its threads; empty when it is gone."""
    try:
        return [int(entry) for entry in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def living_threads(pid: int) -> list[int]:
    """Ids of its threads that have not ended: a leader may be a zombie while others still run, write, or hang."""
    states = ((thread, stat(pid, thread)) for thread in threads(pid))
    return [thread for thread, found in states if found is not None and found.state not in _ENDED]


def living(pid: int, found: Stat) -> bool:
    """True while a thread of the process has not ended. `found` is what `stat(pid)` said."""
    return found.state not in _ENDED or bool(living_threads(pid))


def snapshot() -> dict[int, Stat]:
    """Every process of the host that has a living thread, by pid."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    stats = ((pid, stat(pid)) for pid in pids)
    return {pid: found for pid, found in stats if found is not None and living(pid, found)}


def find(variable: str, value: str) -> list[Process]:
    """Living processes with `variable=value` in the environment that they were started with; reads all of /proc."""
    marker = f"{variable}={value}".encode()
    return [Process(pid, found.start_time) for pid, found in snapshot().items() if marker in environment(pid)]


def environment(pid: int) -> list[bytes]:
    """NAME=value entries of the environment that `pid` was started with; empty when it has ended, and for other users'.

    A zombie leader has given its memory back; the threads that outlive it still show it.
    """
    for path in (f"/proc/{pid}/environ", *(f"/proc/{pid}/task/{thread}/environ" for thread in threads(pid)[1:])):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if found := file.read():
                return found.split(b"\0")
    return []


def bearers(pids: Iterable[int], token: str, variable: str = TASK_TOKEN) -> frozenset[int]:
    """Those of these processes that were started with the token of a task."""
    marker = f"{variable}={token}".encode()
    return frozenset(pid for pid in pids if marker in environment(pid))


def describe(pid: int) -> str:
    """The process and what its living threads do: states as in proc(5), and where in the kernel they wait."""
    name = _line(f"/proc/{pid}/comm") or "?"
    shown = []
    for thread in living_threads(pid)[:3]:
        found = stat(pid, thread)
        where = _line(f"/proc/{pid}/task/{thread}/wchan").strip("0")
        shown.append(f"thread {thread} {found.state if found else '?'}" + (f" in {where}" if where else ""))
    return f"pid {pid} ({name}): {', '.join(shown) or 'ending'}"


def _line(path: str) -> str:
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        return file.readline().strip()
    return ""


def signal_all(processes: list[Process], number: int) -> None:
    """Signals each of them by itself."""
    for process in processes:
        process.signal(number)


def boot_id() -> str:
    """Changes with each boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def network_stack() -> str:
    """Names this process's network stack: those that share it share its loopback addresses."""
    with contextlib.suppress(OSError):
        return f"{boot_id()}/{os.stat('/proc/self/ns/net').st_ino}"
    return ""


def oom_kills() -> int:
    """Processes that the kernel has killed for memory since boot, on the whole host; 0 where it does not say."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


SIGKILL = int(signal.SIGKILL)
