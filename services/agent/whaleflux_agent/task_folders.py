"""What of the node's folders is a task's: where it works, its temporary files, its home; whose they are, and what is swept. Blocks.

An agent that is root touches nothing by a path that a job could have bent: it opens what it gives away, and gives away what it
has just made, or what its own folders hold where no job writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from whaleflux_agent.runtime import leftovers
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.state import TaskMeta

_TMP = ("/tmp", "/var/tmp")  # compared with
_SHORT_CHARS = 60  # of a folder for temporary files: programs put sockets there, whose paths are short
_PASSED, _SHARED = 0o710, 0o770  # a folder that a group passes through, and one that it writes in; neither is its own


class TaskFolders:
    """Of one node. `private`: isolated tasks see folders of their own; `own_checkpoints`: theirs below `checkpoints` are made."""

    def __init__(self, state: Path, checkpoints: Path, *, everybody: int, private: bool, own_checkpoints: bool) -> None:
        self._state, self._checkpoints, self._everybody = state, checkpoints, everybody
        self._private, self._own_checkpoints = private, own_checkpoints

    def covers(self, path: str) -> bool:
        """Whether tasks with a view of their own do not see what the node has there."""
        return any(_below(path, folder) for folder in (str(self._state), *_TMP, "/dev/shm"))

    def check(self, meta: TaskMeta, field: str, path: str) -> None:
        """Raises LaunchFailed for a folder of a job file that its ranks could not see, or that is the agent's."""
        real = os.path.realpath(path)
        if meta.uid and _below(real, str(self._state)) and not self._is_for_checkpoints(real):
            raise LaunchFailed(f"{field} {path!r} is a folder of the agent itself; name another one", unfit=True)
        if meta.uid and self._private and any(_below(real, folder) for folder in _TMP):
            raise LaunchFailed(
                f"{field} {path!r} lies in {_TMP[0]}, and each task has one of its own on this node; name a folder elsewhere",
                unfit=True,
            )

    def _is_for_checkpoints(self, path: str) -> bool:
        return _below(path, os.path.realpath(self._checkpoints))

    def environment(self, meta: TaskMeta, inherited: Mapping[str, str]) -> dict[str, str]:
        """What a task's ranks find of `inherited`: the user's own folders instead of the agent's."""
        found = dict(inherited)
        if meta.tmp:
            found["TMPDIR"] = _TMP[0] if self._private and meta.uid else meta.tmp
        if meta.uid:
            found |= {"HOME": str(self.home(meta)), "USER": meta.user, "LOGNAME": meta.user}
            for name in ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
                found.pop(name, None)
        return found

    def home(self, meta: TaskMeta) -> Path:
        """A system user's own, else the queue's on this node: what its jobs cache there, the next one finds."""
        with contextlib.suppress(KeyError, OSError):
            if os.stat(own := pwd.getpwnam(meta.user).pw_dir).st_uid == meta.uid:
                return Path(own)
        return self._state / "homes" / str(meta.uid)

    def shm_for(self, token: str) -> str:
        """What containers have as their /dev/shm, all of a task the same; "" where the node has none."""
        name = f"whaleflux-{hashlib.sha256(token.encode()).hexdigest()[:12]}"
        return f"/dev/shm/{name}" if os.access("/dev/shm", os.W_OK) else ""

    def let_anybody_write(self, folder: str) -> None:
        """For a container whose user only its image knows; nothing else has the folder."""
        os.chmod(folder, 0o1777)  # noqa: S103

    def tmp_for(self, task_folder: Path, token: str) -> str:
        """Where an attempt's temporary files go: below what the agent's own TMPDIR says, else in the task's folder."""
        name = f"whaleflux-{hashlib.sha256(token.encode()).hexdigest()[:12]}"
        if base := os.environ.get("TMPDIR"):
            return os.path.join(base, name)
        inside = str(task_folder / "tmp")
        return inside if self._private or len(inside) <= _SHORT_CHARS else os.path.join(_TMP[0], name)

    def own(self, meta: TaskMeta, task_folder: Path, mine: Iterable[Path], shared: Iterable[Path]) -> None:
        """Makes `mine` the task's user's (folders of this attempt alone), and lets its group into `shared`, whose owner stays root."""
        if meta.tmp:
            make_own(Path(meta.tmp), meta)
        if not meta.uid:
            return
        os.chown(task_folder, 0, meta.gid)
        os.chmod(task_folder, _PASSED)
        if self.home(meta).parent == self._state / "homes":
            make_own(self.home(meta), meta)
        for folder in mine:
            make_own(folder, meta)
        for folder in shared:
            os.chown(folder, 0, meta.gid, follow_symlinks=False)
            os.chmod(folder, _SHARED)

    def own_checkpoints(self, meta: TaskMeta, folder: str) -> None:
        """Makes the job's folder for checkpoints below the agent's own root, as its user's; elsewhere the storage's permissions decide."""
        real = os.path.realpath(folder)  # "{root}/../x" begins like the root, and lies elsewhere
        if not (meta.uid and self._own_checkpoints and self._is_for_checkpoints(real)):
            return
        parent = os.stat(os.path.dirname(folder))
        if parent.st_uid != 0 or parent.st_mode & stat.S_IWOTH:  # whoever writes there may have put a link in the way
            return
        with contextlib.suppress(PermissionError):  # a server that takes root for nobody
            make_own(Path(folder), meta)

    def clean(self, meta: TaskMeta, task_folder: Path) -> None:
        """Removes what an attempt that is gone has left in memory and in folders that all share."""
        if meta.tmp:
            shutil.rmtree(meta.tmp, ignore_errors=True)
        if meta.gid:
            leftovers.remove_of_group(meta.gid)
        else:
            with contextlib.suppress(OSError):
                begun = task_folder / "setup" / "attempt.json"
                begun = begun if begun.exists() else task_folder / "attempt.json"
                leftovers.remove_by_name(begun.stat().st_mtime_ns)

    def give_secrets(self, folder: Path, meta: TaskMeta) -> None:
        """Lets the task's user read the files among its secrets; variables are put into its environment before it is that user."""
        if not meta.uid or not folder.is_dir():
            return
        os.chown(folder.parent, 0, self._everybody)
        os.chmod(folder.parent, _PASSED)
        os.chown(folder, 0, meta.gid)
        os.chmod(folder, _PASSED)
        if (folder / "files").is_dir():
            self.give_all(folder / "files", meta)

    def give_all(self, folder: Path, meta: TaskMeta) -> None:
        """Makes all of a folder the task's user's. Only for what the agent itself has just unpacked: nothing of the job ran in it yet."""
        if not meta.uid:
            return
        for _, folders, files, here in os.fwalk(folder):
            os.fchown(here, meta.uid, meta.gid)
            for name in (*folders, *files):
                os.chown(name, meta.uid, meta.gid, dir_fd=here, follow_symlinks=False)


def make_own(folder: Path, meta: TaskMeta) -> None:
    """A folder for the task's user alone; one that is there is taken over if it is ours or theirs. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        owner = os.fstat(descriptor).st_uid
        if owner not in (os.geteuid(), meta.uid):
            raise PermissionError(1, f"belongs to uid {owner}", str(folder))
        if meta.uid:
            os.fchown(descriptor, meta.uid, meta.gid)
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
