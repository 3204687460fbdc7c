"""Whose models, replicas and keys may be seen, used and changed by whom: by rpc, and by key at the front door."""

import asyncio
import contextlib
import json
from dataclasses import replace

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import (
    AlreadyExists,
    Compacted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    StatusError,
    Unavailable,
)
from whaleflux.frontdoor import NO_REPLICA_STATUS
from whaleflux.rpc import auth, owners
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux_inference_router import rights
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.request_authorizer import Asked, RequestAuthorizer
from whaleflux_inference_router.rights import ModelRights
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router

SECRET = "hunter2"


def who(role, name, groups=(), queues=None):
    return Principal(Identity(role, name), frozenset(groups), queues)


ANN, MATE, NAMED, EVE = who("user", "ann"), who("user", "bob", ["research"]), who("user", "carl"), who("user", "eve")
CALLERS = {
    "owner": ANN,
    "mate": MATE,
    "named": NAMED,
    "stranger": EVE,
    "viewer": who("viewer", "vic"),
    "operator": who("operator", "op"),
    "app": who("app", "web"),
}
MAY = {  # of ann's model in the serving queue, and in one for groups/research and users/carl: sees, reads, changes
    "owner": ("src", "src"),
    "mate": ("s", "src"),
    "named": ("s", "s"),
    "stranger": ("s", ""),
    "viewer": ("s", "s"),
    "operator": ("src", "src"),
    "app": ("s", ""),
}
MODELS = ("open", "team")
QUEUES = {"serving": OPEN, "team": Access(frozenset({"groups/research", "users/carl"}))}
TABLE = [(name, model, MAY[name][i]) for name in CALLERS for i, model in enumerate(MODELS)]


class Fleet:
    """ann's models `open` and `team`, each with a replica that answers."""

    def __init__(self, current, store, people, queues):
        self.current, self.store, self.people, self.queues = current, store, people, queues
        self.router = Router(store, current.clock, current)

    async def call(self, caller, method, request):
        """What it comes to, with the question asked that the boundary insists on."""
        with auth.acting_as(caller):
            asked = ownership.watch_questions()
            try:
                return await getattr(self.router, method)(request, None)
            except StatusError as error:
                return error
            finally:
                assert asked.yes, f"{method} did not ask"

    def authorizer(self, **options):
        return RequestAuthorizer(self.current, **{"open_access": False, **options})

    async def key(self, caller, **request):
        made = await self.call(caller, "CreateApiKey", pb.CreateApiKeyRequest(**request))
        return made if isinstance(made, StatusError) else made.secret


@contextlib.asynccontextmanager
async def fleet():
    store, clock = MemoryStore(), VirtualClock()
    queues = dict(QUEUES)
    people = {p.subject: p for p in CALLERS.values()}
    async with routing(
        store, clock, ModelRights(lambda queue: queues.get(queue, rights.UNKNOWN), people.get)
    ) as current:
        made = Fleet(current, store, people, queues)
        for name, queue in (("open", ""), ("team", "queues/team")):
            engine = pb.Engine(
                kind="openai", command=["serve", "--port", "{port}", SECRET], environment={"T": SECRET}, gpus=1
            )
            model = pb.Model(
                name=f"models/{name}", engine=engine, owner="user/ann", queue=queue, replicas=pb.ReplicaCount(min=1)
            )
            replica = pb.Replica(
                name=f"models/{name}/replicas/r",
                state=pb.REPLICA_STATE_READY,
                address="10.1.1.1:77",
                queue=queue,
                owner="user/ann",
            )
            revision = await store.commit(
                Put(f"{keys.MODELS}{name}", encode(model)), Put(f"{keys.REPLICAS}{name}/r", encode(replica))
            )
        for cache in (current.models, current.replicas):
            await current.seen(cache, revision)
        yield made


async def test_a_model_is_there_for_whom_its_queue_is_for_and_what_serves_it_is_its_team_s():
    async with fleet() as f:
        for caller, model, may in TABLE:
            principal, name = CALLERS[caller], f"models/{model}"
            found = await f.call(principal, "GetModel", pb.GetModelRequest(name=name))
            absent = await f.call(principal, "GetModel", pb.GetModelRequest(name="models/none"))
            assert isinstance(found, NotFound) == ("s" not in may), (caller, model)
            assert (SECRET in str(found)) == ("r" in may), (caller, model)
            assert "s" in may or found.message.replace(name, "models/none") == absent.message
            listed = await f.call(principal, "ListModels", pb.ListModelsRequest())
            assert (name in [one.name for one in listed.models]) == ("s" in may)
            replicas = await f.call(principal, "ListReplicas", pb.ListReplicasRequest(parent="models/-"))
            mine = [one for one in replicas.replicas if one.name.startswith(name)]
            assert [one.address for one in mine] == {"": [], "s": [""], "src": ["10.1.1.1:77"]}[may]
            route = await f.call(principal, "Route", pb.RouteRequest(model=model))
            assert isinstance(route, NotFound) == ("s" not in may)
            assert ("10.1.1.1" in str(route)) == ("r" in may), "who has an engine's address needs no key"


class ReplicaWatch:
    """What one caller is told of replicas."""

    def __init__(self, f, caller, since=0, parent=""):
        self.caller, self.asked = caller, ownership.watch_questions()
        self.stream = f.router.WatchReplicas(pb.WatchReplicasRequest(resource_version=since, parent=parent), None)

    async def until(self, which):
        """The messages up to the first of that kind."""
        found = []
        with auth.acting_as(self.caller):
            async with asyncio.timeout(5):
                while not found or found[-1].WhichOneof("event") != which:
                    found.append(await anext(self.stream))
        return found


async def test_a_watch_of_replicas_tells_what_a_list_of_them_shows():
    async with fleet() as f:
        for caller, model, may in TABLE:
            watch = ReplicaWatch(f, CALLERS[caller], parent=f"models/{model}")
            *told, mark = await watch.until("bookmark")
            assert watch.asked.yes
            assert [one.added.address for one in told] == {"": [], "s": [""], "src": ["10.1.1.1:77"]}[may]
            with auth.acting_as(CALLERS["operator"]):
                listed = await f.router.ListReplicas(pb.ListReplicasRequest(parent=f"models/{model}"), None)
            assert mark.resource_version == listed.resource_version


async def test_a_replica_that_ends_is_told_to_whom_it_was_there_also_when_its_model_went_first():
    async with fleet() as f:
        owner, stranger = ReplicaWatch(f, ANN), ReplicaWatch(f, EVE)
        since = (await owner.until("bookmark"))[-1].resource_version
        await stranger.until("bookmark")
        resumed = ReplicaWatch(f, ANN, since)
        await f.current.seen(f.current.models, await f.store.commit(Delete(keys.MODELS + "team")))
        await f.store.commit(Delete(keys.REPLICAS + "team/r"), Delete(keys.REPLICAS + "open/r"))
        assert {(await owner.until("deleted"))[-1].deleted for _ in range(2)} == {
            f"models/{m}/replicas/r" for m in MODELS
        }
        assert (await stranger.until("deleted"))[-1].deleted == "models/open/replicas/r"
        with pytest.raises(Compacted):  # whose it was nobody knows any more, and this caller may have it on a list
            while True:
                await resumed.until("deleted")


async def test_a_watch_of_replicas_begins_anew_when_the_caller_sees_other_models():
    async with fleet() as f:
        watch = ReplicaWatch(f, MATE)
        assert len(await watch.until("bookmark")) == 3
        f.queues["team"] = Access(frozenset({"groups/other"}))
        await f.current.clock.advance(2.0)
        await f.store.commit(Put(keys.REPLICAS + "open/r", encode(pb.Replica(name="models/open/replicas/r"))))
        with pytest.raises(Compacted):
            await watch.until("modified")


async def test_a_watch_of_replicas_asks_for_a_model_by_its_name():
    async with fleet() as f:
        with pytest.raises(InvalidArgument, match="parent"):
            await ReplicaWatch(f, ANN, parent="model/open").until("bookmark")


@pytest.mark.parametrize("method", ["UpdateModel", "DeleteModel"])
async def test_a_model_is_changed_by_its_owner_its_team_and_operators(method):
    for caller, model, may in TABLE:
        async with fleet() as f:
            with auth.acting_as(CALLERS["operator"]):
                request = await f.router.GetModel(pb.GetModelRequest(name=f"models/{model}"), None)
            if method == "DeleteModel":
                request = pb.DeleteModelRequest(name=request.name)
            else:
                request = pb.UpdateModelRequest(model=request)
                request.model.context_window_tokens, request.model.owner = 4096, "user/eve"
            found = await f.call(CALLERS[caller], method, request)
            reasons = {"c": "", "s": "NOT_OWNER", "": "MODEL_NOT_FOUND"}
            assert getattr(found, "reason", "") == reasons["c" if "c" in may else may[:1]], (caller, model, found)
            assert getattr(found, "owner", "user/ann") == "user/ann", "nobody gives it away in passing"


async def test_who_declares_a_model_owns_it_in_a_queue_that_is_for_them():
    engine = pb.Engine(command=["serve", "{port}"])
    async with fleet() as f:
        for caller, queue, error in (
            (EVE, "team", NotFound),
            (EVE, "none", NotFound),
            (NAMED, "team", pb.Model),
            (EVE, "", pb.Model),
        ):
            asked = pb.Model(engine=engine, queue=f"queues/{queue}" if queue else "", owner="user/ann")
            request = pb.CreateModelRequest(model_id=f"new-{caller.name}", model=asked)
            found = await f.call(caller, "CreateModel", request)
            assert isinstance(found, error), (caller, queue, found)
            assert getattr(found, "owner", caller.subject) == caller.subject
        found.queue = "queues/team"
        moved = await f.call(EVE, "UpdateModel", pb.UpdateModelRequest(model=found))
        assert isinstance(moved, FailedPrecondition)

    async def test_who_left_a_queue_gets_no_more_replicas_there(self):
        async with fleet() as f:
            model = await f.call(CALLERS["owner"], "GetModel", pb.GetModelRequest(name="models/team"))
            model.replicas.max = 9
            for caller, error in (("owner", PermissionDenied), ("operator", pb.Model)):
                found = await f.call(CALLERS[caller], "UpdateModel", pb.UpdateModelRequest(model=model))
                assert isinstance(found, error), (caller, found)
            found.etag, found.replicas.max = "", 2
            fewer = await f.call(CALLERS["owner"], "UpdateModel", pb.UpdateModelRequest(model=found))
            assert fewer.replicas.max == 2


class TestKeys:
    async def test_a_key_is_its_owner_s_to_list_and_revoke_and_operators(self):
        async with fleet() as f:
            made = {caller: await f.call(p, "CreateApiKey", pb.CreateApiKeyRequest()) for caller, p in CALLERS.items()}
            for caller, principal in CALLERS.items():
                listed = await f.call(principal, "ListApiKeys", pb.ListApiKeysRequest())
                own = set(made) if caller == "operator" else {caller}
                assert {one.name for one in listed.api_keys} == {made[one].name for one in own}
                assert not any(one.secret for one in listed.api_keys)
            theirs = await f.call(EVE, "DeleteApiKey", pb.DeleteApiKeyRequest(name=made["owner"].name))
            none = await f.call(EVE, "DeleteApiKey", pb.DeleteApiKeyRequest(name="apiKeys/none"))
            assert theirs.message.replace(made["owner"].name, "apiKeys/none") == none.message
            assert f.current.opened_by(made["owner"].secret)
            await f.call(CALLERS["operator"], "DeleteApiKey", pb.DeleteApiKeyRequest(name=made["owner"].name))
            assert not f.current.opened_by(made["owner"].secret)

    async def test_a_key_opens_what_its_owner_may_use_or_less(self):
        async with fleet() as f:
            gate = f.authorizer()
            for caller, model, may in TABLE:
                key = await f.key(CALLERS[caller])
                assert status(gate, key, model) == (200 if "s" in may else 404), (caller, model)
                assert (model in models(gate, key)) == ("s" in may)
            only = await f.key(MATE, models=["models/team"])
            assert (status(gate, only, "team"), status(gate, only, "open"), models(gate, only)) == (200, 403, ["team"])
            assert b"keys create --model open" in ask(gate, only, "open").body
            assert isinstance(await f.key(EVE, models=["models/team"]), NotFound)
            assert isinstance(await f.key(EVE, owner="user/ann"), InvalidArgument)
            assert status(gate, await f.key(CALLERS["operator"], owner="user/eve"), "team") == 404

    async def test_a_token_for_some_queues_makes_keys_for_what_is_there_alone(self):
        async with fleet() as f:
            scoped = replace(MATE, queues=frozenset({"team"}))
            assert isinstance(await f.key(scoped), InvalidArgument), "it would open all that bob may use"
            assert isinstance(await f.key(scoped, models=["models/open"]), NotFound)
            key = await f.key(scoped, models=["models/team"])
            assert models(f.authorizer(), key) == ["team"]

    async def test_what_its_owner_loses_the_key_loses_at_once(self):
        async with fleet() as f:
            gate, key = f.authorizer(), await f.key(MATE)
            assert status(gate, key, "team") == 200
            f.people["user/bob"] = who("user", "bob")
            assert (status(gate, key, "team"), status(gate, key, "open")) == (404, 200), "left the group"
            f.people["user/bob"] = MATE
            f.queues["team"] = Access(frozenset({"users/carl"}))
            assert status(gate, key, "team") == 404, "the queue is for others"
            del f.people["user/bob"]
            assert status(gate, key, "open") == 401, "disabled"

    async def test_a_router_that_does_not_know_yet_who_is_admitted_calls_no_key_wrong(self, monkeypatch):
        async with fleet() as f:
            gate, key = f.authorizer(), await f.key(MATE)

            def starting(subject):
                raise Unavailable("not known here yet")

            monkeypatch.setattr(f.current.rights, "known", starting)
            assert ask(gate, key, "team").status == NO_REPLICA_STATUS
            assert ask(gate, "wf-wrong", "team").status == 401

    async def test_without_keys_only_what_is_for_everybody_is_open(self):
        async with fleet() as f:
            gate = f.authorizer(open_access=True)
            assert (status(gate, "", "open"), status(gate, "", "team"), models(gate, "")) == (200, 404, ["open"])
            assert status(gate, await f.key(MATE), "team") == 200


def ask(gate, key, model):
    body = json.dumps({"model": model, "messages": []}).encode()
    return gate.answer(Asked("POST", "/v1/chat/completions", body, f"Bearer {key}"))


def status(gate, key, model):
    found = ask(gate, key, model).status
    one = gate.answer(Asked("GET", f"/v1/models/{model}", authorization=f"Bearer {key}")).status
    assert one == found, "the list and the door say the same"
    return found


def models(gate, key):
    return [
        one["id"]
        for one in json.loads(gate.answer(Asked("GET", "/v1/models", authorization=f"Bearer {key}")).body)["data"]
    ]


class Jobs:
    """A scheduler where somebody has a job already; what is done to it is remembered."""

    def __init__(self, **job):
        self.job, self.done = scheduler_pb2.Job(name="queues/serving/jobs/m-0", **job), []

    async def CreateJob(self, request, timeout):
        self.done.append(f"create for {request.on_behalf_of}")
        raise AlreadyExists("job", self.job.name)

    async def GetJob(self, request, timeout):
        return self.job

    async def CancelJob(self, request, timeout):
        self.done.append("cancel")
        self.job.state = scheduler_pb2.JOB_STATE_CANCELLED
        return self.job

    async def DeleteJob(self, request, timeout):
        self.done.append("delete")


@pytest.mark.parametrize(
    ("submitter", "kind", "done"),
    [
        ("user/ann", scheduler_pb2.JOB_KIND_SERVICE, ["cancel", "delete"]),
        ("user/bob", scheduler_pb2.JOB_KIND_SERVICE, []),
        ("user/ann", scheduler_pb2.JOB_KIND_TRAINING, []),
        ("inference_router/1", scheduler_pb2.JOB_KIND_SERVICE, []),
    ],
)
async def test_a_model_is_no_way_to_end_the_job_of_somebody_else(submitter, kind, done):
    scheduler = Jobs(submitter=submitter, state=scheduler_pb2.JOB_STATE_RUNNING, spec=scheduler_pb2.JobSpec(kind=kind))
    jobs = ReplicaJobs(scheduler, None, VirtualClock())
    named = pb.Model(name="models/m", engine=pb.Engine(command=["x"]), owner="user/ann")
    with pytest.raises(FailedPrecondition, match="give the model another name"):
        await jobs.ensure_job(named, "m-0", named.engine)
    assert scheduler.done == ["create for user/ann", *done]
    jobs.jobs[scheduler.job.name] = scheduler.job
    mine = (submitter, kind) == ("user/ann", scheduler_pb2.JOB_KIND_SERVICE)
    assert (jobs.of(scheduler.job.name, "user/ann") is not None) == mine, "nor to get its requests"


def test_every_field_is_public_or_private_on_purpose():
    private = {
        "Model": "last_change allowed_addresses sites rollout_policy rollout measures",
        "Engine": "command image addresses environment health_path working_directory secrets weights kv_memory_bytes gpu_memory_bytes shape fp8",
        "Replica": "address job node message declared_address site health_path input_tokens output_tokens etag",
    }
    for name, public in rights.PUBLIC.items():
        assert {field.name for field in getattr(pb, name).DESCRIPTOR.fields} == public | set(private[name].split()), (
            name
        )


def test_every_method_is_tried():
    router = {m.rpartition("/")[2] for m in owners.TABLE if "Router" in m}
    assert router == {
        "CreateModel", "GetModel", "ListModels", "UpdateModel", "DeleteModel", "ListReplicas", "WatchReplicas", "Route", "CreateApiKey", "ListApiKeys",
        "DeleteApiKey", "RollBackModel", "EstimateDeployment",
    }  # fmt: skip
