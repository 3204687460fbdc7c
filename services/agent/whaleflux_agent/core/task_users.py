"""Which user a queue's work runs as, and which group one attempt has to itself.

A queue's user is the same on every node unless two queues' numbers collide there: files on shared storage keep their owner.
An attempt's group is of no other attempt, so that jobs of one queue, who share a user, cannot look into one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from whaleflux.errors import FieldViolation, InvalidArgument, ResourceExhausted

_LEAST_ID, _LEAST_SIZE, _MOST_ID = (
    1000,
    64,
    2**31 - 2,
)  # ids below are the system's; some file systems know no higher ones
SYSTEM_USER_PREFIX = "whaleflux-"  # a system user of this name and a queue's is that queue's


@dataclass(frozen=True, slots=True)
class IdRange:
    """Numbers that are nobody's but tasks': users and groups of the same numbers."""

    first: int
    last: int

    @property
    def everybody(self) -> int:
        """The group that all tasks are in, and nobody else."""
        return self.first

    @property
    def size(self) -> int:
        """How many there are for queues, and for attempts."""
        return self.last - self.first

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last


DEFAULT_IDS = IdRange(2_001_000_000, 2_001_065_535)  # above what directories, containers and systemd give out


@dataclass(frozen=True, slots=True)
class IsolationSettings:
    """What an operator has chosen; see the settings of these names."""

    wanted: str = "auto"  # "required", "none"
    ids: IdRange = DEFAULT_IDS
    users: tuple[tuple[str, str], ...] = ()  # queue, system user
    groups: tuple[str, ...] = ()
    processes: int = 0  # 0: no limit
    core_bytes: int = 0
    shm_bytes: int = 0
    private_folders: bool = True
    own_checkpoint_folders: bool = True
    container_root: bool = False


def parse_range(text: str) -> IdRange:
    """FIRST-LAST. Raises InvalidArgument."""
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdecimal() and last.strip().isdecimal()):
        raise _wrong(f"{text[:100]!r} is no range of ids: write FIRST-LAST, such as 2001000000-2001065535")
    found = IdRange(int(first), int(last))
    if found.first < _LEAST_ID or found.last > _MOST_ID:
        raise _wrong(f"{text} must lie between {_LEAST_ID} and {_MOST_ID}: lower ids are the system's")
    if found.last - found.first + 1 < _LEAST_SIZE:
        raise _wrong(f"{text} must hold at least {_LEAST_SIZE} ids: one for each queue, one for each attempt")
    return found


def _wrong(text: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation("task_uids", text))


def uid_of(queue: str, ids: IdRange, taken: Mapping[str, int]) -> int:
    """The user of a queue: the one that it has, else by its name; the next that is free where another queue has that.

    Raises ResourceExhausted when every id is another queue's.
    """
    if (known := taken.get(queue)) is not None and known in ids:
        return known
    wanted = int.from_bytes(hashlib.sha256(queue.encode()).digest()[:8], "big") % ids.size
    others = set(taken.values())
    for step in range(ids.size):
        if (uid := ids.first + 1 + (wanted + step) % ids.size) not in others:
            return uid
    raise ResourceExhausted(f"all of task_uids ({ids}) is taken by queues: give this agent a larger range")


def gid_after(last: int, ids: IdRange, in_use: Collection[int]) -> int:
    """The group of the next attempt: each has its turn before one comes again, so that what an old one left stays closed.

    Raises ResourceExhausted.
    """
    begin = last - ids.first if last in ids else 0
    for step in range(1, ids.size + 1):
        if (gid := ids.first + 1 + (begin + step - 1) % ids.size) not in in_use:
            return gid
    raise ResourceExhausted(f"all of task_uids ({ids}) is in use by attempts: give this agent a larger range")
