"""Which processes belong to an attempt, whatever they did to hide.

A process is a member when it bears the task's token in its environment, when it is in a rank's process group or
session, when it is in one of the task's control groups, or when it descends from a member or from the shim. The shim
adopts what its descendants orphan, so that a daemon with an empty environment and a session of its own is found too.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.procfs import BESIDE_TOKEN, SHIM_TOKEN, TASK_TOKEN, Process, Stat


@dataclass(frozen=True, slots=True)
class Origin:
    """What an attempt's processes come from."""

    token: str
    shim: Process
    ranks: tuple[Process, ...]
    groups: tuple[Path, ...]  # control groups


def members(origin: Origin) -> list[Process]:
    """Living members, without the shim. Reads all of /proc."""
    table = procfs.snapshot()
    found = _bearers(table, origin.token) | _in_groups(table, origin.ranks) | (_listed(origin.groups) & table.keys())
    found |= _descendants(table, [*found, *_present(table, [origin.shim])])
    return [Process(pid, table[pid].start_time) for pid in sorted(found - {origin.shim.pid, os.getpid()})]


def next_to_kill(found: Sequence[Process], token: str) -> list[Process]:
    """Of these members, all but the parents of commands beside ranks, while there are others: they adopt what is orphaned meanwhile."""
    parents = procfs.bearers([process.pid for process in found], token, BESIDE_TOKEN)
    return [process for process in found if process.pid not in parents] or list(found)


def _bearers(table: Mapping[int, Stat], token: str) -> set[int]:
    """Of the task's token; forks of the shim that are no ranks yet; parents of commands beside ranks."""
    markers = {f"{variable}={token}".encode() for variable in (TASK_TOKEN, SHIM_TOKEN, BESIDE_TOKEN)}
    return {pid for pid in table if not markers.isdisjoint(procfs.environment(pid))}


def _in_groups(table: Mapping[int, Stat], ranks: Sequence[Process]) -> set[int]:
    """The kernel gives a rank's number to nobody else while its group or session has a member."""
    reused = {rank.pid for rank in ranks if rank.pid in table and table[rank.pid].start_time != rank.start_time}
    numbers = {rank.pid for rank in ranks if rank.pid > 0} - reused
    return {pid for pid, found in table.items() if found.group in numbers or found.session in numbers}


def _present(table: Mapping[int, Stat], processes: Iterable[Process]) -> list[int]:
    return [p.pid for p in processes if p.pid in table and table[p.pid].start_time == p.start_time]


def _listed(groups: Iterable[Path]) -> set[int]:
    found: set[int] = set()
    for group in groups:
        with contextlib.suppress(OSError, ValueError):
            found |= set(map(int, (group / "cgroup.procs").read_text().split()))
    return found


def _descendants(table: Mapping[int, Stat], roots: Iterable[int]) -> set[int]:
    children = defaultdict(list)
    for pid, stat in table.items():
        children[stat.parent].append(pid)
    found, left = set[int](), list(roots)
    while left:
        fresh = [pid for pid in children[left.pop()] if pid not in found]
        found.update(fresh)
        left += fresh
    return found
