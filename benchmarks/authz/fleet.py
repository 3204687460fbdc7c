"""A fleet with somebody's things in it, and one caller of each kind with a certificate of its own.

Real: the embedded suite with its front door, etcd, NATS, services, and two agents whose machines are simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from benchmarks.authz import http
from benchmarks.authz.expected import Caller, Relation
from whaleflux import checkpoint_storage, names
from whaleflux.embedded.layout import Layout
from whaleflux.embedded.simulated import SimulatedNode
from whaleflux.embedded.suite import Suite, SuiteOptions
from whaleflux.rpc import roles
from whaleflux.rpc.pki import CertificateAuthority, Tls, new_key_and_request
from whaleflux.sdk.client import AsyncClient
from whaleflux.sdk.stubs import Stubs
from whaleflux.v1 import checkpoint_pb2, identity_pb2, inventory_pb2, router_pb2, scheduler_pb2, secrets_pb2, trust_pb2

TEAM, MINE, OPEN = names.queue("research"), names.queue("anns"), names.queue("open")
OWN_NODE, OTHER_NODE = names.node("a", "n1"), names.node("b", "n2")
EVERYBODY: frozenset[str] = frozenset()
TEAM_ONLY, ANN_ONLY = frozenset({names.group("research"), names.user("ann")}), frozenset({names.user("ann")})
PRIVATE = "canary-of-anns-environment"  # what nobody but owner, team and operators may read


@dataclass(frozen=True, slots=True)
class Thing:
    """Something with an owner. `members`: whom it is for beside the owner; none: everybody sees it."""

    name: str
    owner: str = ""
    members: frozenset[str] = frozenset()
    absent: bool = False
    node: str = ""  # of a job: the agent where it runs
    declared: bool = False  # a dataset: every agent may look up where it comes from
    private: bool = False  # viewers do not see it either
    shared: bool = False  # a queue: whoever it is for may use it

    def to(self, caller: Caller) -> Relation:
        """What it is to the caller."""
        if self.absent:
            return Relation.ABSENT
        if caller.above:
            return Relation.SEEN
        if caller.role == roles.AGENT:
            return Relation.OWN if self.declared or caller.name == self.node else Relation.HIDDEN
        if caller.role == roles.APP:
            return Relation.HIDDEN if self.members else Relation.SEEN
        if caller.role in roles.HUMANS:
            named = {names.user(caller.name), *map(names.group, caller.groups)} & self.members
            through_a_group = bool(named - {names.user(caller.name)})
            if self.owner == caller.name or through_a_group:
                return Relation.OWN
            if self.members and not named and (self.private or caller.role != roles.VIEWER):
                return Relation.HIDDEN
            if self.shared and (named or not self.members):
                return Relation.OWN
        return Relation.SEEN


def callers() -> list[Caller]:
    """One of each kind."""
    research = frozenset({"research"})
    return [
        Caller("no certificate", roles.ANONYMOUS, "-"),
        Caller("viewer", roles.VIEWER, "vera"),
        Caller("owner", roles.USER, "ann", research),
        Caller("team mate", roles.USER, "bob", research),
        Caller("stranger", roles.USER, "eve"),
        Caller("operator", roles.OPERATOR, "olga"),
        Caller("admin", roles.ADMIN, "ada"),
        Caller("application", roles.APP, "chat"),
        Caller("agent of the node", roles.AGENT, "a/n1"),
        Caller("agent of another", roles.AGENT, "b/n2"),
        Caller("scheduler", roles.SCHEDULER, "1"),
        Caller("checkpoint", roles.CHECKPOINT, "1"),
        Caller("front door", roles.FRONTDOOR, "1"),
        Caller("disabled user", roles.USER, "dora", admitted=False),
        Caller("revoked session", roles.USER, "rita", admitted=False),
        Caller("another authority's admin", roles.ADMIN, "mallory", ours=False),
    ]


@dataclass(slots=True)
class World:
    """The running fleet: `things` by kind, a channel per caller, and the admin's client."""

    suite: Suite
    admin: AsyncClient
    target: str
    callers: Mapping[str, Caller]
    credentials: dict[str, grpc.ChannelCredentials]
    engine: http.Engine
    engine_port: int
    model: str = ""  # as requests name it
    api_keys: dict[str, str] = field(default_factory=dict)  # kind of key -> its secret
    things: dict[str, list[Thing]] = field(default_factory=dict)

    def channel(self, caller: Caller) -> grpc.aio.Channel:
        """A connection of its own through the front door."""
        return self.dial(self.credentials[caller.label])

    def dial(self, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        """The same with any certificate."""
        options = (("grpc.ssl_target_name_override", "frontdoor.whaleflux"), ("grpc.use_local_subchannel_pool", 1))
        return grpc.aio.secure_channel(self.target, credentials, options)

    def stubs(self, label: str) -> Stubs:
        """A client as that caller."""
        return Stubs(self.channel(self.callers[label]))

    async def fingerprint(self) -> tuple[str, ...]:
        """The versions of everything that is somebody's: equal, when nothing of it was changed."""
        jobs = [job async for job in _all_jobs(self.admin)]
        queues = (await self.admin.scheduler.ListQueues(scheduler_pb2.ListQueuesRequest())).queues
        models = (await self.admin.router.ListModels(router_pb2.ListModelsRequest())).models
        datasets = (await self.admin.inventory.ListDatasets(inventory_pb2.ListDatasetsRequest())).datasets
        keys = (await self.admin.router.ListApiKeys(router_pb2.ListApiKeysRequest())).api_keys
        told = [(job.name, job.spec.SerializeToString(deterministic=True), str((job.state, job.step))) for job in jobs]
        rest = [(one.name, one.etag) for group in (queues, datasets) for one in group]
        return (*map(str, sorted(told)), *map(str, sorted(rest)), *sorted(m.name for m in (*models, *keys)))


async def _all_jobs(client: AsyncClient) -> AsyncIterator[scheduler_pb2.Job]:
    token = ""
    while True:
        request = scheduler_pb2.ListJobsRequest(parent="queues/-", page_token=token, show_ended=True)
        page = await client.scheduler.ListJobs(request)
        for job in page.jobs:
            yield job
        if not (token := page.next_page_token):
            return


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[World]:
    """The fleet, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="authz-") as folder:
        nodes = [SimulatedNode("a", "n1", "h100x8")]
        suite = Suite(SuiteOptions(state=Path(folder), simulate=nodes), lambda _: None)
        try:
            context = await suite.start()
            async with AsyncClient.from_context(suite.layout.context_file) as admin, http.engine() as (engine, port):
                known = {caller.label: caller for caller in callers()}
                world = World(suite, admin, context.server, known, _credentials(suite.layout), engine, port)
                await _populate(world)
                yield world
        finally:
            await suite.stop()


def _credentials(layout: Layout) -> dict[str, grpc.ChannelCredentials]:
    """A certificate for each caller, signed with the fleet's own authority; mallory's with another one."""
    now = datetime.now(UTC)
    ours = CertificateAuthority.load((layout.pki / "ca.crt").read_bytes(), (layout.pki / "authority.key").read_bytes())
    foreign = CertificateAuthority.create(now)
    made: dict[str, grpc.ChannelCredentials] = {}
    for caller in callers():
        if caller.role == roles.ANONYMOUS:
            made[caller.label] = grpc.ssl_channel_credentials(ours.certificate_pem)
            continue
        authority = foreign if caller.name == "mallory" else ours
        tls: Tls = authority.issue(caller.role, caller.name, now, lifetime=timedelta(hours=1))
        made[caller.label] = grpc.ssl_channel_credentials(ours.certificate_pem, tls.key, tls.chain)
    return made


async def _populate(world: World) -> None:
    """Ann's things, in a queue of her team, in one of her own, in an open one; then dora is disabled and rita logs out."""
    await _people(world)
    await _queues(world)
    ann = world.stubs("owner")
    jobs = [await _job(ann, queue) for queue in (TEAM, MINE, OPEN)]
    model = await _model(ann, world.engine_port)
    world.model = names.last(model)
    key = await _keys(world, ann)
    dataset = await _dataset(ann)
    world.things = {
        "job": [
            *(
                Thing(job, "ann", who, node="a/n1")
                for job, who in zip(jobs, (TEAM_ONLY, ANN_ONLY, EVERYBODY), strict=True)
            ),
            Thing(names.job("open", "absent"), absent=True),
        ],
        "queue": [
            Thing(TEAM, "", TEAM_ONLY, shared=True),
            Thing(MINE, "", ANN_ONLY, shared=True),
            Thing(OPEN, shared=True),
            Thing(names.queue("absent"), absent=True),
        ],
        "node": [Thing(OWN_NODE, node="a/n1"), Thing(OTHER_NODE, node="b/n2")],
        "model": [Thing(model, "ann", TEAM_ONLY), Thing(names.model("absent"), absent=True)],
        "dataset": [Thing(dataset, "ann", TEAM_ONLY, declared=True), Thing(names.dataset("absent"), absent=True)],
        "key": [Thing(key, "ann", ANN_ONLY, private=True), Thing("apiKeys/absent", absent=True)],
        "secret": [
            Thing(await _secret(ann), "ann", TEAM_ONLY, private=True),
            Thing(names.secret("absent"), absent=True),
        ],
        "user": [Thing(names.user("ann"), "ann", ANN_ONLY, private=True), Thing(names.user("absent"), absent=True)],
        "code": [Thing("0" * 64, absent=True)],
    }
    await _until_placed(world, jobs)
    await _checkpoints(world, jobs)


async def _people(world: World) -> None:
    """The group, a user who is disabled, and one whose session is revoked."""
    identity = world.admin.identity
    for name in ("ann", "bob", "eve", "dora", "rita"):
        user = trust_pb2.Principal(role=roles.USER, kind=trust_pb2.PRINCIPAL_KIND_USER)
        await identity.CreateUser(identity_pb2.CreateUserRequest(user_id=name, user=user))
    research = trust_pb2.Group(members=[names.user("ann"), names.user("bob")])
    await identity.CreateGroup(identity_pb2.CreateGroupRequest(group_id="research", group=research))
    await identity.DisableUser(identity_pb2.DisableUserRequest(name=names.user("dora")))
    await _log_in_and_out(world)


async def _log_in_and_out(world: World) -> None:
    """Rita's certificate comes from a login, and the login has ended."""
    link = await world.admin.identity.CreateLoginLink(identity_pb2.CreateLoginLinkRequest(user=names.user("rita")))
    key, request = new_key_and_request()
    login = identity_pb2.LoginRequest(code=link.code, certificate_request_pem=request.decode())
    answer = await world.stubs("no certificate").identity.Login(login)
    credentials = (answer.authority_pem.encode(), key, answer.certificate_pem.encode())
    world.credentials["revoked session"] = grpc.ssl_channel_credentials(*credentials)
    await world.stubs("revoked session").identity.Logout(identity_pb2.LogoutRequest())


async def _queues(world: World) -> None:
    for name, members in ((TEAM, TEAM_ONLY), (MINE, ANN_ONLY), (OPEN, EVERYBODY)):
        queue = scheduler_pb2.Queue(members=sorted(members))
        await world.admin.scheduler.CreateQueue(
            scheduler_pb2.CreateQueueRequest(queue_id=names.last(name), queue=queue)
        )


async def _job(ann: Stubs, queue: str) -> str:
    """A job of ann's that runs on the first node."""
    spec = scheduler_pb2.JobSpec(
        command=["sh", "-c", f"exec sleep 86400 # {PRIVATE}"], gpus=1, environment={"PRIVATE": PRIVATE}
    )
    request = scheduler_pb2.CreateJobRequest(parent=queue, job_id="train", job=scheduler_pb2.Job(spec=spec))
    return str((await ann.scheduler.CreateJob(request)).name)


async def _model(ann: Stubs, port: int) -> str:
    engine = router_pb2.Engine(kind=http.ENGINE_KIND, addresses=[f"127.0.0.1:{port}"], environment={"PRIVATE": PRIVATE})
    model = router_pb2.Model(engine=engine, queue=TEAM)
    return str((await ann.router.CreateModel(router_pb2.CreateModelRequest(model_id="anns-model", model=model))).name)


async def _keys(world: World, ann: Stubs) -> str:
    """Keys of each kind; returns the name of one of ann's that may go."""
    own = await ann.router.CreateApiKey(
        router_pb2.CreateApiKeyRequest(display_name="own", models=[names.model(world.model)])
    )
    eve = await world.stubs("stranger").router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="eve's"))
    ended = await ann.router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="ended"))
    await ann.router.DeleteApiKey(router_pb2.DeleteApiKeyRequest(name=ended.name))
    world.api_keys = {
        "none": "",
        "wrong": "wf-wrong",
        "ended": ended.secret,
        "other model": eve.secret,
        "own": own.secret,
    }
    return str((await ann.router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="to be deleted"))).name)


async def _checkpoints(world: World, jobs: list[str]) -> None:
    """One that is being written of each job, announced by the agent of its node."""
    agent = world.stubs("agent of the node").checkpoint
    for job in jobs:
        uid = (await world.admin.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job))).uid
        request = checkpoint_pb2.BeginCheckpointRequest(job=job, job_uid=uid, epoch=1, step=1, serial=1, world_size=1)
        folder = checkpoint_storage.job_folder(
            str(world.suite.layout.checkpoints / names.queue(names.top(job))), job, uid
        )
        request.location = f"{folder}/{names.checkpoint_id(1, 1, 1)}"
        await agent.BeginCheckpoint(request)


async def _until_placed(world: World, jobs: list[str]) -> None:
    """Returns when ann's jobs run and her model can be asked."""
    async with asyncio.timeout(60):
        for job in jobs:
            while (
                await world.admin.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job))
            ).state != scheduler_pb2.JOB_STATE_RUNNING:
                await asyncio.sleep(0.1)
        while not (
            await world.admin.router.GetModel(router_pb2.GetModelRequest(name=names.model(world.model)))
        ).ready_replicas:
            await asyncio.sleep(0.1)


async def _dataset(ann: Stubs) -> str:
    dataset = inventory_pb2.Dataset(uri="file:///nowhere", members=sorted(TEAM_ONLY))
    return str(
        (
            await ann.inventory.CreateDataset(
                inventory_pb2.CreateDatasetRequest(dataset_id="anns-data", dataset=dataset)
            )
        ).name
    )


async def _secret(ann: Stubs) -> str:
    secret = secrets_pb2.Secret(team="groups/research")
    request = secrets_pb2.CreateSecretRequest(secret_id="anns-secret", secret=secret, value=PRIVATE.encode())
    return str((await ann.secrets.CreateSecret(request)).name)
