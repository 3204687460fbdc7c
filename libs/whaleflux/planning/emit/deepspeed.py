"""DeepSpeed's JSON: ZeRO, micro-batch and accumulation. Its other kinds of parallelism are code of the training script, not configuration."""

from __future__ import annotations

import json

from whaleflux.planning.emit.planned import Emitted, Planned, before_bf16, refuse
from whaleflux.planning.plans import Recompute


def deepspeed(planned: Planned) -> Emitted:
    """Raises InvalidArgument for tensor, pipeline, context and expert parallelism, for replicas of shards, for 8 bit, and without ZeRO.

    Without ZeRO DeepSpeed (0.19, engine.py) takes gradients of the parameters' type only, and then keeps neither master weights nor sums in 32 bit.
    """
    refuse("DeepSpeed's JSON", *_cannot(planned))
    configuration = {
        "train_batch_size": planned.global_batch,
        "train_micro_batch_size_per_gpu": planned.micro_batch,
        "gradient_accumulation_steps": planned.micro_batches,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32" if planned.reduce_bytes >= 4 else "bf16",
        "zero_optimization": {
            "stage": planned.zero,
            "overlap_comm": planned.overlap_dp,
            "contiguous_gradients": True,
            "reduce_scatter": True,
        },
    }
    notes = []
    if planned.recompute == Recompute.FULL:
        notes.append(
            "recomputation is code, not JSON: model.gradient_checkpointing_enable() for models of Hugging Face"
        )
    notes.append("give it to deepspeed.initialize(config=...) or --deepspeed; start it with --emit torchrun")
    return Emitted("deepspeed.json", json.dumps(configuration, indent=2) + "\n", tuple(notes))


def _cannot(planned: Planned) -> list[str]:
    code = "is code there"
    wrong = {
        f"tensor parallelism {planned.tp} {code}; use --emit megatron, torchtitan or fsdp2, or plan with --tp 1": planned.tp
        > 1,
        f"pipeline parallelism {planned.pp} {code} (PipelineModule); use --emit megatron or torchtitan, or plan with --pp 1": planned.pp
        > 1,
        f"context parallelism {planned.cp} {code} (Ulysses); use --emit megatron, torchtitan or fsdp2, or plan with --cp 1": planned.cp
        > 1,
        f"expert parallelism {planned.ep} {code}; use --emit megatron or torchtitan, or plan with --ep 1": planned.ep
        > 1,
        f"{planned.replicas} replicas of shards (HSDP); use --emit fsdp2, torchtitan or megatron": planned.zero > 0
        and planned.replicas > 1,
        "linear layers in 8 bit; use --emit megatron or torchtitan": planned.fp8 > 0,
        "gradients in 32 bit without ZeRO; plan with --zero 1": planned.zero < 1,
    }
    return [*before_bf16(planned), *(one for one, there in wrong.items() if there)]
