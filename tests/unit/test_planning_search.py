"""The planner's search: equal to looking at every plan, never an invalid or too large one, and it says what binds."""

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.plan_lab.brute_force import fastest
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.emit import emit
from whaleflux.planning.emit.planned import Planned
from whaleflux.planning.found import candidate
from whaleflux.planning.known_models import MODELS, model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import least_state_bytes, memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.offers import Goal, Offer, estimate
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked, cells, frames, joined, variants, with_other_ends
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

H200 = Machine.of(CATALOGUE.types["H200"])
A100 = Machine.of(CATALOGUE.types["A100-80GB"])
RTX4090 = Machine.of(CATALOGUE.types["RTX4090"])
LLAMA = model_named("llama-3.1-70b")
SMALL = ModelShape("small", 8, 4096, 32, 8, 128, 14336, 32000)
EXPERTS = replace(SMALL, name="experts", experts=8, top_k=2, expert_ffn=4096, ffn=4096)


@pytest.mark.parametrize(
    ("shape", "machine", "gpus", "batch", "sequence"),
    [
        (SMALL, RTX4090, 8, 16, 2048), (SMALL, A100, 12, 24, 4096), (EXPERTS, RTX4090, 16, 32, 2048), (EXPERTS, A100, 16, 48, 8192),
        (replace(SMALL, layers=12, hidden=8192, heads=64, head_dim=128), A100, 24, 16, 8192),
    ],
)  # fmt: skip
def test_the_best_plan_is_that_of_looking_at_every_plan(shape, machine, gpus, batch, sequence):
    best, count = fastest(shape, machine, gpus, [batch], sequence)
    found = search(shape, machine, Asked(gpus, sequence, batch=batch))
    assert count > 500
    assert found.best.step_s / batch == pytest.approx(best, rel=1e-9)


def test_a_batch_that_may_differ_loses_little_of_what_every_batch_and_every_number_of_ranks_would_give():
    best, _ = fastest(SMALL, A100, 13, range(46, 51), 4096)
    found = search(SMALL, A100, Asked(13, 4096, batch=48, batch_slack=0.05))
    assert best * (1 - 1e-9) <= found.best.step_s / found.best.split.global_batch <= best * 1.01


ASKED = st.builds(
    Asked,
    gpus=st.integers(1, 200),
    sequence=st.sampled_from([512, 2048, 8192, 32768]),
    batch=st.sampled_from([16, 96, 256, 1000]),
    batch_slack=st.sampled_from([0.0, 0.05]),
)


@settings(max_examples=60, deadline=None)
@given(asked=ASKED, shape=st.sampled_from([LLAMA, SMALL, EXPERTS]), machine=st.sampled_from([H200, A100, RTX4090]))
def test_what_is_found_is_valid_fits_and_uses_no_more_than_there_is(asked, shape, machine):
    found = search(shape, machine, asked)
    for plan in (*([found.best] if found.best else []), *(one.plan for one in found.runners_up)):
        plans = plan.split.plans()
        assert plans.valid(shape).all()
        assert plan.split.gpus <= asked.gpus
        assert abs(plan.split.global_batch / asked.batch - 1) <= asked.batch_slack + 1e-9
        assert memory(shape, plans, Training()).total_bytes <= machine.usable_bytes
        assert plan.token_s >= found.best.token_s * (1 - 1e-9)
        assert plan.step_s == pytest.approx(float(np.ravel(step_time(shape, machine, plans, Training()).total_s)[0]))
    assert (found.best is None) == (
        not found.binding.words or "no split" in found.binding.words or found.binding.kind in ("rule", "batch")
    )


@settings(max_examples=30, deadline=None)
@given(asked=ASKED)
def test_every_frame_is_valid(asked):
    even = frames(EXPERTS, asked, cells(EXPERTS, 8, asked))
    uneven = frames(EXPERTS, asked, cells(EXPERTS, 8, asked, uneven=True), uneven=True)
    plans = variants(asked, joined([even, with_other_ends(uneven)]))
    assert plans.valid(EXPERTS).all()
    assert (plans.gpus <= asked.gpus).all()


@settings(max_examples=30, deadline=None)
@given(asked=ASKED, more=st.integers(1, 64))
def test_more_gpus_or_more_memory_are_never_slower(asked, more):
    asked = replace(asked, batch_slack=0.0)
    usual, larger = search(SMALL, RTX4090, asked), search(SMALL, RTX4090, replace(asked, gpus=asked.gpus + more))
    roomy = search(SMALL, replace(RTX4090, memory_bytes=60e9), asked)
    assume(usual.best)
    assert roomy.best.token_s <= usual.best.token_s * (1 + 1e-9)
    assume(asked.gpus > 8)  # tensor parallelism within one node may be of any degree, beyond it not
    assert larger.best.token_s <= usual.best.token_s * (1 + 1e-9)


def test_gpus_that_no_split_has_use_for_stay_idle_and_are_named():
    found = search(LLAMA, H200, Asked(127, 8192, batch=512, batch_slack=0.05))
    assert 110 <= found.best.split.gpus < 127
    assert found.idle_gpus == 127 - found.best.split.gpus


def test_runners_up_differ_in_kind_and_say_what_they_lose():
    found = search(LLAMA, H200, Asked(128, 8192, batch=512))
    assert len({one.kind for one in found.runners_up}) == len(found.runners_up) >= 3
    assert [one.loses for one in found.runners_up] == sorted(one.loses for one in found.runners_up)
    first = found.runners_up[0]
    assert first.loses == pytest.approx(first.plan.token_s / found.best.token_s - 1)


def test_memory_binds_in_words_with_the_recomputation_that_would_fit():
    found = search(model_named("dense-700b"), H200, Asked(128, 8192, batch=128))
    assert found.binding.kind == "memory"
    for word in ("activations", "of 144.6 at stage", "full recomputation", "would fit", "% slower"):
        assert word in found.binding.words


def test_where_memory_does_not_bind_the_longest_part_does():
    assert search(SMALL, H200, Asked(8, 4096, batch=512)).binding.kind in ("compute", "communication", "bubble", "host")
    starved = search(SMALL, H200, Asked(8, 4096, batch=512), Training(data_tokens_per_s=100.0))
    assert starved.binding.kind == "data"


def test_where_nothing_fits_the_nearest_is_shown_with_what_it_lacks():
    found = search(LLAMA, RTX4090, Asked(2, 8192, batch=16))
    assert found.best is None
    assert not found.nearest.fits
    assert "no split fits" in found.binding.words


def test_a_batch_that_nothing_divides_or_a_rule_is_named():
    odd = search(LLAMA, H200, Asked(128, 8192, batch=7, tp=1, pp=1, cp=1, micro_batch=2))
    assert (odd.best, odd.binding.kind) == (None, "batch")
    assert search(LLAMA, H200, Asked(8, 8192, tp=3, batch=8)).binding.words == "heads must be a multiple of tp"


def test_parts_that_are_settled_stay_so():
    found = search(LLAMA, H200, Asked(64, 8192, batch=64, tp=4, pp=2, zero=1, recompute=Recompute.FULL, micro_batch=2))
    split = found.best.split
    assert (split.tp, split.pp, split.zero, split.recompute, split.recomputed, split.micro_batch) == (
        4,
        2,
        1,
        "full",
        1.0,
        2,
    )


def test_an_answer_is_json_and_its_stages_add_up():
    found = search(LLAMA, H200, Asked(32, 8192, batch=64, pp=4, tp=8))
    assert json.loads(json.dumps(asdict(found)))["best"]["split"]["pp"] == 4
    best = found.best
    assert len(best.stages_bytes) == 4
    assert best.total_bytes == pytest.approx(float(memory(LLAMA, best.split.plans(), Training()).total_bytes[0]))
    kept = [stage["activations_bytes"] for stage in best.stages_bytes]
    assert kept == sorted(kept, reverse=True)  # earlier stages hold more micro-batches
    assert [stage["logits_bytes"] > 0 for stage in best.stages_bytes] == [False, False, False, True]


def test_a_split_that_somebody_names_has_its_picture_valid_or_not():
    split = search(LLAMA, H200, Asked(32, 8192, batch=64)).best.split
    uneven = candidate(LLAMA, H200, replace(split, tp=8, pp=3, dp=1, cp=1, vp=1, zero=0), Training())
    assert len(uneven.stages_bytes) == 3


def test_zero_2_reduces_the_gradients_of_every_micro_batch():
    def reduced(zero):
        plans = Plans.of(dp=64, zero=zero, micro_batch=1, global_batch=1024, sequence=4096)
        return float(step_time(LLAMA, H200, plans, Training(overlap_dp=False)).dp_s)

    assert reduced(2) > 5 * reduced(1)


def test_stages_are_pictured_together_however_many_there_are():
    deep = replace(LLAMA, layers=10_000)
    split = replace(search(SMALL, H200, Asked(8, 4096, batch=64)).best.split, pp=10_000, vp=1, zero=0)
    began = time.process_time()
    assert len(candidate(deep, H200, split, Training()).stages_bytes) == 10_000
    assert time.process_time() - began < 1


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_where_there_is_no_plan_none_fits(name, gpus):
    """ZeRO-3 gathers layers: where few hold most of the weights, or one GPU all of them, it is not the leanest."""
    shape = MODELS[name]
    for machine in (H200, RTX4090):
        for asked in (
            Asked(gpus, min(2048, shape.sequence), batch=8),
            Asked(gpus, min(2048, shape.sequence), batch=8, zero=3),
        ):
            found = search(shape, machine, asked)
            assert found.best is not None or found.nearest is None or not found.nearest.fits, (name, machine.name)
            nothing = asked.zero < 0 and found.best is None
            settled = [search(shape, machine, replace(asked, zero=zero)).best for zero in range(4 if nothing else 0)]
            assert not any(settled)


def test_seven_billion_parameters_train_on_one_gpu_that_holds_them_without_gathered_layers():
    assert search(model_named("qwen2.5-7b"), H200, Asked(1, 2048, batch=1)).best.split.zero == 0


def test_a_stage_of_zero_that_pipelines_rule_out_is_named_as_the_rule():
    found = search(LLAMA, H200, Asked(8, 8192, batch=8, zero=3, pp=2))
    assert (found.best, found.nearest) == (None, None)
    assert "take zero 0 or 1, or pp 1" in found.binding.words


def test_experts_that_tp_does_not_divide_are_no_plan():
    odd = replace(EXPERTS, ffn=16384, expert_ffn=1408, dense_layers=1)  # 1408 = 128 x 11
    assert (
        not Plans.of(tp=256, micro_batch=1, global_batch=1, sequence=4096)
        .valid(replace(odd, heads=256, kv_heads=256))
        .any()
    )
    assert Plans.of(tp=8, micro_batch=1, global_batch=1, sequence=4096).valid(odd).all()
    assert not Plans.of(tp=8, micro_batch=1, global_batch=1, sequence=4096).valid(replace(odd, ffn=14340)).any()
    assert (
        Plans.of(tp=8, micro_batch=1, global_batch=1, sequence=4096)
        .valid(replace(odd, ffn=14340, dense_layers=0))
        .all()
    )


def test_a_sequence_beyond_learned_positions_is_no_plan_in_words():
    found = search(model_named("gpt2"), H200, Asked(8, 8192, batch=8))
    assert (found.best, found.nearest) == (None, None)
    assert found.binding.words == "sequence must be at most the model's learned positions"


def test_a_model_of_very_many_divisors_is_refused_at_once_and_within_memory():
    shape = ModelShape(
        "many", 5040, 5040, 2520, 2520, 128, 55440, 32000, 1 << 20, experts=55440, top_k=2, expert_ffn=55440
    )
    began = time.process_time()
    roomy = replace(H200, memory_bytes=1e18)  # where it cannot fit no way is looked at
    with pytest.raises(InvalidArgument, match=r"model.*more than 1,000,000 ways.*settle pp, ep"):
        search(shape, roomy, Asked(8192, 131_072, batch=55440))
    assert time.process_time() - began < 10
    assert search(shape, H200, Asked(64, 8192, batch=64)).looked_at < 1_000_000


@pytest.mark.parametrize(("layers", "pp"), [(136, 16), (61, 8), (126, 16), (13, 3), (5, 2)])
def test_layers_that_stages_do_not_divide_are_planned_with_ends_of_their_own(layers, pp):
    shape = replace(LLAMA, layers=layers)
    split = search(shape, H200, Asked(128, 8192, pp=pp, batch=128)).best.split
    counts = [int(split.plans().stage_layers(shape, float(stage))[0]) for stage in range(pp)]
    assert sum(counts) == layers
    assert len(set(counts[1:-1])) <= 1
    assert max(counts) - min(counts) < layers


def test_a_large_output_layer_leaves_the_last_stage_fewer_layers():
    """Even stages would all wait for the last one: 32 layers, an output layer of more than two."""
    shape = model_named("llama-3.1-8b")
    found = search(shape, H200, Asked(4, 8192, tp=1, cp=1, pp=4, batch=64, vp=1, zero=0)).best
    even = candidate(shape, H200, replace(found.split, first_layers=0, last_layers=0), Training())
    assert 0 < found.split.last_layers < 8
    assert found.step_s < even.step_s


def test_first_stages_alone_recompute_where_memory_binds_there():
    small = replace(H200, memory_bytes=80e9)
    found = search(LLAMA, small, Asked(32, 8192, tp=2, cp=1, pp=8, vp=1, zero=1, batch=128)).best
    assert found.split.recompute == "full"
    assert 1 < found.split.recomputing < 8
    everywhere, fewer = (
        candidate(LLAMA, small, replace(found.split, recomputing=stages), Training())
        for stages in (0, found.split.recomputing - 1)
    )
    assert found.step_s < everywhere.step_s
    assert not fewer.fits


@settings(max_examples=40, deadline=None)
@given(asked=ASKED, shape=st.sampled_from([LLAMA, EXPERTS]))
def test_no_gpu_holds_less_than_what_cells_cannot_do_without(asked, shape):
    plans = variants(asked, frames(shape, asked, cells(shape, 8, asked)))
    assume(len(plans))
    needed = memory(shape, replace(plans, recompute=np.full(plans.tp.shape, 2.0)), Training()).state_bytes
    assert (least_state_bytes(shape, plans, Training()) <= needed * (1 + 1e-9)).all()


def test_a_model_that_no_gpu_could_hold_a_part_of_is_refused_at_once_with_the_nearest_split():
    huge = ModelShape("huge", 5040, 32768, 256, 256, 128, 131072, 256000, experts=720, top_k=8, expert_ffn=8192)
    began = time.process_time()
    found = search(huge, H200, Asked(16_384, 8192, batch=4096, batch_slack=0.05))
    assert time.process_time() - began < 5
    assert (found.best, found.looked_at) == (None, 0)
    assert "nearest is" in found.binding.words


@pytest.mark.parametrize("form", ["torchtitan", "deepspeed", "fsdp2", "megatron"])
@pytest.mark.parametrize("shape", [LLAMA, model_named("qwen3-30b-a3b")])
def test_a_search_for_a_format_finds_what_it_can_express_and_loses_what_is_said(form, shape):
    offer = Offer(CATALOGUE.types["H200"], 64)
    asked = Asked(64, 8192, batch=256)
    free, said = (estimate(shape, offer, asked, Goal(), Training(), form=one) for one in ("", form))
    assert emit(form, Planned.of(shape, said.plan.split.plans(), Training())).text
    assert said.plan.token_s >= free.plan.token_s * (1 - 1e-9)
    assert said.quicker in (None, free.plan)
    assert (said.quicker is None) == (said.plan.split == free.plan.split)


def test_a_format_that_can_express_nothing_that_fits_gets_the_best_plan_and_refuses_it_in_words():
    offer = Offer(CATALOGUE.types["H200"], 16)
    plan = estimate(LLAMA, offer, Asked(16, 8192, tp=8, batch=16), Goal(), Training(), form="deepspeed").plan
    with pytest.raises(InvalidArgument, match="tensor parallelism 8"):
        emit("deepspeed", Planned.of(LLAMA, plan.split.plans(), Training()))
