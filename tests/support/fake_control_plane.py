"""What an agent talks to, in one process: each service answers like the real one and remembers what it was told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from tests.support.acting import Unowned
from whaleflux import names
from whaleflux.config import load
from whaleflux.data import manifest
from whaleflux.errors import Aborted, FailedPrecondition, NotFound, PermissionDenied
from whaleflux.rpc import auth, roles
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.boundary import Boundary
from whaleflux.rpc.pki import CertificateAuthority, server_name
from whaleflux.rpc.server import Server
from whaleflux.service import run_service
from whaleflux.trust import ownership
from whaleflux.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    inventory_pb2,
    inventory_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    secrets_pb2,
)
from whaleflux_agent.app import build
from whaleflux_agent.devices.profile import played_uuid
from whaleflux_agent.identity import files
from whaleflux_agent.runtime import procfs
from whaleflux_agent.settings import Settings

SITE, NODE_ID = "lab", "n1"
NODE = f"sites/{SITE}/nodes/{NODE_ID}"
JOB = "queues/default/jobs/train"


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority
        self.tokens = {"good"}
        self.joined: list[inventory_pb2.JoinRequest] = []
        self.registered: list[inventory_pb2.RegisterNodeRequest] = []
        self.renewed = 0
        self.datasets: dict[str, inventory_pb2.Dataset] = {}
        self.manifests: dict[str, inventory_pb2.DatasetManifest] = {}
        self.cached: list[inventory_pb2.DatasetCopy] = []

    async def Join(self, request: Any, context: Any) -> Any:
        if request.token not in self.tokens:
            raise PermissionDenied("the token is not valid", reason="TOKEN_INVALID")
        self.joined.append(request)
        return self._signed(inventory_pb2.JoinResponse(node=NODE), request, f"{SITE}/{request.node_id}")

    async def RenewCertificate(self, request: Any, context: Any) -> Any:
        self.renewed += 1
        return self._signed(inventory_pb2.RenewCertificateResponse(), request, auth.caller().name)

    def _signed(self, answer: Any, request: Any, name: str) -> Any:
        pem = self._authority.sign(request.certificate_request_pem.encode(), "agent", name, datetime.now(UTC))
        answer.certificate_pem, answer.authority_pem = pem.decode(), self._authority.certificate_pem.decode()
        return answer

    async def RegisterNode(self, request: Any, context: Any) -> Any:
        auth.require_own_node(request.name)
        self.registered.append(request)
        return inventory_pb2.Node(name=request.name, facts=request.facts)

    async def GetDataset(self, request: Any, context: Any) -> Any:
        if request.name not in self.datasets:
            raise NotFound("dataset", request.name)
        return self.datasets[request.name]

    async def ListNodePins(self, request: Any, context: Any) -> Any:
        auth.require_own_node(request.node)
        here = [one for one in self.datasets.values() if any(pin.node == request.node for pin in one.pins)]
        return inventory_pb2.ListNodePinsResponse(datasets=here)

    async def GetDatasetManifest(self, request: Any, context: Any) -> Any:
        return self.manifests.get(request.name, inventory_pb2.DatasetManifest())

    async def SetDatasetManifest(self, request: Any, context: Any) -> Any:
        auth.require_own_node(request.node)
        dataset = self.datasets[request.dataset]
        if not dataset.manifest_digest:
            self.manifests[request.dataset] = request.manifest
            dataset.manifest_digest = manifest.from_proto(request.manifest).digest
        return dataset

    async def ReportCachedDataset(self, request: Any, context: Any) -> Any:
        self.cached.append(request.copy)
        return self.datasets[request.dataset]


class Tasks(agent_pb2_grpc.TaskServiceServicer):
    """Acknowledges every report; `desired` is what it wants of the node."""

    def __init__(self) -> None:
        self.desired: dict[str, agent_pb2.DesiredTask] = {}
        self.hellos: list[agent_pb2.SyncHello] = []
        self.reports: list[agent_pb2.TaskReport] = []
        self.progress: list[agent_pb2.TaskProgress] = []
        self.logs: list[agent_pb2.LogChunk] = []
        self.acknowledging = True
        self.secrets: dict[str, bytes] = {}  # secrets/{secret} -> value
        self.opened: list[agent_pb2.OpenTaskSecretsRequest] = []
        self._down: set[asyncio.Queue[agent_pb2.SyncResponse]] = set()

    async def Sync(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        down: asyncio.Queue[agent_pb2.SyncResponse] = asyncio.Queue()
        self._down.add(down)
        reading = asyncio.create_task(self._read(requests, down))
        try:
            while not reading.done():
                waiting = asyncio.create_task(down.get())
                await asyncio.wait((waiting, reading), return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield waiting.result()
                else:
                    waiting.cancel()
        finally:
            self._down.discard(down)
            reading.cancel()

    async def OpenTaskSecrets(self, request: Any, context: Any) -> Any:
        ownership.note_asked()
        self.opened.append(request)
        opened = [secrets_pb2.OpenedSecret(name=name, version=1, value=value) for name, value in self.secrets.items()]
        return agent_pb2.OpenTaskSecretsResponse(secrets=opened)

    async def _read(self, requests: AsyncIterator[Any], down: asyncio.Queue[agent_pb2.SyncResponse]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "hello":
                    auth.require_own_node(request.hello.node)
                    self.hellos.append(request.hello)
                    down.put_nowait(agent_pb2.SyncResponse(desired=self._whole()))
                case "report":
                    self.reports.append(request.report)
                    if self.acknowledging:
                        down.put_nowait(agent_pb2.SyncResponse(acknowledged_sequence=request.report.sequence))
                case "progress":
                    self.progress.extend(request.progress.tasks)
                case "log":
                    self.logs.append(request.log)

    def _whole(self) -> agent_pb2.DesiredTasks:
        return agent_pb2.DesiredTasks(tasks=self.desired.values(), revision=1)

    def tell(self, response: agent_pb2.SyncResponse) -> None:
        for down in self._down:
            down.put_nowait(response)

    def want(self, task: agent_pb2.DesiredTask) -> None:
        self.desired[task.task.id] = task
        self.tell(agent_pb2.SyncResponse(changed=task))

    def unwant(self, task: str) -> None:
        self.desired.pop(task, None)
        self.tell(agent_pb2.SyncResponse(removed=task))

    def phases(self, task: str) -> list[str]:
        prefix = len("TASK_PHASE_")
        return [scheduler_pb2.TaskPhase.Name(r.phase)[prefix:] for r in self.reports if r.task == task]

    def last(self, task: str) -> agent_pb2.TaskReport:
        return [report for report in self.reports if report.task == task][-1]


class Health(health_pb2_grpc.HealthServiceServicer):
    def __init__(self) -> None:
        self.hellos: list[health_pb2.HeartbeatHello] = []
        self.heartbeats: list[health_pb2.Heartbeat] = []
        self.observations: list[health_pb2.Observation] = []
        self.goodbyes: list[health_pb2.Goodbye] = []  # on record
        self.store_takes_s = 0.0
        self.probe: list[str] = []

    async def Heartbeat(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "goodbye":
                await asyncio.sleep(self.store_takes_s)
            {
                "hello": self.hellos,
                "heartbeat": self.heartbeats,
                "observation": self.observations,
                "goodbye": self.goodbyes,
            }[kind].append(getattr(request, kind))  # type: ignore[attr-defined]
            if kind == "heartbeat":
                probe, self.probe = self.probe, []
                yield health_pb2.HeartbeatResponse(acknowledged=request.heartbeat.sequence, indirect_probes=probe)
            elif kind == "observation":
                yield health_pb2.HeartbeatResponse(acknowledged_observation=request.observation.id)
            elif kind == "goodbye":
                yield health_pb2.HeartbeatResponse(goodbye_stored=True)
                return


class Checkpoints(checkpoint_pb2_grpc.CheckpointServiceServicer):
    def __init__(self) -> None:
        self.known: dict[str, checkpoint_pb2.Checkpoint] = {}
        self.reports: list[checkpoint_pb2.ReportPiecesRequest] = []
        self.deletable: list[checkpoint_pb2.Checkpoint] = []
        self.deleted: list[str] = []
        self.lost: list[tuple[str, int, str]] = []  # name, epoch, damaged piece
        self.fence = 0

    async def BeginCheckpoint(self, request: Any, context: Any) -> Any:
        self._fenced(request.epoch)
        name = f"{request.job}/checkpoints/{names.checkpoint_id(request.step, request.epoch, request.serial)}"
        return self.known.setdefault(
            name,
            checkpoint_pb2.Checkpoint(
                name=name,
                epoch=request.epoch,
                step=request.step,
                world_size=request.world_size,
                location=request.location,
                state=checkpoint_pb2.CHECKPOINT_STATE_WRITING,
                job_uid=request.job_uid,
                storage=request.storage,
                resharding=request.resharding,
            ),
        )

    async def AbandonCheckpoint(self, request: Any, context: Any) -> Any:
        self.known[request.name].state = checkpoint_pb2.CHECKPOINT_STATE_ABANDONED
        self.known[request.name].message = request.message
        return self.known[request.name]

    def _fenced(self, epoch: int) -> None:
        if epoch < self.fence:
            raise Aborted(f"epoch {epoch} is over", reason="EPOCH_FENCED")

    async def ReportPieces(self, request: Any, context: Any) -> Any:
        self._fenced(request.epoch)
        if request.checkpoint not in self.known:
            raise NotFound("checkpoint", request.checkpoint)
        self.reports.append(request)
        self.known[request.checkpoint].state = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED
        deletable, self.deletable = self.deletable, []
        return checkpoint_pb2.ReportPiecesResponse(checkpoint=self.known[request.checkpoint], deletable=deletable)

    async def GetCheckpoint(self, request: Any, context: Any) -> Any:
        if request.name not in self.known:
            raise NotFound("checkpoint", request.name)
        return self.known[request.name]

    async def FindRestorable(self, request: Any, context: Any) -> Any:
        found = [
            c
            for c in self.known.values()
            if c.state == checkpoint_pb2.CHECKPOINT_STATE_COMMITTED and c.name.startswith(request.job)
        ]
        if not found:
            raise NotFound("checkpoint", request.job)
        left = [c for c in found if c.name not in request.exclude]
        if not left:
            raise FailedPrecondition("none can be restored from here", reason="CHECKPOINT_UNREACHABLE")
        return max(left, key=lambda c: c.step)

    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        of_job = [c for c in self.known.values() if c.name.startswith(f"{request.parent}/")]
        return checkpoint_pb2.ListCheckpointsResponse(checkpoints=of_job)

    async def ListDeletable(self, request: Any, context: Any) -> Any:
        return checkpoint_pb2.ListDeletableResponse(checkpoints=self.deletable)

    async def ConfirmDeleted(self, request: Any, context: Any) -> Any:
        self.deleted.extend(request.names)
        return checkpoint_pb2.ConfirmDeletedResponse()

    async def MarkLost(self, request: Any, context: Any) -> Any:
        self.lost.append((request.name, request.epoch, request.read.path))
        self.known[request.name].state = checkpoint_pb2.CHECKPOINT_STATE_LOST
        return self.known[request.name]

    async def MarkIntact(self, request: Any, context: Any) -> Any:
        self.known[request.name].state = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED
        return self.known[request.name]


class ControlPlane:
    """All of them behind one port, with the certificate of a front door; can be stopped and started again."""

    def __init__(
        self,
        folder: Path,
        tasks: Tasks | None = None,
        scheduler: scheduler_pb2_grpc.SchedulerServiceServicer | None = None,
    ) -> None:
        self.ca = CertificateAuthority.create(datetime.now(UTC))
        self.inventory, self.tasks, self.health, self.checkpoints = (
            Inventory(self.ca),
            tasks or Tasks(),
            Health(),
            Checkpoints(),
        )
        self._scheduler = scheduler or scheduler_pb2_grpc.SchedulerServiceServicer()
        self.ca_file = folder / "ca.crt"
        self.ca_file.write_bytes(self.ca.certificate_pem)
        self.server_name = server_name("frontdoor")
        self.port = self.join_port = 0
        self._server: Server | None = None
        self._join_server: Any = None

    async def start(self) -> None:
        tls = self.ca.issue(roles.FRONTDOOR, "1", datetime.now(UTC))
        server = Server(tls, Authority())
        for add, servicer, name in (
            (inventory_pb2_grpc.add_InventoryServiceServicer_to_server, self.inventory, "InventoryService"),
            (agent_pb2_grpc.add_TaskServiceServicer_to_server, self.tasks, "TaskService"),
            (scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, self._scheduler, "SchedulerService"),
            (health_pb2_grpc.add_HealthServiceServicer_to_server, self.health, "HealthService"),
            (checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server, self.checkpoints, "CheckpointService"),
        ):
            server.add(add, Unowned(servicer), f"whaleflux.v1.{name}")
        self.port = server.bind(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server
        self._join_server = grpc.aio.server(interceptors=[Boundary(_Anybody())])
        inventory_pb2_grpc.add_InventoryServiceServicer_to_server(self.inventory, self._join_server)
        credentials = grpc.ssl_server_credentials([(tls.key, tls.chain)])
        self.join_port = self._join_server.add_secure_port(f"127.0.0.1:{self.join_port}", credentials)
        await self._join_server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.drain(0)
            await self._join_server.stop(0)
            self._server = None


class _Anybody(Authority):
    """The front door lets callers without a certificate through to Join; it is the only method behind this port."""

    def identified(self, method: str, peer_certificate: Any, metadata: Any) -> auth.Identity:
        if not method.endswith("/Join"):
            raise PermissionDenied("only Join is served here")
        return auth.NOBODY


async def until(condition: Callable[[], Any], timeout_s: float = 45.0) -> None:
    """Returns when `condition` holds; fails the test when it does not in time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def flags(control: ControlPlane, state: Path, *more: str) -> list[str]:
    """The agent's command line for this control plane."""
    return [
        *("--server", f"127.0.0.1:{control.port}", "--server-name", control.server_name),
        *("--ca-file", str(control.ca_file), "--node-id", NODE_ID, "--profile", "h200x4"),
        *("--state-dir", str(state), "--listen", "127.0.0.1:0", "--heartbeat-every-s", "0.1", "--no-cgroups", *more),
    ]


def admit(control: ControlPlane, state: Path) -> None:
    """Gives the agent of `state` its certificate, as if it had joined."""
    files(state).save(control.ca.issue(roles.AGENT, f"{SITE}/{NODE_ID}", datetime.now(UTC)))


def ranks_of(state: Path) -> list[procfs.Process]:
    """Living processes that the agent of `state` has started."""
    return procfs.find("WHALEFLUX_AGENT_SOCKET", str(state / "ranks" / "rank.sock"))


@contextlib.asynccontextmanager
async def agent(control: ControlPlane, state: Path, *more: str) -> AsyncIterator[asyncio.Event]:
    """An agent in this process; gives the event that stops it in order. Leaving the block ends it like a crash would."""
    settings = load(Settings, flags(control, state, *more), environ={})
    stopping = asyncio.Event()
    tls = files(state)
    own = settings.model_copy(update={"tls_key": tls.key, "tls_cert": tls.chain, "tls_ca": tls.roots})
    running = asyncio.create_task(run_service("agent", own, build, stopping=stopping))
    try:
        yield stopping
        if stopping.is_set():
            assert await running == 0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def desired(
    command: list[str],
    *,
    task: str = "",
    job: str = JOB,
    epoch: int = 1,
    gpus: tuple[int, ...] = (0,),
    first_rank: int = 0,
    world_size: int = 0,
    start: bool = True,
    grace_s: float = 2.0,
    edit: Callable[[agent_pb2.DesiredTask], None] = lambda _: None,
) -> agent_pb2.DesiredTask:
    """A task for `NODE`, started at once on its own rendezvous; `gpus` are positions among those that the agent plays."""
    uuids = [played_uuid(NODE, index) for index in gpus]
    wanted = agent_pb2.DesiredTask(
        task=scheduler_pb2.Task(
            id=task or f"{job.rpartition('/')[2]}-{epoch}-0", node=NODE, gpu_uuids=uuids, first_rank=first_rank
        ),
        job=job,
        epoch=epoch,
        spec=scheduler_pb2.JobSpec(command=command, gpus=len(gpus)),
        world_size=world_size or len(gpus),
        group_world_size=1,
        start=start,
    )
    wanted.spec.stop_grace.FromMilliseconds(int(grace_s * 1000))
    wanted.job_uid = "u1"
    edit(wanted)
    return wanted
