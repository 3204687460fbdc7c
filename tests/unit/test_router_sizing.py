"""Models that name their shape: which GPUs their replicas get, what is refused, and what a change of the fleet changes."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import node
from tests.unit.test_router_service import Scheduler, Turns
from whaleflux.clock import VirtualClock
from whaleflux.errors import DeadlineExceeded, InvalidArgument, Unavailable
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core import sizing
from whaleflux_inference_router.core.sizing import Lack, Size
from whaleflux_inference_router.deployments import Deployments
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import routing
from whaleflux_inference_router.servicer import Router
from whaleflux_inference_router.serving_sizes import ReplicaSizes, request_of
from whaleflux_scheduler.core.ray_nodes import FreeNode
from whaleflux_scheduler.serving_plans import ServingPlans

ANN = auth.Identity("user", "ann")
SIZES = st.builds(
    Size,
    st.sampled_from(["H200", "RTX4090", "L40S"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["sites/a", "sites/b"]),
    st.sampled_from(list(Lack)),
    starts_now=st.booleans(),
    context_tokens=st.integers(0, 9000),
    requests_per_s=st.floats(0.1, 9),
)


class TestCore:
    @given(st.lists(SIZES), st.sampled_from(["", "sites/a"]), st.sets(st.sampled_from(["H200", "RTX4090"])))
    def test_what_is_picked_serves_there_and_is_refused_otherwise(self, sizes, site, types):
        there = sizing.suiting(sizes, site, types)
        best = sizing.chosen(there)
        assert best is None or (best.lack is Lack.NOTHING and best in sizes)
        assert best is None or ((not types or best.gpu_type in types) and site in ("", best.site))
        refused = sizing.refusal(sizes, there, 3.0)
        assert (best is None and bool(sizes)) == (refused is not None)

    @given(st.lists(SIZES), st.sampled_from(["H200", "RTX4090", "L4"]), st.sampled_from([1, 2]))
    def test_who_waits_changes_only_for_what_serves_and_never_from_what_could_start(self, sizes, gpu_type, gpus):
        mine = [one for one in sizes if (one.gpu_type, one.gpus, one.lack) == (gpu_type, gpus, Lack.NOTHING)]
        other = sizing.better(sizes, gpu_type, gpus)
        assert other is None or other.lack is Lack.NOTHING
        assert other is None or not any(one.starts_now for one in mine)
        assert other is None or other.starts_now or not mine

    @pytest.mark.parametrize(
        ("lack", "field", "fix"),
        [
            (Lack.WEIGHTS, "engine.shape", "larger GPUs"),
            (Lack.CONTEXT, "context_window_tokens", "Set `context` to 7000 or less"),
            (Lack.FIRST_TOKEN, "objective.first_token", "more than 250 ms"),
            (Lack.TOKEN, "objective.per_token", "more than 40 ms"),
            (Lack.RATE, "objective.requests_per_s", "Set `replicas.min` to 5 or more"),
        ],
    )
    def test_what_is_nearest_to_serving_says_what_to_change(self, lack, field, fix):
        near = Size("H200", 2, "sites/a", lack, "WHY", True, 1e9, 7000, 0.25, 0.04, 2.0)
        far = Size("L4", 1, "sites/a", Lack.WEIGHTS, "FAR", True, 5e9)
        refused = sizing.refusal([far, near], [far, near], 9.0)
        assert refused.field == field
        assert fix in refused.words
        assert "2 x H200: WHY" in refused.words


class Fleet(Scheduler):
    """A scheduler that plans as the real one does, over some nodes: (site/node, type, GPUs, of them free)."""

    def __init__(self, *has):
        super().__init__()
        self.has, self.asked = list(has), 0

    async def PlanServing(self, request, timeout):
        if self.silent:
            raise Unavailable("no scheduler")
        self.asked += 1
        nodes = [FreeNode(node(name, count, model=kind), free, 1000, 1 << 30) for name, kind, count, free in self.has]
        leading = SimpleNamespace(
            view=SimpleNamespace(caught_up=_nothing), planner=SimpleNamespace(ask=_answers(nodes))
        )
        return await ServingPlans().planned(request, leading)


async def _nothing():
    return None


def _answers(nodes):
    async def ask(_):
        return nodes

    return ask


class Inventory:
    async def ListSites(self, request, timeout):
        return inventory_pb2.ListSitesResponse(sites=[inventory_pb2.Site(name=f"sites/{name}") for name in ("s", "t")])

    async def ListNodes(self, request, timeout):
        made = inventory_pb2.Node(name=f"{request.parent}/nodes/n")
        made.facts.gpus.add(model="H200", memory_bytes=141 * 10**9)
        return inventory_pb2.ListNodesResponse(nodes=[made])


def model(*sites, shape="llama-3.1-8b", count=1, **more):
    made = pb.Model(engine=pb.Engine(shape=shape, command=["serve", "--tp", "{gpus}", "--port", "{port}"]))
    made.replicas.min = count
    made.sites.extend(pb.ModelSite(site=f"sites/{site}") for site in sites)
    for name, value in more.items():
        group, _, field = name.rpartition("__")
        holder = getattr(made, group) if group else made
        if isinstance(value, (Duration, list)):
            getattr(holder, field).MergeFrom(value)
        else:
            setattr(holder, field, value)
    return made


def ms(value):
    return Duration(nanos=value * 10**6)


BOTH = (("s/a", "H200", 4, 4), ("t/b", "RTX4090", 2, 2))


@contextlib.asynccontextmanager
async def service(*has):
    store, clock = MemoryStore(), VirtualClock()
    async with routing(store, clock) as current:
        with auth.acting_as(ANN):
            fleet = Fleet(*has)
            router = Router(store, clock, current, Resolver(clock), deployments=Deployments(Inventory(), fleet))
            yield router, current, fleet


async def create(router, wanted):
    return await router.CreateModel(pb.CreateModelRequest(model_id="m", model=wanted), None)


async def refused(wanted, *has):
    async with service(*(has or BOTH)) as (router, current, _):
        with pytest.raises(InvalidArgument) as error:
            await create(router, wanted)
        assert not current.models.values
        return {one.field: one.description for one in error.value.violations}


class TestDeclared:
    async def test_an_estimate_shows_the_choice_what_else_serves_and_why_others_do_not(self):
        async with service(*BOTH) as (router, *_):
            wanted = model(shape="llama-3.1-70b", objective__per_token=ms(50))
            (answer,) = (await router.EstimateDeployment(pb.EstimateDeploymentRequest(model=wanted), None)).sites
            assert not answer.problem
            good = [one for one in answer.sizes if not one.lack]
            assert good
            assert list(answer.sizes[: len(good)]) == good
            assert {one.gpu_type for one in good} == {"H200"}
            assert all(one.per_token_s <= 0.05 for one in good)
            assert any(one.gpu_type == "RTX4090" and "do not fit" in one.words for one in answer.sizes)

    async def test_what_the_next_one_gets_is_told_while_all_answer(self):
        async with service(*BOTH) as (router, *_):
            await create(router, model(count=0))
            (answer,) = (await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)).sites
            assert answer.why == "all replicas answer"
            assert answer.sizes

    async def test_what_is_declared_keeps_its_bounds_and_not_the_choice(self):
        async with service(*BOTH) as (router, *_):
            made = await create(router, model())
            assert (made.engine.gpus, list(made.engine.gpu_models), made.engine.gpu_memory_bytes) == (0, [], 0)
            again = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert again.version == 1, "the same file begins no rollout"

    async def test_another_objective_or_context_is_another_engine(self):
        async with service(*BOTH) as (router, *_):
            made = await create(router, model())
            made.objective.per_token.MergeFrom(ms(20))
            changed = await router.UpdateModel(pb.UpdateModelRequest(model=made), None)
            assert (changed.version, changed.rollout.state) == (2, pb.ROLLOUT_STATE_SURGING)

    @pytest.mark.parametrize(
        ("wanted", "field", "words"),
        [
            (model(shape="llama-3.1-405b"), "model.engine.shape", "too much for each GPU"),
            (model(shape="llama-3.1-70b", engine__gpu_models=["RTX4090"]), "model.engine.shape", "2 x RTX4090"),
            (model(engine__gpu_models=["B200"]), "model.engine.gpu_models", "there are: "),
            (model(engine__gpus=8), "model.engine.gpu_models", "H200: no node has 8 of them"),
            (model(engine__gpus=3), "model.engine.gpus", "does not divide the 32 heads"),
            (
                model(engine__gpu_models=["RTX4090"], context_window_tokens=131_072, engine__gpus=1),
                "model.context_window_tokens",
                "Set `context` to",
            ),
            (model(objective__per_token=ms(1)), "model.objective.per_token", "Set `slo.per_token` to more than"),
            (model(objective__first_token=ms(2)), "model.objective.first_token", "Set `slo.first_token` to more than"),
            (model(objective__requests_per_s=1e5), "model.objective.requests_per_s", "Set `replicas.min` to"),
            (model("t", shape="llama-3.1-70b"), "model.sites[0]", "sites/t: nothing in the fleet serves it"),
            (model(context_window_tokens=200_000), "model.context_window_tokens", "131,072"),
            (model(shape="lama"), "model.engine.shape", "no model that is known by name"),
            (model(objective__prompt_tokens=-1), "model.objective.prompt_tokens", "use 0"),
            (model(objective__requests_per_s=float("nan")), "model.objective.requests_per_s", "use 0"),
            (model(objective__per_token=ms(0)), "model.objective.per_token", "more than 0"),
            (model(shape="", engine__fp8=True), "model.engine.fp8", "name it, or leave this out"),
            (model(engine__command=[]), "", ""),
        ],
    )
    async def test_what_cannot_be_served_names_field_limit_and_fix(self, wanted, field, words):
        if not field:
            wanted.engine.command[:] = ["serve", "--port", "{port}"]
            field, words = "model.engine.command", "--tensor-parallel-size {gpus}"
        assert words in (await refused(wanted))[field]

    async def test_the_rate_is_shared_by_all_replicas(self):
        said = await refused(model(objective__requests_per_s=40.0), ("s/a", "H200", 1, 1))
        enough = int(said["model.objective.requests_per_s"].partition("`replicas.min` to ")[2].split()[0])
        async with service(("s/a", "H200", 1, 1)) as (router, *_):
            await create(router, model(objective__requests_per_s=40.0, count=enough))

    async def test_while_the_scheduler_is_away_an_estimate_says_so_and_nothing_is_declared(self):
        async with service(*BOTH) as (router, current, fleet):
            await create(router, model())
            fleet.silent = True
            (answer,) = (await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)).sites
            assert "which GPUs serve it is not known now: no scheduler" in answer.why
            with pytest.raises(Unavailable):
                await router.CreateModel(pb.CreateModelRequest(model_id="n", model=model()), None)
            assert len(current.models.values) == 1

    async def test_a_site_without_gpus_waits_also_where_others_lack_the_precision(self):
        async with service(("s/a", "A100-80GB", 4, 4)) as (router, *_):
            with pytest.raises(InvalidArgument) as error:
                await create(router, model("s", "t", engine__fp8=True))
            assert [one.field for one in error.value.violations] == ["model.sites[0]"]

    async def test_a_fleet_without_gpus_waits_for_some(self):
        async with service() as (router, *_):
            await create(router, model())
            (answer,) = (await router.EstimateDeployment(pb.EstimateDeploymentRequest(name="models/m"), None)).sites
            assert "no GPUs take work" in answer.problem


@contextlib.asynccontextmanager
async def turns(*has):
    store, clock = MemoryStore(), VirtualClock()
    async with routing(store, clock) as current, elect(store, "inference_router", "t") as leader:
        t = Turns(store, current, leader, Fleet(*has))
        t.healthy.add("*")
        yield t


async def declare(t, wanted):
    wanted.name = "models/m"
    await t.current.seen(t.current.models, await t.store.commit(Put(keys.MODELS + "m", encode(wanted))))


def got(t):
    """Type, number and command of each job."""
    specs = (job.spec for _, job in sorted(t.scheduler.jobs.items()))
    return [(*spec.gpu.any_of, spec.gpus, " ".join(spec.command)) for spec in specs]


class TestReplicas:
    async def test_a_scheduler_that_hangs_is_waited_for_once_and_not_for_each_replica(self):
        clock, asked = VirtualClock(), []

        async def hangs(request):
            asked.append(request)
            await clock.sleep(10)
            raise DeadlineExceeded("no answer")

        sizes = ReplicaSizes(hangs, clock)
        starts = [asyncio.ensure_future(sizes.sized(model(count=4), 1, "")) for _ in range(4)]
        await clock.advance(10.5)
        done, _ = await asyncio.wait(starts, timeout=1)
        assert [type(one.exception()) for one in done] == [DeadlineExceeded] * 4
        assert len(asked) == 1

    async def test_each_gets_what_serves_it_and_its_engine_is_told_how_many(self):
        async with turns(*BOTH) as t:
            await declare(t, model(shape="llama-3.1-70b", count=2, objective__per_token=ms(40)))
            await t.turn(6)
            assert t.states == ["READY", "READY"]
            assert len(set(got(t))) == 1
            kind, gpus, command = got(t)[0]
            assert (kind, command) == ("H200", f"serve --tp {gpus} --port {{port}}")
            assert {one.gpus for one in t.current.replicas.values.values()} == {gpus}

    async def test_a_class_that_joins_counts_from_the_next_one_on_and_what_runs_stays(self):
        async with turns(("s/a", "H200", 4, 4)) as t:
            await declare(t, model())
            await t.turn(6)
            [(first, *_)] = got(t)
            t.scheduler.has = [("s/a", "H200", 4, 0), ("t/b", "RTX4090", 2, 2)]
            await t.clock.advance(10)
            await declare(t, model(count=2))
            await t.turn(6)
            assert t.states == ["READY", "READY"]
            assert [kind for kind, *_ in got(t)] == [first, "RTX4090"]

    async def test_where_nothing_serves_it_says_so_and_goes_on_when_it_does(self):
        async with turns(("t/b", "RTX4090", 1, 1)) as t:
            await declare(t, model(shape="llama-3.1-70b"))
            await t.turn(4)
            (waiting,) = t.current.replicas.values.values()
            assert not t.scheduler.jobs
            assert "do not fit" in waiting.message
            t.scheduler.has.append(("s/a", "H200", 4, 4))
            await t.clock.advance(10)
            await t.turn(6)
            assert t.states == ["READY"]

    async def test_one_that_waits_for_a_class_that_left_gets_another_and_one_that_runs_keeps_its_own(self):
        async with turns(("s/a", "H200", 4, 4)) as t:
            await declare(t, model(count=2))
            await t.turn(6)
            held, waits = (t.scheduler.jobs[f"queues/serving/jobs/m-{number}"] for number in (0, 1))
            waits.state = scheduler_pb2.JOB_STATE_QUEUED
            t.scheduler.has = [("t/b", "RTX4090", 2, 2)]
            await t.clock.advance(10)
            await t.turn(6)
            assert t.scheduler.jobs["queues/serving/jobs/m-0"] is held
            assert [kind for kind, *_ in got(t)] == ["H200", "RTX4090"]

    async def test_one_that_is_held_back_keeps_its_job(self):
        async with turns(("s/a", "H200", 4, 4)) as t:
            await declare(t, model())
            await t.turn(6)
            (job,) = t.scheduler.jobs.values()
            job.state = scheduler_pb2.JOB_STATE_QUEUED
            job.hold.SetInParent()
            t.scheduler.has = [("t/b", "RTX4090", 2, 2)]
            await t.clock.advance(10)
            await t.turn(6)
            assert list(t.scheduler.jobs.values()) == [job]

    async def test_the_fleet_is_not_asked_at_each_turn(self):
        async with turns(("t/b", "RTX4090", 1, 1)) as t:
            await declare(t, model(shape="llama-3.1-70b", count=5))
            await t.turn(40)  # 10 s
            assert t.scheduler.asked <= 3

    async def test_a_model_without_a_shape_asks_nobody(self):
        async with turns(*BOTH) as t:
            await t.declare(1)
            await t.turn(6)
            assert (t.states, t.scheduler.asked) == (["READY"], 0)


class TestVersions:
    def changed(self):
        """A model whose engine is being replaced: with another objective, context and site."""
        made = model("s", objective__per_token=ms(20), context_window_tokens=4096, count=2)
        made.version, made.rollout.state = 2, pb.ROLLOUT_STATE_SURGING
        made.rollout.to_version, made.rollout.from_version = 2, 1
        made.rollout.from_engine.CopyFrom(model(shape="llama-3.1-70b").engine)
        made.rollout.from_objective.per_token.MergeFrom(ms(50))
        made.rollout.from_context_window_tokens = 8192
        made.rollout.from_sites.add(site="sites/t")
        return made

    def test_a_replica_of_the_engine_of_before_keeps_what_that_was_to_keep(self):
        old, new = (request_of(self.changed(), version) for version in (1, 2))
        assert (old.model, old.per_token.nanos, old.context_tokens) == ("llama-3.1-70b", 50 * 10**6, 8192)
        assert (new.model, new.per_token.nanos, new.context_tokens) == ("llama-3.1-8b", 20 * 10**6, 4096)
        assert list(old.sites) == list(new.sites) == ["sites/s", "sites/t"]

    def test_where_one_of_them_is_anywhere_all_sites_are_asked_about(self):
        anywhere = self.changed()
        del anywhere.rollout.from_sites[:]
        assert list(request_of(anywhere, 1).sites) == []

    def test_the_requests_are_shared_by_the_replicas_of_all_sites(self):
        made = model("s", "t", count=2, objective__requests_per_s=8.0)
        assert request_of(made, 1).requests_per_s == 2.0
