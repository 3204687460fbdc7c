"""Plans over pools that differ: never slower than one pool, the same as a uniform plan where they do not differ, and within every GPU's memory."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.constants import FITTED
from whaleflux.planning.found import Split, candidate
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.mixed import MixedAsked, mixed_search
from whaleflux.planning.mixed_plan import ALONE, REPLICAS, STAGES, alone
from whaleflux.planning.mixed_replicas import best_replicas
from whaleflux.planning.mixed_stages import best_stages
from whaleflux.planning.pools import Pool, joined, slowest
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

SMALL, LARGE = model_named("llama-3.1-8b"), model_named("llama-3.1-70b")


def pool(gpu, gpus, **changes):
    return Pool(Machine.of(CATALOGUE.types[gpu]), gpus, **changes)


FLEET = (pool("H100-80GB", 16), pool("A100-80GB", 32))


def twin(of):
    """A pool of the same kind by another name."""
    return replace(of, machine=replace(of.machine, name=f"{of.name}-b"))


@pytest.fixture(scope="module")
def found():
    return {shape.name: mixed_search(shape, FLEET, MixedAsked(512, 4096)) for shape in (SMALL, LARGE)}


@pytest.mark.parametrize("model", [SMALL.name, LARGE.name])
def test_mixed_fleets_beat_each_pool_and_the_even_split(found, model):
    best, shape = found[model].best, model_named(model)
    even = search(shape, slowest(FLEET), Asked(gpus=48, sequence=4096, batch=512, batch_slack=0.1)).best
    assert best.kind != ALONE
    assert best.step_s < 0.8 * min(found[model].alone_s.values())
    assert best.token_s < 0.8 * even.token_s
    assert found[model].left_out == ()


def test_fast_gpus_get_more_samples_or_layers(found):
    for plan in (found[SMALL.name].best, *found[SMALL.name].others, *found[LARGE.name].others, found[LARGE.name].best):
        if plan.kind == ALONE:
            continue
        fast, slow = sorted(plan.parts, key=lambda part: part.pool, reverse=True)
        if plan.kind == REPLICAS:
            assert min(fast.samples) > max(slow.samples)
            assert sum(fast.samples) + sum(slow.samples) == plan.global_batch
        else:
            assert min(fast.layers) / fast.tp > max(slow.layers) / slow.tp
            assert (
                sum(fast.layers) + sum(slow.layers)
                == model_named(LARGE.name if sum(fast.layers + slow.layers) == 80 else SMALL.name).layers
            )


def test_no_gpu_waits_long_where_shares_are_fine(found):
    best = found[SMALL.name].best
    assert best.kind == REPLICAS
    assert min(part.busy_s for part in best.parts) > 0.9 * best.step_s


def test_every_part_fits_its_own_gpu(found):
    for one in found.values():
        for plan in (one.best, *one.others):
            assert all(part.needed_bytes <= part.usable_bytes for part in plan.parts)


def test_what_a_pool_needs_is_counted_against_its_own_memory():
    small = pool("A100-40GB", 16)
    found = mixed_search(SMALL, (FLEET[0], small), MixedAsked(256, 4096))
    part = next(
        part
        for plan in (found.best, *found.others)
        if plan.kind != ALONE
        for part in plan.parts
        if part.pool == "A100-40GB"
    )
    assert part.needed_bytes <= part.usable_bytes == pytest.approx(float(small.machine.usable_bytes))
    assert part.usable_bytes < 42e9


@pytest.mark.parametrize(("shape", "gpus"), [(SMALL, 16), (LARGE, 32)])
def test_replicas_on_two_pools_of_one_kind_are_the_uniform_plan(shape, gpus):
    half = pool("H100-80GB", gpus // 2)
    mixed = best_replicas(shape, (half, twin(half)), 256, 4096, Training(), FITTED)
    whole = search(shape, half.machine, Asked(gpus=gpus, sequence=4096, batch=256, vp=1)).best
    assert mixed.step_s == pytest.approx(whole.step_s, rel=0.05)


def test_stages_on_two_pools_of_one_kind_are_as_long_as_a_uniform_pipeline():
    half = pool("H100-80GB", 16)
    mixed = best_stages(LARGE, (half, twin(half)), 256, 4096, Training(), FITTED)
    whole = search(LARGE, half.machine, Asked(gpus=32, sequence=4096, batch=256, cp=1, vp=1)).best
    assert whole.split.pp > 1
    assert mixed.step_s == pytest.approx(whole.step_s, rel=0.06)


def test_one_pool_alone_says_the_layers_of_its_stages():
    split = Split(1, 3, 2, 1, 1, 1, 1, 96, 4096, 1, 1, "full", 1.0, False, first_layers=10, last_layers=8)
    plan = alone(FLEET[0], candidate(SMALL, FLEET[0].machine, split, Training()), SMALL)
    assert plan.parts[0].layers == (10, 14, 8)


def test_gpus_that_cost_more_than_they_bring_are_left_out():
    """Two RTX 4090 behind a slow line: each step waits for their part of the gradients."""
    far = pool("RTX4090", 2, uplink_bytes_per_s=12.5e6, uplink_hop_s=0.02)
    found = mixed_search(SMALL, (FLEET[0], far), MixedAsked(256, 4096))
    assert found.best.kind == ALONE
    assert found.left_out == ("RTX4090",)


def test_two_sites_over_a_slow_line_are_one_pipeline_or_none():
    """At 10 Gb/s between sites gradients of 70B cross too slowly, hidden states of a pipeline do not."""
    fleet = tuple(replace(one, uplink_bytes_per_s=1.25e9 / one.gpus, uplink_hop_s=0.01) for one in FLEET)
    found = mixed_search(LARGE, fleet, MixedAsked(512, 4096))
    assert found.best.kind == STAGES
    assert found.best.step_s < 0.87 * min(found.alone_s.values())
    replicas = [plan for plan in found.others if plan.kind == REPLICAS]
    assert all(plan.step_s > found.best.step_s for plan in replicas)


def test_a_joined_group_is_as_fast_as_its_slowest_part():
    slow, fast = pool("A100-80GB", 16, uplink_bytes_per_s=1e9), pool("H100-80GB", 16)
    links = joined((fast, slow), [np.array([16.0]), np.array([16.0])], np.array([1.0]))
    assert links.network_bytes_per_s[0] == 16e9  # the whole pool's way out
    assert links.island_bytes_per_s[0] == pytest.approx(0.77 * 300e9)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"]),
    st.lists(
        st.sampled_from(["H100-80GB", "A100-80GB", "A100-40GB", "RTX4090", "H200"]), min_size=2, max_size=2, unique=True
    ),
    st.lists(st.sampled_from([1, 2, 4, 7, 8, 16]), min_size=2, max_size=2),
    st.sampled_from([32, 48, 96]),
)
def test_never_slower_than_one_pool_and_all_of_the_batch_is_trained(model, gpus, counts, batch):
    shape, pools = model_named(model), [pool(gpu, count) for gpu, count in zip(gpus, counts, strict=True)]
    found = mixed_search(shape, pools, MixedAsked(batch, 2048))
    if found.best is None:
        return
    assert (
        found.best.step_s <= min(step_s for step_s in found.alone_s.values() if step_s)
        if any(found.alone_s.values())
        else True
    )
    for plan in (found.best, *found.others):
        assert all(part.needed_bytes <= part.usable_bytes for part in plan.parts)
        assert plan.gpus <= sum(counts)
        assert plan.kind != REPLICAS or sum(sum(part.samples) for part in plan.parts) == batch
        assert plan.kind != STAGES or sum(sum(part.layers) for part in plan.parts) == shape.layers


@pytest.mark.parametrize(
    ("pools", "batch", "said"),
    [
        ((), 8, "0 kinds"),
        (FLEET[:1] * 2, 8, "given twice"),
        (FLEET, 0, "0 samples"),
        (FLEET, 1 << 30, "samples a step; take 1 to"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(pools, batch, said):
    with pytest.raises(InvalidArgument, match=said):
        mixed_search(SMALL, pools, MixedAsked(batch, 4096))
