"""The cost model: what must hold of every prediction, and that a million candidates are one call of arrays."""

import time
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.collectives import all_reduce_s, gather_s
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Fabric, Machine, Tier
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.step import Groups, step_time
from whaleflux.planning.training import Training

LLAMA = model_named("llama-3.1-70b")
H200 = Machine.of(CATALOGUE.types["H200"])
A100 = Machine.of(CATALOGUE.types["A100-80GB"])


def plans(**more):
    return Plans.of(
        **(
            {
                "micro_batch": 1,
                "global_batch": 512,
                "sequence": 4096,
                "tp": 8,
                "pp": 2,
                "dp": 8,
                "sequence_parallel": True,
            }
            | more
        )
    )


def total(machine=H200, how=None, shape=LLAMA, **more):
    return np.ravel(step_time(shape, machine, plans(**more), how or Training()).total_s)


def test_components_add_up_and_none_is_negative():
    step = step_time(LLAMA, H200, plans(tp=[1, 2, 4, 8], pp=[8, 4, 2, 1], recompute=[0, 1, 2, 2]), Training())
    parts = [getattr(step, one.name) for one in fields(step)]
    assert all((part >= 0).all() and part.shape == (4,) for part in parts)
    assert step.total_s == pytest.approx(sum(parts))
    assert (step.exposed_s < step.total_s).all()


def test_nothing_is_faster_than_the_hardware():
    """Six operations a parameter and token, at the best rate that was measured."""
    step = step_time(LLAMA, H200, plans(), Training())
    least = 6 * LLAMA.parameters * 512 * 4096 / (128 * H200.flops)
    assert least < step.total_s < 4 * least


def test_many_plans_at_once_are_the_same_as_one_after_another():
    rng = np.random.default_rng(1)
    many = {name: rng.choice([1, 2, 4, 8], 50) for name in ("tp", "pp", "dp", "cp", "vp")}
    many |= {"zero": rng.integers(0, 4, 50), "recompute": rng.integers(0, 3, 50), "global_batch": np.full(50, 4096)}
    together = total(**many)
    alone = [total(**{name: values[n] for name, values in many.items()})[0] for n in range(50)]
    assert together == pytest.approx(alone)


def test_a_hundred_thousand_candidates_in_a_second_of_cpu():
    size = 100_000
    rng = np.random.default_rng(2)
    many = plans(
        **{name: rng.choice([1, 2, 4, 8], size) for name in ("tp", "pp", "dp", "cp")},
        recompute=rng.integers(0, 3, size),
    )
    began = time.process_time()
    step = step_time(LLAMA, H200, many, Training())
    assert time.process_time() - began < 4  # 0.3 on the reference host
    assert np.isfinite(step.total_s).all()


def test_bubbles_are_those_of_the_schedules():
    """(p - 1) / (m v) of what the micro-batches take, where stages are even."""
    even = replace(LLAMA, vocabulary=1000)
    for virtual in (1, 5):
        step = step_time(
            even,
            H200,
            plans(pp=8, tp=1, dp=1, vp=virtual, global_batch=64, sequence_parallel=False),
            Training(overlap_pp=True),
        )
        busy = step.total_s - step.bubble_s - step.optimizer_s
        assert step.bubble_s / busy == pytest.approx(7 / (64 * virtual), rel=0.05)


def test_recomputation_costs_a_third_and_saves_memory():
    none, full = total(recompute=[Recompute.NONE, Recompute.FULL])
    assert 1.2 < full / none < 1.4


@settings(max_examples=100, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), dp=st.sampled_from([1, 2, 8, 64]), zero=st.integers(0, 3),
    rate=st.floats(1e9, 400e9), factor=st.floats(1.01, 10),
)  # fmt: skip
def test_faster_links_memory_and_arithmetic_never_make_a_step_slower(tp, pp, dp, zero, rate, factor):
    def at(rate, flops=H200.flops, memory=H200.memory_bytes_per_s):
        fabric = replace(H200.fabric, tiers=(Tier(8, rate),))
        machine = replace(H200, fabric=fabric, flops=flops, memory_bytes_per_s=memory)
        return total(machine, tp=tp, pp=pp, dp=dp, zero=zero, global_batch=1024, sequence_parallel=tp > 1)[0]

    usual = at(rate)
    for better in (at(rate * factor), at(rate, H200.flops * factor), at(rate, memory=H200.memory_bytes_per_s * factor)):
        assert better <= usual * (1 + 1e-9)


def test_traffic_that_leaves_an_island_or_a_leaf_costs_more():
    flat = Fabric(8, 365e9, (Tier(8, 50e9),))
    tree = Fabric(8, 365e9, (Tier(8, 50e9), Tier(32, 3e9)))
    size, stride = np.array([8.0, 32.0, 64.0]), np.array([1.0, 1.0, 1.0])
    inside, leaf, across = all_reduce_s(np.array(1e9), flat.links(size, stride), FITTED)
    assert inside < leaf <= across
    far = all_reduce_s(np.array(1e9), tree.links(size, stride), FITTED)
    assert far[:2] == pytest.approx([inside, leaf])
    assert far[2] > 1.5 * across


def test_one_rank_of_each_node_has_one_nic_and_eight_have_all():
    fabric = Fabric(8, 365e9, (Tier(8, 50e9),))
    one = fabric.links(np.array(16.0), np.array(8.0))
    all_ = fabric.links(np.array(128.0), np.array(1.0))
    assert (float(one.network_bytes_per_s), float(one.nodes)) == (50e9, 16)
    assert (float(all_.network_bytes_per_s), float(all_.nodes)) == (400e9, 16)


@pytest.mark.parametrize(
    ("gpus", "size", "measured_s"),
    [(2, 1 << 30, 5.44e-3), (4, 1 << 30, 7.26e-3), (8, 1 << 30, 8.2e-3), (8, 1 << 26, 0.58e-3)],
)
def test_all_reduce_on_an_a100_is_what_was_measured(gpus, size, measured_s):
    """vTrain's tables of nccl-tests (bandwidth-bound sizes)."""
    links = A100.fabric.links(np.array(float(gpus)), np.array(1.0))
    assert all_reduce_s(np.array(float(size)), links, FITTED) == pytest.approx(measured_s, rel=0.25)


def test_nvls_serves_all_reduce_from_five_gpus_up_and_never_a_gather():
    """Bus bandwidth on H200: ring 363 at 4 GPUs, NVLS 473 at 8; all-gather 361."""
    links = H200.fabric.links(np.array([4.0, 8.0]), np.array(1.0))
    size = np.array(8.0 * 2**30)
    steps = 2 * (links.size - 1) / links.size
    assert size * steps / all_reduce_s(size, links, FITTED) / 1e9 == pytest.approx([363, 473], rel=0.03)
    assert size * steps / 2 / gather_s(size, links, FITTED) / 1e9 == pytest.approx([363, 361], rel=0.03)


def test_a_rank_map_of_its_own_can_be_judged():
    """Neighbouring tensor-parallel ranks on different nodes: what `Groups` says counts, not the order."""
    one = plans()
    ordered = Groups.in_order(H200.fabric, one)
    torn = replace(ordered, tp=H200.fabric.links(np.array(8.0), np.array(8.0)))
    assert (
        step_time(LLAMA, H200, one, Training(), groups=torn).tp_s
        > 3 * step_time(LLAMA, H200, one, Training(), groups=ordered).tp_s
    )


def test_loaders_and_checkpoints_stall():
    usual = step_time(LLAMA, H200, plans(), Training())
    slow = step_time(LLAMA, H200, plans(), Training(data_tokens_per_s=1.0, checkpoint_s=30, checkpoint_every_s=3000))
    assert usual.data_s == usual.checkpoint_s == 0
    assert slow.total_s - slow.checkpoint_s == pytest.approx(512 * 4096 / 128)
    assert slow.checkpoint_s == pytest.approx(0.01 * 512 * 4096 / 128)


def test_there_are_at_most_twelve_constants():
    assert len(fields(Constants)) <= 12


def test_rules_name_what_makes_a_plan_impossible():
    many = plans(
        tp=[8, 3, 8, 1, 8, 8],
        pp=[2, 2, 3, 2, 2, 1],
        vp=[1, 1, 1, 1, 3, 2],
        sequence_parallel=[1, 1, 1, 1, 1, 1],
        zero=[1, 0, 0, 0, 3, 0],
    )
    assert many.valid(LLAMA).tolist() == [True, False, False, False, False, False]
    broken = many.faults(LLAMA)
    assert broken["heads must be a multiple of tp"].tolist() == [False, True, False, False, False, False]
    assert broken["sequence_parallel needs tp > 1"].tolist() == [False, False, False, True, False, False]


def test_a_node_gets_a_token_once_however_many_of_its_experts_are_there():
    """DeepSeek-V3's routing visits at most 4 of 8 nodes; without that limit 5.3 of 8 are visited by 8 random experts."""
    shape, machine = model_named("deepseek-v3"), Machine.of(CATALOGUE.types["H100-80GB"])
    one = Plans.of(dp=64, ep=64, micro_batch=1, global_batch=64, sequence=4096)
    limited = step_time(shape, machine, one, Training()).ep_s
    free = step_time(replace(shape, route_nodes=0), machine, one, Training()).ep_s
    assert limited / free == pytest.approx(4 / (8 * (1 - (7 / 8) ** 8)), rel=0.05)


def part(name, how=None, machine=H200, shape=LLAMA, **more):
    return np.ravel(getattr(step_time(shape, machine, plans(**more), how or Training()), name))


def test_tensor_parallel_ranks_share_what_is_sent_between_stages():
    """Without sequence parallelism they gather it over NVLink afterwards, which costs less than to send all of it eight times."""
    split, gathered = part("pp_s", sequence_parallel=[True, False])
    alone = part("pp_s", tp=1, sequence_parallel=False)[0]
    assert split < gathered < alone / 3


def test_only_interleaved_stages_hide_what_they_send():
    plain, interleaved = part("pp_s", pp=4, vp=[1, 4])
    assert plain > 0
    assert interleaved == 0
    assert (part("pp_s", Training(overlap_pp=False), pp=4, vp=[1, 4]) >= plain).all()


def test_inputs_gradients_are_reduced_beside_the_weights():
    before, since = (part("tp_s", Training(overlap_gradients=on)) for on in (False, True))
    assert 0.5 * before < since < before


def test_gathers_of_eight_bit_tensors_move_half():
    """Six of ten of a layer's collectives are gathers, and the volume is what counts at this size."""
    wide, narrow = (part("tp_s", Training(fp8=on, overlap_gradients=False), micro_batch=8) for on in (0, 1))
    assert narrow / wide == pytest.approx(0.7, abs=0.02)


def test_gradients_of_further_micro_batches_are_read_and_written_where_nothing_fuses_that():
    fused, apart = (part("compute_s", Training(fused_gradients=on), pp=1, dp=16)[0] for on in (True, False))
    added = 3 * 4 * (512 / 16 - 1) * LLAMA.layers * LLAMA.layer_weights / 8
    assert apart - fused == pytest.approx(added / H200.memory_bytes_per_s)


def test_the_last_layers_gradients_are_reduced_after_the_backward_pass():
    """However long that is; and all of what it cannot hide."""
    fast = replace(H200, fabric=replace(H200.fabric, tiers=(Tier(8, 1e12),)))
    slow = replace(H200, fabric=replace(H200.fabric, tiers=(Tier(8, 1e9),)))
    hidden, alone = (part("dp_s", Training(overlap_dp=on), fast)[0] for on in (True, False))
    assert hidden == pytest.approx(alone / 40)  # layers of a stage
    assert part("dp_s", machine=slow)[0] > 0.9 * part("dp_s", Training(overlap_dp=False), slow)[0]


def test_a_ring_of_short_parts_costs_launches_and_sums():
    """The same tokens on the same GPUs: eight steps of a ring take kernels of their own, long sequences hide them."""
    short = total(tp=1, pp=1, dp=[16, 2], cp=[1, 8], sequence=8192, sequence_parallel=False)
    long = total(tp=1, pp=1, dp=[16, 2], cp=[1, 8], sequence=262144, sequence_parallel=False)
    assert short[1] / short[0] > 1.1
    assert long[1] / long[0] < 1.03


def test_fully_sharded_training_gathers_the_embedding_too():
    small, large = (
        part("dp_s", shape=replace(LLAMA, vocabulary=words), tp=1, pp=1, dp=128, zero=3, sequence_parallel=False)[0]
        for words in (1000, 256_000)
    )
    assert large > 1.01 * small
