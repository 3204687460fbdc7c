"""What a deployment without a certificate manager needs before its first start, and again before certificates end.

    python -m whaleflux.bootstrap identities --folder identity --host whaleflux.example.org
    python -m whaleflux.bootstrap secrets --folder identity | kubectl apply -f -
    python -m whaleflux.bootstrap token --context identity/admin/context.json --site onprem --file tokens/node-1

The folder has one subfolder per process, so that each can be given its own and nothing else:

    authority/  ca.crt, ca.key: for inventory, which admits agents, and for this command
    scheduler/  service.crt, service.key, ca.crt, service.yaml (the settings that are secret); so for every service
    frontdoor/  the same files, for Envoy
    admin/      the same files and context.json, for a person's command line
    nats/       nats.env: the passwords that deploy/nats takes from the environment

`identities` may run again at any time: authority and passwords stay, certificates are made anew, and every process
takes them up while it runs. With `--keep` it does so for ever, each time a third of their life is left.
"""

from __future__ import annotations

import base64
import json
import secrets as random_secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from whaleflux.context import Context
from whaleflux.errors import Invalid, Refusal
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles, needs_renewal, write_private

SERVICES = ("inventory", "scheduler", "health_monitor", "checkpoint", "inference_router")
NATS_USER = "app"
_LOOK_EVERY_S = 600.0
_PASSWORDS = ("NATS_APP_PASSWORD", "NATS_SYS_PASSWORD", "NATS_SITE_A_PASSWORD", "NATS_SITE_B_PASSWORD")  # deploy/nats

app = typer.Typer(add_completion=False, help=(__doc__ or "").partition("\n")[0], pretty_exceptions_enable=False)


def write_identities(
    folder: Path, now: datetime, *, hosts: Sequence[str], life: timedelta, server: str = "localhost:7443"
) -> None:
    """Makes what is missing (authority, passwords) and renews all certificates.

    `hosts`: names and addresses under which the front door is dialled; `server`: host:port for the admin's context.
    """
    authority = _authority(folder / "authority", now)
    passwords = _passwords(folder / "nats" / "nats.env")
    config = yaml.safe_dump({"nats_user": NATS_USER, "nats_password": passwords["NATS_APP_PASSWORD"]})
    for role in SERVICES:
        files_of(folder, role).save(authority.issue(role, "1", now, lifetime=life))
        write_private(folder / role / "service.yaml", config.encode())
    files_of(folder, "frontdoor").save(authority.issue("frontdoor", "1", now, hosts=hosts, lifetime=life))
    files_of(folder, "admin").save(authority.issue("admin", "admin", now, lifetime=life))
    _write_context(folder / "admin", server)


def files_of(folder: Path, role: str) -> TlsFiles:
    """Where the identity of one process is."""
    return TlsFiles.under(folder / role, "service")


def due(folder: Path, now: datetime) -> bool:
    """Whether certificates are missing, or less than a third of their life is left."""
    try:
        return any(
            needs_renewal(files_of(folder, role).load().chain, now) for role in (*SERVICES, "frontdoor", "admin")
        )
    except Invalid:
        return True


def kubernetes_secrets(folder: Path) -> list[dict[str, Any]]:
    """Every subfolder of `folder` as a Secret whaleflux-<subfolder>; nats.env becomes one entry per variable."""
    made = []
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "tokens"):
        files = {file.name: file.read_bytes() for file in sorted(part.iterdir()) if not file.name.startswith(".")}
        if part.name == "nats":
            files = {name: value.encode() for name, value in _passwords(part / "nats.env").items()}
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


def _authority(folder: Path, now: datetime) -> CertificateAuthority:
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if key.exists() and certificate.exists():
        return CertificateAuthority.load(certificate.read_bytes(), key.read_bytes())
    authority = CertificateAuthority.create(now)
    write_private(key, authority.key_pem)
    write_private(certificate, authority.certificate_pem)
    return authority


def _passwords(file: Path) -> dict[str, str]:
    """The passwords at NATS by variable; made once. Letters and digits: nats-server reads variables as configuration."""
    if not file.exists():
        # A leading letter, or nats-server would take some of them for numbers.
        made = {name: "p" + random_secrets.token_hex(16) for name in _PASSWORDS}
        write_private(file, "".join(f"{name}={value}\n" for name, value in made.items()).encode())
    pairs = (line.partition("=") for line in file.read_text().splitlines() if line)
    return {name: value for name, _, value in pairs}


def _write_context(folder: Path, server: str) -> None:
    files, at = TlsFiles.under(folder.resolve(), "service"), server.rpartition(":")[0]
    context = Context(
        server=server,
        ca=str(files.roots),
        cert=str(files.chain),
        key=str(files.key),
        inference_url=f"http://{at}:8080/v1",
    )
    write_private(folder / "context.json", (json.dumps(asdict(context), indent=2) + "\n").encode())


@app.command()
def identities(
    folder: Annotated[Path, typer.Option(help="Where everything is kept; readable by the owner alone.")],
    host: Annotated[list[str], typer.Option(help="Name or address of the front door; may be given again.")],
    days: Annotated[float, typer.Option(min=0.05, max=397, help="Life of certificates, days.")] = 7,
    server: Annotated[str, typer.Option(help="host:port of the front door for the admin's context file.")] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Stay, and renew in time, for ever.")] = False,
) -> None:
    """Makes or renews the authority, an identity per process, the admin's context and the passwords."""
    life = timedelta(days=days)
    while True:
        now = datetime.now(UTC)
        if not keep or due(folder, now):
            write_identities(folder, now, hosts=host, life=life, server=server or f"{host[0]}:7443")
            print(f"identities in {folder} are good until {now + life:%Y-%m-%d %H:%M} UTC", flush=True)
        if not keep:
            return
        time.sleep(_LOOK_EVERY_S)


@app.command()
def secrets(
    folder: Annotated[Path, typer.Option(help="A folder that `identities` wrote.")],
) -> None:
    """Prints the folder as Kubernetes Secrets, for `kubectl apply -f -`."""
    print(yaml.safe_dump_all(kubernetes_secrets(folder), sort_keys=False), end="")


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

    request = inventory_pb2.CreateJoinTokenRequest(site=f"sites/{site}", ttl_s=ttl_s)
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
    """The command; a refusal is one line and exit code 2."""
    try:
        app()
    except Refusal as refusal:
        print(f"bootstrap: {refusal.message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
