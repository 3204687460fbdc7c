"""The file of keys that wrap the keys of secrets.

One line for each key, the newest last:

    # any comment
    k-20261130-3f9a1c zQ1t...=      an id, and 32 random bytes in base64

The setting names such a file, or a folder of them (taken in the order of their names; dot files are left out, so that a mounted
Secret of Kubernetes works). Nobody but who runs inventory may read it: it opens every secret.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.names import ID_PATTERN
from whaleflux.rpc.tls_files import write_private

KEY_BYTES = 32
MAX_KEYS = 100
SETTING = "secrets_key_file"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys by id, in their order; the last one wraps what is new."""

    keys: dict[str, bytes] = field(repr=False)

    @property
    def newest(self) -> str:
        return next(reversed(self.keys))


def add_key(path: Path, now: datetime) -> str:
    """Puts a new key behind those of a file, which is made if need be, with mode 0600; returns its id."""
    known = _read_file(path) if path.exists() else ""
    key_id = f"k-{now:%Y%m%d}-{secrets.token_hex(3)}"
    if known and not known.endswith("\n"):
        known += "\n"
    line = f"{key_id} {base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}\n"
    write_private(path, f"{known}{line}".encode())
    return key_id


def make_key_file(path: Path, now: datetime) -> None:
    """Makes the file with a first key; one that is there stays as it is."""
    if not path.exists():
        add_key(path, now)


def load(path: Path) -> KeyRing:
    """The keys of a file or a folder. Raises InvalidArgument that names what is wrong, and never a key."""
    try:
        files = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
        texts = [(file, _read_file(file)) for file in files]
    except OSError as error:
        raise _wrong(f"cannot read {path}: {error.strerror}") from None
    found: dict[str, bytes] = {}
    for file, text in texts:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                key_id, key = _parsed(line, f"{file}, line {number}")
                if key_id in found:
                    raise _wrong(f"{file}, line {number}: {key_id} is there twice; each key needs an id of its own")
                found[key_id] = key
    if not 0 < len(found) <= MAX_KEYS:
        raise _wrong(f"{path} has {len(found)} keys; needed are 1 to {MAX_KEYS}")
    return KeyRing(found)


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file of keys was replaced; raises OSError when it is gone."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file.name, s.st_mtime_ns, s.st_ino) for file in files for s in [file.stat()])


def _parsed(line: str, where: str) -> tuple[str, bytes]:
    words = line.split()
    try:
        key = base64.b64decode(words[1], validate=True) if len(words) == 2 else b""
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES or not ID_PATTERN.fullmatch(words[0]):
        raise _wrong(
            f"{where}: is not an id and {KEY_BYTES} bytes in base64; make keys with: python -m whaleflux.bootstrap secrets-key"
        )
    return words[0], key


def _read_file(path: Path) -> str:
    """Its text. Refuses a file that others may read."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if too_open(found, os.geteuid()):
            raise _wrong(
                f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, so that others can read it; chmod 600 {path}"
            )
        return file.read(1 << 20).decode("utf-8", "replace")


def too_open(found: os.stat_result, me: int) -> bool:
    """Group and others have no business there; but the group has where root owns the file, which is how volumes give it to a process."""
    by_group = stat.S_IRWXG if found.st_uid == me else stat.S_IWGRP | stat.S_IXGRP
    return bool(found.st_mode & (stat.S_IRWXO | by_group)) or found.st_uid not in (me, 0)


def _wrong(text: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(SETTING, text))
