"""What nats-server is configured with: a hub, and the servers of sites that link to it.

A hub serves what is on one machine or in a control plane, and leaf sites if it is told of them; a site's server goes on alone while its
link to the hub is cut. With certificates these say who somebody is and there are no passwords. Without (evaluation) secrets stand
in the file (mode 0600), never on the command line. Who may do what is in `permissions`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux import ports
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.events import permissions
from whaleflux.events.permissions import FLEET_ACCOUNT, Permissions
from whaleflux.events.subjects import HUB
from whaleflux.names import check_id
from whaleflux.ports import Party
from whaleflux.rpc import roles
from whaleflux.rpc.pki import STORE_TRUST_DOMAIN, server_name
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.services import ROLES

_IDENTITY = Path("/identity")  # where deployments put the files of a process
_SITE_BYTES, _SITE_MEMORY = 256 << 20, 16 << 20  # for what came from one site, in its account at the hub


@dataclass(frozen=True, slots=True)
class User:
    """A client and what it may do; `allowed` None: everything. Without a password its certificate has `name` as a DNS name."""

    name: str
    password: str = field(default="", repr=False)
    allowed: Permissions | None = None
    connects_as: str = "STANDARD"


@dataclass(frozen=True, slots=True)
class NatsServer:
    """What hub and site have in common. Addresses are host:port.

    With `tls` clients must show a certificate of the same authority, and are the user whose name is in it.
    """

    store: Path
    client_address: str
    monitor_address: str  # /healthz and figures, without authentication: loopback only
    users: tuple[User, ...]
    tls: TlsFiles | None = None
    max_file_bytes: int = 8 << 30  # the streams of the hub and of code, whole
    max_memory_bytes: int = 256 << 20
    fsync_always: bool = False  # True: an acknowledged event survives a power loss too, at half the rate


@dataclass(frozen=True, slots=True)
class Leaf:
    """A site that may link its server, by a certificate of the fleet's authority, or by this password."""

    site: str
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Hub(NatsServer):
    """The hub; `sites` may link their servers at `leaf_address`, with certificates of `leaf_authority`."""

    leaf_address: str = ""
    sites: tuple[Leaf, ...] = ()
    leaf_authority: Path | None = None


@dataclass(frozen=True, slots=True)
class Site(NatsServer):
    """A site's server. `hub_url` is tls://<host>:<leaf port>, or without certificates nats://<site>:<password>@<host>:<port>.

    With `tls` all who show a certificate of the fleet are `users[0]`: agents; `hub_authority` has signed for the hub.
    """

    site: str = ""
    hub_url: str = field(default="", repr=False)
    hub_authority: Path | None = None


def service_users(sites: Iterable[str] = ()) -> tuple[User, ...]:
    """A user for each service and for backups, known by their certificates of the store's authority."""
    named = tuple(sites)
    allowed = {role: permissions.of_service(role, named) for role in ROLES} | {roles.BACKUP: permissions.of_backup()}
    return tuple(
        User(server_name(role, trust_domain=STORE_TRUST_DOMAIN), allowed=rights) for role, rights in allowed.items()
    )


def agents_user(site: str, password: str = "") -> User:
    """The agents of a site at its own server. They connect with `NatsOptions(create_streams=False)`."""
    return User("agents", password, permissions.of_agents(site))


def hub_config(hub: Hub) -> str:
    """The hub's configuration file."""
    for leaf in hub.sites:
        check_id("site", leaf.site)
    lent = [_import(leaf.site, shared) for leaf in hub.sites for shared in permissions.lent_by(leaf.site)]
    fleet = _account(FLEET_ACCOUNT, hub.users, hub.max_file_bytes, hub.max_memory_bytes, lent)
    accounts = [fleet, *(_site_account(leaf, hub.tls is not None) for leaf in hub.sites)]
    common = _common(HUB, hub, accounts, _tls(hub.tls, "", mapped=True), len(hub.sites))
    return common + _leaf_listener(hub)


def deployed_hub(sites: Sequence[str]) -> str:
    """The hub's configuration in deploy/: its identity in /identity, its state in /data."""
    client, leaf, monitor = (ports.number(Party.NATS, name) for name in ("client", "leaf", "monitor"))
    hub = Hub(
        Path("/data"),
        f"0.0.0.0:{client}",
        f"127.0.0.1:{monitor}",
        service_users(sites),
        TlsFiles.under(_IDENTITY, "service"),
        leaf_address=f"0.0.0.0:{leaf}",
        sites=tuple(map(Leaf, sites)),
        leaf_authority=_IDENTITY / "fleet-ca.crt",
    )
    return hub_config(hub)


def deployed_site(site: str, hub: str) -> str:
    """A site's configuration in deploy/; `hub` is host:port of the hub's port for sites."""
    client, monitor = (ports.number(Party.NATS, name) for name in ("client", "monitor"))
    return site_config(
        Site(
            Path("/data"),
            f"0.0.0.0:{client}",
            f"127.0.0.1:{monitor}",
            (agents_user(site),),
            TlsFiles.under(_IDENTITY, "service"),
            max_file_bytes=2 << 30,  # must hold the longest cut
            max_memory_bytes=128 << 20,
            site=site,
            hub_url=f"tls://{hub}",
            hub_authority=_IDENTITY / "store-ca.crt",
        )
    )


def _leaf_listener(hub: Hub) -> str:
    if not hub.leaf_address:
        return ""
    tls = _tls(hub.tls, "  ", mapped=True, authority=hub.leaf_authority) if hub.tls else ""
    return f"""leafnodes {{
  listen: {_q(hub.leaf_address)}
  no_advertise: true  # else sites learn this address and go round a proxy, a firewall or a cut
{tls}}}
"""


def site_config(site: Site) -> str:
    """A leaf site's configuration file."""
    check_id("site", site.site)
    if not site.hub_url:
        raise InvalidArgument(FieldViolation("hub_url", "a site links to a hub: tls://<host>:<port>"))
    # Events cross the link only as stream sources, never as plain messages: no second copy, no loop, and no client of
    # the hub writes into a site's stream.
    account = _account(FLEET_ACCOUNT, site.users, site.max_file_bytes, site.max_memory_bytes, [])
    anyone = f"no_auth_user: {_q(site.users[0].name)}\n" if site.tls else ""  # with a certificate of the fleet
    return (
        _common(site.site, site, [account], anyone + _tls(site.tls, ""))
        + f"""leafnodes {{
  reconnect: "1s"
  remotes = [ {{
    urls: [ {_q(site.hub_url)} ]
    account: {FLEET_ACCOUNT}
    ignore_discovered_servers: true
    deny_exports: [ "wf.>" ]
    deny_imports: [ "wf.>" ]
{_tls(site.tls, "    ", authority=site.hub_authority)}  }} ]
}}
"""
    )


def _common(name: str, server: NatsServer, accounts: Sequence[str], access: str, sites: int = 0) -> str:
    """The server has what its accounts may take: `sites` of them beside the fleet's."""
    return f"""server_name: {_q(name)}
listen: {_q(server.client_address)}
http: {_q(server.monitor_address)}
{access}jetstream {{
  store_dir: {_q(str(server.store))}
  domain: {_q(name)}
  max_memory_store: {server.max_memory_bytes + sites * _SITE_MEMORY}
  max_file_store: {server.max_file_bytes + sites * _SITE_BYTES}
  sync_interval: {'"always"' if server.fsync_always else '"2m"'}
}}
ping_interval: "5s"  # a silent link is given up after three of these
ping_max: 2
max_payload: 1MB
write_deadline: "5s"
accounts {{
{"".join(accounts)}  SYS {{ users: [] }}
}}
system_account: SYS
"""


def _account(
    name: str, users: Iterable[User], file_bytes: int, memory_bytes: int, imports: Sequence[str], exports: str = ""
) -> str:
    listed = "".join(f"      {_user(user)}\n" for user in users)
    taken = "    imports: [\n" + "".join(f"      {one}\n" for one in imports) + "    ]\n" if imports else ""
    return f"""  {_q(name)} {{
    jetstream: {{ max_mem: {memory_bytes}, max_file: {file_bytes}, max_streams: 64, max_consumers: 4096 }}
    users: [
{listed}    ]
{taken}{exports}  }}
"""


def _site_account(leaf: Leaf, certified: bool) -> str:
    """All that a site has at the hub. What its server says stays here until the fleet's account takes of it."""
    name = server_name(roles.SITE, leaf.site) if certified else leaf.site
    user = User(name, "" if certified else leaf.password, permissions.of_leaf(leaf.site), "LEAFNODE")
    lent = "".join(
        f"      {{ {shared.kind}: {_q(shared.subject)}, accounts: [ {_q(FLEET_ACCOUNT)} ]"
        f"{', response_type: stream' if shared.many_answers else ''} }}\n"
        for shared in permissions.lent_by(leaf.site)
    )
    account = permissions.account_of(leaf.site)
    return _account(account, [user], _SITE_BYTES, _SITE_MEMORY, [], f"    exports: [\n{lent}    ]\n")


def _import(site: str, shared: permissions.Shared) -> str:
    source = f"{shared.kind}: {{ account: {_q(permissions.account_of(site))}, subject: {_q(shared.subject)} }}"
    return f"{{ {source}{f', to: {_q(shared.to)}' if shared.to != shared.subject else ''} }}"


def _user(user: User) -> str:
    password = f", password: {_q(user.password)}" if user.password else ""
    rights = ""
    if user.allowed:
        allowed = {"publish": user.allowed.publish, "subscribe": user.allowed.subscribe}
        rights = ", permissions: { " + ", ".join(f"{k}: {{ allow: {_list(v)} }}" for k, v in allowed.items()) + " }"
    return f"{{ user: {_q(user.name)}{password}, allowed_connection_types: [ {user.connects_as} ]{rights} }}"


def _tls(tls: TlsFiles | None, indent: str, *, mapped: bool = False, authority: Path | None = None) -> str:
    """Both sides show a certificate; `mapped`: it says which user the other side is."""
    if tls is None:
        return ""
    files = f"cert_file: {_q(str(tls.chain))}, key_file: {_q(str(tls.key))}, ca_file: {_q(str(authority or tls.roots))}"
    return f"{indent}tls {{ {files}, {'verify_and_map' if mapped else 'verify'}: true, timeout: 3 }}\n"


def _list(items: Sequence[str]) -> str:
    return "[ " + ", ".join(_q(item) for item in items) + " ]"


def _q(text: str) -> str:
    """Quoted for nats-server's configuration; refuses what would end the quotation or start a variable."""
    if not text.isprintable() or "\\" in text or '"' in text:
        raise InvalidArgument(
            FieldViolation("configuration", "values hold neither quotes, backslashes nor control characters")
        )
    return json.dumps(text, ensure_ascii=False)
