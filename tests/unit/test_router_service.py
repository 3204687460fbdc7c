"""RouterService over a store in memory, and the loop that keeps replicas as jobs, against a scheduler that is made up."""

import contextlib

import pytest

from whaleflux.clock import SystemClock
from whaleflux.errors import AlreadyExists, Conflict, Invalid, NotFound, Unavailable, WrongState
from whaleflux.store import keys
from whaleflux.store.api import Delete, Fenced, Put
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core.load import Ended
from whaleflux_inference_router.core.policy import Request
from whaleflux_inference_router.fleet import Fleet
from whaleflux_inference_router.http_policy import Gate, request_of
from whaleflux_inference_router.manager import Manager
from whaleflux_inference_router.routing import routing
from whaleflux_inference_router.servicer import Router

NODE = "sites/edge/nodes/n1"


def model(**engine):
    return pb.Model(engine=pb.Engine(**(engine or {"command": ["serve"]})), replicas=pb.ReplicaCount(min=2))


@contextlib.asynccontextmanager
async def service():
    store = MemoryStore()
    async with routing(store, SystemClock()) as current:
        yield Router(store, SystemClock(), current), current, store


class TestModels:
    async def test_declared_listed_changed_deleted(self):
        async with service() as (router, current, _):
            made = await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)
            assert "m" in current.snapshot.models, "whoever was answered can use it at once"
            assert [m.name for m in (await router.ListModels(pb.ListModelsRequest(), None)).models] == ["models/m"]
            made.replicas.min = 5
            changed = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert (changed.replicas.min, changed.create_time) == (5, made.create_time)
            with pytest.raises(Conflict):
                await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            await router.DeleteModel(pb.DeleteModelRequest(name="models/m", etag=changed.etag), None)
            with pytest.raises(NotFound):
                await router.GetModel(pb.GetModelRequest(name="models/m"), None)

    async def test_a_dry_run_stores_nothing_and_refuses_what_the_real_one_would(self):
        async with service() as (router, _, store):
            dry = pb.CreateModelRequest(model_id="m", model=model(), validate_only=True)
            assert (await router.CreateModel(dry, None)).name == "models/m"
            assert not (await store.list(keys.MODELS)).entries
            await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)
            with pytest.raises(AlreadyExists):
                await router.CreateModel(dry, None)

    async def test_a_repeated_request_gets_the_first_answer_and_another_one_is_refused(self):
        async with service() as (router, _, _):
            request = pb.CreateModelRequest(model_id="m", model=model(), request_id="r1")
            first = await router.CreateModel(request, None)
            assert await router.CreateModel(request, None) == first
            request.model.replicas.min = 7
            with pytest.raises(AlreadyExists):
                await router.CreateModel(request, None)
            with pytest.raises(AlreadyExists):
                await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)

    async def test_the_engine_is_fixed_and_says_what_to_do(self):
        async with service() as (router, _, _):
            await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)
            other = model(command=["other"])
            other.name = "models/m"
            with pytest.raises(WrongState, match="delete the model and create it again"):
                await router.UpdateModel(pb.UpdateModelRequest(model=other), None)
            await router.CreateModel(pb.CreateModelRequest(model_id="e", model=model(addresses=["h:1"])), None)
            moved = model(addresses=["h:1", "h:2"])
            moved.name = "models/e"
            assert len((await router.UpdateModel(pb.UpdateModelRequest(model=moved), None)).engine.addresses) == 2

    @pytest.mark.parametrize(
        ("bad", "field"),
        [
            (pb.Model(), "model.engine"),
            (model(command=["x"], addresses=["h:1"]), "model.engine"),
            (model(addresses=["no-port"]), "model.engine.addresses"),
            (model(command=["x"], gpus=1000), "model.engine.gpus"),
            (pb.Model(engine=pb.Engine(command=["x"]), replicas=pb.ReplicaCount(min=-1)), "model.replicas.min"),
            (pb.Model(engine=pb.Engine(command=["x"]), context_window_tokens=-1), "model.context_window_tokens"),
        ],
    )
    async def test_what_cannot_be_served_is_refused_by_field(self, bad, field):
        async with service() as (router, _, store):
            with pytest.raises(Invalid) as refused:
                await router.CreateModel(pb.CreateModelRequest(model_id="m", model=bad), None)
            assert field in {v.field for v in refused.value.violations}
            assert not (await store.list(keys.MODELS)).entries


class TestKeys:
    async def test_made_once_shown_once_revoked_at_once(self):
        async with service() as (router, current, store):
            made = await router.CreateApiKey(pb.CreateApiKeyRequest(display_name="ci"), None)
            assert current.knows_key(made.secret)
            stored = (await store.list(keys.API_KEYS)).entries[0].value
            assert made.secret.encode() not in stored
            listed = (await router.ListApiKeys(pb.ListApiKeysRequest(), None)).api_keys
            assert [(k.display_name, k.secret) for k in listed] == [("ci", "")]
            await router.DeleteApiKey(pb.DeleteApiKeyRequest(name=made.name), None)
            assert not current.knows_key(made.secret)

    async def test_bounds(self):
        async with service() as (router, _, _):
            for bad in (pb.CreateApiKeyRequest(ttl_s=-1), pb.CreateApiKeyRequest(display_name="x" * 201)):
                with pytest.raises(Invalid):
                    await router.CreateApiKey(bad, None)


class TestGate:
    async def test_a_key_that_has_ended_opens_nothing(self):
        async with service() as (router, current, store):
            made = await router.CreateApiKey(pb.CreateApiKeyRequest(ttl_s=60), None)
            gate = Gate(current, open_access=False)
            assert gate.answer("GET", "/v1/models", f"Bearer {made.secret}", b"").status == 200
            entry = (await store.list(keys.API_KEYS)).entries[0]
            ended = pb.ApiKey.FromString(entry.value)
            ended.expire_time.FromSeconds(1)
            await current.seen(current.api_keys, await store.commit(Put(entry.key, ended.SerializeToString())))
            assert gate.answer("GET", "/v1/models", f"Bearer {made.secret}", b"").status == 401

    @pytest.mark.parametrize(
        ("body", "tokens", "output"),
        [
            (b'{"model":"m","prompt":"12345678"}', 2, 0),
            (
                b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"1234"}]}],"max_tokens":9}',
                1,
                9,
            ),
            (b'{"model":"m","input":["1234","5678"],"max_completion_tokens":3}', 2, 3),
            (b'{"model":"m"}', 0, 0),
        ],
    )
    def test_what_is_read_of_a_request(self, body, tokens, output):
        asked = request_of(body)
        assert (asked.model, asked.tokens, asked.max_output_tokens) == ("m", tokens, output)

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"{", b'{"model":1}', b'{"model":""}', b'{"model":"m","max_tokens":-1}', b'{"model":"m","max_tokens":true}', b"[" * 100_000],
    )  # fmt: skip
    def test_bad_bodies_name_the_field(self, body):
        with pytest.raises(Invalid) as refused:
            request_of(body)
        assert refused.value.violations[0].field in {"body", "model", "max_tokens"}


class Scheduler:
    """Jobs start at once on NODE; `silent` makes every call fail."""

    def __init__(self):
        self.jobs, self.queues, self.created, self.silent = {}, set(), 0, False

    async def CreateJob(self, request, timeout):
        assert not request.HasField("job") or request.job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE
        if self.silent:
            raise Unavailable("no scheduler")
        if request.parent not in self.queues:
            raise NotFound("queue", request.parent)
        name = f"{request.parent}/jobs/{request.job_id}"
        if name in self.jobs:
            return self.jobs[name]
        self.created += 1
        task = scheduler_pb2.Task(node=NODE, gpu_indices=[0], phase=scheduler_pb2.TASK_PHASE_RUNNING, endpoint=f"10.0.0.1:{9000 + self.created}")  # fmt: skip
        job = scheduler_pb2.Job(name=name, state=scheduler_pb2.JOB_STATE_RUNNING)
        job.attempt.tasks.append(task)
        self.jobs[name] = job
        return job

    async def CreateQueue(self, request, timeout):
        self.queues.add(f"queues/{request.queue_id}")

    async def CancelJob(self, request, timeout):
        if request.name not in self.jobs:
            raise NotFound("job", request.name)
        self.jobs[request.name].state = scheduler_pb2.JOB_STATE_CANCELLED
        return self.jobs[request.name]

    async def DeleteJob(self, request, timeout):
        del self.jobs[request.name]


class Inventory:
    async def GetNode(self, request, timeout):
        node = inventory_pb2.Node(name=NODE)
        node.facts.gpus.add(model="RTX4090", memory_bytes=24 * 10**9)
        node.facts.price.usd_per_gpu_hour = 0.5
        return node


class Turns:
    """The manager with its world; the loop is driven turn by turn, and health is a set of addresses."""

    def __init__(self, store, current, leader):
        self.scheduler, self.store, self.current, self.healthy = Scheduler(), store, current, set()
        self.fleet = Fleet(self.scheduler, Inventory(), SystemClock())
        self.fleet.synced = True
        self.manager = Manager(store, SystemClock(), current, self.fleet, leader, self.probe)

    async def probe(self, address, path):
        return path == "/health" and ("*" in self.healthy or address in self.healthy)

    async def declare(self, count, **engine):
        wanted = model(**engine)
        wanted.name, wanted.replicas.min = "models/m", count
        await self.current.seen(self.current.models, await self.store.commit(Put(keys.MODELS + "m", encode(wanted))))

    async def turn(self, times=1):
        for _ in range(times):
            await self.manager.turn()
        await self.current.seen(self.current.replicas, self.current.replicas.revision)

    @property
    def states(self):
        return [pb.ReplicaState.Name(r.state)[14:] for _, r in sorted(self.current.replicas.values.items())]


@contextlib.asynccontextmanager
async def turns():
    async with service() as (_, current, store), elect(store, "inference_router", "t") as leader:
        yield Turns(store, current, leader)


class TestReplicas:
    async def test_a_model_becomes_jobs_becomes_replicas_that_are_routed_by_card_and_price(self):
        async with turns() as t:
            await t.declare(2)
            await t.turn(3)
            assert t.states == ["STARTING", "STARTING"]
            assert sorted(t.scheduler.jobs) == ["queues/serving/jobs/m-0", "queues/serving/jobs/m-1"]
            t.healthy.add("*")
            await t.turn()
            assert t.states == ["READY", "READY"]
            best = t.current.decide(Request("m")).ranking[0].replica
            assert (best.gpu_model, best.gpu_memory_bytes, best.usd_per_hour) == ("RTX4090", 24 * 10**9, 0.5)
            await t.turn(3)
            assert t.scheduler.created == 2, "nothing is made twice"

    async def test_fewer_replicas_drain_finish_what_they_have_and_end_their_jobs(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(2)
            await t.turn(4)
            t.current.book.open("d1", "models/m/replicas/m-1", SystemClock().monotonic())
            await t.declare(1)
            await t.turn(3)
            assert t.states == ["READY", "DRAINING"]
            assert [r.replica.name for r in t.current.decide(Request("m")).ranking] == ["models/m/replicas/m-0"]
            t.current.book.close(Ended("d1", "", None, False))
            await t.turn(2)
            assert t.states == ["READY"]
            assert list(t.scheduler.jobs) == ["queues/serving/jobs/m-0"]

    async def test_a_replica_that_is_wanted_again_while_it_drains_comes_anew(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            await t.declare(0)
            await t.turn()
            assert t.states == ["DRAINING"]
            await t.declare(1)
            await t.turn(5)
            assert t.states == ["READY"]

    async def test_a_job_that_ended_is_replaced_but_not_in_a_hurry(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            for _ in range(2):  # as the watch would tell
                (job,) = t.fleet.jobs.values()
                job.state = scheduler_pb2.JOB_STATE_FAILED
                await t.turn(4)
            assert t.scheduler.created == 2
            assert t.states == ["STARTING"]

    async def test_without_a_scheduler_replicas_that_run_keep_serving(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            t.scheduler.silent = True
            await t.declare(2)
            await t.turn(3)
            assert t.states == ["READY", "STARTING"]
            assert t.current.decide(Request("m")).ranking

    async def test_a_deposed_leader_writes_nothing(self):
        async with turns() as t:
            await t.declare(1)
            leader_key = (await t.store.list(keys.LEADERS)).entries[0].key
            await t.store.commit(Delete(leader_key))
            with pytest.raises(Fenced):
                await t.turn()
            assert not (await t.store.list(keys.REPLICAS)).entries
