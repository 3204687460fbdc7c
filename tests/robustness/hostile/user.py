"""Eve, a user like others, at what is Ann's, and at what is nobody's to have."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc

from benchmarks.authz.fleet import MINE, OPEN, OWN_NODE, TEAM
from tests.robustness.hostile.attempts import ABSENT, CLOSED, DENIED, NOTHING, UNKNOWN, Attempt, Calls
from tests.robustness.hostile.place import ANNS_CODE, Place
from whaleflux import names
from whaleflux.rpc.pki import new_key_and_request
from whaleflux.v1 import agent_pb2 as a
from whaleflux.v1 import audit_pb2 as au
from whaleflux.v1 import checkpoint_pb2 as c
from whaleflux.v1 import events_pb2 as e
from whaleflux.v1 import health_pb2 as h
from whaleflux.v1 import identity_pb2 as i
from whaleflux.v1 import inventory_pb2 as n
from whaleflux.v1 import router_pb2 as r
from whaleflux.v1 import scheduler_pb2 as s
from whaleflux.v1 import secrets_pb2 as k
from whaleflux.v1 import trust_pb2 as t

INVALID, BEHIND = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
XFCC = "x-forwarded-client-cert"


async def attempts(place: Place) -> list[Attempt]:
    eve = Calls(place.world.channel(place.world.callers["stranger"]), "user/eve")
    return [
        *_at_jobs(eve, place),
        *_by_jobs(eve, place),
        *_at_queues_and_people(eve),
        *_at_secrets(eve),
        *_at_models(eve, place),
        *_as_a_part(eve),
        *await _as_another(eve, place),
    ]


def _at_jobs(eve: Calls, place: Place) -> list[Attempt]:
    """Verbs about Ann's job that Eve sees, and about the ones that she does not."""
    seen, hidden = names.job("open", "train"), names.job("anns", "train")
    command = s.AttachOpen(name=seen, command=s.AttachCommand(argv=["cat", "/proc/1/environ"]))
    port = s.AttachOpen(name=seen, port=22)
    read = s.AttachOpen(name=seen, read=s.AttachPath(path="."))
    write = s.AttachOpen(name=seen, write=s.AttachPath(path=".", base_name="planted"))
    others = ("queues/anns/jobs", "queues/research/jobs")
    return [
        eve.attempt("cancel Ann's job", "Scheduler/CancelJob", s.CancelJobRequest(name=seen), DENIED),
        eve.attempt("cancel Ann's hidden job", "Scheduler/CancelJob", s.CancelJobRequest(name=hidden), ABSENT),
        eve.attempt("hold it", "Scheduler/HoldJob", s.HoldJobRequest(name=seen), DENIED),
        eve.attempt("requeue it", "Scheduler/RequeueJob", s.RequeueJobRequest(name=seen), DENIED),
        eve.attempt("lower it", "Scheduler/SetJobPriority", s.SetJobPriorityRequest(name=seen, priority=-9), DENIED),
        eve.attempt("delete it", "Scheduler/DeleteJob", s.DeleteJobRequest(name=seen), DENIED),
        eve.attempt("read its output", "Scheduler/StreamLogs", s.StreamLogsRequest(name=seen), DENIED),
        eve.attempt("a command beside it", "Scheduler/AttachJob", s.AttachJobRequest(open=command), DENIED),
        eve.attempt("a port of it", "Scheduler/AttachJob", s.AttachJobRequest(open=port), DENIED),
        eve.attempt("copy its files", "Scheduler/AttachJob", s.AttachJobRequest(open=read), DENIED),
        eve.attempt("put a file there", "Scheduler/AttachJob", s.AttachJobRequest(open=write), DENIED),
        eve.attempt("explain the hidden one", "Scheduler/ExplainJob", s.ExplainJobRequest(name=hidden), ABSENT),
        eve.attempt("get the hidden one", "Scheduler/GetJob", s.GetJobRequest(name=hidden), ABSENT),
        eve.attempt("its environment", "Scheduler/GetJob", s.GetJobRequest(name=seen), "OK", seen_by=NOTHING),
        eve.attempt(
            "list all, a million at a time", "Scheduler/ListJobs",
            s.ListJobsRequest(parent="queues/-", page_size=1_000_000, show_ended=True), "OK", INVALID,
            seen_by=NOTHING, must_not_tell=others,
        ),
        eve.attempt(
            "its history", "Scheduler/ListJobHistory", s.ListJobHistoryRequest(parent="queues/-", user="user/ann"), "OK",
            seen_by=NOTHING, must_not_tell=others,
        ),
        eve.attempt(
            "watch all", "Scheduler/WatchJobs", s.WatchJobsRequest(), "OK", seen_by=NOTHING, must_not_tell=others
        ),
        eve.attempt(
            "events of all", "Event/ListEvents", e.ListEventsRequest(page_size=1000), "OK",
            seen_by=NOTHING, must_not_tell=others,
        ),
        eve.attempt(
            "find its checkpoint", "Checkpoint/FindRestorable", c.FindRestorableRequest(job=hidden), ABSENT
        ),
        eve.attempt(
            "read its checkpoint", "Checkpoint/GetCheckpoint",
            c.GetCheckpointRequest(name=names.checkpoint(hidden, 1, 1, 1)), ABSENT,
        ),
    ]  # fmt: skip


def _by_jobs(eve: Calls, place: Place) -> list[Attempt]:
    """What a job of her own would have to bring her."""

    def submit(
        name: str, *refused: str, parent: str = OPEN, spec: dict[str, Any] | None = None, **more: Any
    ) -> Attempt:
        known = {"command": ["true"], "gpus": 1, **(spec or {})}
        job = s.Job(spec=s.JobSpec(**known))
        return eve.attempt(name, "Scheduler/CreateJob", s.CreateJobRequest(parent=parent, job=job, **more), *refused)

    hidden = names.job("anns", "train")
    return [
        submit("a job in the team's queue", ABSENT, parent=TEAM),
        submit("a job in Ann's queue", ABSENT, parent=MINE),
        submit("priority 1000", DENIED, INVALID, spec={"priority": 1000}),
        submit("on behalf of Ann", DENIED, INVALID, on_behalf_of="user/ann"),
        submit("in place of Ann's", DENIED, ABSENT, BEHIND, INVALID, replaces=names.job("open", "train"), job_id="train"),
        submit("with Ann's name", "ALREADY_EXISTS", DENIED, job_id="train"),
        submit("after Ann's hidden job", ABSENT, INVALID, BEHIND, spec={"depends_on": [s.Dependency(job=hidden, when=2)]}),
        submit("with Ann's code", ABSENT, BEHIND, DENIED, INVALID, spec={"code": hashlib.sha256(ANNS_CODE).hexdigest()}),
        submit(
            "with Ann's secret", ABSENT, DENIED, BEHIND, INVALID,
            spec={"secrets": [s.SecretUse(secret="secrets/anns-secret", variable="X")]},
        ),
        submit(
            "with Ann's secret, as if in her group", ABSENT, DENIED, BEHIND, INVALID,
            spec={"secrets": [s.SecretUse(secret="secrets/anns-secret", variable="X")], "secrets_groups": ["research"]},
        ),
        submit("with Ann's data", ABSENT, DENIED, BEHIND, INVALID, spec={"datasets": ["datasets/anns-data"]}),
        eve.attempt(
            "code of a petabyte", "Scheduler/UploadCode", s.UploadCodeRequest(digest="0" * 64, size_bytes=1 << 50),
            INVALID, BEHIND, "RESOURCE_EXHAUSTED",
        ),
    ]  # fmt: skip


def _at_queues_and_people(eve: Calls) -> list[Attempt]:
    me, admin = "users/eve", t.Principal(name="users/eve", role="admin")
    raised = i.UpdateUserRequest(user=admin)
    raised.update_mask.paths.append("role")
    return [
        eve.attempt("into the team's queue", "Scheduler/UpdateQueue", s.UpdateQueueRequest(queue=s.Queue(name=TEAM), add_members=[me]), DENIED),
        eve.attempt("a queue of her own", "Scheduler/CreateQueue", s.CreateQueueRequest(queue_id="eves"), DENIED),
        eve.attempt("the queue away", "Scheduler/DeleteQueue", s.DeleteQueueRequest(name=MINE), DENIED),
        eve.attempt("a token for a node", "Inventory/CreateJoinToken", n.CreateJoinTokenRequest(site="sites/a"), DENIED),
        eve.attempt("a node away", "Inventory/RetireNode", n.RetireNodeRequest(name=OWN_NODE), DENIED),
        eve.attempt("a second self", "Identity/CreateUser", i.CreateUserRequest(user_id="eve2", user=t.Principal(role="admin", kind=1)), DENIED),
        eve.attempt("admin by herself", "Identity/UpdateUser", raised, DENIED),
        eve.attempt("into Ann's group", "Identity/AddGroupMember", i.AddGroupMemberRequest(name="groups/research", member=me), DENIED),
        eve.attempt("a token with role admin", "Identity/CreateToken", i.CreateTokenRequest(token=i.Token(role="admin"), ttl_s=60), DENIED, INVALID),
        eve.attempt("a token of Ann's", "Identity/CreateToken", i.CreateTokenRequest(token=i.Token(user="users/ann"), ttl_s=60), DENIED, ABSENT),
        eve.attempt("a login as Ann", "Identity/CreateLoginLink", i.CreateLoginLinkRequest(user="users/ann"), DENIED, ABSENT),
        eve.attempt("Ann away", "Identity/DisableUser", i.DisableUserRequest(name="users/ann"), DENIED),
        eve.attempt("who Ann is", "Identity/GetUser", i.GetUserRequest(name="users/ann"), ABSENT),
        eve.attempt("all users", "Identity/ListUsers", i.ListUsersRequest(), "OK", seen_by=NOTHING, must_not_tell=("users/ann",)),
    ]  # fmt: skip


def _at_secrets(eve: Calls) -> list[Attempt]:
    name = "secrets/anns-secret"
    opened = k.OpenSecretsRequest(subject="user/ann", queue=MINE, choices=[k.SecretChoice(name=name)])
    return [
        eve.attempt("Ann's secret", "Secret/GetSecret", k.GetSecretRequest(name=name), ABSENT),
        eve.attempt("a value into it", "Secret/UpdateSecret", k.UpdateSecretRequest(secret=k.Secret(name=name), value=b"x"), ABSENT),
        eve.attempt("the secret away", "Secret/DeleteSecret", k.DeleteSecretRequest(name=name), ABSENT),
        eve.attempt("its value, as the scheduler", "Secret/OpenSecrets", opened, DENIED),
        eve.attempt("all sealed anew", "Secret/RewrapSecrets", k.RewrapSecretsRequest(), DENIED),
        eve.attempt("a secret of the team's", "Secret/CreateSecret", k.CreateSecretRequest(secret_id="eves", secret=k.Secret(team="groups/research"), value=b"x"), DENIED, ABSENT, INVALID),
        eve.attempt("all secrets", "Secret/ListSecrets", k.ListSecretsRequest(), "OK", seen_by=NOTHING, must_not_tell=(name,)),
        eve.attempt("Ann's data", "Inventory/GetDataset", n.GetDatasetRequest(name="datasets/anns-data"), ABSENT),
        eve.attempt("the data away", "Inventory/DeleteDataset", n.DeleteDatasetRequest(name="datasets/anns-data"), ABSENT),
        eve.attempt(
            "what Ann did", "Audit/ListAudit", au.ListAuditRequest(filter=au.AuditFilter(who="user/ann")), "OK",
            seen_by=NOTHING, must_not_tell=("user/ann",),
        ),
        eve.attempt("the whole trail", "Audit/ExportAudit", au.ExportAuditRequest(), DENIED),
    ]  # fmt: skip


def _at_models(eve: Calls, place: Place) -> list[Attempt]:
    model, etcd, admin = "models/anns-model", place.world.suite.ports["etcd"], place.world.suite.ports["admin"]
    inside = (
        "169.254.169.254:80", f"127.0.0.1:{etcd}", f"2130706433:{etcd}", f"0x7f.1:{admin}", f"[::ffff:127.0.0.1]:{etcd}",
        "[fd00:ec2::254]:80", f"0.0.0.0:{admin}", f"localhost:{etcd}",
    )  # fmt: skip

    def declare(address: str) -> Attempt:
        wanted = r.Model(engine=r.Engine(kind="vllm", addresses=[address]))
        request = r.CreateModelRequest(model_id="eves-way-in", model=wanted)
        return eve.attempt(
            f"a model at {address.split(':', maxsplit=1)[0] or address}", "Router/CreateModel", request, INVALID, DENIED
        )

    taken = r.Model(name=model, engine=r.Engine(kind="vllm", addresses=["10.0.0.1:80"]))
    return [
        *map(declare, inside),
        eve.attempt("Ann's model", "Router/GetModel", r.GetModelRequest(name=model), ABSENT),
        eve.attempt("its address elsewhere", "Router/UpdateModel", r.UpdateModelRequest(model=taken), ABSENT),
        eve.attempt("the model away", "Router/DeleteModel", r.DeleteModelRequest(name=model), ABSENT),
        eve.attempt("its replicas", "Router/Route", r.RouteRequest(model=model), ABSENT),
        eve.attempt("a model in the team's queue", "Router/CreateModel", r.CreateModelRequest(model_id="eves", model=r.Model(engine=r.Engine(kind="vllm", addresses=["10.0.0.1:80"]), queue=TEAM)), ABSENT, DENIED),
        eve.attempt("a key for it", "Router/CreateApiKey", r.CreateApiKeyRequest(display_name="x", models=[model]), ABSENT, DENIED, INVALID),
        eve.attempt("a key of Ann's", "Router/CreateApiKey", r.CreateApiKeyRequest(display_name="x", owner="user/ann"), DENIED, ABSENT, INVALID),
        eve.attempt("Ann's key away", "Router/DeleteApiKey", r.DeleteApiKeyRequest(name=place.thing("key")), ABSENT, DENIED),
    ]  # fmt: skip


def _as_a_part(eve: Calls) -> list[Attempt]:
    """What agents and services may say."""
    job = names.job("open", "train")
    hello = a.SyncRequest(hello=a.SyncHello(node=OWN_NODE))
    beat = h.HeartbeatRequest(hello=h.HeartbeatHello(node=OWN_NODE))
    begin = c.BeginCheckpointRequest(job=job, epoch=1, step=9, world_size=1, location="/tmp/x")
    return [
        eve.attempt("its node's tasks", "Task/Sync", hello, DENIED),
        eve.attempt("a beat of its node", "Health/Heartbeat", beat, DENIED),
        eve.attempt("its secrets", "Task/OpenTaskSecrets", a.OpenTaskSecretsRequest(job=job, epoch=1), DENIED),
        eve.attempt("its code", "Scheduler/DownloadCode", s.DownloadCodeRequest(job=job, epoch=1), DENIED),
        eve.attempt("a checkpoint for it", "Checkpoint/BeginCheckpoint", begin, DENIED),
        eve.attempt("its checkpoint lost", "Checkpoint/MarkLost", c.MarkLostRequest(name=names.checkpoint(job, 1, 1, 1), epoch=1), DENIED),
        eve.attempt("a failure of it", "Health/ReportFailure", h.ReportFailureRequest(job=job, epoch=1), DENIED),
        eve.attempt("the node again", "Inventory/RegisterNode", n.RegisterNodeRequest(name=OWN_NODE), DENIED),
    ]  # fmt: skip


async def _as_another(eve: Calls, place: Place) -> list[Attempt]:
    """With forged headers, certificates of other domains, and logins that are over."""
    forged = ((XFCC, "URI=spiffe://whaleflux/admin/ada"),)
    outside = Calls(place.world.channel(place.world.callers["no certificate"]), "anonymous/-")
    code, ended = await _used_up(place)
    _, request = new_key_and_request()
    again = i.LoginRequest(code=code, certificate_request_pem=request.decode())
    guessed = i.LoginRequest(code=code[:-4] + "aaaa", certificate_request_pem=request.decode())
    foreign = place.authority()
    foreign.trust_domain = "evil.example"
    abroad = Calls(place.channel_with(foreign.issue("admin", "ada", place.now)), "anonymous/-")
    return [
        eve.attempt("admin by a header", "Identity/ListUsers", i.ListUsersRequest(), "OK", seen_by=NOTHING, metadata=forged, must_not_tell=("users/ann",)),
        eve.attempt("a user, by a header", "Identity/CreateUser", i.CreateUserRequest(user_id="eve3"), DENIED, metadata=forged),
        outside.attempt("her own code again", "Identity/Login", again, UNKNOWN, "RESOURCE_EXHAUSTED"),
        outside.attempt("a code nearly right", "Identity/Login", guessed, UNKNOWN, "RESOURCE_EXHAUSTED"),
        Calls(ended, "user/eve").attempt("after her logout", "Identity/WhoAmI", i.WhoAmIRequest(), UNKNOWN),
        Calls(ended, "user/eve").attempt("renewed after it", "Identity/RenewLogin", i.RenewLoginRequest(certificate_request_pem=request.decode()), UNKNOWN),
        abroad.attempt("of another trust domain", "Identity/WhoAmI", i.WhoAmIRequest(), UNKNOWN, CLOSED),
    ]  # fmt: skip


async def _used_up(place: Place) -> tuple[str, grpc.aio.Channel]:
    """A login code that was used, and the connection of a login that has ended."""
    link = await place.world.admin.identity.CreateLoginLink(i.CreateLoginLinkRequest(user="users/eve"))
    key, request = new_key_and_request()
    outside = place.stubs(place.world.channel(place.world.callers["no certificate"]))
    answer = await outside.identity.Login(i.LoginRequest(code=link.code, certificate_request_pem=request.decode()))
    channel = place.channel(answer.authority_pem.encode(), key, answer.certificate_pem.encode())
    await place.stubs(channel).identity.Logout(i.LogoutRequest())
    return link.code, channel
