"""What an attempt leaves in memory and in folders that all share, when it had none of its own: found by its group, or by name.

A file in /dev/shm is memory that stays taken until somebody removes it, so that a node whose jobs crash often would run out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil

from whaleflux_agent.runtime import procfs

_SHARED = ("/dev/shm", "/tmp", "/var/tmp")  # swept
_MEMORY = "/dev/shm"
_LIBRARIES = re.compile(r"nccl-|torch_\d+_|psm_|sem\.mp-|cuda\.shm\.|__KMP_REGISTERED_LIB_")  # who made it, by name
_MAKER = re.compile(r"(?:torch_|__KMP_REGISTERED_LIB_)(\d+)_")
_SYSV = (("shm", "shmctl"), ("sem", "semctl"), ("msg", "msgctl"))
_REMOVE = 0  # IPC_RMID
_libc = ctypes.CDLL(None)


def remove_of_group(gid: int) -> None:
    """Everything of an attempt's own group. Blocks. Nothing of the attempt lives any more."""
    for folder in _SHARED:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_gid == gid:
                        _remove(entry)
    for kind, control in _SYSV:
        for id_ in _segments(kind, gid):
            getattr(_libc, control)(id_, *([0] if kind == "sem" else []), _REMOVE, None)


def _segments(kind: str, gid: int) -> list[int]:
    """Ids of System V objects that a group made. The columns are named in the first line, proc(5)."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/sysvipc/{kind}") as file:
        head, *lines = [line.split() for line in file]
        id_, maker = head.index(f"{kind if kind != 'msg' else 'msq'}id"), head.index("cgid")
        return [int(line[id_]) for line in lines if int(line[maker]) == gid]
    return []


def remove_by_name(since_ns: int) -> None:
    """Shared memory that libraries made since then as our user, and that no process has any more. Blocks.

    What names a process that lives is left: it may be on its way to another one, which has not opened it yet.
    """
    found = [entry for entry in _own_memory(since_ns) if _LIBRARIES.match(entry.name) and not _maker_lives(entry.name)]
    if not found:
        return
    used = _mapped()
    for entry in found:
        if entry.name not in used:
            with contextlib.suppress(OSError):
                _remove(entry)


def _maker_lives(name: str) -> bool:
    made_by = _MAKER.match(name)
    return made_by is not None and os.path.exists(f"/proc/{made_by[1]}")


def _own_memory(since_ns: int) -> list[os.DirEntry[str]]:
    found = []
    with contextlib.suppress(OSError), os.scandir(_MEMORY) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                if about.st_uid == os.geteuid() and about.st_ctime_ns >= since_ns:
                    found.append(entry)
    return found


def _mapped() -> set[str]:
    """Names in /dev/shm that some process has mapped or open."""
    names = set[str]()
    for pid in procfs.snapshot():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as file:
            names |= {_name(line.partition(f" {_MEMORY}/")[2]) for line in file if f" {_MEMORY}/" in line}
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                    if target.startswith(f"{_MEMORY}/"):
                        names.add(_name(target.removeprefix(f"{_MEMORY}/")))
    return names


def _name(text: str) -> str:
    return text.strip().removesuffix(" (deleted)").partition("/")[0]


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)
