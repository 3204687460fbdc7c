"""File access of one thread as a task's user: what the kernel would not give to the task, it does not give to us for it.

Paths that a job has made may lead anywhere. Whoever reads or writes them for a user does so as that user, so that no link, and no
race with the job, reaches more than its ranks do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "ppc64le": 81, "s390x": 206, "riscv64": 159}  # numbers of the call
_ASK = -1  # no id: changes nothing


@contextlib.contextmanager
def as_user(uid: int, gid: int, groups: Sequence[int] = ()) -> Iterator[None]:
    """For this thread alone, setfsuid(2); 0: stays who it is. No other code may run in the thread meanwhile. Raises OSError."""
    if not uid:
        yield
        return
    before = os.getgroups()
    try:
        _set_groups([gid, *groups])
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        if (_libc.setfsuid(_ASK), _libc.setfsgid(_ASK)) != (uid, gid):
            raise PermissionError(f"the agent cannot act as uid {uid}, gid {gid}")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        _set_groups(before)


def _set_groups(groups: Sequence[int]) -> None:
    """Of this thread: the C library's function would change all threads."""
    number = _SETGROUPS.get(os.uname().machine)
    if number is None:
        raise OSError(f"not known on {os.uname().machine}")
    if _libc.syscall(number, len(groups), (ctypes.c_uint32 * len(groups))(*groups)) != 0:
        raise OSError(ctypes.get_errno(), "setgroups")
