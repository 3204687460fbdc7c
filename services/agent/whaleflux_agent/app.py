"""Puts the agent together from its parts."""

from __future__ import annotations

import asyncio
import hashlib
from importlib import metadata

from whaleflux.errors import FieldViolation, Invalid
from whaleflux.fleet.model import Price, PriceKind
from whaleflux.rpc.channel import Channel
from whaleflux.service import Parts, ServiceContext
from whaleflux.v1 import agent_pb2_grpc, checkpoint_pb2_grpc, health_pb2, inventory_pb2_grpc
from whaleflux_agent.config import AgentSettings
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.devices.nvml import open_nvml
from whaleflux_agent.devices.profile import Profile, ProfileSource
from whaleflux_agent.devices.source import DeviceSource
from whaleflux_agent.heartbeat import HeartbeatLoop, Observations
from whaleflux_agent.identity import Renewal
from whaleflux_agent.node_servicer import NodeServicer
from whaleflux_agent.rank_servicer import RankServer, RankServicer, socket_path
from whaleflux_agent.registration import About, Registration
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.api import Runtime
from whaleflux_agent.runtime.cgroups import Cgroups
from whaleflux_agent.runtime.docker import open_docker
from whaleflux_agent.runtime.process import ProcessRuntime
from whaleflux_agent.saves import Saves
from whaleflux_agent.state import StateDir
from whaleflux_agent.supervisor import Limits, Supervisor
from whaleflux_agent.sync import SyncLoop
from whaleflux_agent.tasks import Host
from whaleflux_agent.witness import look

_TIDY_EVERY_S = 3600.0


async def build(ctx: ServiceContext[AgentSettings]) -> Parts:
    """The agent's servicers and loops; the devices are read and earlier tasks adopted before anything is served."""
    settings, clock, node = ctx.settings, ctx.clock, ctx.identity.node
    boot = procfs.boot_id()
    inventory = inventory_pb2_grpc.InventoryServiceStub(_channel(ctx, "inventory"))
    checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(_channel(ctx, "checkpoint"))
    groups = await asyncio.to_thread(_groups, settings) if settings.run else None
    runtimes = await asyncio.to_thread(_runtimes, settings, groups) if settings.run else {}
    host_address = settings.address_for_ranks()
    address = _reachable(ctx.address, host_address)
    about = About(
        node=node,
        boot_id=boot,
        address=address,
        host_address=host_address,
        agent_version=_version(),
        runtimes=tuple(runtimes),
        zone=settings.zone,
        spine=settings.spine,
        leaf=settings.leaf,
        labels=tuple(sorted(settings.labels.items())),
        price=_price(settings),
    )
    source = _source(settings)
    registration = Registration(source, inventory, about, clock)
    await registration.read()

    state = StateDir(settings.state_dir)
    reports, observations = ReportLog(state), Observations(node, boot, clock)
    saves = Saves(state, checkpoints, [settings.checkpoints], clock)
    await reports.open()
    await saves.open()
    datasets = DatasetCache(
        settings.dataset_root or settings.state_dir / "datasets",
        settings.dataset_bytes,
        node,
        inventory,
        lambda: supervisor.datasets_in_use(),  # noqa: PLW0108  # made below
    )
    socket = socket_path(settings.state_dir)
    host = Host(
        node=node,
        host_address=about.host_address,
        agent_socket=socket,
        checkpoint_root=str(settings.checkpoints.resolve()),
        state=state,
        reports=reports,
        runtimes=runtimes,
        datasets=datasets,
        clock=clock,
        simulated=registration.simulated,
        gpu_uuid=registration.gpu_uuid,
        observe=observations.add,
    )
    supervisor = Supervisor(host, registration.healthy_gpus, _limits(settings))
    await supervisor.restore()

    ranks = RankServicer(supervisor, saves, checkpoints, host.checkpoint_root, clock)
    rank_server = RankServer(socket, ranks, supervisor)
    await rank_server.start()
    hello = health_pb2.HeartbeatHello(node=node, boot_id=boot, probe_address=address)
    hello.interval.FromMilliseconds(int(settings.heartbeat_every_s * 1000))

    async def witness(address: str) -> None:
        word, milliseconds = await look(address)
        observations.add(word, None, milliseconds, address)

    heartbeat = HeartbeatLoop(
        _channel(ctx, "health_monitor"),
        hello,
        supervisor,
        observations,
        clock,
        interval_s=settings.heartbeat_every_s,
        probe=witness,
    )
    sync = SyncLoop(_channel(ctx, "scheduler"), node, boot, supervisor, reports, clock)

    async def watch_devices() -> None:
        while True:
            for event in await source.next_events():
                observations.add(event.kind, None, event.code, event.detail, gpu_index=event.gpu_index)
            await clock.sleep(0)

    async def tidy_datasets() -> None:
        while True:
            await registration.registered.wait()
            await datasets.tidy()
            await clock.sleep(_TIDY_EVERY_S)

    return Parts(
        servicers=[
            (
                agent_pb2_grpc.add_NodeServiceServicer_to_server,
                NodeServicer(node, supervisor, clock),
                "whaleflux.v1.NodeService",
            )
        ],
        loops=[
            registration.run,
            supervisor.run,
            *([sync.run] if settings.run else []),  # the scheduler gives work only to agents that it hears
            heartbeat.run,
            saves.run,
            rank_server.run,
            Renewal(ctx.tls, inventory, clock).run,
            watch_devices,
            tidy_datasets,
        ],
        on_stop=[source.close, lambda: asyncio.to_thread(state.close)],
    )


def _channel(ctx: ServiceContext[AgentSettings], role: str) -> Channel:
    """To the service itself where the settings name it, else to the front door."""
    settings = ctx.settings
    if getattr(settings, role):
        return ctx.channel(role)
    if not settings.server:
        raise Invalid(
            FieldViolation("server", f"is not set; name the front door (--server), or --{role.replace('_', '-')}")
        )
    return ctx.channel_to(settings.server, settings.server_name)


def _reachable(address: str, host_address: str) -> str:
    """A port bound on all interfaces is reached under the address that ranks use."""
    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "[::]", ""):
        return f"[{host_address}]:{port}" if ":" in host_address else f"{host_address}:{port}"
    return address


def _groups(settings: AgentSettings) -> Cgroups | None:
    """Named after the state directory: nodes of two fleets on one host may have one name."""
    digest = hashlib.sha256(str(settings.state_dir.resolve()).encode()).hexdigest()
    return Cgroups.find(f"whaleflux-{digest[:16]}") if settings.cgroups else None


def _runtimes(settings: AgentSettings, groups: Cgroups | None) -> dict[str, Runtime]:
    found: dict[str, Runtime] = {"process": ProcessRuntime(groups)}
    if settings.docker and (engine := open_docker()) is not None:
        found["docker"] = engine
    return found


def _source(settings: AgentSettings) -> DeviceSource:
    return ProfileSource(Profile.load(settings.profile)) if settings.profile else open_nvml()


def _price(settings: AgentSettings) -> Price | None:
    if not settings.price_kind and settings.usd_per_gpu_hour < 0:
        return None
    try:
        kind = PriceKind(settings.price_kind or PriceKind.OWNED.value)
    except ValueError:
        known = ", ".join(kind.value for kind in PriceKind)
        raise Invalid(FieldViolation("price_kind", f"{settings.price_kind!r} is not one of {known}")) from None
    return Price(kind, max(0.0, settings.usd_per_gpu_hour))


def _limits(settings: AgentSettings) -> Limits:
    if settings.first_port > settings.last_port:
        raise Invalid(FieldViolation("first_port", f"must not be above last_port ({settings.last_port})"))
    return Limits(settings.first_port, settings.last_port, settings.log_bytes_per_rank, settings.kept_tasks)


def _version() -> str:
    try:
        return metadata.version("whaleflux")
    except metadata.PackageNotFoundError:
        return "unknown"
