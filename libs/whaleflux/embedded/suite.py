"""The whole suite on one machine: etcd, NATS, Envoy and every service as supervised children, state in one folder.

For evaluation, tests and single hosts; production runs the same services from `deploy/`. Everything listens on
127.0.0.1, speaks mTLS and checks roles exactly as elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from whaleflux.context import Context
from whaleflux.embedded import envoy, etcd, nats
from whaleflux.embedded.layout import Layout, choose_ports, issue_identities, running_pid, write_json
from whaleflux.embedded.supervisor import Child, Supervisor
from whaleflux.errors import Unavailable, WrongState

ROLES = ("inventory", "health_monitor", "checkpoint", "scheduler", "inference_router")
_PORTS = (
    "frontdoor", "http", "admin", "etcd", "etcd_peer", "nats", "nats_monitor", "policy",
    *ROLES, *(f"{role}_metrics" for role in ROLES),
)  # fmt: skip
_IDENTITIES = (*ROLES, "frontdoor")
_READY_S = 60.0
_RENEW_EVERY_S = 86_400.0  # certificates live for 30 days


@dataclass(frozen=True, slots=True)
class Options:
    """What `whaleflux up` can be told. Port 0: keep last time's, or choose one. `otlp_endpoint`: where traces go."""

    state: Path = Path(".whaleflux")
    port: int = 0
    http_port: int = 0
    otlp_endpoint: str = ""


class Suite:
    """The children in the order in which they start, and what clients need to know."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.layout = Layout(options.state.resolve())
        self._options, self._say = options, say
        self.layout.create()
        self.ports = choose_ports(self.layout, _PORTS, frontdoor=options.port, http=options.http_port)
        issue_identities(self.layout, _IDENTITIES)
        self.supervisor = Supervisor(self.layout.root / "run", say)

    async def start(self) -> Context:
        """Starts all, each when what it needs is ready; writes the context file last: its presence means ready."""
        self.layout.context_file.unlink(missing_ok=True)
        for child in (self._etcd(), self._nats(), *(self._service(role) for role in ROLES), self._envoy()):
            began = time.monotonic()
            await self.supervisor.start(child)
            self._say(f"{child.name} is ready ({time.monotonic() - began:.1f} s)")
        context = await self._context()
        write_json(self.layout.context_file, asdict(context))
        return context

    async def keep_identities(self) -> None:
        """Renews every certificate each day, until cancelled; the processes take the files up by themselves."""
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            issue_identities(self.layout, _IDENTITIES)

    async def stop(self) -> None:
        """Stops all in reverse order."""
        await self.supervisor.stop()

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def where(self) -> list[tuple[str, str]]:
        """What listens where, for people."""
        return [
            ("front door (gRPC, mTLS)", self.address("frontdoor")),
            ("inference API", f"http://{self.address('http')}/v1"),
            *((f"{role} metrics", f"http://{self.address(f'{role}_metrics')}/metrics") for role in ROLES),
            ("Envoy admin", f"http://{self.address('admin')}"),
            ("etcd", f"http://{self.address('etcd')}"),
            ("NATS", f"nats://{self.address('nats')}"),
            ("state, logs", str(self.layout.root)),
        ]

    def _etcd(self) -> Child:
        ports = self.ports
        argv = etcd.command(
            etcd.find(), self.layout.data("etcd"), client_port=ports["etcd"], peer_port=ports["etcd_peer"]
        )
        return self._child("etcd", argv, lambda: etcd.wait_ready("127.0.0.1", ports["etcd"], timeout_s=_READY_S))

    def _nats(self) -> Child:
        config = self.layout.root / "nats.conf"
        hub = nats.Hub(
            store=self.layout.data("nats"),
            client_address=self.address("nats"),
            monitor_address=self.address("nats_monitor"),
            users=(nats.User("whaleflux", self._nats_password()),),
        )
        nats.write_config(config, nats.hub_config(hub))
        return self._child(
            "nats", nats.command(config), lambda: nats.wait_ready(self.address("nats_monitor"), _READY_S)
        )

    def _service(self, role: str) -> Child:
        port_file = self.layout.root / "run" / f"{role}.json"
        port_file.unlink(missing_ok=True)  # its presence means serving
        tls = self.layout.tls(role)
        settings = {
            "name": "embedded",
            "listen": self.address(role),
            "metrics_listen": self.address(f"{role}_metrics"),
            "port_file": str(port_file),
            "store": f"http://{self.address('etcd')}",
            "nats": f"nats://{self.address('nats')}",
            "nats_user": "whaleflux",
            "nats_password": self._nats_password(),
            "tls_cert": str(tls.chain),
            "tls_key": str(tls.key),
            "tls_ca": str(tls.roots),
            "otlp_endpoint": self._options.otlp_endpoint,
            **{peer: self.address(peer) for peer in ROLES},
            **self._own_settings(role),
        }
        # By environment, not by flags: flags are visible to every user of the machine, and one of these is a password.
        environment = {f"WHALEFLUX_{key.upper()}": value for key, value in settings.items() if value}
        argv = [sys.executable, "-m", f"whaleflux_{role}"]
        return self._child(role, argv, lambda: _appears(port_file), environment)

    def _own_settings(self, role: str) -> dict[str, str]:
        if role == "inventory":
            return {"ca_cert": str(self.layout.pki / "ca.crt"), "ca_key": str(self.layout.pki / "authority.key")}
        if role == "inference_router":
            return {"policy_listen": self.address("policy")}
        return {}

    def _envoy(self) -> Child:
        config, secrets_file = self.layout.root / "envoy.yaml", self.layout.root / "run" / "envoy-secrets.yaml"
        front = envoy.FrontDoor(
            grpc_port=self.ports["frontdoor"],
            http_port=self.ports["http"],
            admin_port=self.ports["admin"],
            tls=self.layout.tls("frontdoor"),
            upstreams={role: self.address(role) for role in ROLES},
            policy=self.address("policy"),
            secrets=str(secrets_file),  # so that renewed certificates are taken up
        )
        config.write_text(envoy.render(front))
        secrets_file.write_text(envoy.render_secrets(front))
        return self._child("envoy", envoy.command(config), lambda: envoy.wait_ready(self.address("admin"), _READY_S))

    def _child(
        self,
        name: str,
        argv: list[str],
        ready: Callable[[], Awaitable[None]],
        environment: dict[str, str] | None = None,
    ) -> Child:
        return Child(name, argv, self.layout.log(name), ready, environment or {}, ready_timeout_s=_READY_S)

    def _nats_password(self) -> str:
        kept = self.layout.root / "nats.password"
        if not kept.exists():
            with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24))
        return kept.read_text()

    async def _context(self) -> Context:
        admin = self.layout.tls("admin")
        plain = Context(
            server=self.address("frontdoor"),
            ca=str(admin.roots),
            cert=str(admin.chain),
            key=str(admin.key),
            inference_url=f"http://{self.address('http')}/v1",
        )
        return await _with_api_key(plain, self.layout.root / "api.key")


async def _appears(file: Path) -> None:
    while not file.exists():
        await asyncio.sleep(0.02)


async def _with_api_key(context: Context, kept: Path) -> Context:
    """The context with a key of the inference API: last time's, or a new one."""
    from dataclasses import replace

    from whaleflux.rpc.channel import connect
    from whaleflux.rpc.pki import TlsFiles, write_private
    from whaleflux.v1 import router_pb2, router_pb2_grpc

    if not kept.exists():
        files = TlsFiles(Path(context.key), Path(context.cert), Path(context.ca))
        async with connect(context.server, files, server=context.server_name) as channel:
            made = await router_pb2_grpc.RouterServiceStub(channel).CreateApiKey(
                router_pb2.CreateApiKeyRequest(display_name="whaleflux up"), timeout=20
            )
        write_private(kept, made.secret.encode())
    return replace(context, api_key=kept.read_text())


def run_up(options: Options, say: Callable[[str], None], ready: Callable[[Suite], None] = lambda _: None) -> None:
    """`whaleflux up`: runs the suite until SIGINT or SIGTERM. `ready` is called once everything serves."""
    layout = Layout(options.state.resolve())
    if (pid := running_pid(layout)) is not None:
        raise WrongState(
            f"a suite already runs here (pid {pid}, state {layout.root}); stop it with: whaleflux down",
            reason="ALREADY_RUNNING",
            metadata={"pid": str(pid)},
        )
    asyncio.run(_until_signalled(Suite(options, say), ready))


async def _until_signalled(suite: Suite, ready: Callable[[Suite], None]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    suite.layout.pid_file.write_text(str(os.getpid()))
    try:
        starting = asyncio.create_task(suite.start())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            await starting
            ready(suite)
            renewing = asyncio.create_task(suite.keep_identities())
            await stop.wait()
            renewing.cancel()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    finally:
        await suite.stop()
        suite.layout.pid_file.unlink(missing_ok=True)


def run_down(state: Path, timeout_s: float = 60.0) -> bool:
    """`whaleflux down`: ends the suite of this state folder and waits for it; False when none runs."""
    layout = Layout(state.resolve())
    pid = running_pid(layout)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while running_pid(layout) is not None:
        if time.monotonic() > deadline:
            raise Unavailable(f"the suite (pid {pid}) did not stop within {timeout_s:g} s; see {layout.root / 'logs'}")
        time.sleep(0.05)
    return True
