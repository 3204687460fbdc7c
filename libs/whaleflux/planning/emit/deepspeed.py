"""DeepSpeed's JSON: ZeRO, micro-batch and accumulation. Its other kinds of parallelism are code of the training script, not configuration."""

from __future__ import annotations

import json

from whaleflux.planning.emit.planned import BF16, FP8, Emitted, Planned, Rule, cannot, refuse

RULES = (
    BF16,
    Rule(
        lambda _, split: split.tp > 1,
        lambda it: (
            f"tensor parallelism {it.split.tp} is code there; use --emit megatron, torchtitan or fsdp2, or plan with --tp 1"
        ),
    ),
    Rule(
        lambda _, split: split.pp > 1,
        lambda it: (
            f"pipeline parallelism {it.split.pp} is code there (PipelineModule); use --emit megatron or torchtitan, or plan with --pp 1"
        ),
    ),
    Rule(
        lambda _, split: split.cp > 1,
        lambda it: (
            f"context parallelism {it.split.cp} is code there (Ulysses); use --emit megatron, torchtitan or fsdp2, or plan with --cp 1"
        ),
    ),
    Rule(
        lambda _, split: split.ep > 1,
        lambda it: (
            f"expert parallelism {it.split.ep} is code there; use --emit megatron or torchtitan, or plan with --ep 1"
        ),
    ),
    Rule(
        lambda _, split: (split.zero > 0) & (split.replicas > 1),
        lambda it: f"{it.split.replicas} replicas of shards (HSDP); use --emit fsdp2, torchtitan or megatron",
    ),
    FP8,
    Rule(lambda _, split: split.zero < 1, lambda _: "gradients in 32 bit without ZeRO; plan with --zero 1"),
)


def deepspeed(planned: Planned) -> Emitted:
    """Raises InvalidArgument for tensor, pipeline, context and expert parallelism, for replicas of shards, for 8 bit, and without ZeRO.

    Without ZeRO DeepSpeed (0.19, engine.py) takes gradients of the parameters' type only, and then keeps neither master weights nor sums in 32 bit.
    """
    refuse("DeepSpeed's JSON", *cannot(planned, RULES))
    configuration = {
        "train_batch_size": planned.split.global_batch,
        "train_micro_batch_size_per_gpu": planned.split.micro_batch,
        "gradient_accumulation_steps": planned.split.micro_batches,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32" if planned.reduce_bytes >= 4 else "bf16",
        "zero_optimization": {
            "stage": planned.split.zero,
            "overlap_comm": planned.overlap_dp,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
    }
    notes = []
    if planned.split.recompute == "full":
        notes.append(
            "recomputation is code, not JSON: model.gradient_checkpointing_enable() for models of Hugging Face"
        )
    notes.append("give it to deepspeed.initialize(config=...) or --deepspeed; start it with --emit torchrun")
    return Emitted("deepspeed.json", json.dumps(configuration, indent=2) + "\n", tuple(notes))
