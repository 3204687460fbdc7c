"""Memory by component: the published formulas, the four verdicts on 700B over 128 H200, and what must hold of any plan."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.fits import verdict
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

H200 = Machine.of(CATALOGUE.types["H200"])
DENSE = model_named("dense-700b")
SEQUENCE = 8192
EAGER = Training(flash=False, dropout=True)
DROPOUT = Training(dropout=True)  # the published formulas count its masks


def plan(**more):
    sizes = {"micro_batch": 1, "global_batch": 1024, "sequence": SEQUENCE, "sequence_parallel": True}
    return Plans.of(**(sizes | more))


# tp, pp, dp, ZeRO -> state, with selective, with full recomputation, in 1e9 bytes; whether each of the two fits.
VERDICTS = {
    "TP8 PP16 DP1": ({"tp": 8, "pp": 16, "dp": 1}, 98.4, 195, 105, False, True),
    "TP8 PP8 DP2 ZeRO-1": ({"tp": 8, "pp": 8, "dp": 2, "zero": 1}, 131.3, 228, 138, False, True),
    "TP8 PP4 DP4 ZeRO-1": ({"tp": 8, "pp": 4, "dp": 4, "zero": 1}, 196.9, 294, 203, False, False),
    "FSDP over 128": ({"dp": 128, "zero": 3, "sequence_parallel": False}, 98.4, 895, 170, False, False),
}


@pytest.mark.parametrize(
    ("split", "state", "selective", "full", "fits", "fits_full"), VERDICTS.values(), ids=VERDICTS.keys()
)
def test_the_four_verdicts_on_700b_over_128_h200(split, state, selective, full, fits, fits_full):
    some = memory(DENSE, plan(recompute=Recompute.SELECTIVE, **split), DROPOUT)
    all_ = memory(DENSE, plan(recompute=Recompute.FULL, **split), DROPOUT)
    # The reference has the average stage; the fullest one holds the embedding too, and 9 layers where the average has 8.5.
    stages = split.get("pp", 1)
    uneven = -(-DENSE.layers // stages) * stages / DENSE.layers
    logits = float(some.logits_bytes)
    assert float(some.state_bytes) / 1e9 == pytest.approx(state * uneven, rel=0.06)
    assert (float(some.total_bytes) - logits) / 1e9 == pytest.approx(selective * uneven, rel=0.05)
    # What the output layer needs under ZeRO-3 besides, the reference leaves out.
    end = 8 * DENSE.head_weights if split.get("zero") == 3 else 0
    assert (float(all_.total_bytes) - logits - end) / 1e9 == pytest.approx(full * uneven, rel=0.05)
    assert bool(some.total_bytes <= H200.usable_bytes) is fits
    assert bool(all_.total_bytes <= H200.usable_bytes) is fits_full


def test_a_plan_that_the_label_would_refuse_fits_by_what_the_driver_reports():
    needed = memory(DENSE, plan(tp=8, pp=8, dp=2, zero=1, recompute=Recompute.FULL), Training())
    assert 138e9 < needed.total_bytes < H200.usable_bytes
    assert H200.memory_bytes > 141e9 > H200.usable_bytes - 5e9


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "split", "eager_gib", "selective_gib"),
    [
        (48, 6144, 64, {"tp": 8, "micro_batch": 4, "global_batch": 4}, 59.25, 9.5625),
        (96, 12288, 96, {"tp": 8, "pp": 8, "vp": 3, "micro_batch": 1, "global_batch": 64}, 66.84375, 12.3515625),
        (
            105,
            20480,
            128,
            {"tp": 8, "pp": 35, "vp": 3, "micro_batch": 1, "global_batch": 280},
            114.0234375,
            23.076171875,
        ),
        (128, 25600, 160, {"tp": 8, "pp": 64, "micro_batch": 1, "global_batch": 512}, 131.25, 26.5625),
    ],
)
def test_activations_of_korthikanti_2022(layers, hidden, heads, split, eager_gib, selective_gib):
    shape = ModelShape("gpt", layers, hidden, heads, heads, hidden // heads, 4 * hidden, 51200, gated=False, tied=True)
    without = memory(shape, Plans.of(sequence=2048, **split), EAGER)
    assert without.activations_bytes / 2**30 == pytest.approx(eager_gib, rel=0.05)
    both = memory(shape, Plans.of(sequence=2048, sequence_parallel=True, recompute=Recompute.SELECTIVE, **split), EAGER)
    assert both.activations_bytes / 2**30 == pytest.approx(selective_gib, rel=0.05)


def test_18_bytes_a_parameter_and_6_plus_12_over_the_shards():
    shape = model_named("llama-3.1-8b")
    alone = memory(shape, plan(sequence_parallel=False), Training())
    assert alone.state_bytes == pytest.approx(18 * shape.parameters, rel=1e-6)
    spread = memory(shape, plan(dp=4, zero=[1, 2, 3], sequence_parallel=False), Training())
    per_parameter = spread.state_bytes / shape.parameters
    assert per_parameter == pytest.approx([6 + 12 / 4, 2 + 16 / 4, 18 / 4], rel=1e-6)


def test_experts_are_spread_over_expert_parallel_ranks_and_the_rest_is_not():
    shape = model_named("qwen3-30b-a3b")
    one = memory(shape, plan(dp=8, sequence_parallel=False), Training())
    eight = memory(shape, plan(dp=8, ep=8, sequence_parallel=False), Training())
    experts = 18 * shape.moe_layers * shape.expert_weights
    assert one.state_bytes - eight.state_bytes == pytest.approx(experts * 7 / 8, rel=1e-6)


POWERS = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=150, deadline=None)
@given(
    tp=POWERS,
    pp=POWERS,
    dp=POWERS,
    zero=st.integers(0, 3),
    again=st.sampled_from(list(Recompute)),
    micro=st.integers(1, 4),
)
def test_more_of_anything_that_saves_never_needs_more(tp, pp, dp, zero, again, micro):
    shape = model_named("llama-3.1-70b")

    def total(**more):
        split = {
            "tp": tp,
            "pp": pp,
            "dp": dp,
            "zero": zero,
            "recompute": again,
            "micro_batch": micro,
            "global_batch": 8 * dp * micro,
            "sequence_parallel": tp > 1,
        }
        return float(memory(shape, plan(**(split | more)), Training()).state_bytes)

    usual = total()
    assert total(zero=min(zero + 1, 3)) <= usual * (1 + 1e-9)
    assert total(pp=pp * 2) <= usual * (1 + 1e-9)
    assert total(tp=tp * 2, sequence_parallel=True) <= usual * (1 + 1e-9)
    activations = memory(
        shape, plan(tp=tp, pp=pp, dp=dp, micro_batch=micro, global_batch=8 * dp * micro, recompute=[0, 2]), Training()
    )
    assert activations.activations_bytes[1] < activations.activations_bytes[0]


def test_a_verdict_names_what_binds_and_what_would_fit():
    gpu = CATALOGUE.types["RTX4090"]
    found = verdict(model_named("llama-3.1-8b"), gpu, Asked(gpus=2, sequence=4096), Training())
    assert not found.fits
    assert found.picture.binding == "optimizer state"
    assert any("lora" in one for one in found.instead)
    more = next(one for one in found.instead if "--gpus" in one)
    count = int(more.rpartition(" ")[2].rstrip(")"))
    assert verdict(model_named("llama-3.1-8b"), gpu, Asked(gpus=count, sequence=4096), Training()).fits
    assert not verdict(model_named("llama-3.1-8b"), gpu, Asked(gpus=count // 2, sequence=4096), Training()).fits


def test_a_split_that_cannot_be_names_its_rule():
    found = verdict(
        model_named("llama-3.1-8b"), CATALOGUE.types["H200"], Asked(gpus=8, sequence=4096, tp=3), Training()
    )
    assert found.picture is None
    assert found.rule == "heads must be a multiple of tp"
    odd = verdict(model_named("llama-3.1-8b"), CATALOGUE.types["H200"], Asked(gpus=6, sequence=4096, tp=3), Training())
    assert odd.rule == "heads must be a multiple of tp"


def test_700b_on_128_h200_fits_with_a_split_that_is_named():
    found = verdict(DENSE, CATALOGUE.types["H200"], Asked(gpus=128, sequence=SEQUENCE), Training())
    assert found.fits
    asked = Asked(gpus=128, sequence=SEQUENCE, tp=8, pp=4, zero=1, recompute=Recompute.SELECTIVE)
    refused = verdict(DENSE, CATALOGUE.types["H200"], asked, Training())
    assert not refused.fits
    assert (
        len(refused.instead) == 1
    )  # no full recomputation of this split fits; another split does, so nothing else is bought
    assert refused.instead[0].startswith("another split: ")
    assert np.isfinite(refused.picture.step_s)
    assert replace(asked, tp=0) != asked


@pytest.mark.parametrize("zero", [0, 1])
def test_adapters_have_weights_gradients_and_an_optimizer_of_their_own(zero):
    """Of rank 16 on all linear layers of Llama 3.1 8B PEFT counts 41,943,040 parameters."""
    one = Plans.of(micro_batch=1, global_batch=1, sequence=2048, zero=zero)
    held = memory(model_named("llama-3.1-8b"), one, Training(frozen=True))
    assert float(held.gradients_bytes) == 4 * 41_943_040
    assert float(held.optimizer_bytes) == 12 * 41_943_040
    assert float(held.weights_bytes) == pytest.approx(
        2 * (model_named("llama-3.1-8b").parameters + 41_943_040), rel=1e-4
    )
