"""Where an embedded suite keeps its state: one folder, one set of ports, one small certificate authority.

.whaleflux/
ports.json     port of each part, chosen at the first start and kept
context.json   what a client needs: front door, certificates, API key
pki/           authority and identities, renewed at each start
pki/store/     the same for etcd and NATS, whose authority is another one
etcd/ nats/    state of the servers
checkpoints/   default folder for jobs' checkpoints
simulated.json agents/   the nodes that are played, and what their agents keep
audit/         records of the audit trail that wait for NATS
logs/ run/     one log and one pid file per process
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from whaleflux.errors import FailedPrecondition
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import pki, store_authority
from whaleflux.rpc.pki import TlsFiles

_CERTIFICATE_LIFE = timedelta(days=30)
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below one state folder."""

    root: Path

    @property
    def ports_file(self) -> Path:
        return self.root / "ports.json"

    @property
    def context_file(self) -> Path:
        return self.root / "context.json"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def secrets_key(self) -> Path:
        """What seals secrets."""
        return self.pki / "secrets.keys"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def ledger(self) -> Path:
        """Files of the usage ledger."""
        return self.root / "ledger"

    @property
    def simulated_file(self) -> Path:
        """Which nodes are played."""
        return self.root / "simulated.json"

    @property
    def agents(self) -> Path:
        """What the agents of simulated nodes keep, a folder each."""
        return self.root / "agents"

    @property
    def rented(self) -> Path:
        """Machines of the simulated cloud, a folder each, with what their agents keep."""
        return self.agents / "rented"

    def agent(self, name: str) -> Path:
        """State folder of one of them."""
        return self.agents / name

    @property
    def pid_file(self) -> Path:
        return self.root / "run" / "supervisor.pid"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def data(self, name: str) -> Path:
        """State folder of one part."""
        return self.root / name

    def tls(self, name: str) -> TlsFiles:
        """Where the identity of one part is."""
        return TlsFiles.under(self.pki, name)

    def store_tls(self, role: str) -> TlsFiles:
        """Where the identity is that etcd, NATS or a service shows of the store's authority."""
        return TlsFiles.under(self.pki / "store", role)

    def create(self) -> None:
        for folder in (self.root, self.root / "logs", self.root / "run", self.pki, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_json(path: Path, content: object) -> None:
    """Replaces `path` atomically; readable by the owner alone."""
    pki.write_private(path, (json.dumps(content, indent=2) + "\n").encode())


def choose_ports(layout: Layout, names: Iterable[str], **told: int) -> dict[str, int]:
    """A port of 127.0.0.1 for each name: as told, else last time's where it is free, else a new one; written down.

    Agents and clients were told the ports of the front door and of the inference API (`frontdoor`, `http`): a taken
    one is refused, not replaced.
    """
    kept: dict[str, int] = json.loads(layout.ports_file.read_text()) if layout.ports_file.exists() else {}
    kept |= {name: port for name, port in told.items() if port}
    for name in told:
        if name in kept and not _is_free(kept[name]):
            raise FailedPrecondition(
                f"port {kept[name]} of 127.0.0.1 ({name}) is taken by another process; stop that process, or choose "
                "other ports with: whaleflux up --port N --http-port M",
                reason=ErrorReason.PORT_TAKEN,
                metadata={"port": str(kept[name]), "name": name},
            )
    ports: dict[str, int] = {}
    for name in names:
        port = kept.get(name, 0)
        ports[name] = port if port and _is_free(port) and port not in ports.values() else _free_port(ports.values())
    write_json(layout.ports_file, ports)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(taken: Iterable[int]) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port


def issue_identities(layout: Layout, roles: Iterable[str]) -> pki.CertificateAuthority:
    """Makes (once) the authority and (at each start) an identity per role and one for the local administrator."""
    now = datetime.now(UTC)
    authority = _authority(layout.pki, now, pki.CertificateAuthority.create)
    for role in roles:
        hosts = _LOOPBACK_HOSTS if role == "frontdoor" else ()
        layout.tls(role).save(authority.issue(role, "embedded", now, hosts=hosts, lifetime=_CERTIFICATE_LIFE))
    layout.tls("admin").save(authority.issue("admin", local_admin(), now, lifetime=_CERTIFICATE_LIFE))
    _issue_store_identities(layout, now)
    return authority


def local_admin() -> str:
    """The user who starts the suite, as an id: its first admin."""
    plain = re.sub(r"[^a-z0-9]+", "-", os.environ.get("USER", "").lower()).strip("-")
    return plain[:63].rstrip("-") or "local"


def _issue_store_identities(layout: Layout, now: datetime) -> None:
    authority = _authority(layout.pki / "store", now, store_authority.new_authority)
    hosts = store_authority.StoreHosts(_LOOPBACK_HOSTS, _LOOPBACK_HOSTS)
    for role, tls in store_authority.identities(authority, "embedded", now, _CERTIFICATE_LIFE, hosts):
        layout.store_tls(role).save(tls)


def _authority(
    folder: Path, now: datetime, create: Callable[[datetime], pki.CertificateAuthority]
) -> pki.CertificateAuthority:
    key_file, certificate_file = folder / "authority.key", folder / "ca.crt"
    if key_file.exists() and certificate_file.exists():
        return pki.CertificateAuthority.load(certificate_file.read_bytes(), key_file.read_bytes())
    authority = create(now)
    pki.write_private(key_file, authority.key_pem)
    pki.write_private(certificate_file, authority.certificate_pem)
    return authority


def write_pid(layout: Layout) -> None:
    """Says that this process is the supervisor of the state folder."""
    layout.pid_file.write_text(f"{os.getpid()} {_start_time(os.getpid())}")


def running_pid(layout: Layout) -> int | None:
    """Pid of the supervisor of this state folder, None when there is none; a recycled pid does not count."""
    with contextlib.suppress(OSError, ValueError):
        pid, began = map(int, layout.pid_file.read_text().split())
        if _start_time(pid) == began:
            return pid
    return None


def _start_time(pid: int) -> int:
    """Clock ticks since boot (proc(5), field 22): with the pid it names a process for good; -1 once it has ended."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])
