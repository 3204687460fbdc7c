"""Which storage a folder of checkpoints really lies on, and how names and bytes become durable there.

The first save of a job leaves a random name in the job's folder. Whoever reads the same name sees the same storage; whoever
does not (a path without its mount, a folder of its own on another node) must not conclude anything from what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

STORAGE_FILE = ".whaleflux-storage"
STORAGE_LABEL = "checkpoint-storage"  # of a node: the storage that its default folder for checkpoints is on


def job_folder(root: str, job: str, job_uid: str) -> str:
    """Where a job's checkpoints lie below a folder or URL prefix.

    The uid of the job is in the name: a later job of the same name does not find what this one leaves.
    """
    return os.path.join(root, quote(job, safe="") + (f".{job_uid}" if job_uid else ""))


def storage_id(folder: Path) -> str:
    """The name in a job's folder; "" when nobody ever saved in what is there now. Raises OSError when it cannot be told."""
    try:
        return (folder / STORAGE_FILE).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder that was not there, and its parents, durably. Raises FileExistsError, OSError."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    try:
        for made in (folder, *missing):
            sync(made.parent)
    except OSError:
        folder.rmdir()
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` as a whole: bytes, then name, then the folder that holds the name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def found_storage(folder: Path, known: str = "") -> str:
    """The name of the storage that a job's folder is on; gives it one when nobody has yet. Raises OSError.

    `known`: the storage that the job saved on before; raises OSError when the folder does not show it, and leaves what is there alone.
    """
    found = storage_id(folder)
    if known and found != known:
        raise OSError(errno.ENODEV, "is not the storage that this job saves on: not mounted any more?", str(folder))
    if found:
        return found
    with contextlib.suppress(FileExistsError):  # another rank makes it at the same time
        make_folder(folder)
    named = folder / f"{STORAGE_FILE}.{secrets.token_hex(4)}.part"
    try:
        write_durably(named, secrets.token_hex(16).encode())
        with contextlib.suppress(FileExistsError):  # and names it: the first name stays
            os.link(named, folder / STORAGE_FILE)
    finally:
        named.unlink(missing_ok=True)
    sync(folder)
    return storage_id(folder)


def unshared(storages: Mapping[str, str]) -> str:
    """What to know before a job on these nodes saves into their default folders, "" when they share one.

    `storages`: by node, the storage of its default folder; "" where it is not known.
    """
    if len(storages) < 2 or (len(set(storages.values())) == 1 and "" not in storages.values()):
        return ""
    return (
        f"its {len(storages)} nodes do not share their default folder for checkpoints: name one that they share as "
        "checkpoint.location, or nothing of it can be saved"
    )
