"""What each plan needs on the fullest GPU, in bytes by component.

Korthikanti et al. 2022 (activations), Megatron-Core's theoretical memory (states); the reference figures of 700B on 128 H200 are a unit test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from whaleflux.planning.arrays import Array, Flags, Value, array
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import ADAPTER_RANK, Training

# Eager kernels keep what fused ones compute anew: norms in 32 bit, parts of the activation. Measured on an H200, six shapes, PyTorch 2.11: 1.58-1.62.
_EAGER_KEPT = 1.6
# ZeRO-3: the output layer is gathered whole, has a 16-bit gradient, and a 32-bit buffer in which that is reduced.
_END_BYTES = 2 + 2 + 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a GPU of the stage that needs most; arrays of the plans' shape. What the driver and communicators hold is `Machine.reserved_bytes`.

    `activations_bytes` are kept from forward to backward; `working_bytes` is what one layer needs while it runs: the layer that is computed
    again, the two whose weights are gathered (ZeRO-3); `logits_bytes` is what those of the
    last stage need beyond a layer that is computed again: both are never there at once.
    """

    weights_bytes: Array
    gradients_bytes: Array
    optimizer_bytes: Array
    activations_bytes: Array
    working_bytes: Array
    logits_bytes: Array

    @property
    def state_bytes(self) -> Array:
        """Weights, gradients and the optimizer's: what does not depend on the batch."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> Array:
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)), dtype=np.float64)

    def of(self, number: int) -> dict[str, float]:
        """One plan's components by name."""
        whole = np.broadcast_arrays(*(np.atleast_1d(getattr(self, one.name)) for one in fields(self)))
        return {one.name: float(part[number]) for one, part in zip(fields(self), whole, strict=True)}


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters on one rank before ZeRO: those that data-parallel ranks have in common, and of experts those that `ep` left here."""

    common: Array
    experts: Array

    def owned(self, plans: Plans, spread: Flags) -> Array:
        """How many remain where they are spread over ZeRO's shards; those of experts lie on fewer copies."""
        copies = np.maximum(plans.shards / plans.ep, 1.0)
        return np.asarray(
            np.where(spread, self.common / plans.shards + self.experts / copies, self.common + self.experts)
        )


def layer_weights(shape: ModelShape, plans: Plans) -> Weights:
    """Of the average layer."""
    experts = shape.moe_layers / shape.layers * shape.expert_weights
    return Weights(np.asarray(shape.layer_weights / plans.tp), np.asarray(experts / (plans.tp * plans.ep)))


def stage_weights(shape: ModelShape, plans: Plans, stage: Value) -> Weights:
    """Of that stage, counted from 0: the first has the embedding, the last the output layer, one stage both."""
    layer = layer_weights(shape, plans)
    layers = plans.stage_layers(shape, stage)
    first, last = np.equal(stage, 0), plans.pp - 1 == stage
    tied = shape.tied & first & last  # one stage: the output layer is the embedding
    end = np.where(first, shape.embedding_weights, 0) + np.where(last & ~tied, shape.head_weights, 0)
    return Weights(layers * layer.common + end / plans.tp, layers * layer.experts)


def stage_adapters(shape: ModelShape, plans: Plans, stage: Value) -> Weights:
    """Of adapters (LoRA) on every linear layer of that stage. Tensor parallelism splits one of an adapter's two matrices: both count whole."""
    layers = ADAPTER_RANK * plans.stage_layers(shape, stage)
    experts = shape.moe_layers / shape.layers * shape.experts * shape.mlp_ends(shape.expert_ffn)
    return Weights(np.asarray(layers * shape.layer_ends), np.asarray(layers * experts / plans.ep))


def activation_bytes(shape: ModelShape, plans: Plans, how: Training) -> tuple[Array, Array]:
    """Of one layer and one micro-batch on one rank: (all of them, those that the plan's recomputation keeps of a layer that it is for).

    In 8 bit, inputs of linear layers are kept as they were multiplied: one byte; attention keeps its output in 16 bit besides.
    """
    small = np.where(array(how.fp8) > 0, 1.0, 0.0)
    experts = shape.moe_layers / shape.layers
    each = (6 if shape.gated else 4) - small  # what enters the activation, and what leaves it
    width = (1 - experts) * shape.ffn + experts * (shape.top_k + shape.shared_experts) * shape.expert_ffn
    heads = (
        2 * (shape.heads * (shape.head_dim + shape.value_dim) + shape.kv_width) + small * shape.heads * shape.value_dim
    )
    inner = heads + each * width
    permuted = 4 * experts * shape.top_k * shape.hidden  # to experts and back
    outer = (
        how.either(how.dropout, 10, 8) - 2 * small
    ) * shape.hidden  # norms, inputs of the projections, masks of dropout
    scores = 5 * shape.heads * plans.sequence * how.either(how.flash, 0.0, 1.0)
    shared = np.where(plans.sequence_parallel > 0, plans.tp, 1.0)
    more = np.where(array(how.kept) > 0, how.kept, how.either(how.fused, 1.0, _EAGER_KEPT))
    without = more * plans.tokens * (outer / shared + (inner + permuted) / plans.tp)
    whole = without + plans.tokens * scores / plans.tp
    inputs = 2 * plans.tokens * shape.hidden / shared
    kept = np.where(
        plans.recompute == Recompute.FULL, inputs, np.where(plans.recompute == Recompute.SELECTIVE, without, whole)
    )
    return np.asarray(whole), np.asarray(kept)


def least_state_bytes(shape: ModelShape, plans: Plans, how: Training) -> Array:
    """What no way to run these cells (tp, pp, dp, cp) can do without on its fullest GPU, whatever is chosen of the rest.

    That of the average GPU: weights, gradients and the optimizer's state spread as far as ZeRO beside a pipeline, or without one, spreads them.
    """
    trained = how.either(how.frozen, 0.0, 1.0)
    kept = np.where(
        array(how.lazy_gradients) > 0, array(how.weight_bytes), array(how.weight_bytes) + trained * how.gradient_bytes
    )
    experts = shape.moe_layers * shape.expert_weights
    common = shape.layers * shape.layer_weights + shape.embedding_weights + (0 if shape.tied else shape.head_weights)
    copied = np.where(plans.pp > 1, common * plans.dp * plans.cp, common)
    return np.asarray((kept * (copied + experts) + trained * how.optimizer_bytes * (common + experts)) / plans.gpus)


def memory(shape: ModelShape, plans: Plans, how: Training) -> Memory:
    """Of the stage that needs most.

    The first holds activations of as many micro-batches as there are stages, the last the logits. The second, or the first that computes nothing
    again, needs more only where the ends have layers of their own, or not all stages recompute.
    """
    fullest = _fuller(memory_of_stage(shape, plans, how, 0), memory_of_stage(shape, plans, how, plans.pp - 1))
    if np.any(plans.own_ends > 0):
        fullest = _fuller(fullest, memory_of_stage(shape, plans, how, np.minimum(1.0, plans.pp - 1)))
    if np.any(plans.recomputing > 0):
        keeping = np.where(plans.recomputing > 0, np.minimum(plans.recomputing, plans.pp - 1), 0)
        fullest = _fuller(fullest, memory_of_stage(shape, plans, how, keeping))
    return fullest


def _fuller(one: Memory, other: Memory) -> Memory:
    more = other.total_bytes > one.total_bytes
    return Memory(*(np.where(more, getattr(other, name.name), getattr(one, name.name)) for name in fields(Memory)))


def memory_of_stage(shape: ModelShape, plans: Plans, how: Training, stage: Value) -> Memory:
    """Of one pipeline stage, counted from 0. `working_bytes` and `logits_bytes` are there at once only in the last one."""
    final = plans.pp - 1 == stage
    weights = stage_weights(shape, plans, stage)
    frozen, adapters = how.either(how.frozen, 1.0, 0.0), stage_adapters(shape, plans, stage)

    def owned(spread: Flags) -> Array:
        """Of what is trained."""
        return np.where(frozen > 0, adapters.owned(plans, spread), weights.owned(plans, spread))

    multiplied = weights.owned(plans, plans.zero > 2) + frozen * adapters.owned(plans, plans.zero > 2)
    layers, fully = plans.stage_layers(shape, stage), plans.again_layers(shape, stage)
    some = fully > 0
    whole, kept = activation_bytes(shape, plans, how)
    logits = array(how.logits_bytes) * plans.tokens * shape.vocabulary / plans.tp * np.where(final, 1.0, 0.0)
    again = np.where(some, whole, np.where(plans.recompute == Recompute.SELECTIVE, whole - kept, 0.0))
    layer = layer_weights(shape, plans)
    gathered = np.where(
        plans.zero > 2, 2 * 2 * (layer.common + layer.experts) + _END_BYTES * shape.head_weights / plans.tp, 0.0
    )
    # The loss and a layer that is computed again are never there at once.
    logits = np.maximum(logits - again, 0.0)
    gradients = how.gradient_bytes * owned(plans.zero > 1)
    full = plans.recompute == Recompute.FULL
    held = (np.where(full, (layers - fully) * whole, layers * kept) + fully * kept) * _in_flight(plans, stage)
    # Lazy ones of a single micro-batch grow where activations are given back, beside the 16-bit weights: only what is more than those counts.
    beside = array(how.weight_bytes) * multiplied + held + again + gathered + logits
    lazy = (array(how.lazy_gradients) > 0) & (plans.micro_batches <= 1)
    parts = (
        array(how.weight_bytes) * multiplied,
        np.where(lazy, np.maximum(gradients - beside, 0.0), gradients),
        how.optimizer_bytes * owned(plans.zero > 0),
        held,
        again + gathered,
        logits,
    )
    return Memory(*(np.asarray(part, dtype=np.float64) for part in np.broadcast_arrays(*parts)))


def _in_flight(plans: Plans, stage: Value) -> Array:
    """Micro-batches whose activations a stage holds at once, 1F1B; interleaved, more of them (Megatron's warm-up of every virtual stage)."""
    before, virtual = plans.pp - 1 - stage, plans.vp
    interleaved = (2 * before + (virtual - 1) * plans.pp + 1) / virtual
    held = np.where(virtual > 1, interleaved, before + 1)
    return np.asarray(np.minimum(held, np.maximum(plans.micro_batches, 1.0)))
