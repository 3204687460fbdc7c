"""How the training software works, as far as its cost depends on it: facts of a stack, not constants of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whaleflux.planning.arrays import Array, Value

ADAPTER_RANK = 16  # of adapters, which are on every linear layer but the output: what people usually take


@dataclass(frozen=True, slots=True)
class Training:
    """Each is one value, or one for each plan. The defaults are today's Megatron-Core or FSDP2 in bf16.

    Bytes are per parameter: `weight_bytes` of what is multiplied, `gradient_bytes` as they are summed up, `optimizer_bytes` of master weights
    and Adam's two moments, `reduce_bytes` of gradients on the wire. `frozen`: the weights are (LoRA): gradients and optimizer are of adapters alone.
    `kept`: activations against the formula's (0: 1 where fused, else 1.6). `logits_bytes` and `logits_traffic` of one logit at the loss: held at
    most, and moved in passes of 4 bytes against those of the constants (0: as those); `optimizer_traffic` likewise. `cast_bytes` are moved for each weight and
    micro-batch where weights are kept in 32 bit and multiplied in 16 (autocast, FSDP2's mixed precision: 12). `data_tokens_per_s` is what a GPU's share of the loader delivers (0: never waited for); a checkpoint halts training for
    `checkpoint_s` once in `checkpoint_every_s` (0: none).
    """

    flash: Value = True  # attention without stored scores
    fused: Value = True  # element-wise kernels are fused (Transformer Engine, torch.compile)
    dropout: Value = False
    fp8: Value = 0  # linear layers in 8 bit or less, attention in 16: how often tensors are cast (1: scale per tensor, 2: per block)
    overlap_tp: Value = False  # tensor-parallel collectives run beside the multiplications (user buffers, async TP); no published run is faster for it
    overlap_gradients: Value = (
        True  # inputs' gradients are reduced over tp beside the weights' gradients (Megatron since v3.0)
    )
    fused_gradients: Value = (
        True  # a micro-batch's gradients are added within the multiplication (Megatron since v3.0), not after it
    )
    overlap_pp: Value = True  # sends between stages run beside computation
    overlap_dp: Value = True  # gradients are reduced while the backward pass runs
    frozen: Value = False
    lazy_gradients: Value = (
        False  # they are there only in the backward pass (PyTorch), not from the first step on (Megatron)
    )
    weight_bytes: Value = 2
    gradient_bytes: Value = 4
    optimizer_bytes: Value = 12
    reduce_bytes: Value = 4
    kept: Value = 0
    logits_bytes: Value = 8
    logits_traffic: Value = 0
    optimizer_traffic: Value = 0
    cast_bytes: Value = 0
    data_tokens_per_s: Value = 0
    checkpoint_s: Value = 0
    checkpoint_every_s: Value = 0

    def either(self, flag: Value, yes: Value, no: Value) -> Array:
        """`yes` where the flag is set."""
        return np.where(np.asarray(flag, dtype=bool), yes, no).astype(np.float64)
