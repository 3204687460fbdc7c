"""TOML of torchtitan 0.2. 0.3 has no such files: most of the fields are its command line's, `--parallelism.tensor_parallel_degree 8`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from whaleflux.planning.emit.planned import BF16, SHARED_REPLICAS, Emitted, Planned, Rule, cannot, refuse
from whaleflux.planning.found import Split
from whaleflux.planning.known_models import MODELS
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans

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
    refuse("torchtitan", *cannot(planned, RULES))
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


def _other(shape: ModelShape) -> bool:
    """A model that it has not itself and that is no Llama of another size."""
    return not _flavor(shape) and bool(shape.experts or shape.latent or not shape.gated or shape.positions)


# What its models refuse themselves (torchtitan/models/*/infra/parallelize.py, pipelining_fn in their TrainSpec).
_OF_MODELS = (
    Rule(lambda facts, _: facts.frozen, lambda _: "adapters; use --emit fsdp2 or deepspeed with a library of adapters"),
    Rule(
        lambda facts, _: _other(facts.shape),
        lambda it: f"the model {it.shape.name}, which it does not have; use --emit megatron",
    ),
    Rule(
        lambda facts, split: (split.pp > 1) & (_family(facts.shape) in ("qwen3", "gpt_oss")),
        lambda it: (
            f"pipeline parallelism {it.split.pp}: its {_family(it.shape)} has none; plan with --pp 1, or use --emit megatron"
        ),
    ),
    Rule(
        lambda facts, split: (split.cp > 1) & (_family(facts.shape) == "gpt_oss"),
        lambda it: (
            f"context parallelism {it.split.cp}: its {_family(it.shape)} has none; plan with --cp 1, or use --emit megatron"
        ),
    ),
    Rule(
        lambda facts, split: (split.tp > 1) & (facts.fp8 == 1) & (_family(facts.shape) == "deepseek_v3"),
        lambda it: (
            f"8 bit with one scale per tensor beside tensor parallelism {it.split.tp} of its {_family(it.shape)}; plan with --tp 1, or use --emit megatron"
        ),
    ),
)
_OF_SPLITS = (
    Rule(
        lambda facts, split: facts.shape.kv_heads % split.tp > 0,
        lambda it: (
            f"tensor parallelism {it.split.tp} of {it.shape.kv_heads} heads of keys and values, which it does not repeat; "
            "plan with a --tp that divides them, or use --emit megatron"
        ),
    ),
    Rule(
        lambda _, split: split.sequence % (2 * split.cp * split.tp) > 0,
        lambda it: (
            f"sequences of {it.split.sequence} tokens, which must be a multiple of 2 x cp x tp there; "
            f"plan with --sequence {_up(it.split.sequence, 2 * it.split.cp * it.split.tp)}"
        ),
    ),
    SHARED_REPLICAS,
    Rule(
        lambda _, split: (
            (split.dp > 1)
            & (_shards(split) == 1)
            & (split.tp * split.pp * np.where(np.asarray(split.zero) > 0, 1, split.cp) > 1)
        ),
        lambda _: (
            "data parallelism without shards beside another kind; plan with --zero 1 or more and fewer replicas, or use --emit megatron"
        ),
    ),
    Rule(
        lambda _, split: (split.vp > 1) & (split.first_layers + split.last_layers > 0),
        lambda _: (
            "stages with layers of their own that are cut into virtual ones; plan with --vp 1, or use --emit megatron"
        ),
    ),
    Rule(
        lambda facts, split: _longer_end(facts.shape, split),
        lambda it: (
            f"a first or last stage of {max(it.split.first_layers, it.split.last_layers)} layers, more than each between them has: it says how many fewer "
            "they have; let the ends have at most as many, or use --emit megatron"
        ),
    ),
    Rule(
        lambda _, split: split.recomputing > 0,
        lambda it: (
            f"recomputation in the first {it.split.recomputing} stages alone; plan with --recompute full, or use --emit megatron"
        ),
    ),
)
# It takes experts' ranks of all context-parallel ones, and of data-parallel ones only shards (ParallelDims of 0.2.0 and 0.2.1; 0.2.2 wants the latter).
_OF_EXPERTS = (
    Rule(
        lambda _, split: (split.ep > 1) & (_shards(split) * split.cp % split.ep > 0),
        lambda it: (
            f"expert parallelism {it.split.ep} across ranks that are no shards; let it divide shards x cp, {_shards(it.split) * it.split.cp} here"
            f"{'' if it.split.zero else ' (more with --zero 1)'}, or use --emit megatron"
        ),
    ),
    Rule(
        lambda _, split: (split.ep > 1) & (split.ep % split.cp > 0),
        lambda it: (
            f"expert parallelism {it.split.ep} beside context parallelism {it.split.cp}, of which it must be a multiple there; "
            "plan with a --cp that divides it, or use --emit megatron"
        ),
    ),
)
RULES = (BF16, *_OF_MODELS, *_OF_SPLITS, *_OF_EXPERTS)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _longer_end(shape: ModelShape, split: Split | Plans) -> Any:
    """Whether the first or the last stage has more layers than each of those between, where there are any."""
    first, last = np.asarray(split.first_layers), np.asarray(split.last_layers)
    stages = split.pp - (first > 0) - (last > 0)
    return (stages > 0) & (np.maximum(first, last) * stages > shape.layers - first - last)


def _shards(split: Split | Plans) -> Any:
    """Data-parallel ranks among which parameters are spread."""
    return np.where(np.asarray(split.zero) > 0, split.dp // split.replicas, 1)


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
    local = planned.split.micro_batch * (planned.split.micro_batches if planned.split.pp > 1 else 1)
    return {
        "local_batch_size": local,
        "global_batch_size": planned.split.global_batch,
        "seq_len": planned.split.sequence,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
    }


def _parallelism(planned: Planned) -> dict[str, Field]:
    shards = int(_shards(planned.split))
    found: dict[str, Field] = {
        "data_parallel_replicate_degree": planned.split.dp // shards,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": "always" if planned.split.zero > 2 else "never",
        "tensor_parallel_degree": planned.split.tp,
        "enable_async_tensor_parallel": planned.overlap_tp and planned.fused,
        "context_parallel_degree": planned.split.cp,
        "pipeline_parallel_degree": planned.split.pp,
    }
    if planned.split.pp > 1:
        found |= {
            "pipeline_parallel_schedule": "Interleaved1F1B" if planned.split.vp > 1 else "1F1B",
            "pipeline_parallel_microbatch_size": planned.split.micro_batch,
            "pipeline_parallel_layers_per_stage": planned.layers_per_chunk,
            "pipeline_parallel_first_stage_less_layers": planned.layers_per_chunk
            - planned.stage_layers[0] // planned.split.vp,
            "pipeline_parallel_last_stage_less_layers": planned.layers_per_chunk
            - planned.stage_layers[-1] // planned.split.vp,
        }
    if planned.split.ep > 1:
        found |= {"expert_parallel_degree": planned.split.ep, "expert_tensor_parallel_degree": planned.split.tp}
    return found


def _recomputation(planned: Planned) -> dict[str, Field]:
    if planned.split.recompute != "full" or planned.split.recomputed <= 0:
        return {"mode": "none"}  # attention keeps no scores that could be computed again
    if planned.split.recomputed >= 1:
        return {"mode": "full"}
    return {
        "mode": "selective",
        "selective_ac_option": str(max(1, int(1 / planned.split.recomputed))),
    }  # every nth layer


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
    if planned.split.zero == 1 and planned.split.pp == 1 and planned.split.micro_batches > 1:
        notes.append(
            f"torchtitan has no ZeRO-1: it spreads gradients too, which needs less memory and reduces them in each of {planned.split.micro_batches} micro-batches"
        )
    if planned.split.tp > 1 and not planned.split.sequence_parallel:
        notes.append("torchtitan's tensor parallelism is sequence-parallel too: it needs less memory than planned")
    if planned.split.recompute == "selective":
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
