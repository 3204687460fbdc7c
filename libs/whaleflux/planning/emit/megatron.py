"""Flags of Megatron-LM (Megatron-Core 0.16 to 0.19), in a script that starts `pretrain_gpt.py` with them."""

from __future__ import annotations

import math

from whaleflux.planning.emit.planned import BF16, Emitted, Planned, Rule, cannot, refuse
from whaleflux.planning.emit.torchrun import environment, head, launcher
from whaleflux.planning.model_shape import ModelShape

Flags = dict[str, str | int | None]  # None: a flag without a value


def megatron(planned: Planned) -> Emitted:
    """Raises InvalidArgument for adapters, and for what Megatron's own checks refuse."""
    refuse("Megatron-LM", *cannot(planned, RULES))
    lines = [
        *head(planned),
        *environment(planned, sharded=planned.split.zero > 1),
        "arguments=(",
        *(f"  --{name}{'' if value is None else f' {_quoted(value)}'}" for name, value in flags(planned).items()),
        ")",
        *(_launched_by_stage(planned) if planned.split.recomputing else _launched(planned)),
        'exec "${launch[@]}" "${PRETRAIN:-pretrain_gpt.py}" "${arguments[@]}" "$@"',
        "",
    ]
    note = (
        "add what the plan does not decide: bash megatron.sh --data-path ... --tokenizer-type ... --train-iters ... --lr ...; "
        f"to try it: --mock-data --tokenizer-type NullTokenizer --vocab-size {planned.shape.vocabulary}"
    )
    return Emitted("megatron.sh", "\n".join(lines), (note, *planned.uneven()))


_STARTED = "# A rank that has been started already (in a WhaleFlux job, by srun) starts no others."


def _launched(planned: Planned) -> list[str]:
    started = " ".join(launcher(planned))
    return [_STARTED, f'if [ -n "${{RANK:-}}" ]; then launch=(python); else launch=({started}); fi']


def _launched_by_stage(planned: Planned) -> list[str]:
    """Each rank runs the script itself, since those of the first stages have flags of their own: Megatron counts stages outermost."""
    split, started = planned.split, " ".join(launcher(planned))
    words = " ".join(
        f"--{name} {_quoted(value)}" for name, value in _recomputation(planned).items() if value is not None
    )
    return [
        _STARTED,
        f'if [ -z "${{RANK:-}}" ]; then exec {started} --no-python bash "${{BASH_SOURCE[0]}}" "$@"; fi',
        f"# The first {split.recomputing} of {split.pp} stages, of {split.gpus // split.pp} ranks each, compute layers again.",
        f"if [ $((RANK / {split.gpus // split.pp})) -lt {split.recomputing} ]; then arguments+=({words}); fi",
        "launch=(python)",
    ]


def flags(planned: Planned) -> Flags:
    """By name without the dashes; of every rank."""
    return {
        **_model(planned.shape, planned),
        **(_experts(planned.shape, planned) if planned.shape.experts else {}),
        **_split(planned),
        **_precision(planned),
        **_data_parallel(planned),
        **({} if planned.split.recomputing else _recomputation(planned)),
    }


RULES = (
    BF16,
    Rule(lambda facts, _: facts.frozen, lambda _: "adapters; use --emit fsdp2 or deepspeed with a library of adapters"),
    Rule(
        lambda facts, split: (facts.shape.positions > 0) & (split.sequence > facts.shape.positions),
        lambda it: (
            f"sequences longer than the model's {it.shape.positions:,} learned positions; use --sequence {it.shape.positions}"
        ),
    ),
    Rule(
        lambda facts, split: (facts.shape.experts > 0) & (split.tp > 1) & (split.sequence_parallel == 0),
        lambda _: "experts with tensor parallelism want sequence parallelism; plan with it",
    ),
    Rule(
        lambda _, split: (split.replicas > 1) & (split.zero < 1),
        lambda _: "replicas without ZeRO; plan with --zero 1",
    ),
    Rule(
        lambda facts, split: (facts.shape.experts > 0) & (split.dp * split.cp // split.ep % split.replicas > 0),
        lambda it: (
            f"{it.split.replicas} replicas of shards where each expert is there {it.split.dp * it.split.cp // it.split.ep} times; use another number"
        ),
    ),
)


def _model(shape: ModelShape, planned: Planned) -> Flags:
    learned = shape.positions > 0
    common: Flags = {
        "num-layers": shape.layers,
        "hidden-size": shape.hidden,
        "ffn-hidden-size": shape.ffn,
        "num-attention-heads": shape.heads,
        "seq-length": planned.split.sequence,
        "max-position-embeddings": shape.positions if learned else max(planned.split.sequence, shape.sequence),
        "position-embedding-type": "learned_absolute" if learned else "rope",
        "attention-backend": "flash" if planned.flash else "unfused",
    }
    if not planned.dropout:
        common |= {"attention-dropout": 0, "hidden-dropout": 0}
    if shape.gated:  # as all such models of the last years: no biases, RMS norms
        common |= {"swiglu": None, "disable-bias-linear": None, "normalization": "RMSNorm"}
    if not shape.tied:
        common["untie-embeddings-and-output-weights"] = None
    return common | _attention(shape)


def _attention(shape: ModelShape) -> Flags:
    if shape.latent is None:
        grouped: Flags = (
            {"group-query-attention": None, "num-query-groups": shape.kv_heads} if shape.kv_heads != shape.heads else {}
        )
        return {"kv-channels": shape.head_dim, **grouped}
    one = shape.latent
    queries: Flags = {"q-lora-rank": one.query_rank} if one.query_rank else {}
    return {
        "multi-latent-attention": None, **queries, "kv-lora-rank": one.kv_rank, "qk-head-dim": shape.head_dim - one.rope,
        "qk-pos-emb-head-dim": one.rope, "v-head-dim": one.value,
    }  # fmt: skip


def _experts(shape: ModelShape, planned: Planned) -> Flags:
    found: Flags = {
        "num-experts": shape.experts,
        "moe-router-topk": shape.top_k,
        "moe-ffn-hidden-size": shape.expert_ffn,
        "moe-grouped-gemm": None,
        "moe-token-dispatcher-type": "alltoall",
        "expert-model-parallel-size": planned.split.ep,
        "expert-tensor-parallel-size": planned.split.tp,  # each expert is split as the rest of its layer is
    }
    if shape.shared_experts:
        found["moe-shared-expert-intermediate-size"] = shape.shared_experts * shape.expert_ffn
    if shape.dense_layers:
        found["moe-layer-freq"] = f"([0]*{shape.dense_layers}+[1]*{shape.moe_layers})"
    return found


def _split(planned: Planned) -> Flags:
    found: Flags = {
        "tensor-model-parallel-size": planned.split.tp,
        "pipeline-model-parallel-size": planned.split.pp,
        "context-parallel-size": planned.split.cp,
        "micro-batch-size": planned.split.micro_batch,
        "global-batch-size": planned.split.global_batch,
    }
    ends = {"first": planned.split.first_layers, "last": planned.split.last_layers}
    found |= {f"decoder-{end}-pipeline-num-layers": layers for end, layers in ends.items() if layers}
    if planned.split.vp > 1 and any(ends.values()):
        found["num-virtual-stages-per-pipeline-rank"] = planned.split.vp
    elif planned.split.vp > 1:
        found["num-layers-per-virtual-pipeline-stage"] = planned.layers_per_chunk
    if planned.split.sequence_parallel:
        found["sequence-parallel"] = None
        found |= {"tp-comm-overlap": None} if planned.overlap_tp else {}
    return found


def _precision(planned: Planned) -> Flags:
    found: Flags = {"bf16": None}
    if planned.reduce_bytes < 4:
        found["grad-reduce-in-bf16"] = None
    if planned.fp8:
        found |= {"fp8-format": "hybrid", "fp8-recipe": "tensorwise" if planned.fp8 == 1 else "blockwise"}
    return found


def _data_parallel(planned: Planned) -> Flags:
    found: Flags = {"overlap-grad-reduce": None} if planned.overlap_dp or planned.split.replicas > 1 else {}
    if planned.split.zero:
        found["use-distributed-optimizer"] = None
        found |= {"overlap-param-gather": None} if planned.overlap_dp else {}
    if planned.split.replicas > 1:
        found["num-distributed-optimizer-instances"] = planned.split.replicas
    if planned.split.zero > 1:
        strategy = "optim_grads" if planned.split.zero == 2 else "optim_grads_params"
        found |= {
            "use-megatron-fsdp": None,
            "data-parallel-sharding-strategy": strategy,
            "no-gradient-accumulation-fusion": None,
        }
        found["ckpt-format"] = "fsdp_dtensor"
    return found


def _recomputation(planned: Planned) -> Flags:
    """A share of the layers is given as so many of each (virtual) stage, counted up: what is kept is never more than planned."""
    if planned.split.recompute == "none":
        return {}
    if planned.split.recompute == "selective":
        return {"recompute-granularity": "selective", "recompute-modules": "core_attn"}
    if planned.split.recomputed >= 1:
        return {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    some = math.ceil(planned.split.recomputed * planned.layers_per_chunk - 1e-9)
    return {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": some} if some else {}


def _quoted(value: str | int) -> str:
    text = str(value)
    return text if text.replace("_", "").replace("-", "").isalnum() else f"'{text}'"
