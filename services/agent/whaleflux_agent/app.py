"""Puts the agent together from its parts."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from whaleflux import hostport, names
from whaleflux.checkpoint_storage import STORAGE_LABEL, found_storage
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.model import Price, PriceKind
from whaleflux.fleet.profile import Profile
from whaleflux.fleet.xids import is_hardware_fault
from whaleflux.reasons import ConditionType, NodeReason, What
from whaleflux.rpc.channel import Channel
from whaleflux.service import Parts, ServiceContext
from whaleflux.v1 import (
    agent_pb2_grpc,
    checkpoint_pb2_grpc,
    health_pb2,
    inventory_pb2_grpc,
    scheduler_pb2_grpc,
    usage_pb2_grpc,
)
from whaleflux_agent import indirect_probe, machine_notices
from whaleflux_agent.attach import AttachSessions
from whaleflux_agent.checkpoint_access import CheckpointAccess
from whaleflux_agent.checkpoint_collector import CheckpointCollector
from whaleflux_agent.checkpoint_outbox import CheckpointOutbox
from whaleflux_agent.code_cache import CodeCache
from whaleflux_agent.data_ahead import DataAhead
from whaleflux_agent.dataset_peers import Peers
from whaleflux_agent.dataset_progress import Pace
from whaleflux_agent.dataset_readers import DatasetReaders
from whaleflux_agent.dataset_store import cache_bytes
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.devices import host
from whaleflux_agent.devices.nvml import open_nvml
from whaleflux_agent.devices.profile import ProfileSource
from whaleflux_agent.devices.source import DeviceSource, MachineCondition
from whaleflux_agent.heartbeat import HeartbeatLoop
from whaleflux_agent.identity import Renewal
from whaleflux_agent.isolation import NONE, Isolation
from whaleflux_agent.joining import come_back
from whaleflux_agent.machine_id import host_id_file, machine_id
from whaleflux_agent.machine_notices import Ec2Metadata
from whaleflux_agent.node_servicer import NodeServicer
from whaleflux_agent.observations import Observations
from whaleflux_agent.piece_servicer import PieceServicer
from whaleflux_agent.rank_server import RankServer
from whaleflux_agent.rank_servicer import RankServicer, socket_path
from whaleflux_agent.ray_readings import RayReadings
from whaleflux_agent.registration import NodeDescription, Registration
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.revocation import Revocation
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.api import Runtime
from whaleflux_agent.runtime.cgroups import Cgroups
from whaleflux_agent.runtime.docker import open_docker
from whaleflux_agent.runtime.process import ProcessRuntime
from whaleflux_agent.secret_access import SecretAccess
from whaleflux_agent.secret_files import SecretFiles, choose_root
from whaleflux_agent.settings import Settings
from whaleflux_agent.state import StateDir
from whaleflux_agent.supervisor import NodeLimits, Supervisor
from whaleflux_agent.sync import SyncLoop
from whaleflux_agent.task_runner import NodeContext, Sockets, Task
from whaleflux_agent.usage.dcgm import Exporter
from whaleflux_agent.usage.network import NetworkCounters
from whaleflux_agent.usage.nvml import open_nvml_usage
from whaleflux_agent.usage.outbox import UsageOutbox
from whaleflux_agent.usage.played import PlayedUsage
from whaleflux_agent.usage.sampler import Sampled, Sampler
from whaleflux_agent.usage.sender import UsageSender
from whaleflux_agent.usage.source import UsageSource
from whaleflux_agent.usage.steps import StepLog

_TIDY_EVERY_S = 3600.0
_PINS_EVERY_S = 10.0
_LOOK_AT_STORAGE_S = 5.0
Context = ServiceContext[Settings]


async def build(ctx: Context, revocation: Revocation | None = None) -> Parts:
    """The agent's servicers and loops; the devices are read and earlier tasks adopted before anything is served."""
    revocation = revocation or Revocation()
    settings, clock = ctx.settings, ctx.clock
    inventory = inventory_pb2_grpc.InventoryServiceStub(_channel(ctx, "inventory"))
    checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(_channel(ctx, "checkpoint"))
    isolation = await asyncio.to_thread(_isolation, settings)
    runtimes = await asyncio.to_thread(_runtimes, settings)
    storage = await _storage_of_checkpoints(settings)
    source, description = _source(settings), _description(ctx, runtimes, isolation, storage)
    registration = Registration(source, inventory, description, clock)
    await registration.read()
    heard = settings.machine_notices == "ec2"
    notices = [await machine_notices.begin(Ec2Metadata(), registration.announce, clock)] if heard else []
    collector = CheckpointCollector(checkpoints, [settings.checkpoints], clock)
    custody = await _open_custody(ctx, checkpoints, collector)
    start = names.ulid(clock.now().timestamp())
    observations = Observations(description.node, description.boot_id, start, clock)
    sockets = _LaterSockets()
    datasets, supervisor = _supervision(
        ctx, custody, source, registration, observations, inventory, checkpoints, runtimes, isolation, sockets
    )
    await supervisor.restore()
    ray = RayReadings(clock)
    steps = StepLog()
    rank_server = await _serve_ranks(ctx, supervisor, custody.outbox, checkpoints, observations, ray, steps)
    isolation.let_pass(socket_path(settings.state_dir).parent)
    sockets.server = rank_server
    ahead = DataAhead(datasets, clock)
    readers = DatasetReaders(agent_pb2_grpc.TaskServiceStub(_channel(ctx, "scheduler")), clock)
    attached = AttachSessions(_channel(ctx, "scheduler"), description.node, supervisor.by_id)
    sync = SyncLoop(
        _channel(ctx, "scheduler"),
        description.node,
        description.boot_id,
        supervisor,
        custody.reports,
        clock,
        ray=ray,
        machine_id=description.machine_id,
        data=ahead,
        attach=attached.start,
        refused=revocation.look_at,
    )
    heartbeat = _heartbeat(ctx, description, supervisor, observations, revocation)
    counters = _counters(ctx, source)
    usage = await _usage(ctx, description, start, registration, supervisor, counters, steps)
    return Parts(
        servicers=[
            (
                agent_pb2_grpc.add_NodeServiceServicer_to_server,
                NodeServicer(description.node, supervisor, clock),
                "whaleflux.v1.NodeService",
            ),
            (
                agent_pb2_grpc.add_PieceServiceServicer_to_server,
                PieceServicer(description.node, datasets.held, inventory, clock, readers.reads),
                "whaleflux.v1.PieceService",
            ),
        ],
        loops=[
            registration.run,
            supervisor.run,
            *([sync.run, ahead.run] if settings.run else []),  # the scheduler gives work only to agents that it hears
            heartbeat.run,
            *usage,
            custody.outbox.run,
            collector.run,
            rank_server.run,
            lambda: revocation.run(supervisor, clock, ctx.stopping),
            _renewal(ctx, inventory, description, revocation).run,
            _device_events(source, observations, registration),
            _dataset_tidying(datasets, registration, clock),
            *notices,
            *([lambda: _dataset_pins(datasets, registration, clock)] if settings.run else []),
        ],
        farewells=[lambda: _say_goodbye(heartbeat, revocation)],
        on_stop=[
            attached.close,
            source.close,
            counters.close,
            datasets.close,
            lambda: asyncio.to_thread(custody.state.close),
        ],
    )


def _renewal(
    ctx: Context,
    inventory: inventory_pb2_grpc.InventoryServiceStub,
    description: NodeDescription,
    revocation: Revocation,
) -> Renewal:
    return Renewal(
        ctx.tls,
        inventory,
        ctx.clock,
        description.machine_id,
        lambda kept: come_back(ctx, kept),
        refused=revocation.look_at,
    )


class _LaterSockets:
    """The ranks' sockets, for tasks that the server of sockets asks about."""

    server: RankServer

    async def open(self, task: Task) -> None:
        await self.server.open(task)

    async def close(self, task: Task) -> None:
        await self.server.close(task)


@dataclass(frozen=True, slots=True)
class _Custody:
    """What outlives the agent's process: its files, and what it owes to the scheduler and the checkpoint service."""

    state: StateDir
    reports: ReportLog
    outbox: CheckpointOutbox


async def _open_custody(
    ctx: Context, checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub, collector: CheckpointCollector
) -> _Custody:
    state = StateDir(ctx.settings.state_dir)
    reports = ReportLog(state)
    outbox = CheckpointOutbox(state, checkpoints, ctx.clock, collector.learn)
    await reports.open()
    await outbox.open()
    return _Custody(state, reports, outbox)


def _description(ctx: Context, runtimes: dict[str, Runtime], isolation: Isolation, storage: str) -> NodeDescription:
    settings = ctx.settings
    host_address = settings.address_for_ranks()
    return NodeDescription(
        node=ctx.identity.node,
        boot_id=procfs.boot_id(),
        machine_id=machine_id(settings.state_dir, host_id_file()),
        address=_reachable(ctx.address, host_address),
        host_address=host_address,
        agent_version=_version(),
        runtimes=() if isolation.refused else tuple(runtimes),
        isolation=isolation.facts(runtimes["process"].limited_by) if runtimes else None,
        conditions=_conditions(isolation) if runtimes else (),
        memory_limits=runtimes["process"].memory_limits if runtimes else "",
        dataset_cache_bytes=cache_bytes(_dataset_root(settings), settings.dataset_bytes) if runtimes else 0,
        zone=settings.zone,
        spine=settings.spine,
        leaf=settings.leaf,
        labels=tuple(sorted({**settings.labels, **({STORAGE_LABEL: storage} if storage else {})}.items())),
        price=_price(settings),
    )


def _conditions(isolation: Isolation) -> tuple[MachineCondition, ...]:
    if not isolation.refused:
        return ()
    return (MachineCondition(ConditionType.ISOLATION_WORKS, NodeReason.ISOLATION_IMPOSSIBLE, isolation.refused),)


def _supervision(
    ctx: Context,
    custody: _Custody,
    source: DeviceSource,
    registration: Registration,
    observations: Observations,
    inventory: inventory_pb2_grpc.InventoryServiceStub,
    checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub,
    runtimes: dict[str, Runtime],
    isolation: Isolation,
    sockets: Sockets,
) -> tuple[DatasetCache, Supervisor]:
    """The supervisor and the cache that it fetches with; the cache evicts nothing that the supervisor's tasks read."""
    settings, node = ctx.settings, ctx.identity.node
    files = SecretFiles(choose_root(settings.secrets_dir, settings.state_dir), settings.state_dir / "secrets")
    secrets = SecretAccess(files, agent_pb2_grpc.TaskServiceStub(_channel(ctx, "scheduler")), ctx.clock)
    datasets = DatasetCache(
        _dataset_root(settings),
        settings.dataset_bytes,
        node,
        inventory,
        lambda: supervisor.datasets_in_use(),  # noqa: PLW0108  # made below
        reader=isolation.reader,
        header=secrets.header,
        pace=Pace(settings.dataset_bytes_per_s),
        address=_reachable(ctx.address, settings.address_for_ranks()),
        peers=Peers(node, ctx.tls, settings.trust_domain, inventory),
    )
    context = NodeContext(
        node=node,
        host_address=settings.address_for_ranks(),
        agent_socket=socket_path(settings.state_dir),
        checkpoint_root=_checkpoint_root(settings),
        pass_environment=settings.passed_environment,
        state=custody.state,
        reports=custody.reports,
        runtimes=runtimes,
        datasets=datasets,
        code=CodeCache(
            settings.state_dir / "code",
            settings.code_bytes,
            scheduler_pb2_grpc.SchedulerServiceStub(_channel(ctx, "scheduler")),
            ctx.clock,
        ),
        secrets=secrets,
        restore_access=CheckpointAccess(checkpoints),
        clock=ctx.clock,
        simulated=registration.simulated,
        computing=source.computing,
        memory_used=source.memory_used,
        observe=observations.add,
        isolation=isolation,
        sockets=sockets,
    )
    supervisor = Supervisor(context, registration.healthy_gpus, _limits(settings))
    return datasets, supervisor


async def _serve_ranks(
    ctx: Context,
    supervisor: Supervisor,
    outbox: CheckpointOutbox,
    checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub,
    observations: Observations,
    ray: RayReadings,
    steps: StepLog,
) -> RankServer:
    """The ranks' socket, listening."""
    root = _checkpoint_root(ctx.settings)
    servicer = RankServicer(supervisor, outbox, checkpoints, root, ctx.clock, observations.add, ray, steps)
    server = RankServer(socket_path(ctx.settings.state_dir), servicer, supervisor, observations.add)
    await server.start()
    return server


async def _usage(
    ctx: Context,
    description: NodeDescription,
    start: str,
    registration: Registration,
    supervisor: Supervisor,
    counters: UsageSource,
    steps: StepLog,
) -> list[Callable[[], Awaitable[None]]]:
    """The loops that read what GPUs do, and tell the console."""
    settings, clock = ctx.settings, ctx.clock
    outbox = UsageOutbox(settings.state_dir / "usage", settings.usage_bytes, start)
    await outbox.open()
    of = Sampled(
        node=description.node,
        boot_id=description.boot_id,
        simulated=lambda: registration.simulated,
        devices=lambda: [gpu.uuid for gpu in registration.machine.node.gpus],
        works=lambda: [task.work for task in supervisor.holding()],
    )
    sampler = Sampler(of, counters, NetworkCounters(), steps, outbox, clock, settings.usage_every_s)
    stub = usage_pb2_grpc.UsageServiceStub(_channel(ctx, "console"))
    return [sampler.run, UsageSender(outbox, stub, description.node, clock).run]


def _counters(ctx: Context, source: DeviceSource) -> UsageSource:
    if isinstance(source, ProfileSource):
        return PlayedUsage(source.scripts(ctx.identity.node), ctx.clock)
    return open_nvml_usage(Exporter(ctx.settings.dcgm_url), ctx.clock)


def _heartbeat(
    ctx: Context,
    description: NodeDescription,
    supervisor: Supervisor,
    observations: Observations,
    revocation: Revocation,
) -> HeartbeatLoop:
    interval_s = ctx.settings.heartbeat_every_s
    hello = health_pb2.HeartbeatHello(
        node=description.node,
        boot_id=description.boot_id,
        probe_address=description.address,
        machine_id=description.machine_id,
    )
    hello.interval.FromMilliseconds(int(interval_s * 1000))

    async def probe(address: str) -> None:
        outcome, milliseconds = await indirect_probe.probe(address)
        observations.add(outcome, None, milliseconds, address)

    return HeartbeatLoop(
        _channel(ctx, "health_monitor"),
        hello,
        supervisor,
        observations,
        ctx.clock,
        interval_s=interval_s,
        stop_kind=_stop_kind,
        probe=probe,
        refused=revocation.look_at,
    )


async def _say_goodbye(heartbeat: HeartbeatLoop, revocation: Revocation) -> None:
    """Announces the stop, unless nobody listens to this node any more."""
    if revocation.error is None:
        await heartbeat.announce()


async def _stop_kind() -> health_pb2.StopKind:
    """What a signal to stop means: an agent that is replaced or restarted, unless its whole host goes down."""
    shutdown = await host.is_shutting_down()
    return health_pb2.STOP_KIND_HOST_SHUTDOWN if shutdown else health_pb2.STOP_KIND_AGENT_RESTART


def _device_events(
    source: DeviceSource, observations: Observations, registration: Registration
) -> Callable[[], Awaitable[None]]:
    async def watch() -> None:
        while True:
            for event in await source.next_events():
                observations.add(event.kind, None, event.code, event.detail, gpu_index=event.gpu_index)
                if event.kind != What.XID or is_hardware_fault(event.code):
                    registration.read_soon()

    return watch


def _dataset_tidying(datasets: DatasetCache, registration: Registration, clock: Clock) -> Callable[[], Awaitable[None]]:
    async def tidy() -> None:
        while True:
            await registration.registered.wait()
            await datasets.upkeep.tidy()
            await clock.sleep(_TIDY_EVERY_S)

    return tidy


async def _dataset_pins(datasets: DatasetCache, registration: Registration, clock: Clock) -> None:
    await registration.registered.wait()
    while True:
        await datasets.upkeep.follow_pins()
        await clock.sleep(_PINS_EVERY_S * (0.5 + random.random()))  # not all agents at once


async def _storage_of_checkpoints(settings: Settings) -> str:
    """The name of the storage that this node's folder for checkpoints is on, so that people can see which nodes share one."""
    try:
        async with asyncio.timeout(_LOOK_AT_STORAGE_S):
            return await asyncio.to_thread(found_storage, settings.checkpoints)
    except (OSError, TimeoutError):  # nothing is mounted there, or it does not answer: jobs will say so
        return ""


def _dataset_root(settings: Settings) -> Path:
    return settings.dataset_root or settings.state_dir / "datasets"


def _checkpoint_root(settings: Settings) -> str:
    return str(settings.checkpoints.resolve())


def _channel(ctx: Context, role: str) -> Channel:
    """To the service itself where the settings name it, else to the front door."""
    settings = ctx.settings
    if getattr(settings, role):
        return ctx.channel(role)
    if not settings.server:
        raise InvalidArgument(
            FieldViolation("server", f"is not set; name the front door (--server), or --{role.replace('_', '-')}")
        )
    return ctx.channel_to(settings.server, settings.server_name)


def _reachable(address: str, host_address: str) -> str:
    """A port bound on all interfaces is reached under the address that ranks use."""
    host, port = hostport.parse(address, listening=True)
    return hostport.join(host_address, port) if host in ("0.0.0.0", "::", "") else address


def _groups(settings: Settings) -> Cgroups | None:
    """Named after the state directory: nodes of two fleets on one host may have one name."""
    digest = hashlib.sha256(str(settings.state_dir.resolve()).encode()).hexdigest()
    return Cgroups.find(f"whaleflux-{digest[:16]}") if settings.cgroups else None


def _isolation(settings: Settings) -> Isolation:
    chosen = settings.isolation if settings.run else replace(settings.isolation, wanted=NONE)
    return Isolation(chosen, settings.state_dir, settings.checkpoints, playing=bool(settings.profile))


def _runtimes(settings: Settings) -> dict[str, Runtime]:
    """What tasks can run in; nothing where the agent only senses."""
    if not settings.run:
        return {}
    found: dict[str, Runtime] = {"process": ProcessRuntime(_groups(settings))}
    if settings.docker and (engine := open_docker()) is not None:
        found["docker"] = engine
    return found


def _source(settings: Settings) -> DeviceSource:
    return ProfileSource(Profile.load(settings.profile)) if settings.profile else open_nvml()


def _price(settings: Settings) -> Price | None:
    if not settings.price_kind and settings.usd_per_gpu_hour < 0:
        return None
    try:
        kind = PriceKind(settings.price_kind or PriceKind.OWNED.value)
    except ValueError:
        known = ", ".join(kind.value for kind in PriceKind)
        raise InvalidArgument(FieldViolation("price_kind", f"{settings.price_kind!r} is not one of {known}")) from None
    return Price(kind, max(0.0, settings.usd_per_gpu_hour))


def _limits(settings: Settings) -> NodeLimits:
    if settings.first_port > settings.last_port:
        raise InvalidArgument(FieldViolation("first_port", f"must not be above last_port ({settings.last_port})"))
    return NodeLimits(settings.first_port, settings.last_port, settings.log_bytes_per_rank, settings.kept_tasks)


def _version() -> str:
    try:
        return metadata.version("whaleflux")
    except metadata.PackageNotFoundError:
        return "unknown"
