"""Tables of measured training runs, by their columns: any file that has some of these is read, whatever it is called.

    model's shape   `hidden` `heads` `layers` (`kv_heads` `ffn` `vocab`), or a name in `model`
    split           `tp` `pp` `dp` `cp` `ep` `vp` of `gpus`; `micro_batch`|`mbs`, `global_batch`|`gbs`; `seq_len`; `fsdp`|`sharding`
    GPU             `gpu` or `system`
    software        `compiled` (PyTorch's own, eager or compiled), `framework`, `container`, `kernels`, `precision`, `recompute`, `act_ckpt`, `seq_parallel`, `task`
    measured        `iter_ms`, `iter_s`, `step_time_s`, `step_time_s_derived`, `tokens_per_s_per_gpu`; `allocated_bytes`

Never scored: TFLOP/s and MFU, which count operations by conventions that differ. What a row says of its software decides `Training`; how, is
below, and is the same for every file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux.errors import StatusError
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.known_models import model_named
from whaleflux.planning.model_shape import ModelShape

Cells = Mapping[str, str]
_ALIASES = {
    "micro_batch": ("micro_batch", "mbs"),
    "global_batch": ("global_batch", "gbs"),
    "sequence": ("seq_len", "sequence"),
    "gpus": ("gpus",),
    "vp": ("vp",),
    "tp": ("tp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "ep": ("ep",),
    "dp": ("dp",),
}
_MODELS = {
    "qwen330ba3b": "qwen3-30b-a3b", "qwen3moe30b": "qwen3-30b-a3b", "qwen3235ba22b": "qwen3-235b-a22b", "deepseekv3": "deepseek-v3",
    "deepseekv3671b": "deepseek-v3", "nemotron340b": "nemotron-4-340b", "nemotron4340b": "nemotron-4-340b", "gpt35b": "gpt-3-5b", "gpt320b": "gpt-3-20b",
    "gpt3175b": "gpt-3-175b",
}  # fmt: skip
_GPUS = (  # the first that is part of what the table says
    ("gb300", "GB300"), ("gb200", "GB200"), ("b300", "B300"), ("b200", "B200"), ("h200", "H200"), ("gh200", "GH200-96GB"), ("h100", "H100-80GB"),
    ("v100", "V100-32GB"), ("a10040", "A100-40GB"), ("a100sxm440", "A100-40GB"), ("a100", "A100-80GB"), ("rtx4090", "RTX4090"), ("l40s", "L40S"),
)  # fmt: skip

# Of 32-bit logits Megatron's cross entropy makes 13 passes where nothing is fused: cast, maximum, difference, exponential, sum, quotient, product, cast;
# `layers.head_s` counts 5.
_UNFUSED_LOSS = 13 / 5


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run. `fold` names what must be held out together; `open` are parts of the split that were not published. `flags` are fields of `Training`; `split` fields of `Plans`."""

    family: str
    fold: str
    shape: ModelShape
    gpu: str
    precision: str
    split: Mapping[str, float]
    flags: Mapping[str, float]
    step_s: float
    open: tuple[str, ...] = ()
    about: Cells = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        return self.shape.experts > 0


def runs_of(path: Path) -> tuple[list[Run], dict[str, int]]:
    """The runs of a file, and why others were left out, with how many."""
    found: list[Run] = []
    left_out: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            try:
                found.append(_run(path.stem, cells))
            except _NotScored as why:
                left_out[str(why)] = left_out.get(str(why), 0) + 1
    return found, left_out


class _NotScored(Exception):
    pass


def _run(stem: str, cells: Cells) -> Run:
    if cells.get("ambiguous_parenthesised") == "True":
        raise _NotScored("ambiguous: two values in a cell")
    shape = _shape(cells)
    split = _split(cells, shape)
    flags, precision = _software(cells)
    step_s = _measured(cells, split)
    family = f"{stem} (MoE)" if shape.experts else stem
    if cells.get("gpu") and not cells.get("framework") and cells.get("sharding"):
        family += f" {_gpu(cells)}"  # one table for several kinds of GPU
    if flags.get("frozen"):
        family += " LoRA"
    fold = f"{shape.hidden}/{shape.layers}"
    return Run(family, fold, shape, _gpu(cells), precision, split, flags, step_s, _open(cells, split), dict(cells))


def _number(cells: Cells, *names: str) -> float | None:
    for name in names:
        text = (cells.get(name) or "").strip().replace(",", "")
        if re.fullmatch(r"\d+(\.\d+)?([eE][-+]?\d+)?", text):
            return float(text)
    return None


def _shape(cells: Cells) -> ModelShape:
    hidden, heads, layers = (_number(cells, name) for name in ("hidden", "heads", "layers"))
    if hidden and heads and layers:
        ffn, kv = _number(cells, "ffn") or 4 * hidden, _number(cells, "kv_heads") or heads
        gated = bool(_number(cells, "kv_heads")) and ffn < 4 * hidden
        vocabulary = int(_number(cells, "vocab", "vocabulary") or 51200)
        name = cells.get("model") or f"{hidden:.0f}x{layers:.0f}"
        return ModelShape(
            name, int(layers), int(hidden), int(heads), int(kv), int(hidden / heads), int(ffn), vocabulary, gated=gated, tied=not gated
        )  # fmt: skip
    name = re.sub(r"\(.*?\)|\d-node", "", cells.get("model") or "").strip()
    if re.fullmatch(r"\d+[mb]", name) and cells.get("sharding"):
        name = f"mpt-{name}"
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    try:
        return model_named(_MODELS.get(key, name))
    except StatusError:
        raise _NotScored(f"model not known: {name}") from None


def _split(cells: Cells, shape: ModelShape) -> dict[str, float]:
    split = {name: _number(cells, *columns) or 0.0 for name, columns in _ALIASES.items()}
    split["global_batch"] = split["global_batch"] or split["dp"] * (_number(cells, "batch_per_dp") or 0.0)
    if not split["gpus"] or not split["global_batch"]:
        raise _NotScored("no GPUs or no global batch")
    for name in ("tp", "pp", "cp", "ep", "vp"):
        split[name] = max(split[name], 1.0)
    split["sequence"] = split["sequence"] or 1024.0
    split["dp"] = split["gpus"] / (split["tp"] * split["pp"] * split["cp"])
    split["ep"] = (
        max(split["ep"] / split["tp"], 1.0) if split["ep"] * split["tp"] > split["gpus"] / split["pp"] else split["ep"]
    )
    if cells.get("sharding"):
        split["zero"] = 3.0 if cells["sharding"] == "FULL_SHARD" else 2.0
    elif (_number(cells, "fsdp") or 0) > 1:
        split["zero"] = 3.0 if split["pp"] == 1 else 1.0
    else:
        split["zero"] = 1.0 if cells.get("container") or not split["micro_batch"] else 0.0
    split["recompute"] = _recompute(cells)
    split["recomputed"] = 1.0
    split["sequence_parallel"] = float(split["tp"] > 1 and _modern(cells))
    del split["gpus"]
    return split


def _open(cells: Cells, split: Mapping[str, float]) -> tuple[str, ...]:
    """What the table does not say, and the planner chooses: the fastest that fits. Where the split is whole, only how much is recomputed."""
    if not split["micro_batch"]:
        said = bool(cells.get("recompute")) or "full recompute" in (cells.get("note") or "")
        return ("micro_batch", "vp") if said else ("micro_batch", "vp", "recomputed")
    if _offloads(cells):
        return ()
    known = any(cells.get(name) for name in ("recompute", "act_ckpt", "framework", "provenance"))
    return () if known else ("recomputed",)


def _offloads(cells: Cells) -> bool:
    """Grace-Blackwell: what does not fit goes to the CPU's memory over NVLink-C2C beside the computation, as NeMo's recipes do."""
    return "GB" in (cells.get("system") or "")


def _modern(cells: Cells) -> bool:
    if cells.get("seq_parallel"):
        return cells["seq_parallel"] == "True"
    return (cells.get("precision") or "fp16").lower() != "fp16" and not cells.get("framework")


def _recompute(cells: Cells) -> float:
    said = cells.get("recompute") or ""
    if said.startswith("full") or cells.get("act_ckpt") == "True" or cells.get("framework") == "Megatron-DeepSpeed":
        return 2.0
    if "full recompute" in (cells.get("note") or ""):
        return 2.0
    if said.startswith("selective"):
        return 1.0
    return 0.0 if cells.get("act_ckpt") or _offloads(cells) else 2.0  # not said: of as many layers as it takes


def _software(cells: Cells) -> tuple[dict[str, float], str]:
    """`Training`'s fields, and the precision."""
    precision = (cells.get("precision") or "fp16").lower()
    old = cells.get("framework") == "Megatron-DeepSpeed" or precision == "fp16"
    fp4, fp8 = "fp4" in precision, "fp8" in precision
    overlapping = bool(cells.get("container"))  # NeMo: user buffers, distributed optimizer, all overlap on
    told = overlapping or "DP/TP/PP overlap on" in (cells.get("note") or "")
    before_2022 = old and not cells.get(
        "seq_parallel"
    )  # a table that tells sequence parallelism is of a Megatron that has it
    flags = {
        "flash": not old,
        "fused": not (cells.get("sharding") or cells.get("kernels") or cells.get("compiled") == "False"),
        "lazy_gradients": bool(cells.get("compiled")),
        "fp8": 2 if fp4 or "mx" in precision else fp8,
        "dropout": old,
        "overlap_tp": told,
        "logits_traffic": 0 if _fuses_loss(cells) else _UNFUSED_LOSS,
        "overlap_gradients": not before_2022,
        "fused_gradients": not before_2022 and not cells.get("sharding") and not cells.get("compiled"),
        "overlap_pp": told,
        "overlap_dp": not old,
        "frozen": "lora" in (cells.get("task") or "").lower(),
        "gradient_bytes": 2 if overlapping else 4,  # NeMo's recipes: grad_reduce_in_fp32 off
        "reduce_bytes": 2 if old or overlapping or cells.get("mp_mode") == "PURE" or cells.get("kernels") else 4,
    }
    return {name: float(value) for name, value in flags.items()}, "fp4" if fp4 else "fp8" if fp8 else "bf16"


def _fuses_loss(cells: Cells) -> bool:
    """The loss is a few kernels: PyTorch's, and NeMo's since 25.02. Megatron's own, without --cross-entropy-loss-fusion, is one for each operation."""
    container = re.search(r"\d+", cells.get("container") or "")
    return bool(
        cells.get("sharding")
        or cells.get("compiled")
        or cells.get("kernels")
        or (container and int(container[0]) >= 25)
        or "Automodel" in (cells.get("container") or "")
    )


def _measured(cells: Cells, split: Mapping[str, float]) -> float:
    for name, scale in (("iter_ms", 1e-3), ("iter_s", 1.0), ("step_time_s", 1.0), ("step_time_s_derived", 1.0)):
        if (value := _number(cells, name)) is not None and value > 0:
            return value * scale
    rate = _number(cells, "tokens_per_s_per_gpu")
    if not rate:
        raise _NotScored("no time and no tokens per second")
    gpus = split["tp"] * split["pp"] * split["cp"] * split["dp"]
    return split["global_batch"] * split["sequence"] / (rate * gpus)


def _gpu(cells: Cells) -> str:
    said = re.sub(r"[^a-z0-9]", "", (cells.get("gpu") or cells.get("system") or "").lower())
    for part, name in _GPUS:
        if part in said and name in CATALOGUE.types:
            return name
    raise _NotScored(f"GPU not known: {said}")


def all_runs(paths: Iterable[Path]) -> tuple[list[Run], dict[str, dict[str, int]]]:
    """Of every file that has such columns; files without are no tables of runs and are passed over."""
    runs: list[Run] = []
    left: dict[str, dict[str, int]] = {}
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            header = set(next(csv.reader(file), []))
        timed = {"iter_ms", "iter_s", "step_time_s", "step_time_s_derived", "tokens_per_s_per_gpu"} & header
        if not timed or not {"gpus", "tp"} & header or not {"global_batch", "gbs", "batch_per_dp"} & header:
            continue
        found, left_out = runs_of(path)
        runs += found
        left[path.stem] = left_out
    return runs, left
