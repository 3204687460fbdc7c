"""What a rank, and a command beside it, gives up before it begins; alone as `shim.py`, whose children call it.

Always: nothing that it starts can gain rights by being executed (no_new_privs), core files within their bound, files for its
user alone (umask 077), keys of no other session. Where the agent may, also another user without capabilities, and a view of
the node of the task's own: its own /tmp and /dev/shm, of the agent's folder what is the task's, of processes its own.

A wall is a dictionary, as it stands in attempt.json:

    core_bytes                most bytes of a core file
    uid, gid, groups          who it becomes; absent: it stays who its agent is
    processes                 most processes and threads that this user may have at a time; 0: no limit
    view                      what of the node is its own; absent: all of it is as its agent sees it
        hidden                folder of the agent, where nothing is but what `shown` says
        shown                 [path, "rw" or "ro"] of what is the task's; also of what lies in /tmp
        tmp                   folder that is its /tmp and /var/tmp
        shm_bytes             most bytes of its /dev/shm; 0: half of the memory
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import warnings  # noqa: F401  # os.execvpe imports it, as a user who may not be able to read it any more

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC = 0x00020000, 0x08000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _SLAVE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 19
_SET_DUMPABLE, _CAPBSET_READ, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CLEAR_ALL = 4, 23, 24, 38, 47, 4
_KEYCTL = {"x86_64": 250, "aarch64": 219, "ppc64le": 271, "s390x": 280, "riscv64": 219}  # numbers of the call
_JOIN_SESSION_KEYRING = 1
_FOR_EVERYBODY = ("/tmp", "/var/tmp")  # what is covered, not what is written to
_SHARED_TMP = ("/tmp/nvidia-mps", "/tmp/.X11-unix")  # sockets of the host's daemons that work may need


def enter(wall: dict) -> None:  # type: ignore[type-arg]  # typing costs memory
    """Gives all of it up, in a fresh child that is about to execute its program. Raises OSError: none of it is optional."""
    core = wall.get("core_bytes", 0)
    _limit(
        resource.RLIMIT_CORE, core or 1
    )  # at 0 a program that core files are piped into is given them, at 1 not (core(5))
    _own_keys()
    if "uid" in wall:
        _limit(
            resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY
        )  # as before it left root: what NCCL pins is counted as memory
        if wall.get("processes"):
            _limit(resource.RLIMIT_NPROC, wall["processes"])
        _drop_capabilities()
        os.setgroups(wall["groups"])
        os.setresgid(wall["gid"], wall["gid"], wall["gid"])
        os.setresuid(wall["uid"], wall["uid"], wall["uid"])
    _prctl(_SET_NO_NEW_PRIVS, 1)
    os.umask(0o077)


def hint(wall: dict, error: BaseException) -> str:  # type: ignore[type-arg]
    """What to know of who a program runs as, when that may be why it does not."""
    if "uid" not in wall or not isinstance(error, PermissionError):
        return ""
    return f" (it runs as uid {wall['uid']} of its queue, who must be able to read it; see the guide, isolation)"


def _limit(what: int, most: int) -> None:
    """Both limits; no higher than the one that is there where it may not be raised."""
    try:
        resource.setrlimit(what, (most, most))
    except ValueError:
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (hard, hard))


def _own_keys() -> None:
    """A session keyring of its own; a kernel, or a container, may have none."""
    if number := _KEYCTL.get(os.uname().machine):
        _libc.syscall(number, _JOIN_SESSION_KEYRING, None)


def _drop_capabilities() -> None:
    """From the bounding set, so that no program can bring one back; the rest go with the user id."""
    _prctl(_CAP_AMBIENT, _CLEAR_ALL)
    for capability in range(64):
        if _libc.prctl(_CAPBSET_READ, capability, 0, 0, 0) == 1:
            _prctl(_CAPBSET_DROP, capability)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise _error(f"prctl({option}, {value})")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


# the view


def join(names: list) -> None:  # type: ignore[type-arg]
    """Sees what the namespaces of these descriptors show."""
    for descriptor, kind in names:
        if _libc.setns(descriptor, kind) != 0:
            raise _error("setns")


def opened(pid: int) -> list:  # type: ignore[type-arg]
    """The namespaces of a process, for `join`. Raises OSError."""
    kinds = (("ipc", _NEWIPC), ("mnt", _NEWNS))
    return [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind) for name, kind in kinds]


def make_view(view: dict) -> list:  # type: ignore[type-arg]
    """Namespaces for `join` in which the view is made; this process itself stays where it is. Raises OSError."""
    own = opened(os.getpid())
    if _libc.unshare(_NEWNS | _NEWIPC) != 0:
        raise _error("unshare")
    try:
        _mount(None, "/", None, _REC | _SLAVE)  # what is mounted on the host later is seen, nothing goes back
        _make(view)
        return opened(os.getpid())
    finally:
        join(own)
        for descriptor, _ in own:
            os.close(descriptor)


def _make(view: dict) -> None:  # type: ignore[type-arg]
    shown = [(os.open(path, os.O_PATH), path, how) for path, how in view["shown"]]
    shown += [(os.open(path, os.O_PATH), path, "rw") for path in _SHARED_TMP if os.path.isdir(path)]
    tmp = os.open(view["tmp"], os.O_PATH)
    size = view.get("shm_bytes") or "50%"
    _mount("tmpfs", "/dev/shm", "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={size}")  # what is mounted
    for folder in _FOR_EVERYBODY:
        if os.path.isdir(folder):
            _bind(tmp, folder)
    hidden = view["hidden"]
    if covered := os.path.isdir(hidden):
        _mount("tmpfs", hidden, "tmpfs", _NOSUID | _NODEV | _NOEXEC, "mode=755,size=1m")
    for descriptor, path, how in shown:
        os.makedirs(path, mode=0o755, exist_ok=True)
        _bind(descriptor, path, _RDONLY if how == "ro" else 0)
    if covered:
        _mount(None, hidden, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    if hides_processes(os.uname().release):
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC, "hidepid=2")  # processes that it may not look into
    for descriptor in (tmp, *(descriptor for descriptor, _, _ in shown)):
        os.close(descriptor)


def hides_processes(release: str) -> bool:
    """Whether a kernel hides them in one mount alone: before Linux 5.8 it hides them in all, from the host's own users too (proc(5))."""
    version = [int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2]]
    return version >= [5, 8]


def _bind(descriptor: int, path: str, flags: int = 0) -> None:
    """What is open there, at `path`: nothing in it gives rights or is a device, and what its mount forbids stays forbidden."""
    kept = os.fstatvfs(descriptor).f_flag & (_RDONLY | _NOEXEC)
    _mount(f"/proc/self/fd/{descriptor}", path, None, _BIND)
    _mount(None, path, None, _REMOUNT | _BIND | _NOSUID | _NODEV | kept | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    if _libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]) != 0:
        raise _error(f"mount {target}")


if __name__ == "__main__":  # tries a wall: ends with 0 where it stands
    import json

    tried = json.loads(sys.argv[1])
    if "view" in tried:
        join(make_view(tried["view"]))
    enter(tried)
