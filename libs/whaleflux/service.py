"""The common main of every service: what is started before it, watched beside it, and ended after it.

    async def build(ctx: ServiceContext[SchedulerSettings]) -> Parts:
        core = ...
        return Parts(
            servicers=[(add_SchedulerServiceServicer_to_server, Servicer(core), "whaleflux.v1.SchedulerService")],
            loops=[core.plan_loop],
        )

    if __name__ == "__main__":
        main("scheduler", SchedulerSettings, build)

A loop runs until it is cancelled; one that ends or raises is lost, and the process exits non-zero to be restarted.
SIGTERM: NOT_SERVING, streams told to go elsewhere, calls finished, loops cancelled (they hand back their work and
resign in their `finally`), connections closed; all within `drain_grace_s`. A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from whaleflux import telemetry
from whaleflux.clock import Clock, SystemClock
from whaleflux.config import ServiceSettings, load
from whaleflux.errors import FieldViolation, Invalid, Refusal
from whaleflux.events.api import Bus
from whaleflux.rpc.auth import Authority, Identity
from whaleflux.rpc.boundary import Limits
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.pki import TlsFiles, expiry, identity_of, server_name, write_private
from whaleflux.rpc.policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.store.api import Store
from whaleflux.telemetry import Event, Metric

S = TypeVar("S", bound=ServiceSettings)
Loop = Callable[[], Awaitable[None]]
_log = telemetry.get_logger("whaleflux.service")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service consists of. `on_stop` runs after the loops have ended, before store and bus are closed."""

    servicers: Sequence[tuple[Callable[[Any, Any], None], Any, str]] = ()
    loops: Sequence[Loop] = ()
    on_stop: Sequence[Loop] = ()
    ready: Callable[[], bool] = lambda: True  # beside serving: caches filled, for instance
    ports: Mapping[str, int] = field(default_factory=dict)  # further bound ports, for the port file


@dataclass(slots=True)
class ServiceContext(Generic[S]):
    """What `build` may use. Everything here is closed by `run_service`."""

    role: str
    settings: S
    identity: Identity
    tls: TlsFiles
    address: str  # host:port under which others reach this process
    clock: Clock
    stopping: asyncio.Event
    _store: Store | None = None
    _bus: Bus | None = None
    _channels: dict[tuple[str, str], Channel] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The store; `Invalid` when the settings name none."""
        if self._store is None:
            raise Invalid(FieldViolation("store", "is not set; give etcd endpoints (--store http://host:2379)"))
        return self._store

    @property
    def bus(self) -> Bus:
        """The event bus; `Invalid` when the settings name none."""
        if self._bus is None:
            raise Invalid(FieldViolation("nats", "is not set; give NATS servers (--nats nats://host:4222)"))
        return self._bus

    def channel(self, role: str) -> Channel:
        """A channel to the service of that role, where the settings say it is; made once."""
        target = str(getattr(self.settings, role, ""))
        if not target:
            raise Invalid(FieldViolation(role, f"is not set; say where it is (--{role.replace('_', '-')} host:port)"))
        return self.channel_to(target, server_name(role, trust_domain=self.settings.trust_domain))

    def channel_to(self, target: str, server: str, policy: CallPolicy | None = None) -> Channel:
        """A channel to `target`, whose certificate must be that of `server` (`pki.server_name`); made once."""
        if (target, server) not in self._channels:
            self._channels[target, server] = connect(target, self.tls, server=server, policy=policy, follow_leader=True)
        return self._channels[target, server]


Build = Callable[[ServiceContext[S]], Awaitable[Parts]]


def main(role: str, kind: type[S], build: Build[S], *, limits: Limits | None = None) -> None:
    """Reads the settings, runs the service until a signal, and exits: 0 stopped in order, 1 lost, 2 bad settings."""
    try:
        settings = load(kind, sys.argv[1:])
    except Invalid as wrong:
        for violation in wrong.violations:
            print(f"{role}: {violation.field}: {violation.description}", file=sys.stderr)
        raise SystemExit(2) from None
    telemetry.setup_logging(role, level=settings.log_level)
    telemetry.setup_tracing(role, endpoint=settings.otlp_endpoint)
    _collect_rarely()
    try:
        code = asyncio.run(run_service(role, settings, build, limits=limits))
    except Refusal as refusal:  # settings that only the start could judge, or a bus that does not answer
        _log.error(Event.SERVICE_STOPPED, reason=refusal.message)
        code = 2 if isinstance(refusal, Invalid) else 1
    telemetry.flush()
    raise SystemExit(code)


def _collect_rarely() -> None:
    """What was imported lives as long as the process, and nearly all that a call makes dies by its reference count.

    With the defaults the cycle collector takes a fourteenth of the scheduler's time under load, and finds next to nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(25_000, 20, 20)


async def run_service(
    role: str,
    settings: S,
    build: Build[S],
    *,
    limits: Limits | None = None,
    clock: Clock | None = None,
    stopping: asyncio.Event | None = None,
) -> int:
    """Runs the service until `stopping` is set (a signal sets it); returns the exit code, 0 or 1."""
    clock, stopping = clock or SystemClock(), stopping or asyncio.Event()
    tls = TlsFiles(settings.tls_key, settings.tls_cert, settings.tls_ca)
    identity = identity_of(tls.load().chain)
    server = Server(tls, Authority(settings.trust_domain), limits)
    port = server.bind(settings.listen)
    address = settings.advertise or f"{_host(settings.listen)}:{port}"
    ctx = ServiceContext(role, settings, identity, tls, address, clock, stopping)
    try:
        with _signals(stopping, settings.drain_grace_s):
            async with _connections(ctx):
                parts = await build(ctx)
                return await _serve(ctx, server, parts)
    finally:
        await server.drain(0)


async def _serve(ctx: ServiceContext[S], server: Server, parts: Parts) -> int:
    for add_to_server, servicer, name in parts.servicers:
        server.add(add_to_server, servicer, name)
    host, _, port = ctx.settings.metrics_listen.rpartition(":")
    metrics = telemetry.start_metrics(host, int(port), ready=lambda: server.serving and parts.ready())
    try:
        await server.start()
        bound = {"grpc": server.port, "metrics": metrics.port, **parts.ports}
        with _port_file(ctx.settings, bound):
            _log.info(Event.SERVICE_STARTED, address=ctx.address, identity=ctx.identity.uri, ports=bound)
            return await _until_stopped(ctx, server, parts)
    finally:
        metrics.close()
        _log.info(Event.SERVICE_STOPPED)


async def _until_stopped(ctx: ServiceContext[S], server: Server, parts: Parts) -> int:
    """Serves and runs the loops; 0 when asked to stop, 1 when a loop was lost or stopping took too long."""
    grace_s = ctx.settings.drain_grace_s
    code = 0
    try:
        async with asyncio.TaskGroup() as group:
            watched = [*parts.loops, _lag_loop(ctx.clock), _expiry_loop(ctx)]
            tasks = [group.create_task(_watched(ctx, loop)) for loop in watched]
            await ctx.stopping.wait()
            _log.info(Event.SERVICE_STOPPING)
            await server.drain(grace_s / 2)
            for task in tasks:
                task.cancel()
    except* Exception:
        code = 1  # said already, by `_watched`
        await server.drain(min(grace_s, 1.0))
    for stop in parts.on_stop:
        await stop()
    return code


async def _watched(ctx: ServiceContext[S], loop: Loop) -> None:
    name = getattr(loop, "__qualname__", repr(loop))
    try:
        await loop()
    except Exception as bug:
        _log.error(Event.LOOP_LOST, loop=name, exc_info=bug)
        raise
    if not ctx.stopping.is_set():
        _log.error(Event.LOOP_LOST, loop=name, reason="it returned")
        raise RuntimeError(f"loop {name} returned")


def _lag_loop(clock: Clock) -> Loop:
    async def measure_lag() -> None:
        lag = telemetry.histogram(Metric.LOOP_LAG)
        while True:
            due = clock.monotonic() + 0.5
            await clock.sleep(0.5)
            lag.observe(max(0.0, clock.monotonic() - due))

    return measure_lag


def _expiry_loop(ctx: ServiceContext[S]) -> Loop:
    async def watch_certificate() -> None:
        gauge = telemetry.gauge(Metric.CERTIFICATE_EXPIRY)
        while True:
            try:
                gauge.set(expiry(ctx.tls.load().chain).timestamp())
            except Invalid as unreadable:  # the one in memory still serves
                _log.warning(Event.CERTIFICATE_UNREADABLE, reason=unreadable.message)
            await ctx.clock.sleep(60)

    return watch_certificate


@contextlib.asynccontextmanager
async def _connections(ctx: ServiceContext[S]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        if ctx.settings.store:
            ctx._store = _open_store(ctx)
            stack.push_async_callback(ctx._store.close)
        if ctx.settings.nats:
            ctx._bus = await _open_bus(ctx)
            stack.push_async_callback(ctx._bus.close)
        try:
            yield
        finally:
            for channel in ctx._channels.values():
                await channel.close()


def _open_store(ctx: ServiceContext[S]) -> Store:
    if ctx.settings.store == "memory://":
        from whaleflux.store.memory import MemoryStore

        return MemoryStore(ctx.clock)
    from whaleflux.store.etcd import EtcdStore, Tls

    endpoints, secure = _endpoints("store", ctx.settings.store, plain="http", encrypted="https")
    return EtcdStore(endpoints, tls=Tls(ctx.tls.roots, ctx.tls.chain, ctx.tls.key) if secure else None)


async def _open_bus(ctx: ServiceContext[S]) -> Bus:
    settings = ctx.settings
    if settings.nats == "memory://":
        from whaleflux.events.memory import MemoryBus

        return MemoryBus(ctx.clock)
    from whaleflux.events.nats import NatsBus, NatsOptions

    endpoints, secure = _endpoints("nats", settings.nats, plain="nats", encrypted="tls")
    options = NatsOptions(
        servers=tuple(f"{'tls' if secure else 'nats'}://{endpoint}" for endpoint in endpoints),
        location=settings.nats_location,
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        tls=_ssl_context(ctx.tls) if secure else None,
        name=f"{ctx.role}/{settings.name}",
    )
    return await NatsBus.connect(options, timeout_s=settings.nats_timeout_s)


def _endpoints(field_name: str, text: str, *, plain: str, encrypted: str) -> tuple[list[str], bool]:
    """scheme://host:port,... as host:port list, and whether it is the encrypted scheme, which all must share."""
    urls = [urlsplit(part.strip()) for part in text.split(",")]
    schemes = {url.scheme for url in urls}
    if schemes not in ({plain}, {encrypted}) or not all(url.netloc and url.port for url in urls):
        raise Invalid(
            FieldViolation(field_name, f"use {plain}://host:port or {encrypted}://host:port, comma separated")
        )
    if any("@" in url.netloc for url in urls):
        raise Invalid(
            FieldViolation(field_name, f"give user and password as {field_name}_user and {field_name}_password")
        )
    return [url.netloc for url in urls], schemes == {encrypted}


def _ssl_context(tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls.roots))
    context.load_cert_chain(str(tls.chain), str(tls.key))
    return context


@contextlib.contextmanager
def _port_file(settings: ServiceSettings, ports: Mapping[str, int]) -> Any:
    path = settings.port_file
    if path is None:
        yield
        return
    write_private(path, json.dumps({**ports, "pid": os.getpid()}).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals(stopping: asyncio.Event, grace_s: float) -> Any:
    """The first SIGTERM or SIGINT asks to stop within `grace_s`, the second does not ask."""
    loop = asyncio.get_running_loop()
    overdue: list[asyncio.TimerHandle] = []

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()
        overdue.append(loop.call_later(grace_s, os._exit, 1))

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
    except RuntimeError:  # not the main thread: whoever runs us there sets `stopping`
        yield
        return
    try:
        yield
    finally:
        for timer in overdue:
            timer.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _host(listen: str) -> str:
    return listen.rpartition(":")[0]
