"""What a configuration of parallel training says of its split: flags of Megatron, TOML of torchtitan, JSON of DeepSpeed, or a mesh of FSDP2."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.stage_rules import Stages

MAX_BYTES = 1 << 20
_MOST, _MOST_STAGES = 10**9, 4096
_MOST_TOML, _MOST_DOTS = 64 << 10, 256  # bytes; of a line: the parser's time grows with the square of a key's parts
_TABLE = re.compile(r"^\s*\[(parallelism|training|model)\b", re.MULTILINE)  # torchtitan's, which no script has
_AUTO = "auto"  # in DeepSpeed's JSON
_UNSAID = ("gpu", "auto", "cpu", "xpu")  # as --nproc-per-node: as many as there are


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration says of the split; None: nothing. `experts` 0: it says that there are none."""

    form: str
    gpus: int | None = None
    exact: bool = False  # all degrees are said: their product is the number of GPUs, not a part of it
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    context: int = 1  # torchtitan: of `cp`, what is no data parallelism
    shards: int | None = None  # torchtitan: data-parallel ranks that hold parts, from which alone it takes experts'
    interleaved: bool = False
    sequence_parallel: bool = False
    heads: int | None = None
    experts: int | None = None
    fp16: bool = False
    bf16: bool = False
    stage_precision: bool = True  # what stages send one another has a precision
    stages: Stages | None = None  # None: it says nothing of layers
    batch: int | None = None  # samples of a step
    micro_batch: int = 1  # samples at once on a data-parallel rank

    @property
    def data(self) -> int | None:
        """Data-parallel ranks; None where the number of GPUs is not known, or not a multiple of what the degrees take."""
        taken = self.tp * self.pp * (self.context if self.form == "torchtitan" else self.cp)
        return None if self.gpus is None or self.gpus % taken else self.gpus // taken


def read(text: str, gpus: int | None = None) -> Stated:
    """What `text` says, whichever of the formats it is in. Raises InvalidArgument."""
    if len(text) > MAX_BYTES:
        raise InvalidArgument(
            FieldViolation("FILE", f"is longer than {MAX_BYTES:,} bytes; give a configuration, not data")
        )
    if text.lstrip().startswith("{"):
        return _json(text, gpus)
    if (tables := _as_toml(text)) is not None and "parallelism" in tables:
        return _torchtitan(tables, gpus)
    return _flags(text, gpus)


def _unknown(why: str) -> InvalidArgument:
    return InvalidArgument(
        FieldViolation("FILE", f"{why}; give Megatron's flags, torchtitan's TOML, DeepSpeed's JSON or a mesh.json")
    )


def _whole(name: str, value: object, least: int = 1) -> int:
    """Raises InvalidArgument, naming the field, for what is no whole number in reach."""
    text = _said(value)[:20]
    if isinstance(value, str) and value.isascii() and value.lstrip("-").isdigit() and len(value) < 11:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise InvalidArgument(FieldViolation(name, f"is {text!r}, must be a whole number from {least} to {_MOST:,}"))
    return value


def _said(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no more than 4,300 digits
        return "a number of thousands of digits"


# ---- Megatron's flags, in a script or bare


def _flags(text: str, gpus: int | None) -> Stated:
    given = _given(text)
    if not any(name in given for name in ("tensor-model-parallel-size", "num-layers", "micro-batch-size")):
        raise _unknown("says nothing of a split")

    def number(name: str, without: int) -> int:
        return _whole(f"--{name}", given[name]) if name in given else without

    tp = number("tensor-model-parallel-size", 1)
    world = None if _unsaid(given) else number("nnodes", 1) * number("nproc-per-node", 1)
    if gpus and world and gpus != world:
        raise InvalidArgument(
            FieldViolation("--gpus", f"is {gpus}, and FILE starts {world} (nnodes x nproc-per-node); leave --gpus out, or change FILE")
        )  # fmt: skip
    half = "bf16" in given or "fp16" in given
    return Stated(
        form="megatron",
        gpus=gpus or world,
        tp=tp,
        pp=number("pipeline-model-parallel-size", 1),
        cp=number("context-parallel-size", 1),
        ep=number("expert-model-parallel-size", 1),
        expert_tp=number("expert-tensor-parallel-size", tp),
        interleaved=bool(
            given.keys() & {"num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"}
        ),
        sequence_parallel="sequence-parallel" in given,
        heads=number("num-attention-heads", 0) or None,
        experts=number("num-experts", 0),
        fp16="fp16" in given,
        bf16="bf16" in given,
        stage_precision=half or "pipeline-dtype" in given,
        batch=None if "decrease-batch-size-if-needed" in given else _literal(given, "global-batch-size"),
        micro_batch=_literal(given, "micro-batch-size") or 1,
        stages=_stages(given),
    )


def _literal(given: Mapping[str, str], name: str) -> int | None:
    """None: nothing is said, or a variable of the shell says it."""
    return None if given.get(name, "$").startswith("$") else _whole(f"--{name}", given[name])


def _stages(given: Mapping[str, str]) -> Stages | None:
    """None: nothing is said, or by a variable of the shell, or by a layout of its own, which is Megatron's to read."""
    names = (
        "num-layers",
        "pipeline-model-parallel-size",
        "num-virtual-stages-per-pipeline-rank",
        "num-layers-per-virtual-pipeline-stage",
    )
    ends = tuple(f"decoder-{end}-pipeline-num-layers" for end in ("first", "last"))
    variables = any(given.get(name, "").startswith("$") for name in (*names, *ends))
    if "num-layers" not in given or variables or "pipeline-model-parallel-layout" in given:
        return None

    def number(name: str, without: int = 0) -> int:
        return _literal(given, name) or without

    counted = sum(f"account-for-{end}-in-pipeline-split" in given for end in ("embedding", "loss"))
    layers, pp, virtual, each = (number(name) for name in names)
    first, last = (number(name) for name in ends)
    return Stages(layers + counted, pp or 1, virtual or each or 1, first, last)


def _unsaid(given: Mapping[str, str]) -> bool:
    """How many processes there are the machines say, or a variable, not the file."""
    said = [given.get("nproc-per-node", "auto"), given.get("nnodes", "1")]
    return any(one.startswith("$") or ":" in one or one in _UNSAID for one in said)


def _given(text: str) -> dict[str, str]:
    """Flags by name, the last one of each: `--name value`, `--name=value`, or alone."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError:
        raise _unknown("is not text that a shell reads (a quote is open)") from None
    found: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            value = value if equals else ("" if after.startswith("--") else after)
            found[name.replace("_", "-")] = value.rstrip(";)")
    return found


# ---- torchtitan


def _as_toml(text: str) -> dict[str, Any] | None:
    """None: it is none."""
    if len(text) > _MOST_TOML:
        if "\n[parallelism]" in f"\n{text}":
            raise _unknown(f"is TOML of more than {_MOST_TOML:,} bytes")
        return None
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        return None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as wrong:
        if _TABLE.search(text):
            raise _unknown(f"is no TOML: {str(wrong)[:200]}") from None
        return None
    except RecursionError:
        return None
    except ValueError:
        raise _unknown("has a number of thousands of digits") from None


def _torchtitan(tables: Mapping[str, Any], gpus: int | None) -> Stated:
    split, training, model = (_table(tables, name) for name in ("parallelism", "training", "model"))

    def degree(name: str) -> int:
        return _whole(f"parallelism.{name}", split.get(name, 1))

    tp, pp, cp = (degree(f"{name}_parallel_degree") for name in ("tensor", "pipeline", "context"))
    shards = _or_open("parallelism.data_parallel_shard_degree", split.get("data_parallel_shard_degree", -1))
    copies = tp * pp * cp * degree("data_parallel_replicate_degree")
    stated = None if shards < 1 else copies * shards
    heads, experts, layers = _shape_of(_said(model.get("name", "")), _said(model.get("flavor", "")))
    batch = _or_open("training.global_batch_size", training.get("global_batch_size", -1))
    return Stated(
        form="torchtitan",
        gpus=gpus or stated,
        tp=tp,
        pp=pp,
        exact=stated is not None,
        cp=cp if stated is None else stated // (tp * pp),
        ep=degree("expert_parallel_degree"),
        expert_tp=_whole("parallelism.expert_tensor_parallel_degree", split.get("expert_tensor_parallel_degree", 1)),
        context=cp,
        shards=shards if shards > 0 else None if gpus is None else gpus // copies,
        interleaved="Interleaved" in _said(split.get("pipeline_parallel_schedule", "")),
        sequence_parallel=tp > 1,
        heads=heads,
        experts=experts,
        stages=_parts(split, layers, pp),
        bf16=training.get("mixed_precision_param", "bfloat16") == "bfloat16",
        batch=batch if batch > 0 else None,
        micro_batch=_whole("training.local_batch_size", training.get("local_batch_size", 1)),
    )


def _parts(split: Mapping[str, Any], layers: int | None, pp: int) -> Stages | None:
    """It counts (virtual) stages by the layers of one, the ends as if they had more."""
    if layers is None or "pipeline_parallel_layers_per_stage" not in split or "module_fqns_per_model_part" in split:
        return None
    each = _whole("parallelism.pipeline_parallel_layers_per_stage", split["pipeline_parallel_layers_per_stage"])
    names = [f"pipeline_parallel_{end}_stage_less_layers" for end in ("first", "last")]
    counted = layers + sum(_whole(f"parallelism.{name}", split.get(name, 1), 0) for name in names)
    return Stages(layers, pp, parts=-(-counted // each))


def _or_open(name: str, value: object) -> int:
    """-1: torchtitan works it out."""
    return -1 if value == -1 else _whole(name, value)


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, Mapping):
        raise InvalidArgument(FieldViolation(name, "must be a table"))
    return found


def _shape_of(name: str, flavor: str) -> tuple[int | None, int | None, int | None]:
    """Heads, experts and layers of torchtitan's own models; of others nothing is known."""
    known = {
        ("llama3", "8B"): (32, 0), ("llama3", "70B"): (64, 0), ("llama3", "405B"): (128, 0), ("qwen3", "8B"): (32, 0), ("qwen3", "14B"): (40, 0),
        ("qwen3", "32B"): (64, 0), ("qwen3", "30B-A3B"): (32, 128), ("qwen3", "235B-A22B"): (64, 128), ("deepseek_v3", "16B"): (16, 64),
        ("deepseek_v3", "671B"): (128, 256), ("gpt_oss", "20b"): (64, 32), ("gpt_oss", "120b"): (64, 128),
    }  # fmt: skip
    heads, experts = known.get((name, flavor), (None, None))
    layers = {("llama3", "8B"): 32, ("llama3", "70B"): 80, ("llama3", "405B"): 126, ("deepseek_v3", "16B"): 27, ("deepseek_v3", "671B"): 61}  # fmt: skip
    return heads, experts, layers.get((name, flavor))


# ---- DeepSpeed and meshes


def _json(text: str, gpus: int | None) -> Stated:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise _unknown("is no JSON") from None
    if "mesh" in given:
        return _mesh(given, gpus)
    if "train_micro_batch_size_per_gpu" in given or "zero_optimization" in given:
        return _deepspeed(given, gpus)
    raise _unknown("is JSON of neither")


def _mesh(given: Mapping[str, Any], gpus: int | None) -> Stated:
    mesh = _table(given, "mesh")
    size = {name: _whole(f"mesh.{name}", mesh.get(name, 1)) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    heads, layers = (_table(given, "model").get(name) for name in ("heads", "layers"))
    data = size["dp_replicate"] * size["dp_shard"]
    return Stated(
        form="fsdp2",
        exact=True,
        gpus=gpus or data * size["pp"] * size["cp"] * size["tp"],
        tp=size["tp"],
        pp=size["pp"],
        cp=size["cp"] * data,
        interleaved=_whole("virtual_stages", given.get("virtual_stages", 1)) > 1,
        sequence_parallel=bool(given.get("sequence_parallel", False)),
        heads=None if heads is None else _whole("model.heads", heads),
        stages=_listed(given, layers, size["pp"]),
        fp16=given.get("parameters") == "float16",
        bf16=given.get("parameters") == "bfloat16",
        stage_precision=given.get("parameters") is not None,
    )


def _listed(given: Mapping[str, Any], layers: object, pp: int) -> Stages | None:
    found = given.get("stage_layers")
    if layers is None or found is None:
        return None
    if not isinstance(found, list) or len(found) > _MOST_STAGES:
        raise InvalidArgument(
            FieldViolation("stage_layers", f"must be a list of layers, at most {_MOST_STAGES} stages")
        )
    each = tuple(_whole(f"stage_layers[{place}]", one) for place, one in enumerate(found))
    return Stages(_whole("model.layers", layers), pp, listed=each)


def _deepspeed(given: Mapping[str, Any], gpus: int | None) -> Stated:
    """Its batches say the number of GPUs: batch = micro-batch x accumulation x GPUs; what is left over divides nothing."""
    sizes = {
        name: _size(name, given.get(name, _AUTO))
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    }
    micro, steps, whole = sizes.values()
    share = (micro or 1) * (steps or 1) * (gpus or 1)
    return Stated(
        form="deepspeed",
        gpus=whole or share,
        cp=share,
        fp16=_enabled(given, "fp16"),
        bf16=_enabled(given, "bf16"),
    )


def _size(name: str, value: object) -> int | None:
    """None: whoever starts it says so (the Trainer of Hugging Face)."""
    return None if value == _AUTO else _whole(name, value)


def _enabled(given: Mapping[str, Any], name: str) -> bool:
    """No where whoever starts it says so."""
    return _table(given, name).get("enabled", False) not in (False, _AUTO)
