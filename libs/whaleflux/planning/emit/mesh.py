"""The device mesh of PyTorch (FSDP2, tensor and context parallelism) as a file, which `whaleflux.sdk.device_mesh` reads."""

from __future__ import annotations

import json

from whaleflux.planning.emit.planned import FP8, SHARED_REPLICAS, Emitted, Planned, Rule, cannot, has_bf16, refuse

AXES = (
    "pp",
    "dp_replicate",
    "dp_shard",
    "cp",
    "tp",
)  # outermost first: neighbouring ranks share a tensor-parallel group


RULES = (
    Rule(
        lambda _, split: split.ep > 1,
        lambda it: (
            f"expert parallelism {it.split.ep} is no dimension of its mesh; use --emit megatron or torchtitan, or plan with --ep 1"
        ),
    ),
    SHARED_REPLICAS,
    FP8,
)


def fsdp2(planned: Planned) -> Emitted:
    """Raises InvalidArgument for what is no dimension of a mesh. ZeRO-1 is FSDP2 that gathers once and reduces with the last micro-batch."""
    refuse("FSDP2", *cannot(planned, RULES))
    shards = planned.split.dp // planned.split.replicas if planned.split.zero else 1
    sizes = dict(
        zip(
            AXES,
            (planned.split.pp, planned.split.dp // shards, shards, planned.split.cp, planned.split.tp),
            strict=True,
        )
    )
    recompute = planned.split.recompute if planned.split.recompute != "selective" else "none"
    plan = {
        "mesh": sizes,
        "reshard_after_forward": planned.split.zero > 2,
        "reduce_each_micro_batch": planned.split.zero > 1,
        "sequence_parallel": planned.split.sequence_parallel,
        "micro_batch": planned.split.micro_batch,
        "micro_batches": planned.split.micro_batches,
        "sequence": planned.split.sequence,
        "virtual_stages": planned.split.vp,
        "stage_layers": list(planned.stage_layers),
        "recompute": recompute,
        "recomputed": planned.split.recomputed if recompute == "full" else 0.0,
        "recomputing_stages": planned.split.recomputing or planned.split.pp,
        "parameters": "bfloat16",
        "reduce": "float32" if planned.reduce_bytes >= 4 else "bfloat16",
        "model": {"heads": planned.shape.heads, "layers": planned.shape.layers},
    }
    notes = [
        "read by whaleflux.sdk.device_mesh('mesh.json'); start the ranks with --emit torchrun, or as a WhaleFlux job"
    ]
    if planned.frozen:
        notes.append("adapters are the script's own: freeze the weights and add them before plan.shard")
    if planned.split.pp > 1:
        notes.append("stages are the script's own: torch.distributed.pipelining over mesh['pp']")
    if planned.split.tp > 1:
        notes.append("which layers are split over mesh['tp'] is the script's own: parallelize_module")
    if planned.shape.kv_heads % planned.split.tp:
        notes.append(
            f"{planned.shape.kv_heads} heads of keys and values are fewer than tensor parallelism {planned.split.tp}: the script has to repeat them"
        )
    if not has_bf16(planned):
        notes.append(
            "these GPUs compute bf16 more slowly than planned (they emulate it): set parameters to float16, and scale the loss"
        )
    return Emitted("mesh.json", json.dumps(plan, indent=2) + "\n", tuple(notes))
