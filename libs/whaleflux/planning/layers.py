"""What the layers of a model cost one GPU for one micro-batch: operations, bytes through memory, kernels; and the seconds of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whaleflux.planning.arrays import Array, array
from whaleflux.planning.constants import Constants
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training

_MATMULS, _MOE_MATMULS = 4, 6  # of a layer, forward: QKV, output, up (and gate), down; and those of experts
_KERNELS_EAGER, _KERNELS_FUSED = 40, 20  # of a layer, forward; twice as many backward
_RING_KERNELS = 8  # of each further step of a ring, forward: sends, halves of keys and values, attention, its sum and its maxima corrected
_RING_SHARE = (
    0.75  # of a rank's tokens a further step is for: all of them or, of earlier tokens, half (causal, balanced)
)
_OUTER_PASSES = 8  # reads and writes of a token's hidden state by norms, dropout and residuals, forward
_LOSS_PASSES = 5  # of 32-bit logits: read and written twice forward, once backward
_CAUSAL = 0.5  # of the scores are computed by fused attention


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one average layer and one micro-batch on one rank: the GPU's, forward and backward, and the host's for its kernels, forward.

    `core_s` is the part of `forward_s` that selective recomputation repeats, `linear_s` that of multiplications with weights.
    """

    forward_s: Array
    backward_s: Array
    core_s: Array
    linear_s: Array
    host_s: Array


def layer_times(shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants) -> LayerTimes:
    linear, tails = _linear_s(shape, machine, plans, constants)
    core, core_back = _attention_s(shape, machine, plans, how, constants)
    passing = _elementwise_s(shape, machine, plans, how, constants)
    ring, ring_back = _ring_s(shape, machine, plans, how, constants)
    gradients = how.either(how.frozen, 1.0, 2.0)  # of inputs, and of weights where they learn
    kernels = how.either(how.fused, _KERNELS_FUSED, _KERNELS_EAGER) + _RING_KERNELS * (plans.cp - 1)
    casts = array(how.cast_bytes) / 2 * shape.layer_weights / plans.tp / machine.memory_bytes_per_s
    return LayerTimes(
        forward_s=linear + tails + core + ring + passing + casts,
        backward_s=gradients * (linear + tails) + core_back + ring_back + 2 * passing + casts,
        core_s=core,
        linear_s=linear + tails,
        host_s=constants.launch_s * kernels,
    )


def head_s(shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants) -> Array:
    """The output layer and the loss, forward and backward, seconds of one micro-batch on a rank of the last stage."""
    logits = plans.tokens * shape.vocabulary / plans.tp
    # The output layer stays in 16 bit.
    multiplied = 3 * 2 * logits * shape.hidden / (constants.matmul_share * array(machine.attention_flops))
    passes = np.where(array(how.logits_traffic) > 0, how.logits_traffic, constants.fused_traffic)
    casts = array(how.cast_bytes) * (shape.head_weights + shape.embedding_weights) / plans.tp
    moved = _LOSS_PASSES * 4 * logits * passes + casts
    return np.asarray(multiplied + moved / machine.memory_bytes_per_s)


def _linear_s(shape: ModelShape, machine: Machine, plans: Plans, constants: Constants) -> tuple[Array, Array]:
    """Of matrix multiplications with weights, forward: at the rate of large ones, and what each costs beyond."""
    experts = shape.moe_layers / shape.layers
    routed = experts * shape.top_k * shape.mlp_weights(shape.expert_ffn)
    operations = 2 * plans.tokens * (shape.layer_weights + routed) / plans.tp
    kernels = _MATMULS + experts * _MOE_MATMULS
    rate = constants.matmul_share * array(machine.flops)
    return np.asarray(operations / rate), np.asarray(constants.matmul_tail_s * kernels)


def _attention_s(
    shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants
) -> tuple[Array, Array]:
    """Of scores and values, forward and backward. Fused: half of the scores, once more backward; else each passes through memory."""
    scores = plans.tokens * plans.sequence * shape.heads / plans.tp
    operations = 2 * scores * (shape.head_dim + shape.value_dim)
    best = array(machine.attention_flops)
    short = 1.0 + constants.attention_short * plans.cp / plans.sequence  # of a ring, each step sees a rank's part
    fused = _CAUSAL * operations * short / (constants.attention_share * best)
    moved = 2 * scores * constants.score_passes / machine.memory_bytes_per_s
    eager = operations / (constants.matmul_share * best) + moved
    return how.either(how.flash, fused, eager), how.either(how.flash, 2.5 * fused, 2 * eager)


def _ring_s(
    shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants
) -> tuple[Array, Array]:
    """What attention in `cp` steps takes beyond one step, forward and backward.

    A kernel's tail for each, and its part read, added to the sum, written: of the output, of gradients of queries, and of keys and values.
    """
    steps, part = plans.cp - 1, 3 * 2 * _RING_SHARE * plans.tokens / plans.tp / machine.memory_bytes_per_s
    traffic = how.either(how.fused, constants.fused_traffic, constants.eager_traffic)
    forward = constants.matmul_tail_s + traffic * part * shape.heads * shape.value_dim
    backward = 2 * constants.matmul_tail_s + traffic * part * (shape.heads * shape.head_dim + shape.kv_width)
    return np.asarray(steps * forward), np.asarray(steps * backward)


def _elementwise_s(shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants) -> Array:
    """Of what is read and written besides, forward: norms, residuals, dropout on all ranks (or shared: sequence parallelism), the rest on tp."""
    experts = shape.moe_layers / shape.layers
    each = 3 if shape.gated else 2
    width = (1 - experts) * shape.ffn + experts * (shape.top_k + shape.shared_experts) * shape.expert_ffn
    inner = each * width + 2 * (shape.heads * shape.head_dim + shape.kv_width)
    permuted = 4 * experts * shape.top_k * shape.hidden  # to the experts and back
    outer = _OUTER_PASSES * shape.hidden / np.where(plans.sequence_parallel > 0, plans.tp, 1.0)
    cast = array(how.fp8) * (2 * shape.hidden + shape.heads * shape.head_dim + width)
    moved = 2 * plans.tokens * (outer + (inner + permuted + cast) / plans.tp)
    traffic = how.either(how.fused, constants.fused_traffic, constants.eager_traffic)
    return np.asarray(traffic * moved / machine.memory_bytes_per_s)
