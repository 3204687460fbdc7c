"""RouterService over a store in memory, and the loop that keeps replicas as jobs, against a scheduler that is made up."""

import asyncio
import contextlib
import dataclasses
import json

import pytest
from prometheus_client import REGISTRY

from whaleflux import frontdoor
from whaleflux.clock import VirtualClock
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from whaleflux.frontdoor.http_paths import TO_ENGINES
from whaleflux.manifests import job_checks
from whaleflux.manifests.job_spec import spec_of
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Delete, Fenced, Put
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import model_changes
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core import allowed_networks
from whaleflux_inference_router.core.load_tracker import Ended, LoadTracker
from whaleflux_inference_router.core.outcomes import End, Outcome
from whaleflux_inference_router.core.ranking import Request
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.replica_manager import ReplicaManager
from whaleflux_inference_router.request_authorizer import Answer, Asked, RequestAuthorizer
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.router_views import RouterViews
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.served_tokens import ServedTokens
from whaleflux_inference_router.servicer import Router

NODE = "sites/edge/nodes/n1"
ADMIN = auth.Identity("admin", "root")


def model(**engine):
    return pb.Model(engine=pb.Engine(**(engine or {"command": ["serve", "{port}"]})), replicas=pb.ReplicaCount(min=2))


@contextlib.asynccontextmanager
async def service():
    store, clock = MemoryStore(), VirtualClock()
    async with routing(store, clock) as current:
        with auth.acting_as(ADMIN):
            yield Router(store, clock, current, Resolver(clock, no_such_name)), current, store


async def no_such_name(host, port):
    raise OSError("Name or service not known")


class TestModels:
    async def test_declared_listed_changed_deleted(self):
        async with service() as (router, current, _):
            made = await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)
            assert "m" in current.snapshot.models, "whoever was answered can use it at once"
            assert [m.name for m in (await router.ListModels(pb.ListModelsRequest(), None)).models] == ["models/m"]
            made.replicas.min = 5
            changed = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert (changed.replicas.min, changed.create_time) == (5, made.create_time)
            with pytest.raises(Aborted):
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

    async def test_the_engine_of_servers_elsewhere_is_fixed_and_says_what_to_do(self):
        async with service() as (router, _, _):
            await router.CreateModel(pb.CreateModelRequest(model_id="m", model=model()), None)
            other = model(addresses=["h:1"])
            other.name = "models/m"
            with pytest.raises(FailedPrecondition, match="delete the model and create it again"):
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
            (model(addresses=["ok:1", "no-port"]), "model.engine.addresses[1]"),
            (model(addresses=["256.1.1.1:80"]), "model.engine.addresses[0]"),
            (model(addresses=["http://x:80"]), "model.engine.addresses[0]"),
            (model(addresses=["1.2.3.4:²"]), "model.engine.addresses[0]"),
            (model(command=["x"], gpus=1000), "model.engine.gpus"),
            (
                pb.Model(engine=pb.Engine(command=["x", "{port}"]), replicas=pb.ReplicaCount(min=-1)),
                "model.replicas.min",
            ),
            (
                pb.Model(engine=pb.Engine(command=["x", "{port}"]), context_window_tokens=-1),
                "model.context_window_tokens",
            ),
        ],
    )
    async def test_what_cannot_be_served_is_refused_by_field(self, bad, field):
        async with service() as (router, _, store):
            with pytest.raises(InvalidArgument) as refused:
                await router.CreateModel(pb.CreateModelRequest(model_id="m", model=bad), None)
            assert field in {v.field for v in refused.value.violations}
            assert not (await store.list(keys.MODELS)).entries


class TestKeys:
    async def test_made_once_shown_once_revoked_at_once(self):
        async with service() as (router, current, store):
            made = await router.CreateApiKey(pb.CreateApiKeyRequest(display_name="ci"), None)
            assert current.opened_by(made.secret)
            stored = (await store.list(keys.API_KEYS)).entries[0].value
            assert made.secret.encode() not in stored
            listed = (await router.ListApiKeys(pb.ListApiKeysRequest(), None)).api_keys
            assert [(k.display_name, k.secret) for k in listed] == [("ci", "")]
            await router.DeleteApiKey(pb.DeleteApiKeyRequest(name=made.name), None)
            assert not current.opened_by(made.secret)

    async def test_bounds(self):
        async with service() as (router, _, _):
            for bad in (pb.CreateApiKeyRequest(ttl_s=-1), pb.CreateApiKeyRequest(display_name="x" * 201)):
                with pytest.raises(InvalidArgument):
                    await router.CreateApiKey(bad, None)


def post(path="/v1/chat/completions", **content):
    return Asked("POST", path, json.dumps({"model": "m", **content}).encode())


class TestAuthorizer:
    async def test_a_key_that_has_ended_opens_nothing(self):
        async with service() as (router, current, store):
            made = await router.CreateApiKey(pb.CreateApiKeyRequest(ttl_s=60), None)
            authorizer = RequestAuthorizer(current, open_access=False)
            models = Asked("GET", "/v1/models", b"", f"Bearer {made.secret}")
            assert authorizer.answer(models).status == 200
            entry = (await store.list(keys.API_KEYS)).entries[0]
            ended = pb.ApiKey.FromString(entry.value)
            ended.expire_time.FromSeconds(1)
            await current.seen(current.api_keys, await store.commit(Put(entry.key, ended.SerializeToString())))
            assert authorizer.answer(models).status == 401

    async def test_what_has_begun_is_sent_to_one_more_replica_at_most_and_what_is_kept_to_none(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(3)
            await t.turn(4)
            authorizer = RequestAuthorizer(t.current, open_access=True)

            def sent(asked):
                headers = dict(authorizer.answer(asked).headers)
                return len(headers["x-gateway-destination-endpoint"].split(",")), headers.get("x-envoy-retry-on")

            assert sent(post()) == (2, "reset")
            assert sent(post(store=True)) == (3, None), "an attempt that could not begin is repeated all the same"
            assert sent(post(background=True)) == (3, None)
            assert sent(post("/v1/responses")) == (3, None)

    async def test_a_request_that_ends_engine_after_engine_is_refused_for_a_while(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(3)
            await t.turn(4)
            authorizer = RequestAuthorizer(t.current, open_access=True)

            def killing():
                answer = authorizer.answer(post(prompt="deadly"))
                return answer, dict(answer.headers).get("x-wf-decision-id", "")

            now_s = t.clock.monotonic()
            _, decision_id = killing()
            for (
                replica
            ) in "aab":  # its attempt (a second copy of it at the same engine counts once), and the one repeat
                t.current.load_tracker.engine_ended(decision_id, replica, now_s)
            alone, decision_id = killing()
            assert "x-envoy-retry-on" not in dict(alone.headers)
            t.current.load_tracker.engine_ended(decision_id, "c", now_s)
            refused, _ = killing()
            assert refused.status == 422
            assert b"change it" in refused.body
            assert authorizer.answer(post(prompt="innocent")).status == 200
            await t.clock.advance(601)
            assert killing()[0].status == 200

    async def test_a_request_that_was_answered_is_no_danger(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            authorizer = RequestAuthorizer(t.current, open_access=True)
            for replica in "abcd":  # a rolling restart meets the same popular question again and again
                headers = dict(authorizer.answer(post(prompt="popular")).headers)
                t.current.load_tracker.engine_ended(headers["x-wf-decision-id"], replica, 0.0)
                t.current.load_tracker.close(
                    Ended(headers["x-wf-decision-id"], "", 0.1, completed=True, succeeded=True)
                )

    async def test_the_key_is_judged_by_the_headers_alone_and_wrong_ones_are_slowed_down_by_address(self):
        async with service() as (router, current, _):
            made = await router.CreateApiKey(pb.CreateApiKeyRequest(), None)
            authorizer = RequestAuthorizer(current, open_access=False)

            def asked(key, address="10.0.0.1"):
                path = frontdoor.KEY_PREFIX + "/v1/chat/completions"
                return authorizer.answer(Asked("POST", path, authorization=f"Bearer {key}", address=address))

            assert asked(made.secret) == Answer(200)
            answers = [asked("wf-wrong") for _ in range(40)]
            assert answers[0].status == 401
            assert answers[-1].status == 429
            assert "retry-after" in dict(answers[-1].headers)
            assert asked(made.secret).status == 200, "who has a key there is served all the same"
            assert asked("wf-wrong", "10.0.0.2").status == 401

    async def test_an_engine_gets_the_paths_of_its_kind_only(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            authorizer = RequestAuthorizer(t.current, open_access=True)
            for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/metrics", "/v1/files"):
                assert authorizer.answer(post(path)).status == 404
            models = t.current.snapshot.models
            models["m"] = dataclasses.replace(models["m"], engine="vllm")
            other = next(row for row in TO_ENGINES.values() if "vllm" not in row.engines)
            refused = authorizer.answer(post(other.path))
            assert refused.status == 404
            assert b"/v1/chat/completions" in refused.body, "what it answers is said"

    async def test_a_form_without_a_model_goes_to_the_only_one(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            authorizer = RequestAuthorizer(t.current, open_access=True)
            form = Asked(
                "POST", "/v1/audio/transcriptions", b"--x\r\n\r\n--x--", content_type="multipart/form-data; boundary=x"
            )
            assert authorizer.answer(form).status == 200


class Scheduler:
    """Jobs start at once on NODE; `silent` makes every call fail."""

    def __init__(self):
        self.jobs, self.queues, self.created, self.silent = {}, set(), 0, False

    async def CreateJob(self, request, timeout):
        assert not request.HasField("job") or request.job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE
        assert not list(job_checks.violations(spec_of(request.job.spec)))
        if self.silent:
            raise Unavailable("no scheduler")
        if request.parent not in self.queues:
            raise NotFound("queue", request.parent)
        name = f"{request.parent}/jobs/{request.job_id}"
        if name in self.jobs:
            return self.jobs[name]
        self.created += 1
        task = scheduler_pb2.Task(node=NODE, gpu_uuids=["GPU-0"], phase=scheduler_pb2.TASK_PHASE_RUNNING, endpoint=f"10.0.0.1:{9000 + self.created}")  # fmt: skip
        job = scheduler_pb2.Job(
            name=name,
            state=scheduler_pb2.JOB_STATE_RUNNING,
            submitter=request.on_behalf_of or "inference_router/1",
            spec=request.job.spec,
        )
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

    def __init__(self, store, current, leader, scheduler=None):
        self.scheduler, self.store, self.current, self.healthy = scheduler or Scheduler(), store, current, set()
        self.clock, self.served, self.hosts, self.silent_on = current.clock, None, {}, {}
        self.paths = {}  # at which engines answer, by address
        self.jobs = ReplicaJobs(self.scheduler, Inventory(), self.clock)
        self.jobs.synced = True
        resolver = Resolver(self.clock, self.look_up, allowed=allowed_networks.parse("ordinary,::1/128,127.0.0.1/32"))
        self.manager = ReplicaManager(store, self.clock, current, self.jobs, leader, self, resolver)

    async def look_up(self, host, port):
        if host not in self.hosts:
            raise OSError("Name or service not known")
        return self.hosts[host]

    async def is_well(self, address, path):
        return path == self.paths.get(address, "/health") and ("*" in self.healthy or address in self.healthy)

    async def served_models(self, address):
        return self.served

    async def first_token(self, address, model):
        return self.silent_on.get(address, "")

    async def declare(self, count, **engine):
        wanted = model(**engine)
        wanted.name, wanted.replicas.min = "models/m", count
        await self.current.seen(self.current.models, await self.store.commit(Put(keys.MODELS + "m", encode(wanted))))

    async def tell(self, view):
        """What another router knows."""
        revision = await self.store.commit(Put(keys.ROUTER_VIEWS + "other", view.SerializeToString()))
        await self.current.seen(self.current.views, revision)

    async def turn(self, times=1):
        for _ in range(times):
            await self.clock.advance(0.25)
            await self.manager.turn()
        await self.current.seen(self.current.replicas, self.current.replicas.revision)

    def job(self, version, site=""):
        wanted = (version, f"sites/{site}" if site else "")
        return next(
            self.scheduler.jobs[r.job]
            for r in self.current.replicas.values.values()
            if (r.version, r.site) == wanted and r.job in self.scheduler.jobs
        )

    @property
    def states(self):
        return [pb.ReplicaState.Name(r.state)[14:] for _, r in sorted(self.current.replicas.values.items())]


@contextlib.asynccontextmanager
async def turns():
    async with service() as (_, current, store), elect(store, "inference_router", "t") as leader:
        yield Turns(store, current, leader)


class Counting:
    """Engines that count tokens, at one address."""

    async def metrics(self, address):
        return "prompt_tokens_total 7\ngeneration_tokens_total 5\n" if address == "10.0.0.1:80" else ""


class TestServedTokens:
    async def test_who_asks_is_told_what_engines_count_and_nothing_of_the_others(self):
        async with service() as (_, current, store):
            router = Router(store, current.clock, current, served=ServedTokens(current.clock, Counting()))
            for number in (1, 2):
                one = pb.Replica(name=f"models/m/replicas/m-{number}", state=pb.REPLICA_STATE_READY)
                one.address = f"10.0.0.{number}:80"
                await store.commit(Put(f"{keys.REPLICAS}m/m-{number}", encode(one)))
            told = await router.ListReplicas(pb.ListReplicasRequest(parent="models/-", with_served_tokens=True), None)
            first, second = told.replicas
            assert (first.input_tokens, first.output_tokens) == (7, 5)
            assert not second.HasField("input_tokens")
            unasked = await router.ListReplicas(pb.ListReplicasRequest(parent="models/-"), None)
            assert not unasked.replicas[0].HasField("input_tokens")


class TestReplicas:
    async def test_a_model_becomes_jobs_becomes_replicas_that_are_routed_by_card_and_price(self):
        async with turns() as t:
            await t.declare(2)
            await t.turn(3)
            assert t.states == ["STARTING", "STARTING"]
            assert sorted(t.scheduler.jobs) == ["queues/serving/jobs/m-0", "queues/serving/jobs/m-1"]
            t.healthy.add("*")
            await t.turn(2)
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
            await t.clock.advance(600)
            t.current.load_tracker.open("d1", "models/m/replicas/m-1", t.clock.monotonic())
            await t.declare(1)
            await t.turn(3)
            assert t.states == ["READY", "DRAINING"]
            assert [r.replica.name for r in t.current.decide(Request("m")).ranking] == ["models/m/replicas/m-0"]
            t.current.load_tracker.close(Ended("d1", "", None, False))
            await t.turn(2)
            assert t.states == ["READY"]
            assert list(t.scheduler.jobs) == ["queues/serving/jobs/m-0"]

    async def test_replicas_of_a_model_that_cannot_be_read_are_not_ended(self):
        async with turns() as t:
            t.healthy.add("*")
            replica = pb.Replica(name="models/m/replicas/m-0", state=pb.REPLICA_STATE_READY, address="10.0.0.1:80")
            await t.store.commit(Put(keys.MODELS + "m", b"\xff\xff"), Put(keys.REPLICAS + "m/m-0", encode(replica)))
            await t.current.seen(t.current.replicas, (await t.store.list(keys.MODELS)).revision)
            await t.current.seen(t.current.models, (await t.store.list(keys.MODELS)).revision)
            await t.turn(3)
            assert t.states == ["READY"]

    async def test_a_replica_in_a_state_of_a_newer_version_is_left_alone_and_the_others_go_on(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(2)
            await t.turn(4)
            newer = t.current.replicas.values[keys.REPLICAS + "m/m-0"]
            changed = pb.Replica.FromString(encode(newer))
            changed.state = 99
            await t.current.seen(
                t.current.replicas, await t.store.commit(Put(keys.REPLICAS + "m/m-0", encode(changed)))
            )
            await t.declare(0)
            await t.turn()
            kept = t.current.replicas.values[keys.REPLICAS + "m/m-0"]
            assert kept.state == 99, "neither ended nor written over"
            with pytest.raises(Unavailable, match="m-0: it is UNKNOWN; models/m/replicas/m-1: it is DRAINING"):
                t.current.decide(Request("m"))

    async def test_models_below_their_minimum_are_shown(self):
        def short():
            return REGISTRY.get_sample_value("whaleflux_models_below_minimum")

        async with turns() as t:
            await t.declare(1)
            await t.turn(2)
            assert short() == 1, "nothing is ready yet"
            t.healthy.add("*")
            await t.turn(4)
            assert (t.states, short()) == (["READY"], 0)

    async def test_a_replica_that_is_wanted_again_while_it_drains_comes_anew(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            await t.clock.advance(600)
            await t.declare(0)
            await t.turn()
            assert t.states == ["DRAINING"]
            await t.declare(1)
            await t.turn(5)
            assert t.states == ["READY"]

    async def test_a_router_that_has_just_started_does_not_take_a_replica_for_idle(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            t.current.load_tracker = LoadTracker(t.clock.monotonic())
            t.current.load_tracker.keep_only({"models/m/replicas/m-0"})
            await t.declare(0)
            await t.turn(3)
            assert t.states == ["DRAINING"], "streams of before its start may be under way"
            await t.clock.advance(600)
            await t.turn()
            assert t.states == []

    async def test_a_long_answer_is_not_cut_by_a_replica_that_leaves(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            t.current.load_tracker.open("d1", "models/m/replicas/m-0", t.clock.monotonic())
            await t.declare(0)
            await t.turn(2)
            await t.clock.advance(590)
            await t.turn()
            assert t.states == ["DRAINING"]
            t.current.load_tracker.close(Ended("d1", "", 0.1, True, True))
            await t.turn(2)
            assert (t.states, t.scheduler.jobs) == ([], {})

    async def test_a_replica_is_idle_when_every_router_says_so(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            await t.tell(pb.RouterView())
            await t.declare(0)
            await t.turn(20)
            assert t.states == ["DRAINING"]
            await t.tell(pb.RouterView(idle_replicas=["models/m/replicas/m-0"]))
            await t.turn(2)
            assert t.states == []

    async def test_a_router_tells_the_others_what_it_knows_for_as_long_as_it_lives(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            telling = asyncio.create_task(RouterViews(t.store, t.clock, t.current, "r/2").run())
            await t.clock.advance(1)
            (entry,) = (await t.store.list(keys.ROUTER_VIEWS)).entries
            assert entry.value == b"", "nothing is compared, and nobody leaves"
            await t.declare(0)
            await t.turn()
            await t.clock.advance(2)
            (entry,) = (await t.store.list(keys.ROUTER_VIEWS)).entries
            assert list(pb.RouterView.FromString(entry.value).idle_replicas) == ["models/m/replicas/m-0"]
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling
            assert not (await t.store.list(keys.ROUTER_VIEWS)).entries

    async def test_one_that_answers_stays_where_another_has_crashed(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(3)
            await t.turn(4)
            t.healthy = {r.address for r in t.current.replicas.values.values() if not r.name.endswith("m-0")}
            await t.turn(10)
            assert t.states == ["STARTING", "READY", "READY"]
            await t.declare(1)
            await t.turn(4)
            assert t.states == ["READY"]
            assert len(t.scheduler.jobs) == 1

    async def test_models_whose_names_go_on_alike_have_jobs_of_their_own(self):
        async with turns() as t:
            t.healthy.add("*")
            for name, version, site in (("m", 2, ""), ("m-v2", 1, ""), ("m", 1, "a"), ("m-a", 1, "")):
                wanted = model()
                wanted.name, wanted.replicas.min, wanted.version = f"models/{name}", 1, version
                if site:
                    wanted.sites.add(site=f"sites/{site}", replicas=1)
                revision = await t.store.commit(Put(keys.MODELS + name, encode(wanted)))
                await t.current.seen(t.current.models, revision)
                await t.turn(4)
            kept = {job.name for job in t.scheduler.jobs.values() if job.state == scheduler_pb2.JOB_STATE_RUNNING}
            assert {"queues/serving/jobs/m-v2-0", "queues/serving/jobs/m-a-0"} < kept
            assert len(kept) == 3
            assert len({r.address for r in t.current.replicas.values.values()}) == 3

    async def test_a_job_that_runs_another_models_replica_is_not_taken(self):
        async with turns() as t:
            t.healthy.add("*")
            taken = pb.Replica(name="models/other/replicas/x", state=99, job="queues/serving/jobs/m-0")
            await t.current.seen(
                t.current.replicas, await t.store.commit(Put(keys.REPLICAS + "other/x", encode(taken)))
            )
            await t.declare(1)
            await t.turn(4)
            assert not t.scheduler.jobs
            assert [r.name for r in t.current.replicas.values.values()] == ["models/other/replicas/x"]

    async def test_a_host_name_is_looked_up_here_and_a_bad_one_is_its_own_trouble(self):
        async with turns() as t:
            t.healthy.add("*")
            t.hosts["good.example"] = ["10.0.0.7"]
            await t.declare(0, addresses=["good.example:8000", "typo.example:8000", "[::1]:9000"])
            await t.turn(4)
            by_name = {r.declared_address: r for r in t.current.replicas.values.values()}
            assert by_name["good.example:8000"].address == "10.0.0.7:8000"
            assert by_name["[::1]:9000"].address == "[::1]:9000"
            bad = by_name["typo.example:8000"]
            assert (bad.state, bad.address) == (pb.REPLICA_STATE_STARTING, "")
            assert "typo.example" in bad.message
            assert "correct" in bad.message
            ranked = t.current.decide(Request("m")).ranking
            assert {r.replica.address for r in ranked} == {"10.0.0.7:8000", "[::1]:9000"}
            t.hosts.clear()
            await t.clock.advance(60)
            await t.turn(2)
            assert len(t.current.decide(Request("m")).ranking) == 2, "a silent name server takes nobody away"

    async def test_replicas_that_run_elsewhere_are_known_by_their_address_not_by_their_place_in_the_list(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(0, addresses=["10.0.0.1:1", "10.0.0.2:1"])
            await t.turn(4)
            before = {r.declared_address: r.name for r in t.current.replicas.values.values()}
            await t.declare(0, addresses=["10.0.0.2:1"])
            await t.turn()
            states = {r.name: pb.ReplicaState.Name(r.state) for r in t.current.replicas.values.values()}
            assert states[before["10.0.0.2:1"]] == "REPLICA_STATE_READY"
            assert states[before["10.0.0.1:1"]] == "REPLICA_STATE_DRAINING"

    async def test_an_engine_that_serves_another_model_is_not_ready_and_says_so(self):
        async with turns() as t:
            t.healthy.add("*")
            t.served = frozenset({"llama"})
            await t.declare(0, addresses=["10.0.0.1:1"])
            await t.turn(4)
            (replica,) = t.current.replicas.values.values()
            assert (replica.state, replica.message) == (pb.REPLICA_STATE_STARTING, "serves llama and not m")
            t.served = frozenset({"llama", "m"})
            await t.turn(5)
            assert t.states == ["READY"]
            t.served = frozenset({"llama"})
            await t.turn(41)
            assert t.states == ["STARTING"], "an engine that was replaced on its port is noticed within ten seconds"

    async def test_ready_is_a_first_token_and_what_keeps_it_back_is_said(self):
        async with turns() as t:
            t.healthy.add("*")
            t.silent_on["10.0.0.1:9001"] = "its first completion (/v1/completions) was answered 500"
            await t.declare(1)
            await t.turn(8)
            (replica,) = t.current.replicas.values.values()
            assert (replica.state, replica.message) == (
                pb.REPLICA_STATE_STARTING,
                "its first completion (/v1/completions) was answered 500",
            )
            t.silent_on.clear()
            await t.turn(8)
            assert t.states == ["READY"]

    async def test_what_a_job_waits_for_is_said_on_its_replica(self):
        async with turns() as t:
            await t.declare(1)
            await t.turn(3)
            (job,) = t.jobs.jobs.values()
            job.state = scheduler_pb2.JOB_STATE_STARTING
            job.attempt.tasks[0].phase = scheduler_pb2.TASK_PHASE_FETCHING
            job.attempt.tasks[0].message = "datasets/w (120 MB of 1 GB, 5 MB/s)"
            await t.turn()
            (replica,) = t.current.replicas.values.values()
            assert replica.message == f"it fetches datasets/w (120 MB of 1 GB, 5 MB/s) on {NODE}"
            job.state = scheduler_pb2.JOB_STATE_QUEUED
            job.decision.summary = "waits: 1 GPU short"
            await t.turn()
            (replica,) = t.current.replicas.values.values()
            assert replica.message == "its job waits for GPUs: waits: 1 GPU short"
            job.past_attempts.add(end_reason="rank 0 exited with code 2")
            await t.turn()
            (replica,) = t.current.replicas.values.values()
            assert replica.message.endswith(
                "its last process ended: rank 0 exited with code 2 (whaleflux logs serving/m-0)"
            )
            job.state, job.state_message = scheduler_pb2.JOB_STATE_FAILED, "it failed 3 times"
            await t.turn()
            (replica,) = t.current.replicas.values.values()
            assert replica.message == "its job ended: it failed 3 times (whaleflux logs serving/m-0)"

    async def test_a_job_that_ended_is_replaced_but_not_in_a_hurry(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            for _ in range(2):  # as the watch would tell
                (job,) = t.jobs.jobs.values()
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

    async def test_a_new_leader_that_has_not_heard_of_the_scheduler_keeps_replicas_serving(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            t.jobs.jobs.clear()
            t.jobs.synced = False
            await t.turn(3)
            assert t.states == ["READY"]
            t.healthy.clear()
            await t.turn(20)
            assert t.states == ["STARTING"], "its health is asked all the same"

    async def test_a_replica_whose_job_cannot_be_read_keeps_serving(self):
        async with turns() as t:
            t.healthy.add("*")
            await t.declare(1)
            await t.turn(4)
            (job,) = t.jobs.jobs.values()
            job.state = 99
            await t.turn(3)
            assert t.states == ["READY"]
            job.state = scheduler_pb2.JOB_STATE_RECOVERING
            await t.turn(3)
            assert t.states == ["STARTING"]

    async def test_a_deposed_leader_writes_nothing(self):
        async with turns() as t:
            await t.declare(1)
            leader_key = (await t.store.list(keys.LEADERS)).entries[0].key
            await t.store.commit(Delete(leader_key))
            with pytest.raises(Fenced):
                await t.turn()
            assert not (await t.store.list(keys.REPLICAS)).entries


class TestRollouts:
    """A changed engine of a model that serves, turn by turn."""

    async def serving(self, t, count=2, **sites):
        t.healthy.add("*")
        wanted = model()
        wanted.name, wanted.replicas.min, wanted.version = "models/m", count, 1
        wanted.rollout_policy.watch.FromSeconds(10)
        wanted.rollout_policy.ready_within.FromSeconds(30)
        for site, replicas in sites.items():
            wanted.sites.add(site=f"sites/{site}", replicas=replicas)
        await self.write(t, wanted)
        await t.turn(6)
        assert set(t.states) == {"READY"}

    async def write(self, t, wanted):
        await t.current.seen(t.current.models, await t.store.commit(Put(keys.MODELS + "m", encode(wanted))))

    async def change(self, t, **engine):
        changed, before = pb.Model(), t.current.models.values[keys.MODELS + "m"]
        changed.CopyFrom(before)
        changed.engine.MergeFrom(pb.Engine(**engine))
        model_changes.begin(changed, before, [site.site for site in before.sites], t.clock.now())
        await self.write(t, changed)

    def model(self, t):
        return t.current.models.values[keys.MODELS + "m"]

    def state(self, t):
        return pb.RolloutState.Name(self.model(t).rollout.state).removeprefix("ROLLOUT_STATE_")

    def versions(self, t):
        ready = [r.version for r in t.current.replicas.values.values() if r.state == pb.REPLICA_STATE_READY]
        return sorted(ready)

    async def until(self, t, state, turns=400):
        for _ in range(turns):
            if self.state(t) == state:
                return
            await t.turn()
            assert self.versions(t).count(1) + self.versions(t).count(2) >= 2, "as many as before answer"
        raise AssertionError(f"{self.state(t)}, not {state}")

    async def test_one_first_a_share_of_the_requests_then_the_others(self):
        async with turns() as t:
            await self.serving(t, 0, a=1, b=1)
            await self.change(t, environment={"A": "1"})
            await self.until(t, "WATCHING")
            assert self.versions(t) == [1, 1, 2]
            assert t.job(2, "a").spec.environment == {"A": "1"}
            assert t.job(1, "a").spec.sites == ["a"]
            sent = [t.current.send(Request("m")) for _ in range(100)]
            assert [decision.ranking[0].replica.version for _, decision in sent].count(2) == 10
            for decision_id, _ in sent:
                t.current.load_tracker.close(Ended(decision_id, "", 0.1, completed=True, succeeded=True))
            ranked = t.current.decide(dataclasses.replace(Request("m"), draw=0.05)).ranking
            assert [one.replica.version for one in ranked] == [2, 1, 1], "the old ones are asked next"
            await self.until(t, "DONE")
            await t.turn(150)
            assert self.versions(t) == [2, 2]
            assert len(t.scheduler.jobs) == 2
            assert self.model(t).version == 2

    async def test_one_that_never_makes_a_token_is_rolled_back_in_its_time(self):
        async with turns() as t:
            await self.serving(t)
            t.silent_on["10.0.0.1:9003"] = "its first completion was not answered"
            await self.change(t, environment={"A": "1"})
            await self.until(t, "ROLLED_BACK")
            assert "not READY within 30 s" in self.model(t).rollout.message
            assert "its first completion was not answered" in self.model(t).rollout.message
            assert (self.model(t).version, dict(self.model(t).engine.environment)) == (1, {})
            await t.turn(150)
            assert len(t.scheduler.jobs) == 2

    async def test_one_that_fails_requests_is_rolled_back_and_they_are_asked_elsewhere(self):
        async with turns() as t:
            await self.serving(t)
            await self.change(t, environment={"A": "1"})
            await self.until(t, "WATCHING")
            (new,) = [r for r in t.current.replicas.values.values() if r.version == 2]
            authorizer = RequestAuthorizer(t.current, open_access=True)
            answers = [dict(authorizer.answer(chat()).headers) for _ in range(20)]
            mine = [a for a in answers if a["x-gateway-destination-endpoint"].startswith(new.address)]
            assert {a["x-envoy-retry-on"] for a in mine} == {"reset,5xx"}
            assert all(len(a["x-gateway-destination-endpoint"].split(",")) == 2 for a in mine)
            assert {a["x-envoy-retry-on"] for a in answers if a not in mine} == {"reset"}
            await t.turn()
            for _ in range(3):
                t.current.load_tracker.fail(new.name, t.clock.monotonic())
            await self.until(t, "ROLLED_BACK")
            assert "3 of 3 tries failed" in self.model(t).rollout.message

    async def watched(self, t):
        """A rollout whose first replica is watched: that replica, and one of the old ones that has answered 30 requests."""
        await self.serving(t)
        await self.change(t, environment={"A": "1"})
        await self.until(t, "WATCHING")
        await t.turn()
        by_version = {r.version: r for r in t.current.replicas.values.values()}
        answered = Outcome(t.clock.monotonic(), End.ANSWERED, 0.1, 0.5)
        for _ in range(30):
            t.current.load_tracker.outcomes.add(by_version[1].name, answered)
        return by_version[2], by_version[1]

    async def test_one_that_refuses_what_the_old_one_answers_is_rolled_back(self):
        async with turns() as t:
            new, _ = await self.watched(t)
            for _ in range(3):
                t.current.load_tracker.outcomes.add(new.name, Outcome(t.clock.monotonic(), End.REFUSED, 0.1, 0.1))
            await self.until(t, "ROLLED_BACK")
            assert "answered with a 4xx" in self.model(t).rollout.message

    async def test_one_that_hangs_is_rolled_back(self):
        async with turns() as t:
            new, _ = await self.watched(t)
            for number in range(3):
                t.current.load_tracker.open(f"d{number}", new.name, t.clock.monotonic())
            await self.until(t, "ROLLED_BACK")
            assert "3 of 3 requests take longer than 10 s" in self.model(t).rollout.message

    async def test_one_that_was_asked_and_has_not_answered_is_not_made_the_model(self):
        async with turns() as t:
            new, _ = await self.watched(t)
            t.current.load_tracker.open("d", new.name, t.clock.monotonic())
            await t.turn(100)
            assert self.state(t) == "WATCHING"
            t.current.load_tracker.outcomes.add(new.name, Outcome(t.clock.monotonic(), End.ANSWERED, 0.1, 20))
            await t.turn(8)
            assert self.state(t) == "SHIFTING"

    async def test_what_another_router_saw_counts(self):
        async with turns() as t:
            await self.watched(t)
            rollout = self.model(t).rollout
            view = pb.RouterView()
            trial = view.trials.add(model="models/m", to_version=2, state=rollout.state)
            trial.new.refused = 3
            await t.tell(view)
            await self.until(t, "ROLLED_BACK")
            assert "3 of 3 requests were answered with a 4xx" in self.model(t).rollout.message

    async def test_another_leader_goes_on_where_it_was_and_a_deposed_one_takes_no_step(self):
        async with service() as (_, current, store):
            async with elect(store, "inference_router", "t") as leader:
                t = Turns(store, current, leader)
                await self.serving(t)
                await self.change(t, environment={"A": "1"})
                await self.until(t, "WATCHING")
            await t.clock.advance(60)
            with contextlib.suppress(Fenced):
                await t.manager.turn()
            assert self.state(t) == "WATCHING"
            async with elect(store, "inference_router", "u") as other:
                following = Turns(store, current, other, t.scheduler)
                following.healthy, following.jobs.jobs = t.healthy, t.jobs.jobs
                await self.until(following, "DONE")

    async def test_each_version_is_asked_at_its_own_health_path(self):
        async with turns() as t:
            await self.serving(t)
            t.paths = {"10.0.0.1:9001": "/health", "10.0.0.1:9002": "/health", "10.0.0.1:9003": "/new"}
            await self.change(t, health_path="/new", gpus=2)
            await self.until(t, "WATCHING")
            await t.turn(30)
            assert self.versions(t) == [1, 1, 2]
            assert {r.version: r.gpus for r in t.current.replicas.values.values()} == {1: 1, 2: 2}

    async def test_what_was_rolled_back_helps_out_until_the_old_ones_are_there_and_then_goes(self):
        async with turns() as t:
            await self.serving(t)
            await self.change(t, health_path="/new")
            t.paths = {f"10.0.0.1:{port}": "/new" for port in range(9003, 9100)}
            await self.until(t, "SHIFTING")
            await self.until_versions(t, [2, 2])
            await self.roll_back(t)
            t.healthy = {r.address for r in t.current.replicas.values.values() if r.version == 2}
            t.paths = dict.fromkeys(t.healthy, "/new")
            await t.turn(100)
            assert len(self.versions(t)) == 2, "the old ones do not come, so that the new ones stay, at their own path"
            t.healthy.add("*")
            await t.turn(100)
            assert self.versions(t) == [1, 1]
            assert len(t.scheduler.jobs) == 2

    async def test_another_rollout_after_one_that_went_back_keeps_who_answers(self):
        async with turns() as t:
            await self.serving(t)
            await self.change(t, environment={"A": "1"})
            await self.until(t, "SHIFTING")
            await self.until_versions(t, [2, 2])
            await self.roll_back(t)
            t.healthy = {r.address for r in t.current.replicas.values.values() if r.version == 2}
            await t.turn(8)
            await self.change(t, environment={"A": "2"})
            await t.turn(40)
            assert self.versions(t) == [2, 2], "nobody else answers"

    async def test_a_start_is_measured_from_its_process_on_and_a_moment_without_answers_is_none(self):
        async with turns() as t:
            lost, commit = [], t.store.commit

            async def losing(*writes, when=()):
                if not lost and any(put.key.startswith(keys.MODELS) for put in writes) and when:
                    lost.append(writes)
                    raise ConditionFailed(when[:1])
                return await commit(*writes, when=when)

            t.store.commit = losing
            await t.declare(1)
            await t.turn(20)
            t.healthy.add("*")
            await t.turn(8)
            (measure,) = self.model(t).measures
            assert lost, "the first write of what was measured came to nothing"
            assert measure.site == "sites/edge"
            assert measure.engine_start_s >= 4
            t.healthy.clear()
            await t.turn(20)
            assert t.states == ["STARTING"]
            t.healthy.add("*")
            await t.turn(8)
            assert t.states == ["READY"]
            assert self.model(t).measures[0] == measure

    async def until_versions(self, t, wanted):
        for _ in range(200):
            if self.versions(t) == wanted:
                return
            await t.turn()
        raise AssertionError(f"{self.versions(t)}, not {wanted}")

    async def roll_back(self, t):
        changed = pb.Model()
        changed.CopyFrom(self.model(t))
        model_changes.restore(changed)
        changed.rollout.state = pb.ROLLOUT_STATE_ROLLED_BACK
        await self.write(t, changed)

    async def test_sites_that_change_altogether_leave_when_the_others_answer(self):
        async with turns() as t:
            await self.serving(t, 0, a=2)
            changed = pb.Model()
            changed.CopyFrom(self.model(t))
            del changed.sites[:]
            changed.sites.add(site="sites/b", replicas=2)
            assert not model_changes.same_engine(self.model(t), changed)
            model_changes.begin(changed, self.model(t), ["sites/b"], t.clock.now())
            await self.write(t, changed)
            await self.until(t, "DONE")
            await t.turn(150)
            assert len(t.scheduler.jobs) == 2
            assert list(t.job(2, "b").spec.sites) == ["b"]


def chat():
    return Asked("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": []}).encode())
