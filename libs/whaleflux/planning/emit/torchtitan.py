"""TOML of torchtitan 0.2. 0.3 has no such files: most of the fields are its command line's, `--parallelism.tensor_parallel_degree 8`."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from whaleflux.planning.emit.planned import Emitted, Planned, before_bf16, refuse
from whaleflux.planning.known_models import MODELS
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Recompute

Field: TypeAlias = str | int | bool | list[str]
Sections: TypeAlias = dict[str, dict[str, Field]]

# Shapes that torchtitan has itself (torchtitan/models/*/__init__.py): its name and flavor of ours.
_FLAVORS = {
    "llama-3.1-8b": ("llama3", "8B"),
    "llama-3.1-70b": ("llama3", "70B"),
    "llama-3.1-405b": ("llama3", "405B"),
    "qwen3-8b": ("qwen3", "8B"),
    "qwen3-14b": ("qwen3", "14B"),
    "qwen3-32b": ("qwen3", "32B"),
    "qwen3-30b-a3b": ("qwen3", "30B-A3B"),
    "qwen3-235b-a22b": ("qwen3", "235B-A22B"),
    "deepseek-v2-lite": ("deepseek_v3", "16B"),
    "deepseek-v3": ("deepseek_v3", "671B"),
    "gpt-oss-20b": ("gpt_oss", "20b"),
    "gpt-oss-120b": ("gpt_oss", "120b"),
}


def torchtitan(planned: Planned) -> Emitted:
    """Raises InvalidArgument for what torchtitan's fields cannot say."""
    refuse("torchtitan", *_cannot(planned))
    sections: Sections = {
        "job": {"description": planned.title()},
        "model": _model(planned),
        "training": _training(planned),
        "parallelism": _parallelism(planned),
        "activation_checkpoint": _recomputation(planned),
        "compile": {"enable": planned.fused},
    }
    if planned.fp8:
        sections["quantize.linear.float8"] = {"recipe_name": "tensorwise" if planned.fp8 == 1 else "rowwise"}
    return Emitted("torchtitan.toml", _toml(sections), tuple(_notes(planned)))


def _cannot(planned: Planned) -> list[str]:
    wrong = {**_wrong_model(planned), **_wrong_split(planned), **_wrong_experts(planned)}
    return [*before_bf16(planned), *(one for one, there in wrong.items() if there)]


def _wrong_model(planned: Planned) -> dict[str, bool]:
    """What its models refuse themselves (torchtitan/models/*/infra/parallelize.py, pipelining_fn in their TrainSpec)."""
    shape, family = planned.shape, _family(planned.shape)
    other = shape.experts or shape.latent or not shape.gated or shape.positions
    return {
        "adapters; use --emit fsdp2 or deepspeed with a library of adapters": planned.frozen,
        f"the model {shape.name}, which it does not have; use --emit megatron": not _flavor(shape) and bool(other),
        f"pipeline parallelism {planned.pp}: its {family} has none; plan with --pp 1, or use --emit megatron": planned.pp
        > 1
        and family in ("qwen3", "gpt_oss"),
        f"context parallelism {planned.cp}: its {family} has none; plan with --cp 1, or use --emit megatron": planned.cp
        > 1
        and family == "gpt_oss",
        f"8 bit with one scale per tensor beside tensor parallelism {planned.tp} of its {family}; plan with --tp 1, or use --emit megatron": planned.fp8
        == 1
        and planned.tp > 1
        and family == "deepseek_v3",
    }


def _wrong_split(planned: Planned) -> dict[str, bool]:
    kv_heads, every = planned.shape.kv_heads, 2 * planned.cp * planned.tp
    return {
        f"tensor parallelism {planned.tp} of {kv_heads} heads of keys and values, which it does not repeat; plan with a --tp that divides them, or use --emit megatron": kv_heads
        % planned.tp
        > 0,
        f"sequences of {planned.sequence} tokens, which must be a multiple of 2 x cp x tp there; plan with --sequence {-(-planned.sequence // every) * every}": planned.sequence
        % every
        > 0,
        f"{planned.replicas} replicas that share context-parallel ranks; let replicas divide dp {planned.dp}, or use --emit megatron": planned.dp
        % planned.replicas
        > 0,
        "data parallelism without shards beside another kind; plan with --zero 1 or more, or use --emit megatron": not planned.zero
        and planned.dp > 1
        and planned.tp * planned.pp * planned.cp > 1,
    }


def _wrong_experts(planned: Planned) -> dict[str, bool]:
    """Expert parallelism takes all context-parallel ranks, and of data-parallel ones only shards (ParallelDims of 0.2.0 and 0.2.1; 0.2.2 wants the latter)."""
    among = _shards(planned) * planned.cp
    zero = "" if planned.zero else " (more with --zero 1)"
    return {
        f"expert parallelism {planned.ep} across ranks that are no shards; let it divide shards x cp, {among} here{zero}, or use --emit megatron": planned.ep
        > 1
        and among % planned.ep > 0,
        f"expert parallelism {planned.ep} beside context parallelism {planned.cp}, of which it must be a multiple there; plan with a --cp that divides it, or use --emit megatron": planned.ep
        > 1
        and planned.ep % planned.cp > 0,
    }


def _shards(planned: Planned) -> int:
    """Data-parallel ranks among which parameters are spread."""
    return planned.dp // planned.replicas if planned.zero else 1


def _flavor(shape: ModelShape) -> tuple[str, str] | None:
    """By numbers, not by name: a config.json of the same model is found too. The longest sequence is training's business."""
    for name, found in _FLAVORS.items():
        known = MODELS[name]
        if replace(shape, name=name, sequence=known.sequence) == known:
            return found
    return None


def _family(shape: ModelShape) -> str:
    return (_flavor(shape) or ("llama3", ""))[0]


def _model(planned: Planned) -> dict[str, Field]:
    name, flavor = _flavor(planned.shape) or ("llama3", planned.shape.name)
    found: dict[str, Field] = {"name": name, "flavor": flavor}
    if planned.fp8:
        found["converters"] = ["quantize.linear.float8"]
    return found


def _training(planned: Planned) -> dict[str, Field]:
    """A pipeline's micro-batches are parts of the local batch; without one, what the global batch has more is accumulated."""
    local = planned.micro_batch * (planned.micro_batches if planned.pp > 1 else 1)
    return {
        "local_batch_size": local,
        "global_batch_size": planned.global_batch,
        "seq_len": planned.sequence,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
    }


def _parallelism(planned: Planned) -> dict[str, Field]:
    shards = _shards(planned)
    found: dict[str, Field] = {
        "data_parallel_replicate_degree": planned.dp // shards,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": "always" if planned.zero > 2 else "never",
        "tensor_parallel_degree": planned.tp,
        "enable_async_tensor_parallel": planned.overlap_tp and planned.fused,
        "context_parallel_degree": planned.cp,
        "pipeline_parallel_degree": planned.pp,
    }
    if planned.pp > 1:
        found |= {
            "pipeline_parallel_schedule": "Interleaved1F1B" if planned.vp > 1 else "1F1B",
            "pipeline_parallel_microbatch_size": planned.micro_batch,
            "pipeline_parallel_layers_per_stage": planned.layers_per_chunk,
            "pipeline_parallel_first_stage_less_layers": 0,
            "pipeline_parallel_last_stage_less_layers": 0,
        }
    if planned.ep > 1:
        found |= {"expert_parallel_degree": planned.ep, "expert_tensor_parallel_degree": planned.tp}
    return found


def _recomputation(planned: Planned) -> dict[str, Field]:
    if planned.recompute != Recompute.FULL or planned.recomputed <= 0:
        return {"mode": "none"}  # attention keeps no scores that could be computed again
    if planned.recomputed >= 1:
        return {"mode": "full"}
    return {"mode": "selective", "selective_ac_option": str(max(1, int(1 / planned.recomputed)))}  # every nth layer


def _notes(planned: Planned) -> list[str]:
    shape = planned.shape
    notes = [
        "start it with: bash torchrun.sh -m torchtitan.train --job.config_file torchtitan.toml (--emit torchrun), and its dataset and tokenizer"
    ]
    if not _flavor(shape):
        notes.append(
            f"torchtitan has no such model: register llama3_args[{shape.name!r}] = TransformerModelArgs(dim={shape.hidden}, "
            f"n_layers={shape.layers}, n_heads={shape.heads}, n_kv_heads={shape.kv_heads}, vocab_size={shape.vocabulary}) "
            f"with a feed-forward width of {shape.ffn}"
        )
    if _family(shape) == "gpt_oss":
        notes.append("torchtitan has gpt_oss from 0.2.2 on (0.2.1: among its experiments)")
    if planned.zero == 1 and planned.pp == 1 and planned.micro_batches > 1:
        notes.append(
            f"torchtitan has no ZeRO-1: it spreads gradients too, which needs less memory and reduces them in each of {planned.micro_batches} micro-batches"
        )
    if planned.tp > 1 and not planned.sequence_parallel:
        notes.append("torchtitan's tensor parallelism is sequence-parallel too: it needs less memory than planned")
    if planned.recompute == Recompute.SELECTIVE:
        notes.append(
            "torchtitan's attention keeps no scores: there is nothing to compute again selectively, mode is none"
        )
    if planned.fp8 > 1:
        notes.append("scales per block are scales per row there")
    return notes


def _toml(sections: Sections) -> str:
    parts = [
        "\n".join([f"[{name}]", *(f"{key} = {_value(one)}" for key, one in fields.items())])
        for name, fields in sections.items()
    ]
    return "\n\n".join(parts) + "\n"


def _value(one: Field) -> str:
    if isinstance(one, bool):
        return "true" if one else "false"
    if isinstance(one, list):
        return f"[{', '.join(map(_value, one))}]"
    return str(one) if isinstance(one, int) else _string(one)


def _string(text: str) -> str:
    """A basic string of TOML."""
    safe = "".join(char if char.isprintable() else " " for char in text)
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'
