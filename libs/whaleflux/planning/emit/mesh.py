"""The device mesh of PyTorch (FSDP2, tensor and context parallelism) as a file, which `whaleflux.sdk.device_mesh` reads."""

from __future__ import annotations

import json

from whaleflux.planning.emit.planned import Emitted, Planned, before_bf16, refuse
from whaleflux.planning.plans import Recompute

AXES = (
    "pp",
    "dp_replicate",
    "dp_shard",
    "cp",
    "tp",
)  # outermost first: neighbouring ranks share a tensor-parallel group


def fsdp2(planned: Planned) -> Emitted:
    """Raises InvalidArgument for what is no dimension of a mesh. ZeRO-1 is FSDP2 that gathers once and reduces with the last micro-batch."""
    refuse("FSDP2", *_cannot(planned))
    shards = planned.dp // planned.replicas if planned.zero else 1
    sizes = dict(zip(AXES, (planned.pp, planned.dp // shards, shards, planned.cp, planned.tp), strict=True))
    recompute = planned.recompute.name.lower() if planned.recompute != Recompute.SELECTIVE else "none"
    plan = {
        "mesh": sizes,
        "reshard_after_forward": planned.zero > 2,
        "reduce_each_micro_batch": planned.zero > 1,
        "sequence_parallel": planned.sequence_parallel,
        "micro_batch": planned.micro_batch,
        "micro_batches": planned.micro_batches,
        "sequence": planned.sequence,
        "virtual_stages": planned.vp,
        "recompute": recompute,
        "recomputed": planned.recomputed if recompute == "full" else 0.0,
        "parameters": "bfloat16",
        "reduce": "float32" if planned.reduce_bytes >= 4 else "bfloat16",
        "model": {"heads": planned.shape.heads, "layers": planned.shape.layers},
    }
    notes = [
        "read by whaleflux.sdk.device_mesh('mesh.json'); start the ranks with --emit torchrun, or as a WhaleFlux job"
    ]
    if planned.frozen:
        notes.append("adapters are the script's own: freeze the weights and add them before plan.shard")
    if planned.pp > 1:
        notes.append("stages are the script's own: torch.distributed.pipelining over mesh['pp']")
    if planned.tp > 1:
        notes.append("which layers are split over mesh['tp'] is the script's own: parallelize_module")
    if planned.shape.kv_heads % planned.tp:
        notes.append(
            f"{planned.shape.kv_heads} heads of keys and values are fewer than tensor parallelism {planned.tp}: the script has to repeat them"
        )
    if before_bf16(planned):
        notes.append(
            "these GPUs compute bf16 more slowly than planned (they emulate it): set parameters to float16, and scale the loss"
        )
    return Emitted("mesh.json", json.dumps(plan, indent=2) + "\n", tuple(notes))


def _cannot(planned: Planned) -> list[str]:
    wrong = {
        f"expert parallelism {planned.ep} is no dimension of its mesh; use --emit megatron or torchtitan, or plan with --ep 1": planned.ep
        > 1,
        f"{planned.replicas} replicas that share context-parallel ranks; let replicas divide dp {planned.dp}, or use --emit megatron": planned.dp
        % planned.replicas
        > 0,
        "linear layers in 8 bit; use --emit megatron or torchtitan": planned.fp8 > 0,
    }
    return [one for one, there in wrong.items() if there]
