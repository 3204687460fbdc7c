"""What a deployment without a certificate manager needs before its first start, and again before certificates end.

    python -m whaleflux.bootstrap identities --folder identity --host whaleflux.example.org
    python -m whaleflux.bootstrap secrets --folder identity | kubectl apply -f -
    python -m whaleflux.bootstrap token --context identity/admin/context.json --site onprem --file tokens/node-1
    python -m whaleflux.bootstrap request --folder admin --name ann --server whaleflux.example.org:7443 | kubectl apply -f -

The last is for deployments with cert-manager, which then has the place of `identities`.

The folder has one subfolder per process, so that each can be given its own and nothing else:

    authority/  ca.crt, ca.key: for inventory, which admits agents, and for this command; secrets.keys, which seals secrets
    scheduler/  service.crt, service.key, ca.crt, and what etcd and NATS are shown: store.crt, store.key, store-ca.crt; so for
                every service
    frontdoor/  the first three, for Envoy; scraper/ for what reads metrics
    admin/      the same and context.json, for a person's command line
    store-authority/  ca.crt, ca.key: for this command alone
    etcd/       service.crt, service.key, ca.crt, the last of the store's authority; all members share it
    backup/     the same, for copies of etcd and of the bus' streams: opens both, belongs to no process
    nats/       the same, and fleet-ca.crt, of which sites' servers show certificates
    site-a/     service.crt, service.key, ca.crt, and store-ca.crt, for the event server of a site (--site a)

`identities` may run again at any time: authorities stay, certificates are made anew, and every process takes them up while it
runs, nats-server when it is sent SIGHUP. With `--keep` it does so for ever, each time a third of their life is left. Hub and
sites' event servers are configured by `python -m whaleflux.bootstrap nats-config`; no password is anywhere.
"""

from __future__ import annotations

import base64
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from whaleflux import hostport, names
from whaleflux.certificate_requests import certificate_request
from whaleflux.context import Context
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.events import nats_config as nats
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Identity
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, needs_renewal, write_private
from whaleflux.rpc.store_authority import NATS_LIFETIME, StoreHosts, new_authority
from whaleflux.rpc.store_authority import identities as identities_of_store
from whaleflux.services import FRONTDOOR_GRPC_PORT, FRONTDOOR_HTTP_PORT, ROLES
from whaleflux.trust import key_file

SECRETS_KEY = "secrets.keys"
_LOOK_EVERY_S = 600.0
# Parts that a process in the cluster reads. Whatever else lies in the folder (an admin's key, tokens) has no reader there.
_READ_IN_CLUSTER = (*ROLES, "frontdoor", "authority", roles.ETCD, roles.NATS, roles.SCRAPER)
_HERE = ("localhost", "127.0.0.1")
# Names of etcd's members in deploy/: alone and of three, in Compose and in Kubernetes.
_ETCD_HOSTS = ("etcd", "etcd-2", "etcd-3", *(f"etcd-{n}.etcd-members" for n in range(3)), *_HERE)

app = typer.Typer(add_completion=False, help=(__doc__ or "").partition("\n")[0], pretty_exceptions_enable=False)


def write_identities(
    folder: Path,
    now: datetime,
    *,
    hosts: Sequence[str],
    life: timedelta,
    server: str = f"localhost:{FRONTDOOR_GRPC_PORT}",
    admin: str = "admin",
    sites: Sequence[str] = (),
    store_hosts: Sequence[str] = (),
) -> None:
    """Makes the authorities where they are missing and renews all certificates.

    `hosts`: names and addresses under which the front door is dialled, and the hub of the event bus by `sites`; `server`: host:port
    for the admin's context; `admin`: their name; `store_hosts`: further names of etcd and NATS within the control plane.
    """
    authority = _authority(folder / "authority", now)
    key_file.make_key_file(folder / "authority" / SECRETS_KEY, now)
    for role in (*ROLES, roles.SCRAPER):
        files_of(folder, role).save(authority.issue(role, "1", now, lifetime=life))
    files_of(folder, "frontdoor").save(authority.issue("frontdoor", "1", now, hosts=hosts, lifetime=life))
    files_of(folder, "admin").save(authority.issue("admin", names.check_id("admin", admin), now, lifetime=life))
    _write_context(folder / "admin", server)
    known_as = StoreHosts([*_ETCD_HOSTS, *store_hosts], ["nats", *_HERE, *hosts, *store_hosts])
    store = _write_store_identities(folder, now, life, known_as)
    write_private(folder / roles.NATS / "fleet-ca.crt", authority.certificate_pem)
    for site in sites:
        # Of nats-server too, which reads it when it starts: revoked is a site by its account in the hub's configuration.
        lasting = max(life, NATS_LIFETIME)
        tls = authority.issue(roles.SITE, names.check_id("site", site), now, hosts=_HERE, lifetime=lasting)
        files_of(folder, f"site-{site}").save(tls)
        write_private(folder / f"site-{site}" / "store-ca.crt", store.certificate_pem)


def _write_store_identities(folder: Path, now: datetime, life: timedelta, hosts: StoreHosts) -> CertificateAuthority:
    """What the store's authority signs, each to the subfolder of its process; returns the authority."""
    authority = _authority(folder / "store-authority", now, new_authority)
    for role, tls in identities_of_store(authority, "1", now, life, hosts):
        (store_files_of if role in ROLES else files_of)(folder, role).save(tls)
    return authority


def store_files_of(folder: Path, role: str) -> TlsFiles:
    """Where a service's identity for etcd and NATS is."""
    part = folder / role
    return TlsFiles(part / "store.key", part / "store.crt", part / "store-ca.crt")


def files_of(folder: Path, role: str) -> TlsFiles:
    """Where the identity of one process is."""
    return TlsFiles.under(folder / role, "service")


def due(folder: Path, now: datetime) -> bool:
    """Whether certificates are missing, or less than a third of their life is left."""
    files = [files_of(folder, role) for role in (*ROLES, "frontdoor", "admin", roles.SCRAPER, roles.ETCD)]
    files += [store_files_of(folder, role) for role in ROLES]
    try:
        return any(needs_renewal(one.load().chain, now) for one in files)
    except InvalidArgument:
        return True


def kubernetes_secrets(folder: Path) -> list[dict[str, Any]]:
    """A Secret whaleflux-<part> for each part that a process in the cluster reads, and for no other.

    Raises InvalidArgument where a part is missing.
    """
    made = []
    for part in (folder / name for name in _READ_IN_CLUSTER):
        if not part.is_dir():
            raise InvalidArgument(
                FieldViolation("folder", f"{folder} has no {part.name}/; make it with: whaleflux.bootstrap identities")
            )
        files = {file.name: file.read_bytes() for file in sorted(part.iterdir()) if not file.name.startswith(".")}
        made.append(secret(f"whaleflux-{part.name.replace('_', '-')}", files))
    return made


def secret(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """A Kubernetes Secret."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "whaleflux"}},
        "type": "Opaque",
        "data": {key: base64.b64encode(value).decode() for key, value in files.items()},
    }


def _authority(
    folder: Path, now: datetime, create: Callable[[datetime], CertificateAuthority] = CertificateAuthority.create
) -> CertificateAuthority:
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if key.exists() and certificate.exists():
        return CertificateAuthority.load(certificate.read_bytes(), key.read_bytes())
    authority = create(now)
    write_private(key, authority.key_pem)
    write_private(certificate, authority.certificate_pem)
    return authority


def _write_context(folder: Path, server: str) -> None:
    files, at = TlsFiles.under(folder.resolve(), "service"), hostport.parse(server, "server")
    context = Context(
        server=server,
        ca=str(files.roots),
        cert=str(files.chain),
        key=str(files.key),
        inference_url=f"https://{hostport.join(at.host, FRONTDOOR_HTTP_PORT)}/v1",
    )
    write_private(folder / "context.json", (json.dumps(asdict(context), indent=2) + "\n").encode())


@app.command()
def identities(
    folder: Annotated[Path, typer.Option(help="Where everything is kept; readable by the owner alone.")],
    host: Annotated[list[str], typer.Option(help="Name or address of the front door; may be given again.")],
    days: Annotated[float, typer.Option(min=0.05, max=397, help="Life of certificates, days.")] = 7,
    server: Annotated[str, typer.Option(help="host:port of the front door for the admin's context file.")] = "",
    admin: Annotated[str, typer.Option(help="Name of the admin; another one where that was disabled.")] = "admin",
    site: Annotated[
        list[str] | None, typer.Option(help="A site with an event server of its own; may be given again.")
    ] = None,
    store_host: Annotated[
        list[str] | None, typer.Option(help="A further name of etcd or NATS; may be given again.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Stay, and renew in time, for ever.")] = False,
) -> None:
    """Makes or renews the authorities, an identity per process, and the admin's context."""
    life = timedelta(days=days)
    if keep:
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(0)
        )  # the first process of a container is not ended by it otherwise
    while True:
        now = datetime.now(UTC)
        if not keep or due(folder, now):
            write_identities(
                folder,
                now,
                hosts=host,
                life=life,
                server=server or hostport.join(host[0], FRONTDOOR_GRPC_PORT),
                admin=admin,
                sites=site or (),
                store_hosts=store_host or (),
            )
            print(f"identities in {folder} are good until {now + life:%Y-%m-%d %H:%M} UTC", flush=True)
        if not keep:
            return
        time.sleep(_LOOK_EVERY_S)


@app.command("nats-config")
def nats_config(
    site: Annotated[list[str] | None, typer.Option(help="A site whose server links; may be given again.")] = None,
    of: Annotated[str, typer.Option(help="Print the configuration of this site's server, not the hub's.")] = "",
    hub: Annotated[str, typer.Option(help="host:port of the hub for sites' servers.")] = "nats:7422",
) -> None:
    """Prints what nats-server is configured with: who may say and hear what, and where its identity lies (/identity)."""
    text = nats.deployed_site(of, hub) if of else nats.deployed_hub(site or ())
    print(text, end="")


@app.command()
def secrets(
    folder: Annotated[Path, typer.Option(help="A folder that `identities` wrote.")],
) -> None:
    """Prints what the cluster's processes read, as Secrets for `kubectl apply -f -`; the admin's key is not among it."""
    print(yaml.safe_dump_all(kubernetes_secrets(folder), sort_keys=False), end="")


@app.command()
def request(
    folder: Annotated[Path, typer.Option(help="Where the key and context.json go; made if need be.")],
    name: Annotated[str, typer.Option(help="The person, as in user/NAME.")],
    server: Annotated[str, typer.Option(help="host:port of the front door for the context file.")],
    role: Annotated[str, typer.Option(help="admin, operator, user or viewer.")] = "admin",
    issuer: Annotated[str, typer.Option(help="cert-manager's Issuer of the fleet.")] = "whaleflux-fleet",
    days: Annotated[float, typer.Option(min=0.05, max=397, help="Life of the certificate, days.")] = 7,
) -> None:
    """Makes a person's key, which stays here, and prints the request for cert-manager that has it certified."""
    if role not in roles.HUMANS:
        raise InvalidArgument(FieldViolation("role", f"{role!r} is none of {', '.join(sorted(roles.HUMANS))}"))
    identity = Identity.parse(Identity(role, name).uri)
    key, manifest = certificate_request(identity, issuer, timedelta(days=days))
    write_private(files_of(folder.parent, folder.name).key, key)
    _write_context(folder, server)
    print(yaml.safe_dump(manifest, sort_keys=False), end="")


@app.command("secrets-key")
def secrets_key(
    file: Annotated[
        Path, typer.Option(help="The file of keys (setting secrets_key_file of inventory); made if need be.")
    ],
) -> None:
    """Adds a key that seals secrets from now on; `whaleflux secrets rewrap` then moves all to it."""
    key_id = key_file.add_key(file, datetime.now(UTC))
    print(f"{file}: {key_id} seals from now on; next: whaleflux secrets rewrap", flush=True)


@app.command()
def token(
    context: Annotated[Path, typer.Option(help="The admin's context file.")],
    site: Annotated[str, typer.Option(help="Site that the node joins; made when it does not exist.")],
    file: Annotated[list[Path], typer.Option(help="Where a token goes; may be given again. One that exists is kept.")],
    ttl_s: Annotated[int, typer.Option(min=1, max=604800, help="Seconds until unused tokens end.")] = 604800,
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the control plane.")] = 60,
) -> None:
    """Gets a single-use join token for each file, the CA's certificate beside it; without the control plane it waits."""
    from whaleflux.sdk.client import Client
    from whaleflux.v1 import inventory_pb2

    request = inventory_pb2.CreateJoinTokenRequest(site=names.site(site), ttl_s=ttl_s)
    deadline = time.monotonic() + wait_s
    with Client.from_context(context) as client:
        for path in (path for path in file if not path.exists()):
            made = _until(deadline, lambda: client.inventory.CreateJoinToken(request, timeout=10))
            write_private(path.parent / "ca.crt", Path(Context.load(context).ca).read_bytes())
            write_private(path, made.secret.encode())
            print(f"{path}: admits one node to site {site}", flush=True)


def _until(deadline: float, call: Any) -> Any:
    """Unanswered is tried again until `deadline` (monotonic seconds); a token made in vain ends by itself."""
    from whaleflux.errors import DeadlineExceeded, Unavailable

    while True:
        try:
            return call()
        except (Unavailable, DeadlineExceeded):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def main() -> None:
    """The command; a status error is one line and exit code 2."""
    try:
        app()
    except StatusError as error:
        print(f"bootstrap: {error.message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
