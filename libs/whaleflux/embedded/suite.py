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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from whaleflux import frontdoor
from whaleflux.context import Context
from whaleflux.embedded import api_key, etcd, join_tokens, nats, processes, simulated
from whaleflux.embedded.layout import (
    Layout,
    choose_ports,
    issue_identities,
    local_admin,
    running_pid,
    write_json,
    write_pid,
)
from whaleflux.embedded.simulated import SimulatedNode
from whaleflux.embedded.supervisor import Child, Supervisor
from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.events import nats_config
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import roles, store_authority
from whaleflux.rpc.tls_files import client_context
from whaleflux.services import ROLES, SERVICES, Service
from whaleflux.trust import key_file

_PORTS = (
    "frontdoor", "http", "admin", "etcd", "etcd_peer", "nats", "nats_monitor",
    *(setting.removesuffix("_listen") for service in SERVICES for setting in service.http),
    *ROLES, *(f"{role}_metrics" for role in ROLES),
)  # fmt: skip
_IDENTITIES = (*ROLES, "frontdoor")
_READY_S = 60.0
_RENTED_MACHINE = "whaleflux_inventory.providers.simulated_machine"
_RENEW_EVERY_S = 86_400.0  # certificates live for 30 days


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """What `whaleflux up` can be told. Port 0: keep last time's, or choose one. `otlp_endpoint`: where traces go."""

    state: Path = Path(".whaleflux")
    port: int = 0
    http_port: int = 0
    otlp_endpoint: str = ""
    plain_loopback: bool = False  # etcd and NATS without certificates
    tls_http: bool = False  # the inference API over TLS, with a certificate of the fleet's own authority
    simulate: Sequence[SimulatedNode] | None = None  # nodes that are played; None: last time's


class Suite:
    """The children in the order in which they start, and what clients need to know."""

    def __init__(self, options: SuiteOptions, say: Callable[[str], None]) -> None:
        self.layout = Layout(options.state.resolve())
        self._options, self._say = options, say
        self.layout.create()
        self.ports = choose_ports(self.layout, _PORTS, frontdoor=options.port, http=options.http_port)
        if (self.layout.pki / "store").exists() and not self.layout.secrets_key.exists():
            say(
                f"{self.layout.secrets_key} is gone and made anew: put the old one back, or what was stored cannot be opened"
            )
        issue_identities(self.layout, _IDENTITIES)
        key_file.make_key_file(self.layout.secrets_key, datetime.now(UTC))
        self.simulated = self._simulated()
        self.supervisor = Supervisor(self.layout.root / "run", say)

    async def start(self) -> Context:
        """Starts all side by side; writes the context file last: its presence means ready.

        Services dial until etcd and NATS answer, and say that they serve once they have: nothing has to wait for its turn.
        """
        self.layout.context_file.unlink(missing_ok=True)
        self._say("starting etcd, NATS, Envoy and the services ...")
        await self.supervisor.start([self._etcd(), self._nats(), *map(self._service, SERVICES), self._envoy()])
        context = await self._context()
        await self._start_agents(context)
        write_json(self.layout.context_file, asdict(context))
        return context

    async def keep_identities(self) -> None:
        """Renews every certificate each day, until cancelled; the processes take the files up by themselves."""
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            self.renew()

    def renew(self) -> None:
        """Issues every certificate anew. NATS reads its own when it is told to, all others by themselves."""
        issue_identities(self.layout, _IDENTITIES)
        if pid := self.supervisor.pid("nats"):
            os.kill(pid, signal.SIGHUP)

    async def stop(self) -> None:
        """Stops all in reverse order; what simulated nodes still run ends with them."""
        await self.supervisor.stop()
        await _end_rented(self.layout)
        if self.simulated or self.layout.rented.exists():
            await _end_tasks(self.layout, self.simulated)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def where(self) -> list[tuple[str, str]]:
        """What listens where, for people."""
        return [
            ("front door (gRPC, mTLS)", self.address("frontdoor")),
            ("inference API", self._inference_url()),
            *((f"{role} metrics", f"http://{self.address(f'{role}_metrics')}/metrics") for role in ROLES),
            ("Envoy admin", f"http://{self.address('admin')}"),
            ("etcd", self._store_url()),
            ("NATS", self._nats_url()),
            ("state, logs", str(self.layout.root)),
        ]

    def _etcd(self) -> Child:
        ports = self.ports
        files = self.layout.store_tls(roles.ETCD)
        tls = None if self._options.plain_loopback else etcd.EtcdTls(files, store_authority.ETCD_MEMBER)
        argv = etcd.command(
            etcd.find(), self.layout.data("etcd"), client_port=ports["etcd"], peer_port=ports["etcd_peer"], tls=tls
        )
        shown = client_context(files) if tls else None

        async def ready() -> None:
            await etcd.wait_ready("127.0.0.1", ports["etcd"], tls=shown, timeout_s=_READY_S)

        return self._child("etcd", argv, ready)

    def _nats(self) -> Child:
        config = self.layout.root / "nats.conf"
        plain = self._options.plain_loopback
        hub = nats_config.Hub(
            store=self.layout.data("nats"),
            client_address=self.address("nats"),
            monitor_address=self.address("nats_monitor"),
            users=(nats_config.User("whaleflux", self._nats_password()),) if plain else nats_config.service_users(),
            tls=None if plain else self.layout.store_tls(roles.NATS),
        )
        nats.write_config(config, nats_config.hub_config(hub))
        return self._child(
            "nats", nats.command(config), lambda: nats.wait_ready(self.address("nats_monitor"), _READY_S)
        )

    def _service(self, service: Service) -> Child:
        role = service.role
        port_file = self.layout.root / "run" / f"{role}.json"
        port_file.unlink(missing_ok=True)  # its presence means serving
        tls = self.layout.tls(role)
        settings = {
            "name": "embedded",
            "listen": self.address(role),
            "metrics_listen": self.address(f"{role}_metrics"),
            "port_file": str(port_file),
            "store": self._store_url(),
            **self._store_identity(role),
            "nats": self._nats_url(),
            "tls_cert": str(tls.chain),
            "tls_key": str(tls.key),
            "tls_ca": str(tls.roots),
            "audit_dir": str(self.layout.root / "audit"),
            "otlp_endpoint": self._options.otlp_endpoint,
            **{peer: self.address(peer) for peer in ROLES},
            **self._own_settings(service),
        }
        # By environment, not by flags: flags are visible to every user of the machine, and one of these is a password.
        environment = {f"WHALEFLUX_{key.upper()}": value for key, value in settings.items() if value}
        argv = [sys.executable, "-m", service.package]
        return self._child(role, argv, lambda: _appears(port_file), environment)

    def _store_url(self) -> str:
        return f"{'http' if self._options.plain_loopback else 'https'}://{self.address('etcd')}"

    def _inference_url(self) -> str:
        return f"{'https' if self._options.tls_http else 'http'}://{self.address('http')}/v1"

    def _nats_url(self) -> str:
        return f"{'nats' if self._options.plain_loopback else 'tls'}://{self.address('nats')}"

    def _store_identity(self, role: str) -> dict[str, str]:
        """What a service shows to etcd and NATS."""
        if self._options.plain_loopback:
            user = {"nats_user": "whaleflux", "nats_password": self._nats_password()}
            return {"plain_loopback": "true", **user}
        files = self.layout.store_tls(role)
        return {"store_cert": str(files.chain), "store_key": str(files.key), "store_ca": str(files.roots)}

    def _own_settings(self, service: Service) -> dict[str, str]:
        authority = {
            "ca_cert": str(self.layout.pki / "ca.crt"),
            "ca_key": str(self.layout.pki / "authority.key"),
            "first_admin": local_admin(),
            "secrets_key_file": str(self.layout.secrets_key),
            "rent_server": self.address("frontdoor"),
            "rent_simulated": str(self.layout.rented),
            "rent_checkpoint_root": str(self.layout.checkpoints),
            "rent_poll_s": "0.5",
            "rent_silent_s": "60",
        }
        ledger = {"ledger_folder": str(self.layout.ledger)} if service.role == "console" else {}
        listens = {setting: self.address(setting.removesuffix("_listen")) for setting in service.http}
        # Engines run on this machine; no model reaches the suite's own parts.
        own = ",".join(f"127.0.0.1:{port}" for port in self.ports.values())
        models = {"model_networks": "ordinary,127.0.0.0/8,::1/128", "control_addresses": own}
        return (authority if service.signs else {}) | (models if service.http else {}) | ledger | listens

    def _envoy(self) -> Child:
        config, secrets_file = self.layout.root / "envoy.yaml", self.layout.root / "run" / "envoy-secrets.yaml"
        public_file = secrets_file.with_name("envoy-public.yaml")
        front = frontdoor.FrontDoor(
            grpc_port=self.ports["frontdoor"],
            http_port=self.ports["http"],
            admin_port=self.ports["admin"],
            tls=self.layout.tls("frontdoor"),
            upstreams={role: self.address(role) for role in ROLES},
            policy=self.address("policy"),
            limits=frontdoor.limits_from(os.environ),
            open_access=_is_on(os.environ.get("WHALEFLUX_OPEN_ACCESS", "")),  # the router reads it too
            secrets=str(secrets_file),  # so that renewed certificates are taken up
            public=self.layout.tls("frontdoor") if self._options.tls_http else None,
            public_secrets=str(public_file) if self._options.tls_http else "",
        )
        config.write_text(frontdoor.render(front))
        secrets_file.write_text(frontdoor.render_secrets(front))
        public_file.write_text(frontdoor.render_public_secrets(front))
        return self._child(
            "envoy", frontdoor.command(config), lambda: frontdoor.wait_ready(self.address("admin"), _READY_S)
        )

    def _simulated(self) -> list[SimulatedNode]:
        """As told, else as last time."""
        told = self._options.simulate
        return simulated.remembered(self.layout.simulated_file) if told is None else list(told)

    async def _start_agents(self, context: Context) -> None:
        """An agent for each simulated node; those without a valid certificate get a token. What has started is remembered."""
        new = {self._token_of(node): node.site for node in self.simulated if not self._is_admitted(node)}
        await join_tokens.made(context, new)
        await self.supervisor.start([self._agent(node, context) for node in self.simulated])
        for token in new:
            token.unlink(missing_ok=True)
        simulated.remember(self.layout.simulated_file, self.simulated)

    def _agent(self, node: SimulatedNode, context: Context) -> Child:
        port_file = self.layout.root / "run" / f"{node.part}.json"
        port_file.unlink(missing_ok=True)
        settings = {
            "server": context.server,
            "server_name": context.server_name,
            "ca_file": context.ca,
            "join_token_file": "" if self._is_admitted(node) else str(self._token_of(node)),
            "site": node.site,
            "node_id": node.node,
            "profile": node.profile,
            "state_dir": str(self.layout.agent(node.part)),
            "checkpoint_root": str(self.layout.checkpoints),  # one folder that all nodes reach, as a shared mount
            "port_file": str(port_file),
            "otlp_endpoint": self._options.otlp_endpoint,
        }
        environment = {f"WHALEFLUX_{key.upper()}": value for key, value in settings.items() if value}
        # Jobs find the Python that this suite runs in, with what is installed there.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return self._child(
            node.part, [sys.executable, "-m", "whaleflux_agent"], lambda: _appears(port_file), environment
        )

    def _token_of(self, node: SimulatedNode) -> Path:
        return self.layout.agent(node.part) / "join.token"

    def _is_admitted(self, node: SimulatedNode) -> bool:
        """Its certificate lasts for a day: a suite that was down for longer has to admit it again."""
        return simulated.has_certificate(self.layout.agent(node.part), datetime.now(UTC))

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
            inference_url=self._inference_url(),
        )
        return replace(plain, api_key=await api_key.kept_or_new(plain, self.layout.root / "api.key"))


async def _appears(file: Path) -> None:
    while not file.exists():
        await asyncio.sleep(0.02)


def run_up(options: SuiteOptions, say: Callable[[str], None], ready: Callable[[Suite], None] = lambda _: None) -> None:
    """`whaleflux up`: runs the suite until SIGINT or SIGTERM. `ready` is called once everything serves."""
    layout = Layout(options.state.resolve())
    if (pid := running_pid(layout)) is not None:
        raise FailedPrecondition(
            f"a suite already runs here (pid {pid}, state {layout.root}); stop it with: whaleflux down",
            reason=ErrorReason.ALREADY_RUNNING,
            metadata={"pid": str(pid)},
        )
    asyncio.run(_until_signalled(Suite(options, say), ready))


async def _until_signalled(suite: Suite, ready: Callable[[Suite], None]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    write_pid(suite.layout)
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


async def _end_rented(layout: Layout) -> None:
    """Ends the machines that are played by processes of their own: the suite's cloud ends with it."""
    await processes.end(lambda: processes.started_below(layout.rented, _RENTED_MACHINE))


async def _end_tasks(layout: Layout, nodes: Sequence[SimulatedNode]) -> None:
    """Ends what simulated nodes run."""
    tokens = set[str]()
    await processes.end(lambda: _tasks_of_agents(layout, nodes, tokens))
    processes.forget_secrets(layout.agents)


def _tasks_of_agents(layout: Layout, nodes: Sequence[SimulatedNode], tokens: set[str]) -> set[int]:
    """Their shims, and what bears the token of one, which is remembered: ranks may outlive it.

    Of ranks without a shim, those of these very nodes: a real agent here may keep its checkpoints in the same folder.
    """
    shims = processes.shims_below(layout.agents)
    tokens.update(filter(None, shims.values()))
    below = f"WHALEFLUX_CHECKPOINT_LOCATION={layout.root}/"
    marks: list[tuple[str, ...]] = [(f"WHALEFLUX_TASK_TOKEN={token}",) for token in tokens]
    marks += [(f"WHALEFLUX_NODE={node.name}", below) for node in nodes]
    return {*shims, *(pid for mark in marks for pid in processes.with_variables(*mark))}


def _end_left_behind(layout: Layout) -> bool:
    """Ranks outlive a supervisor that was killed, for its next start; whether there were any."""
    nodes = simulated.remembered(layout.simulated_file)
    machines = processes.started_below(layout.rented, _RENTED_MACHINE)
    if not machines and not _tasks_of_agents(layout, nodes, set()):
        return False
    asyncio.run(_end_rented(layout))
    asyncio.run(_end_tasks(layout, nodes))
    return True


def run_down(state: Path, timeout_s: float = 60.0) -> bool:
    """`whaleflux down`: ends the suite of this state folder and waits for it; False when nothing of it runs."""
    layout = Layout(state.resolve())
    pid = running_pid(layout)
    if pid is None:
        return _end_left_behind(layout)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while running_pid(layout) is not None:
        if time.monotonic() > deadline:
            raise Unavailable(f"the suite (pid {pid}) did not stop within {timeout_s:g} s; see {layout.root / 'logs'}")
        time.sleep(0.05)
    return True


def _is_on(text: str) -> bool:
    """As services read a switch."""
    return text.strip().lower() in {"1", "true", "t", "yes", "y", "on"}
