"""What tasks were given of secrets, in memory only: one folder each on a tmpfs, from before the ranks start until nothing of the task is left.

    {task}/env/{VARIABLE}    values of variables: whoever starts a process of the task puts them into its environment
    {task}/files/{file}      files; WHALEFLUX_SECRETS_DIR names this folder

Nothing of it is on a disk: not in the agent's records, which name the folder alone. A later agent finds here what the ranks were given
(for commands beside them, and to leave it out of messages), and what no task needs any more, which it deletes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from whaleflux.manifests.job_fields import SecretUse
from whaleflux_agent.runtime.api import LaunchFailed

MASK = "***"
_UNFINISHED = ".making"  # behind the name of a folder that is being written
LEAST_MASKED_BYTES = 4  # shorter ones are parts of ordinary words
_MEMORY = frozenset({"tmpfs", "ramfs"})
_BASES = ("/run", "/dev/shm")  # where a tmpfs is on Linux: hier(7), shm_overview(7)


class SecretFiles:
    """The folders of one agent. `root` None: there is no place that is memory only. Methods block, a little.

    `link`: what leads to `root` from the agent's own folder, for whoever removes that without the agent.
    """

    def __init__(self, root: Path | None, link: Path | None = None) -> None:
        self._root, self._link = root, link

    def folder(self, task: str) -> Path:
        """Of a task, whether it is there or not."""
        return (self._root or Path("/nonexistent")) / quote(task, safe="")

    def write(self, task: str, uses: Sequence[SecretUse], values: Sequence[bytes], *, for_anybody: bool) -> None:
        """Makes the folder of a task, whole or not at all: the next agent takes it as it is. Raises LaunchFailed where there is no place for it.

        `for_anybody`: a container's user may be any; it sees this folder alone, and nobody else gets through the one above.
        """
        folder = self._made(task)
        try:
            _fill(folder, uses, values, for_anybody=for_anybody)
            folder.rename(self.folder(task))
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def exists(self, task: str) -> bool:
        return self.folder(task).is_dir()

    def remove(self, task: str) -> None:
        """Nothing of the task is left that could need it."""
        shutil.rmtree(self.folder(task), ignore_errors=True)

    def sweep(self, needed: Collection[str]) -> None:
        """Removes what no task needs: of agents that went before they could."""
        with contextlib.suppress(OSError):
            for folder in self._root.iterdir() if self._root else ():
                if unquote(folder.name) not in needed:
                    shutil.rmtree(folder, ignore_errors=True)

    def masked(self, task: str, text: str) -> str:
        """A text about the task without any of its values: such texts go into records that others read."""
        for value in self._values(task):
            text = text.replace(value, MASK)
            if cut := _end_of(value, text):  # the text is the end of a longer one, and begins within the value
                text = MASK + text[cut:]
        return text

    def _values(self, task: str) -> list[str]:
        """All of them, and the lines of those that have several; longest first, so that no part of one is left."""
        found: set[str] = set()
        with contextlib.suppress(OSError):
            for file in self.folder(task).glob("*/*"):
                text = file.read_bytes().decode("utf-8", "replace")
                found.update((text.strip(), *(line.strip() for line in text.splitlines())))
        return sorted((one for one in found if len(one.encode()) >= LEAST_MASKED_BYTES), key=len, reverse=True)

    def _made(self, task: str) -> Path:
        if self._root is None:
            raise LaunchFailed(
                "this node has no place for secrets that is memory only (a tmpfs at /run or /dev/shm); mount one, or start its agent with "
                "--secrets-dir FOLDER",
                unfit=True,
            )
        try:
            own_folder(self._root)
            if self._link is not None and not self._link.is_symlink():
                self._link.symlink_to(self._root)
            self.remove(task)
            folder = self.folder(task + _UNFINISHED)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise LaunchFailed(
                f"secrets cannot be put into {self._root}: {error.strerror}; free it, or choose another: --secrets-dir"
            ) from None
        return folder


def _fill(folder: Path, uses: Sequence[SecretUse], values: Sequence[bytes], *, for_anybody: bool) -> None:
    files_mode, folder_mode = (0o444, 0o755) if for_anybody else (0o400, 0o700)
    for use, value in zip(uses, values, strict=True):
        place = ("env", use.variable) if use.as_text else ("files", use.file)
        (folder / place[0]).mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / place[0] / place[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
        with os.fdopen(descriptor, "wb") as file:
            file.write(value)
            os.fchmod(file.fileno(), files_mode)
    for made in (folder / "env", folder / "files", folder):
        with contextlib.suppress(FileNotFoundError):
            made.chmod(folder_mode)


def _end_of(value: str, text: str) -> int:
    """How many characters at the beginning of a text are the end of a value; 0 for fewer than could be one's."""
    longest = min(len(value) - 1, len(text))
    return next((n for n in range(longest, LEAST_MASKED_BYTES - 1, -1) if text.startswith(value[-n:])), 0)


def own_folder(root: Path) -> None:
    """Makes it, for us alone. Raises OSError for one that is somebody else's, or that others may enter."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(1, "it belongs to somebody else", str(root))
    if found.st_mode & 0o067:  # tasks that are users of their own pass through it to what is theirs
        root.chmod(0o700)


def choose_root(
    chosen: Path | None, state_dir: Path, *, mounts: str = "/proc/self/mounts", bases: Sequence[str] = ()
) -> Path | None:
    """The operator's folder, else one of this agent's own on the first tmpfs that it may write to; None: there is none."""
    if chosen is not None:
        return chosen.resolve()
    digest = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:16]
    types = _file_systems(mounts)
    for base in bases or (os.environ.get("XDG_RUNTIME_DIR", ""), *_BASES):
        if base and _type_at(base, types) in _MEMORY and os.access(base, os.W_OK | os.X_OK):
            return Path(base) / f"whaleflux-{digest}"
    return None


def _file_systems(mounts: str) -> dict[str, str]:
    """Type of what is mounted where (proc(5))."""
    with contextlib.suppress(OSError):
        fields = [line.split(" ") for line in Path(mounts).read_text().splitlines()]
        return {one[1]: one[2] for one in fields if len(one) > 2}
    return {}


def _type_at(folder: str, types: dict[str, str]) -> str:
    """Of the file system that a folder is on: that of the nearest mount above it."""
    path = os.path.realpath(folder)
    while path not in types and path != "/":
        path = os.path.dirname(path)
    return types.get(path, "")
