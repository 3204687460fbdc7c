"""Which machine this is, so that a node's name belongs to one: the installation in this state directory, on this host."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from whaleflux.rpc.pki import write_private

_HOST_ID = Path("/etc/machine-id")  # of the operating system; readable by everybody, and made anew for a cloned one


def host_id_file() -> Path | None:
    """Where the host says which one it is; None in a container, whose image may bring such a file and lose it again."""
    contained = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    return None if contained or "KUBERNETES_SERVICE_HOST" in os.environ else _HOST_ID


def machine_id(state_dir: Path, host_id: Path | None) -> str:
    """32 hexadecimal digits: the same at each start, others for another state directory and for a copy of it elsewhere."""
    path = state_dir / "identity" / "installation"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, secrets.token_hex(16).encode())
    try:
        host = host_id.read_bytes().strip() if host_id is not None else b""
    except OSError:  # not every system has one
        host = b""
    return hashlib.sha256(path.read_bytes().strip() + b"/" + host).hexdigest()[:32]
