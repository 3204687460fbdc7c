"""Ways to split training over GPUs, any number of them at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whaleflux.planning.arrays import Array, Flags, Value
from whaleflux.planning.model_shape import ModelShape


class Recompute(IntEnum):
    """Which activations are computed again in the backward pass instead of being kept."""

    NONE = 0
    SELECTIVE = 1  # the attention core
    FULL = 2  # whole layers: only their inputs are kept (`Plans.recomputed`: of how many)


@dataclass(frozen=True, slots=True)
class Plans:
    """Plans as arrays of one shape, or of shapes that broadcast. Ranks are counted tp first, then cp, dp, pp (Megatron's order).

    `micro_batch`, `global_batch` in samples, `sequence` in tokens. `zero` is the stage of ZeRO (3: FSDP); its shards lie over dp x cp ranks
    divided by `replicas` (HSDP; 1: over all). `ep` divides dp x cp. `vp` are virtual stages of each pipeline stage (1: not interleaved).
    `recomputed` is the share of a (virtual) stage's layers, of one that has most, that full recomputation is for: as many in each of the first
    `recomputing` stages (0: in all), or all where a stage has fewer (Megatron's --recompute-num-layers). `first_layers` and `last_layers` are those of
    the first and the last stage (0: as many as each stage between them): Megatron's --decoder-first-pipeline-num-layers.
    """

    tp: Array
    pp: Array
    dp: Array
    cp: Array
    ep: Array
    vp: Array
    micro_batch: Array
    global_batch: Array
    sequence: Array
    zero: Array
    replicas: Array
    recompute: Array
    sequence_parallel: Array
    recomputed: Array
    recomputing: Array
    first_layers: Array
    last_layers: Array

    @staticmethod
    def of(
        *,
        micro_batch: ArrayLike,
        global_batch: ArrayLike,
        sequence: ArrayLike,
        tp: ArrayLike = 1,
        pp: ArrayLike = 1,
        dp: ArrayLike = 1,
        cp: ArrayLike = 1,
        ep: ArrayLike = 1,
        vp: ArrayLike = 1,
        zero: ArrayLike = 0,
        replicas: ArrayLike = 1,
        recompute: ArrayLike = Recompute.NONE,
        sequence_parallel: ArrayLike = False,
        recomputed: ArrayLike = 1.0,
        recomputing: ArrayLike = 0,
        first_layers: ArrayLike = 0,
        last_layers: ArrayLike = 0,
    ) -> Plans:
        """Of numbers, lists or arrays."""
        given = (
            tp, pp, dp, cp, ep, vp, micro_batch, global_batch, sequence, zero, replicas, recompute, sequence_parallel, recomputed,
            recomputing, first_layers, last_layers,
        )  # fmt: skip
        return Plans(*(np.asarray(one, dtype=np.float64) for one in given))

    @property
    def gpus(self) -> Array:
        """All GPUs of a plan."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def micro_batches(self) -> Array:
        """Of one data-parallel rank in a step."""
        return self.global_batch / (self.dp * self.micro_batch)

    @property
    def shards(self) -> Array:
        """Ranks over which ZeRO spreads what is spread."""
        return self.dp * self.cp / self.replicas

    @property
    def tokens(self) -> Array:
        """Of one micro-batch on one rank."""
        return self.micro_batch * self.sequence / self.cp

    @property
    def tokens_per_step(self) -> Array:
        """Of the global batch."""
        return self.global_batch * self.sequence

    @property
    def own_ends(self) -> Array:
        """How many stages, the first and the last, have a number of layers of their own."""
        return np.asarray((self.first_layers > 0).astype(np.float64) + (self.last_layers > 0))

    def between(self, shape: ModelShape) -> Array:
        """Layers of each stage that has no number of its own; counted up where they are not even, 0 where there is none."""
        stages, rest = self.pp - self.own_ends, shape.layers - self.first_layers - self.last_layers
        chunks = np.ceil(rest / (np.maximum(stages, 1) * self.vp))
        return np.asarray(np.where(stages > 0, np.maximum(chunks, 0) * self.vp, 0.0))

    def stage_layers(self, shape: ModelShape, stage: Value) -> Array:
        """Of that stage, counted from 0."""
        if not np.any(self.own_ends):
            return self.between(shape)
        last = np.where((self.last_layers > 0) & np.equal(stage, self.pp - 1), self.last_layers, self.between(shape))
        return np.where((self.first_layers > 0) & np.equal(stage, 0), self.first_layers, last)

    def again_layers(self, shape: ModelShape, stage: Value) -> Array:
        """Of that stage, those of which full recomputation keeps the input alone."""
        if not np.any(self.recompute == Recompute.FULL):
            return np.zeros(())
        most = np.maximum(np.maximum(self.first_layers, self.last_layers), self.between(shape))
        there = (self.recompute == Recompute.FULL) & ((self.recomputing == 0) | (stage < self.recomputing))
        return np.where(there, np.minimum(self.recomputed * most, self.stage_layers(shape, stage)), 0.0)

    def __len__(self) -> int:
        return int(np.broadcast(*(getattr(self, one.name) for one in fields(self))).size)

    def take(self, chosen: NDArray[np.intp] | Flags | slice | int) -> Plans:
        """Some of them, in that order."""
        whole = np.broadcast_arrays(*(getattr(self, one.name) for one in fields(self)))
        return Plans(*(np.asarray(np.atleast_1d(one)[chosen]) for one in whole))

    def faults(self, shape: ModelShape) -> dict[str, Flags]:
        """What makes plans impossible, by rule: which of them break it. A plan that breaks none can be run."""
        whole_batches = self.micro_batches
        ends, own = self.first_layers + self.last_layers, self.own_ends
        rest, stages = shape.layers - ends, self.pp - own
        broken = {
            "layers must be a multiple of pp x vp": (own == 0) & (shape.layers % (self.pp * self.vp) != 0),
            "first_layers and last_layers need pp > 1, and to leave each stage between them as many, in multiples of vp": (
                own > 0
            )
            & (
                (self.pp < 2)
                | (rest < stages)
                | (rest % (np.maximum(stages, 1) * self.vp) != 0)
                | ((stages == 0) & (rest != 0))
                | (self.first_layers % self.vp != 0)
                | (self.last_layers % self.vp != 0)
            ),
            "recomputing must be at most pp": self.recomputing > self.pp,
            "heads must be a multiple of tp": shape.heads % self.tp != 0,
            "kv_heads and tp must divide one another": (shape.kv_heads % self.tp != 0)
            & (self.tp % shape.kv_heads != 0),
            "ffn, and expert_ffn where there are experts, must be multiples of tp": shape.common_ffn % self.tp != 0,
            "global_batch must be a multiple of dp x micro_batch": (whole_batches % 1 != 0) | (whole_batches < 1),
            "sequence must be at most the model's learned positions": (shape.positions > 0)
            & (self.sequence > shape.positions),
            "sequence must be a multiple of 2 x cp": (self.cp > 1) & (self.sequence % (2 * self.cp) != 0),
            "sequence must be a multiple of tp with sequence_parallel": (self.sequence_parallel > 0)
            & ((self.sequence / self.cp) % self.tp != 0),
            "sequence_parallel needs tp > 1": (self.sequence_parallel > 0) & (self.tp < 2),
            "vp needs pp > 1, and micro-batches in a multiple of pp": (self.vp > 1)
            & ((self.pp < 2) | (whole_batches % self.pp != 0)),
            "ep needs experts, must divide them, and divide dp x cp": (self.ep > 1)
            & ((shape.experts % self.ep != 0) | (shape.experts == 0) | ((self.dp * self.cp) % self.ep != 0)),
            "replicas must divide dp x cp": (self.dp * self.cp) % self.replicas != 0,
            "zero must be 0 or 1 where pp > 1": (self.zero > 1) & (self.pp > 1),
        }
        whole = np.broadcast_shapes(*(one.shape for one in broken.values()))
        return {rule: np.broadcast_to(one, whole) for rule, one in broken.items()}

    def valid(self, shape: ModelShape) -> Flags:
        """Which of them break no rule."""
        return np.asarray(~np.any(list(self.faults(shape).values()), axis=0), dtype=np.bool_)
