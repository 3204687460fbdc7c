"""Memory of ranks where the kernel does not limit it: what the files of /proc say, so that somebody notices.

Only memory that cannot be dropped counts (anonymous and shared), as in a control group: pages of mapped files go when
others need the room. A page that several processes of a rank share counts once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.procfs import Process


def used_bytes(rank: Process, limit_bytes: int) -> int:
    """Bytes that the rank and its family hold: never less than they are, and exact where they are over the limit.

    The exact figure (proportional set sizes) walks page tables, so the cheap one is asked first.
    """
    pids = _family(rank)
    cheap = sum(_sum(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:")) for pid in pids)
    if cheap <= limit_bytes:
        return cheap
    return sum(_sum(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) for pid in pids)


def _family(rank: Process) -> set[int]:
    """The rank's session and its descendants."""
    table = procfs.snapshot()
    if rank.pid not in table or table[rank.pid].start_time != rank.start_time:
        return set()
    found = {pid for pid, stat in table.items() if stat.session == rank.pid} | {rank.pid}
    while more := {pid for pid, stat in table.items() if stat.parent in found and pid not in found}:
        found |= more
    return found


def _sum(path: str, names: Iterable[str]) -> int:
    """The lines of these names, which are in kB; 0 for a process that has ended."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(tuple(names)))
    return 0
