"""What serves a model on the fleet as it is: the rpc."""

import json

import pytest

from tests.support.scheduler_world import World, node
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import scheduler_pb2 as pb

SMALL = json.dumps({"name": "small", "layers": 8, "hidden": 1024, "heads": 8, "vocabulary": 32000, "sequence": 2048})


async def planned(world, model="llama-3.1-8b", **more):
    request = pb.PlanServingRequest(model=model)
    for name in ("first_token", "per_token"):
        if name in more:
            getattr(request, name).FromMilliseconds(more.pop(name))
    for name, value in more.items():
        setattr(request, name, value)
    return await world.scheduler.PlanServing(request, None)


def serving(answer):
    return [(one.gpus, one.gpu_type, one.site) for one in answer.sizes if not one.lack]


async def test_the_fleet_as_it_is_with_its_prices_and_what_is_free():
    async with World() as world:
        await world.add(node("s/a", 4, model="H200"), node("t/b", 2, model="RTX4090"))
        found = await planned(world)
        assert set(serving(found)) <= {(n, "H200", "sites/s") for n in (1, 2, 4)} | {
            (n, "RTX4090", "sites/t") for n in (1, 2)
        }
        assert all(one.starts_now for one in found.sizes)
        name = await world.submit(4)
        await world.reaches(name, "RUNNING")
        busy = await planned(world)
        taken = {one.gpu_type for one in busy.sizes if not one.starts_now}
        assert len(taken) == 1
        assert busy.sizes[0].starts_now


async def test_what_does_not_serve_says_why_with_the_numbers():
    async with World() as world:
        await world.add(node("t/b", 2, model="RTX4090"))
        weights = await planned(world, "llama-3.1-70b")
        assert {one.lack for one in weights.sizes} == {pb.SERVING_LACK_WEIGHTS}
        assert "too much for each GPU" in weights.sizes[0].words
        tokens = await planned(world, per_token=1, context_tokens=8192)
        assert {one.lack for one in tokens.sizes} == {pb.SERVING_LACK_TOKEN}
        assert "1 ms are wanted" in tokens.sizes[0].words


async def test_without_a_context_a_request_of_the_models_own_has_to_fit_as_engines_take_it():
    async with World() as world:
        await world.add(node("t/b", 1, model="RTX4090"))
        (size,) = (await planned(world)).sizes
        assert size.lack == pb.SERVING_LACK_CONTEXT
        assert "no request of 131,072 tokens" in size.words
        (size,) = (await planned(world, context_tokens=size.context_tokens)).sizes
        assert not size.lack


async def test_types_whose_speed_nobody_knows_are_named():
    async with World() as world:
        await world.add(node("t/b", 1, model="RIVA128"))
        found = await planned(world)
        assert [(one.gpu_type, one.site, one.words) for one in found.refusals] == [
            ("RIVA128", "sites/t", "its speed is not known")
        ]


async def test_types_that_lack_the_precision_are_refused_and_named():
    async with World() as world:
        await world.add(node("s/a", 4, model="A100-80GB"))
        found = await planned(world, fp8=True)
        assert not found.sizes
        assert [(one.gpu_type, one.site) for one in found.refusals] == [("A100-80GB", "sites/s")]
        assert "A100-80GB has none" in found.refusals[0].words


async def test_a_site_and_a_number_of_gpus_bound_it():
    async with World() as world:
        await world.add(node("s/a", 4, model="H200"), node("t/b", 2, model="H200"))
        request = pb.PlanServingRequest(model=SMALL, sites=["sites/t"], gpus=2)
        found = await world.scheduler.PlanServing(request, None)
        assert {(one.gpus, one.site) for one in found.sizes} == {(2, "sites/t")}


async def test_a_number_of_gpus_that_no_node_has_is_said():
    async with World() as world:
        await world.add(node("t/b", 2, model="H200"))
        found = await planned(world, gpus=4)
        assert not found.sizes
        assert [(one.site, one.words) for one in found.refusals] == [("sites/t", "no node has 4 of them")]


async def test_a_fleet_without_gpus_has_no_sizes():
    async with World() as world:
        assert not (await planned(world)).sizes


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"model": ""}, "model"),
        ({"model": "lama"}, "model"),
        ({"model": SMALL, "context_tokens": 4096}, "context_tokens"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"prompt_tokens": 3000, "context_tokens": 2000}, "prompt_tokens"),
        ({"per_token": 0}, "per_token"),
        ({"first_token": -5}, "first_token"),
        ({"requests_per_s": float("nan")}, "requests_per_s"),
        ({"gpus": 65}, "gpus"),
        ({"gpus": 3}, "gpus"),
    ],
)
async def test_bad_input_names_its_field_and_limit(more, field):
    async with World() as world:
        with pytest.raises(InvalidArgument) as refused:
            await planned(world, **more)
        assert field in {one.field for one in refused.value.violations}
