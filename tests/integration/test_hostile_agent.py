"""The agent of b/n2, with its real certificate, against a/n1 and the job that runs there; then nodes that are retired and replaced."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from tests.support.trust_world import Machine, Stream, TrustWorld, facts, obey, until
from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    PermissionDenied,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from whaleflux.rpc import pki
from whaleflux.store import keys
from whaleflux.v1 import agent_pb2, checkpoint_pb2, health_pb2, inventory_pb2, router_pb2, scheduler_pb2

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
A1, B2 = "sites/a/nodes/n1", "sites/b/nodes/n2"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world():
    async with TrustWorld() as world:
        yield world


class Fleet:
    """Both agents, with open streams, and a job that runs on a/n1."""

    def __init__(self, world):
        self.world, self.n1, self.n2 = world, Machine("1" * 32, "n1"), Machine("2" * 32, "n2")

    async def start(self):
        self.own = await self.n1.join(self.world, await self.world.token("a"))
        self.eve = await self.n2.join(self.world, await self.world.token("b"))
        self.ann = self.world.caller(self.world.issue("user", "ann"))
        self.operator = self.world.caller(self.world.issue("operator", "olga"))
        for caller, node in ((self.own, A1), (self.eve, B2)):
            request = inventory_pb2.RegisterNodeRequest(
                name=node, facts=facts(node), boot_id=f"boot-{node[-2:]}", machine_id=node[-1] * 32
            )
            await caller.inventory.RegisterNode(request)
        self.sync, self.beat = self.streams(self.own, A1)
        await until(lambda: self.sync.got and self.beat.got, "a/n1 is connected")
        await self.operator.scheduler.GetQueue(scheduler_pb2.GetQueueRequest(name="queues/default"))
        job = scheduler_pb2.Job(spec=scheduler_pb2.JobSpec(command=["python", "train.py"], gpus=1))
        job.spec.environment["HF_TOKEN"] = "hf_secret"
        self.job = await until(lambda: self.submitted(job), "there is room for the job")
        seen = 0
        while (await self.state()) != scheduler_pb2.JOB_STATE_RUNNING:
            seen = obey(self.sync, seen)
            await asyncio.sleep(0.01)
        self.uid = (await self.ann.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=self.job))).uid
        return self

    async def submitted(self, job):
        try:
            made = await self.ann.scheduler.CreateJob(scheduler_pb2.CreateJobRequest(parent="queues/default", job=job))
        except (FailedPrecondition, Unavailable):  # the scheduler has not heard of the node yet
            return ""
        return made.name

    async def state(self):
        return (await self.ann.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=self.job))).state

    def streams(self, caller, node):
        boot = f"boot-{node[-2:]}"
        hello = agent_pb2.SyncHello(node=node, boot_id=boot, machine_id=node[-1] * 32)
        sync = Stream(caller.tasks.Sync, agent_pb2.SyncRequest(hello=hello))
        told = health_pb2.HeartbeatHello(node=node, boot_id=boot, machine_id=node[-1] * 32)
        return sync, Stream(caller.health_monitor.Heartbeat, health_pb2.HeartbeatRequest(hello=told))

    def begin(self, step, **more):
        location = f"{job_folder('/c', self.job, self.uid)}/{names.checkpoint_id(step, 1, 0)}"
        known = {"job": self.job, "epoch": 1, "step": step, "world_size": 1, "job_uid": self.uid, "location": location}
        return checkpoint_pb2.BeginCheckpointRequest(**{**known, **more})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(world):
    return await Fleet(world).start()


async def first_answer(method, *requests):
    """The error of a stream that says this, or what it answers first."""

    async def said():
        for request in requests:
            yield request
        await asyncio.sleep(5)

    async with method(said()) as answers:
        return [answer async for answer in answers]


async def attacks(fleet):
    """What the agent of b/n2 tries, by name: one call each."""
    eve, job, n1 = fleet.eve, fleet.job, fleet.n1
    saved = await fleet.own.checkpoint.BeginCheckpoint(fleet.begin(10))
    piece = checkpoint_pb2.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:0")
    report = checkpoint_pb2.ReportPiecesRequest(checkpoint=saved.name, epoch=1, complete_ranks=[0], pieces=[piece])
    read = checkpoint_pb2.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:1")
    of_n1 = (await fleet.ann.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job))).attempt.tasks[0].id
    ended = agent_pb2.TaskReport(task=of_n1, job=job, epoch=1, phase=scheduler_pb2.TASK_PHASE_EXITED, exit_code=1)
    own = agent_pb2.SyncHello(node=B2, boot_id="boot-n2", machine_id="2" * 32)
    claims_it = agent_pb2.SyncHello(node=B2, boot_id="boot-n2", machine_id="2" * 32, tasks=[ended])
    takes_over = Machine(n1.id, "n1")  # it says to be the machine, and has another key
    stranger = Machine(n1.id, "n1")
    token, token_b = await fleet.world.token("a"), await fleet.world.token("b", B2)
    pb, inv, sch, ckp = inventory_pb2, eve.inventory, eve.scheduler, eve.checkpoint
    return {
        "register a/n1": inv.RegisterNode(pb.RegisterNodeRequest(name=A1, facts=facts(A1), boot_id="x")),
        "say that a/n1 caches": inv.ReportCachedDataset(
            pb.ReportCachedDatasetRequest(dataset="datasets/d", copy=pb.DatasetCopy(node=A1))
        ),
        "list nodes": inv.ListNodes(pb.ListNodesRequest()),
        "read a/n1": inv.GetNode(pb.GetNodeRequest(name=A1)),
        "list sites": inv.ListSites(pb.ListSitesRequest()),
        "make a token": inv.CreateJoinToken(pb.CreateJoinTokenRequest(site="sites/a")),
        "retire a/n1": inv.RetireNode(pb.RetireNodeRequest(name=A1)),
        "replace a/n1": inv.ReplaceNode(pb.ReplaceNodeRequest(name=A1)),
        "join as a/n1 with a token of its site": takes_over.join(fleet.world, token),
        "join as another node than the token names": Machine("3" * 32, "n3").join(fleet.world, token_b),
        "come back by a/n1's certificate": stranger.join(fleet.world, certificate=n1.certificate),
        "sync as a/n1": first_answer(eve.tasks.Sync, agent_pb2.SyncRequest(hello=agent_pb2.SyncHello(node=A1))),
        "end a/n1's task": first_answer(
            eve.tasks.Sync, agent_pb2.SyncRequest(hello=own), agent_pb2.SyncRequest(report=ended)
        ),
        "say to have a/n1's task": first_answer(eve.tasks.Sync, agent_pb2.SyncRequest(hello=claims_it)),
        "attach as a/n1": first_answer(
            eve.tasks.Attach, agent_pb2.AttachRequest(hello=agent_pb2.AttachHello(node=A1, session="s", secret="x"))
        ),
        "attach to a guessed session": first_answer(
            eve.tasks.Attach, agent_pb2.AttachRequest(hello=agent_pb2.AttachHello(node=B2, session="s", secret="x"))
        ),
        "beat as a/n1": first_answer(
            eve.health_monitor.Heartbeat, health_pb2.HeartbeatRequest(hello=health_pb2.HeartbeatHello(node=A1))
        ),
        "report a failure": eve.health_monitor.ReportFailure(
            health_pb2.ReportFailureRequest(job=job, epoch=1, task=of_n1, node=A1)
        ),
        "fetch the code": first_of(sch.DownloadCode(scheduler_pb2.DownloadCodeRequest(job=job, epoch=1))),
        "read the job": sch.GetJob(scheduler_pb2.GetJobRequest(name=job)),
        "cancel the job": sch.CancelJob(scheduler_pb2.CancelJobRequest(name=job)),
        "begin a checkpoint": ckp.BeginCheckpoint(fleet.begin(99, location="/tmp/evil")),
        "commit it": ckp.ReportPieces(report),
        "give it up": ckp.AbandonCheckpoint(checkpoint_pb2.AbandonCheckpointRequest(name=saved.name, epoch=1)),
        "lose it": ckp.MarkLost(checkpoint_pb2.MarkLostRequest(name=saved.name, epoch=1, read=read)),
        "find it": ckp.FindRestorable(checkpoint_pb2.FindRestorableRequest(job=job)),
        "read it": ckp.GetCheckpoint(checkpoint_pb2.GetCheckpointRequest(name=saved.name)),
        "list all": ckp.ListCheckpoints(checkpoint_pb2.ListCheckpointsRequest(parent="queues/-/jobs/-")),
        "say that it is deleted": ckp.ConfirmDeleted(checkpoint_pb2.ConfirmDeletedRequest(names=[saved.name])),
        "declare a model": eve.inference_router.CreateModel(router_pb2.CreateModelRequest(model_id="m")),
        "list keys": eve.inference_router.ListApiKeys(router_pb2.ListApiKeysRequest()),
    }  # fmt: skip


async def first_of(stream):
    return await anext(aiter(stream))


REFUSED_OTHERWISE = {
    "join as a/n1 with a token of its site": (FailedPrecondition, "NODE_NAME_TAKEN"),
    "join as another node than the token names": (FailedPrecondition, "WRONG_NODE"),
    "come back by a/n1's certificate": (Unauthenticated, "CERTIFICATE_REFUSED"),
    "attach to a guessed session": (Unavailable, "SESSION_LOST"),
}


async def test_an_agent_gains_nothing_over_another_node(world, fleet):
    for attack, call in (await attacks(fleet)).items():
        before, told = (await world.store.list("", limit=1)).revision, len(world.trail.records)
        kind, reason = REFUSED_OTHERWISE.get(attack, (PermissionDenied, ""))
        with pytest.raises(StatusError) as refused:
            await call
            pytest.fail(f"{attack} was answered")
        assert isinstance(refused.value, kind), (attack, refused.value)
        assert reason in ("", refused.value.reason), attack
        assert "hf_secret" not in str(refused.value)
        assert (await world.store.list("", limit=1)).revision == before, f"{attack} changed something"
        on_record = any(r.result != "OK" for r in world.trail.records[told:])
        assert on_record or kind is Unavailable, f"{attack} is not on record"
    assert await fleet.state() == scheduler_pb2.JOB_STATE_RUNNING
    assert not fleet.sync.ended.is_set() and not fleet.beat.ended.is_set()


async def refusals(caller, within_s=15.0):
    """What each of the five services says; who says nothing for so long has taken the call."""
    asked = {
        "inventory": caller.inventory.GetDataset(inventory_pb2.GetDatasetRequest(name="datasets/d")),
        "scheduler": first_of(caller.scheduler.DownloadCode(scheduler_pb2.DownloadCodeRequest(job="queues/q/jobs/j"))),
        "health_monitor": first_answer(
            caller.health_monitor.Heartbeat,
            health_pb2.HeartbeatRequest(hello=health_pb2.HeartbeatHello(node=B2, boot_id="boot-n2")),
        ),
        "checkpoint": caller.checkpoint.ListDeletable(checkpoint_pb2.ListDeletableRequest()),
        "inference_router": caller.inference_router.ListApiKeys(router_pb2.ListApiKeysRequest()),
    }
    found = {}
    for role, call in asked.items():
        try:
            await asyncio.wait_for(call, within_s)
            found[role] = "answered"
        except TimeoutError:
            found[role] = "answered"
        except StatusError as error:
            found[role] = error.reason
    return found


REVOKED = dict.fromkeys(["inventory", "scheduler", "health_monitor", "checkpoint", "inference_router"], "REVOKED")


async def test_a_retired_node_is_refused_on_five_services_within_a_second(world, fleet):
    streams = fleet.streams(fleet.eve, B2)
    await until(lambda: all(stream.got for stream in streams), "b/n2 is connected")
    assert await refusals(fleet.eve, within_s=2.0) != REVOKED
    world.neighbours.dead = True
    began = time.monotonic()
    await fleet.operator.inventory.RetireNode(inventory_pb2.RetireNodeRequest(name=B2, reason="too loud"))
    assert await refusals(fleet.eve) == REVOKED
    for stream in streams:
        await asyncio.wait_for(stream.ended.wait(), 45.0)
    assert time.monotonic() - began < 10  # a second is promised; a machine that is busy with other tests is given more
    for stream in streams:
        assert stream.error.reason == "REVOKED"
        assert "too loud" in stream.error.message and "--node-id" in stream.error.message
    with pytest.raises(FailedPrecondition) as refused:
        await fleet.n2.join(world, certificate=fleet.n2.certificate)
    assert refused.value.reason == "NODE_RETIRED"


async def test_a_node_that_slept_a_week_comes_back_by_its_key_and_no_other_way(world, fleet):
    sleeper = Machine("5" * 32, "n5")
    await sleeper.join(world, await world.token("a"))
    then = datetime.now(UTC) - timedelta(days=7)
    sleeper.certificate = world.ca.sign(pki.request_for(sleeper.key), "agent", "a/n5", then, session=sleeper.session)
    asleep = world.caller(sleeper.tls(world.ca.certificate_pem))
    with pytest.raises((Unavailable, DeadlineExceeded)):  # the handshake is refused, so that no service answers
        await asleep.inventory.GetDataset(inventory_pb2.GetDatasetRequest(name="datasets/d"), timeout=1)
    awake = await sleeper.join(world, certificate=sleeper.certificate)
    await awake.inventory.RegisterNode(
        inventory_pb2.RegisterNodeRequest(
            name="sites/a/nodes/n5", facts=facts("n5"), boot_id="b", machine_id=sleeper.id
        )
    )


async def test_a_replaced_machine_is_refused_everywhere_and_the_new_one_is_the_node(world, fleet):
    world.neighbours.dead = True
    await fleet.operator.inventory.ReplaceNode(inventory_pb2.ReplaceNodeRequest(name=A1))
    for stream in (fleet.sync, fleet.beat):
        await asyncio.wait_for(stream.ended.wait(), 45.0)
        assert stream.error.reason == "REVOKED"
    assert await refusals(fleet.own) == REVOKED
    new = Machine("9" * 32, "n1")
    caller = await new.join(world, await world.token("a", A1))
    assert await world.store.get(keys.REVOKED + fleet.n1.session)
    await caller.inventory.RegisterNode(
        inventory_pb2.RegisterNodeRequest(name=A1, facts=facts("new"), boot_id="b9", machine_id=new.id)
    )
    assert "REVOKED" not in (await refusals(caller)).values()
