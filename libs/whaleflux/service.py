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
import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from whaleflux import hostport, telemetry
from whaleflux.clock import Clock, SystemClock
from whaleflux.config import ServiceSettings, load
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.events.api import Bus
from whaleflux.retry import Backoff
from whaleflux.rpc.auth import Authority, Identity, Principal
from whaleflux.rpc.channel import Channel, connect
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.peers import who_reads_figures
from whaleflux.rpc.pki import TlsFiles, expiry, identity_of, server_name, write_private
from whaleflux.rpc.retry_policy import CallPolicy
from whaleflux.rpc.server import Server
from whaleflux.rpc.tls_files import server_context
from whaleflux.service_connections import open_bus, open_store
from whaleflux.services import REFLECTING
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.telemetry import Event, Metric
from whaleflux.trust.audit import Audit, NoAudit
from whaleflux.trust.audit_trail import Options as TrailOptions
from whaleflux.trust.audit_trail import Trail
from whaleflux.trust.view import TrustView

S = TypeVar("S", bound=ServiceSettings)
Loop = Callable[[], Awaitable[None]]
LAG_EVERY_S = 1.0
_M_ARENA_MAX = -8  # <malloc.h>
_log = telemetry.get_logger("whaleflux.service")
_PROBE_S = 1.0  # within which the store has to answer
_STORE_AGAIN = Backoff()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service consists of. `on_stop` runs after the loops have ended, before store and bus are closed.

    `farewells` run when the process is asked to stop, while its calls are finished; loops go on until they have ended.
    """

    servicers: Sequence[tuple[Callable[[Any, Any], None], Any, str]] = ()
    loops: Sequence[Loop] = ()
    on_stop: Sequence[Loop] = ()
    farewells: Sequence[Loop] = ()
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
    trail: Audit = field(default_factory=NoAudit)  # what is written down of calls
    _trust: TrustView | None = None
    _store: Store | None = None
    _bus: Bus | None = None
    _channels: dict[tuple[str, str], Channel] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The store; `InvalidArgument` when the settings name none."""
        if self._store is None:
            raise InvalidArgument(
                FieldViolation("store", "is not set; give etcd endpoints (--store https://host:2379)")
            )
        return self._store

    @property
    def trust(self) -> TrustView:
        """Who is admitted, and whom queues are for; followed while the service runs."""
        if self._trust is None:
            self._trust = TrustView(self.store, self.clock)
        return self._trust

    @property
    def bus(self) -> Bus:
        """The event bus; `InvalidArgument` when the settings name none."""
        if self._bus is None:
            raise InvalidArgument(FieldViolation("nats", "is not set; give NATS servers (--nats tls://host:4222)"))
        return self._bus

    def channel(self, role: str) -> Channel:
        """A channel to the service of that role, where the settings say it is; made once."""
        target = str(getattr(self.settings, role, ""))
        if not target:
            raise InvalidArgument(
                FieldViolation(role, f"is not set; say where it is (--{role.replace('_', '-')} host:port)")
            )
        return self.channel_to(target, server_name(role, trust_domain=self.settings.trust_domain))

    def channel_to(self, target: str, server: str, policy: CallPolicy | None = None) -> Channel:
        """A channel to `target`, whose certificate must be that of `server` (`pki.server_name`); made once."""
        if (target, server) not in self._channels:
            self._channels[target, server] = connect(target, self.tls, server=server, policy=policy, follow_leader=True)
        return self._channels[target, server]


Build = Callable[[ServiceContext[S]], Awaitable[Parts]]


def main(role: str, kind: type[S], build: Build[S], *, limits: CallLimits | None = None) -> None:
    """Reads the settings, runs the service until a signal, and exits: 0 stopped in order, 1 lost, 2 bad settings."""
    try:
        settings = load(kind, sys.argv[1:])
    except InvalidArgument as wrong:
        for violation in wrong.violations:
            print(f"{role}: {violation.field}: {violation.description}", file=sys.stderr)
        raise SystemExit(2) from None
    hold_little()
    leave_no_core()
    telemetry.setup_logging(role, level=settings.log_level)
    telemetry.setup_tracing(role, endpoint=settings.otlp_endpoint)
    collect_rarely()
    try:
        code = asyncio.run(run_service(role, settings, build, limits=limits))
    except StatusError as error:  # settings that only the start could judge, or a bus that does not answer
        _log.error(Event.SERVICE_STOPPED, reason=error.message)
        code = 2 if isinstance(error, InvalidArgument) else 1
    telemetry.flush()
    raise SystemExit(code)


def hold_little() -> None:
    """One arena of the allocator instead of eight per core: each thread's own keeps what it has once held."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def leave_no_core() -> None:
    """A crash leaves nothing of what was in memory: private keys, and values of secrets on their way.

    One byte, not none: a program that core files are piped into is given them at a limit of 0, and not at 1 (fs/coredump.c of Linux).
    """
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def collect_rarely() -> None:
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
    limits: CallLimits | None = None,
    clock: Clock | None = None,
    stopping: asyncio.Event | None = None,
) -> int:
    """Runs the service until `stopping` is set (a signal sets it); returns the exit code, 0 or 1."""
    clock, stopping = clock or SystemClock(), stopping or asyncio.Event()
    tls = TlsFiles(settings.tls_key, settings.tls_cert, settings.tls_ca)
    identity = identity_of(tls.load().chain)
    server = Server(tls, Authority(settings.trust_domain), limits)
    port = server.bind(settings.listen)
    address = settings.advertise or hostport.join(hostport.parse(settings.listen, "listen", listening=True).host, port)
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
    host, metrics_port = hostport.parse(ctx.settings.metrics_listen, "metrics_listen", listening=True)
    loop = asyncio.get_running_loop()

    def ready() -> bool:
        """Asked by a thread of the probes; looks at the store anew each time: what was reached once may be gone."""
        if not (server.serving and parts.ready()):
            return False
        reached = asyncio.run_coroutine_threadsafe(_reaches_store(ctx), loop)
        try:
            return reached.result(2 * _PROBE_S)
        except TimeoutError:  # the loop itself is stuck
            return False

    metrics = telemetry.start_metrics(host, metrics_port, ready=ready, tls=_metrics_tls(ctx, host))
    try:
        loops = [*parts.loops]
        if ctx._store is not None:
            server.guard(ctx.trust, ctx.trail)
            loops += [await _following(ctx.trust), server.end_streams_of_the_revoked]
        if isinstance(ctx.trail, Trail):
            loops.append(ctx.trail.run)
        await server.start(reflects_all=ctx.role == REFLECTING.role)
        bound = {"grpc": server.port, "metrics": metrics.port, **parts.ports}
        return await _until_stopped(ctx, server, replace(parts, loops=[*loops, _announcement(ctx, bound)]))
    finally:
        metrics.close()
        _log.info(Event.SERVICE_STOPPED)


async def _following(trust: TrustView) -> Loop:
    """The loop that follows whom to admit, begun before the first call comes: who is called before it knows has to refuse.

    A store that does not answer holds nothing up for long: what callers then get says so.
    """
    task = asyncio.create_task(trust.run())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PROBE_S):
            await trust.until_known()

    async def follow_trust() -> None:
        try:
            await task
        finally:
            task.cancel()

    return follow_trust


def _metrics_tls(ctx: ServiceContext[S], host: str) -> telemetry.MetricsTls | None:
    """None on loopback: beyond it nothing is plain."""
    if hostport.is_loopback(host):
        return None

    admit = Principal if ctx._store is None else ctx.trust.admit
    may_read = who_reads_figures(admit, ctx.settings.trust_domain)
    return telemetry.MetricsTls(server_context(ctx.tls, everybody=True), may_read)


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
            await asyncio.gather(server.drain(grace_s / 2), _say_farewell(parts, grace_s / 2))
            for task in tasks:
                task.cancel()
    except* Exception:
        code = 1  # said already, by `_watched`
        await server.drain(min(grace_s, 1.0))
    for stop in parts.on_stop:
        await stop()
    return code


async def _say_farewell(parts: Parts, within_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(farewell() for farewell in parts.farewells))


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


async def _reaches_store(ctx: ServiceContext[S]) -> bool:
    """Whether the store answers a read now; True where there is none."""
    if ctx._store is None:
        return True
    try:
        async with asyncio.timeout(_PROBE_S):
            await ctx._store.get(keys.LEADERS)  # no such key: the cheapest read that needs a quorum
    except (StatusError, TimeoutError):
        return False
    return True


def _announcement(ctx: ServiceContext[S], ports: Mapping[str, int]) -> Loop:
    async def announce() -> None:
        """Says that the service serves once its store has answered, also with whom to admit: until then it could refuse only."""
        failures = 0
        while not await _reaches_store(ctx):
            failures += 1
            if failures == 1:
                _log.warning(Event.STORE_UNREACHABLE, reason="waiting for the store before saying that it serves")
            await ctx.clock.sleep(_STORE_AGAIN.pause_s(failures))
        if ctx._store is not None:
            await ctx.trust.until_known()
        with _port_file(ctx.settings, ports):
            _log.info(Event.SERVICE_STARTED, address=ctx.address, identity=ctx.identity.uri, ports=dict(ports))
            await asyncio.Event().wait()

    return announce


def _lag_loop(clock: Clock) -> Loop:
    async def measure_lag() -> None:
        lag = telemetry.histogram(Metric.LOOP_LAG)
        while True:
            due = clock.monotonic() + LAG_EVERY_S
            await clock.sleep(LAG_EVERY_S)
            lag.observe(max(0.0, clock.monotonic() - due))

    return measure_lag


def _expiry_loop(ctx: ServiceContext[S]) -> Loop:
    async def watch_certificate() -> None:
        gauge = telemetry.gauge(Metric.CERTIFICATE_EXPIRY)
        while True:
            try:
                gauge.set(expiry(ctx.tls.load().chain).timestamp())
            except InvalidArgument as unreadable:  # the one in memory still serves
                _log.warning(Event.CERTIFICATE_UNREADABLE, reason=unreadable.message)
            await ctx.clock.sleep(60)

    return watch_certificate


@contextlib.asynccontextmanager
async def _connections(ctx: ServiceContext[S]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        if ctx.settings.store:
            ctx._store = open_store(ctx.settings, ctx.clock)
            stack.push_async_callback(ctx._store.close)
        if ctx.settings.nats:
            ctx._bus = await open_bus(ctx.settings, ctx.clock, ctx.role)
            stack.push_async_callback(ctx._bus.close)
        if ctx._store is not None and ctx._bus is not None:
            ctx.trail = trail = _trail(ctx, ctx._store, ctx._bus)
            stack.push_async_callback(trail.close)
        try:
            yield
        finally:
            for channel in ctx._channels.values():
                await channel.close()


def _trail(ctx: ServiceContext[S], store: Store, bus: Bus) -> Trail:
    """What this process writes down of calls, on its way to the bus."""
    told = ctx.settings
    options = TrailOptions(told.audit_dir, told.audit_spool_bytes, told.audit_required)
    try:
        return Trail(bus, store, ctx.clock, ctx.role, told.name, options)
    except OSError as error:
        why = f"cannot be written to: {error.strerror}; give a folder of the service's own, or none"
        raise InvalidArgument(FieldViolation("audit_dir", why)) from None


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
