"""A captured node: b/n2, joined like any other, at a/n1 and at what runs there."""

from __future__ import annotations

import grpc

from tests.robustness.hostile.attempts import ABSENT, DENIED, UNKNOWN, Attempt, Calls
from tests.robustness.hostile.place import Place
from tests.support.suite import until
from whaleflux import names
from whaleflux.rpc.pki import new_key_and_request
from whaleflux.v1 import agent_pb2 as a
from whaleflux.v1 import checkpoint_pb2 as c
from whaleflux.v1 import health_pb2 as h
from whaleflux.v1 import identity_pb2 as i
from whaleflux.v1 import inventory_pb2 as n
from whaleflux.v1 import router_pb2 as r
from whaleflux.v1 import scheduler_pb2 as s
from whaleflux.v1 import secrets_pb2 as k

A1, B2 = "sites/a/nodes/n1", "sites/b/nodes/n2"
BEHIND = "FAILED_PRECONDITION"


async def attempts(place: Place) -> list[Attempt]:
    mallory = Calls(await _joined(place, "n2", "2"), "agent/b/n2")
    return [
        *_as_a1(mallory),
        *await _at_its_tasks(mallory, place),
        *_at_its_checkpoints(mallory),
        *_at_the_fleet(mallory),
        *await _as_a_retired_node(place),
        *await _by_joining(place),
    ]


async def _token(place: Place, site: str, node: str = "") -> str:
    request = n.CreateJoinTokenRequest(site=f"sites/{site}", node=node)
    return str((await place.world.admin.inventory.CreateJoinToken(request)).secret)


def _join(token: str, node: str, machine: str) -> tuple[n.JoinRequest, bytes]:
    key, request = new_key_and_request()
    return n.JoinRequest(
        token=token, node_id=node, machine_id=machine * 32, certificate_request_pem=request.decode()
    ), key


async def _joined(place: Place, node: str, machine: str) -> grpc.aio.Channel:
    request, key = _join(await _token(place, "b"), node, machine)
    answer = await place.stubs(place.as_caller("no certificate")).inventory.Join(request)
    channel = place.channel(place.authority().certificate_pem, key, answer.certificate_pem.encode())
    facts = n.NodeFacts(simulated=True, cpu_millicores=8000, memory_bytes=64 << 30)
    name = names.node("b", node)
    registered = n.RegisterNodeRequest(name=name, facts=facts, boot_id=f"boot-{node}", machine_id=machine * 32)
    await place.stubs(channel).inventory.RegisterNode(registered)
    return channel


def _as_a1(mallory: Calls) -> list[Attempt]:
    """In the name of the other node."""
    return [
        mallory.attempt("register a/n1", "Inventory/RegisterNode", n.RegisterNodeRequest(name=A1, boot_id="x"), DENIED),
        mallory.attempt("say that a/n1 caches", "Inventory/ReportCachedDataset", n.ReportCachedDatasetRequest(dataset="datasets/d", copy=n.DatasetCopy(node=A1)), DENIED),
        mallory.stream("sync as a/n1", "Task/Sync", [a.SyncRequest(hello=a.SyncHello(node=A1))], DENIED),
        mallory.stream("attach as a/n1", "Task/Attach", [a.AttachRequest(hello=a.AttachHello(node=A1, session="s", secret="x"))], DENIED),
        mallory.stream("beat as a/n1", "Health/Heartbeat", [h.HeartbeatRequest(hello=h.HeartbeatHello(node=A1))], DENIED),
    ]  # fmt: skip


async def _at_its_tasks(mallory: Calls, place: Place) -> list[Attempt]:
    job = names.job("anns", "train")
    task = (await place.world.admin.scheduler.GetJob(s.GetJobRequest(name=job))).attempt.tasks[0].id
    ended = a.TaskReport(task=task, job=job, epoch=1, phase=s.TASK_PHASE_EXITED, exit_code=1)
    own = a.SyncHello(node=B2, boot_id="boot-n2", machine_id="2" * 32)
    claims = a.SyncHello(node=B2, boot_id="boot-n2", machine_id="2" * 32, tasks=[ended])
    failed = h.ReportFailureRequest(job=job, epoch=1, task=task, node=A1)
    running = h.RunningTask(task=task, job=job, epoch=1, step=10**9, alive=True)
    own_beat = h.HeartbeatHello(node=B2, boot_id="boot-n2", machine_id="2" * 32)
    beat = [
        h.HeartbeatRequest(hello=own_beat),
        h.HeartbeatRequest(heartbeat=h.Heartbeat(sequence=1, tasks=[running])),
    ]
    moved = a.ProgressReport(tasks=[a.TaskProgress(job=job, epoch=1, step=10**9)])
    return [
        mallory.stream("a beat of its task", "Health/Heartbeat", beat, "OK", unheeded=DENIED),
        mallory.stream("progress of its task", "Task/Sync", [a.SyncRequest(hello=own), a.SyncRequest(progress=moved)], "OK", unheeded=DENIED),
        mallory.stream("end a/n1's task", "Task/Sync", [a.SyncRequest(hello=own), a.SyncRequest(report=ended)], DENIED),
        mallory.stream("say to have a/n1's task", "Task/Sync", [a.SyncRequest(hello=claims)], DENIED),
        mallory.attempt("report a failure", "Health/ReportFailure", failed, DENIED),
        mallory.attempt("open its secrets", "Task/OpenTaskSecrets", a.OpenTaskSecretsRequest(job=job, epoch=1), DENIED),
        mallory.attempt("fetch its code", "Scheduler/DownloadCode", s.DownloadCodeRequest(job=job, epoch=1), DENIED, ABSENT),
        mallory.attempt("read the job", "Scheduler/GetJob", s.GetJobRequest(name=job), DENIED),
        mallory.attempt("list jobs", "Scheduler/ListJobs", s.ListJobsRequest(parent="queues/-"), DENIED),
        mallory.attempt("watch jobs", "Scheduler/WatchJobs", s.WatchJobsRequest(), DENIED),
        mallory.attempt("cancel it", "Scheduler/CancelJob", s.CancelJobRequest(name=job), DENIED),
        mallory.attempt("enter it", "Scheduler/AttachJob", s.AttachJobRequest(open=s.AttachOpen(name=job, port=22)), DENIED),
        mallory.attempt("submit a job", "Scheduler/CreateJob", s.CreateJobRequest(parent="queues/open", job=s.Job(spec=s.JobSpec(command=["true"]))), DENIED),
    ]  # fmt: skip


def _at_its_checkpoints(mallory: Calls) -> list[Attempt]:
    job = names.job("anns", "train")
    saved = names.checkpoint(job, 1, 1, 1)
    piece = c.Piece(path="__0_0.distcp", size_bytes=1, checksum="xxh3-128:0")
    begin = c.BeginCheckpointRequest(job=job, epoch=1, step=99, world_size=1, location="/tmp/evil")
    report = c.ReportPiecesRequest(checkpoint=saved, epoch=1, complete_ranks=[0], pieces=[piece])
    return [
        mallory.attempt("begin a checkpoint", "Checkpoint/BeginCheckpoint", begin, DENIED),
        mallory.attempt("commit it", "Checkpoint/ReportPieces", report, DENIED),
        mallory.attempt("give it up", "Checkpoint/AbandonCheckpoint", c.AbandonCheckpointRequest(name=saved, epoch=1), DENIED),
        mallory.attempt("lose it", "Checkpoint/MarkLost", c.MarkLostRequest(name=saved, epoch=1, read=piece), DENIED),
        mallory.attempt("lose it by an old epoch", "Checkpoint/MarkLost", c.MarkLostRequest(name=saved, epoch=0, read=piece), DENIED, "ABORTED"),
        mallory.attempt("call it intact", "Checkpoint/MarkIntact", c.MarkIntactRequest(name=saved, epoch=1), DENIED),
        mallory.attempt("find it", "Checkpoint/FindRestorable", c.FindRestorableRequest(job=job), DENIED),
        mallory.attempt("read it", "Checkpoint/GetCheckpoint", c.GetCheckpointRequest(name=saved), DENIED),
        mallory.attempt("list all", "Checkpoint/ListCheckpoints", c.ListCheckpointsRequest(parent="queues/-/jobs/-"), DENIED),
        mallory.attempt("say that it is deleted", "Checkpoint/ConfirmDeleted", c.ConfirmDeletedRequest(names=[saved]), DENIED),
    ]  # fmt: skip


def _at_the_fleet(mallory: Calls) -> list[Attempt]:
    return [
        mallory.attempt("list nodes", "Inventory/ListNodes", n.ListNodesRequest(), DENIED),
        mallory.attempt("read a/n1", "Inventory/GetNode", n.GetNodeRequest(name=A1), DENIED),
        mallory.attempt("make a token", "Inventory/CreateJoinToken", n.CreateJoinTokenRequest(site="sites/a"), DENIED),
        mallory.attempt("retire a/n1", "Inventory/RetireNode", n.RetireNodeRequest(name=A1), DENIED),
        mallory.attempt("replace a/n1", "Inventory/ReplaceNode", n.ReplaceNodeRequest(name=A1), DENIED),
        mallory.attempt("all users", "Identity/ListUsers", i.ListUsersRequest(), DENIED),
        mallory.attempt("Ann's secret, as the scheduler", "Secret/OpenSecrets", k.OpenSecretsRequest(subject="user/ann"), DENIED),
        mallory.attempt("declare a model", "Router/CreateModel", r.CreateModelRequest(model_id="m"), DENIED),
        mallory.attempt("list keys", "Router/ListApiKeys", r.ListApiKeysRequest(), DENIED),
    ]  # fmt: skip


async def _as_a_retired_node(place: Place) -> list[Attempt]:
    """With a certificate that lasts for another day."""
    retired = Calls(await _joined(place, "n8", "8"), "agent/b/n8")
    inventory, node = place.world.admin.inventory, "sites/b/nodes/n8"

    async def gone() -> bool:
        await inventory.RetireNode(n.RetireNodeRequest(name=node))
        return True

    await inventory.DrainNode(n.DrainNodeRequest(name=node))
    await until(gone, f"{node} is retired", 20)
    begin = c.BeginCheckpointRequest(job=names.job("anns", "train"), epoch=1, step=9, world_size=1, location="/tmp/x")
    _, request = new_key_and_request()
    renewed = n.RenewCertificateRequest(certificate_request_pem=request.decode())
    hello = a.SyncRequest(hello=a.SyncHello(node=node))
    return [
        retired.attempt("retired: list nodes", "Inventory/ListNodes", n.ListNodesRequest(), UNKNOWN),
        retired.attempt("retired: begin a checkpoint", "Checkpoint/BeginCheckpoint", begin, UNKNOWN),
        retired.attempt("retired: renew", "Inventory/RenewCertificate", renewed, UNKNOWN),
        retired.stream("retired: sync", "Task/Sync", [hello], UNKNOWN),
    ]


async def _by_joining(place: Place) -> list[Attempt]:
    """Once more, as somebody else."""
    outside = Calls(place.as_caller("no certificate"), "anonymous/-")
    spent, bound = await _token(place, "b"), await _token(place, "b", B2)
    takes_over, _ = _join(await _token(place, "a"), "n1", "9")
    other, _ = _join(bound, "n3", "3")
    first, _ = _join(spent, "n4", "4")
    again, _ = _join(spent, "n5", "5")
    await place.stubs(outside.channel).inventory.Join(first)
    _, request = new_key_and_request()
    renewed = n.RenewCertificateRequest(certificate_request_pem=request.decode())
    return [
        outside.attempt("join as a/n1", "Inventory/Join", takes_over, BEHIND),
        outside.attempt("join as another node than the token names", "Inventory/Join", other, BEHIND),
        outside.attempt("join by a token that was used", "Inventory/Join", again, UNKNOWN, BEHIND, "RESOURCE_EXHAUSTED"),
        outside.attempt("renew without a certificate", "Inventory/RenewCertificate", renewed, UNKNOWN),
    ]  # fmt: skip
