"""Ten common configurations that cannot run, found in what is given to a program.

It may be flags of Megatron, TOML of torchtitan, JSON of DeepSpeed, or a mesh of FSDP2.
Eight rules are those of NVIDIA/Megatron-LM pull request 5768; that of the batch is asserted by its `num_microbatches_calculator`, and by torchtitan's
trainer; the tenth is of layers that stages do not divide. They read files, know nothing of `planning.emit`, and so judge it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whaleflux.planning.stage_rules import wrong_layers
from whaleflux.planning.stated import Stated, read


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that a configuration breaks: which, what is wrong with these numbers, and what to change."""

    rule: str
    words: str
    fix: str


Rule = Callable[[Stated], tuple[str, str] | None]


def check(text: str, gpus: int | None = None) -> tuple[Broken, ...]:
    """Which of the rules the configuration `text` breaks. `gpus`: on so many, where it does not say itself.

    Raises InvalidArgument for what is no such configuration.
    """
    stated = read(text, gpus)
    found = ((name, rule(stated)) for name, rule in RULES.items())
    return tuple(Broken(name, *wrong) for name, wrong in found if wrong)


def _world(it: Stated) -> tuple[str, str] | None:
    among = it.tp * it.pp * it.cp
    if it.gpus is None or (it.gpus == among if it.exact else it.gpus % among == 0):
        return None
    if it.form == "deepspeed":
        return (
            f"train_batch_size {it.gpus} is not a multiple of micro-batch x accumulation x GPUs, {it.cp}",
            "let train_batch_size be train_micro_batch_size_per_gpu x gradient_accumulation_steps x GPUs",
        )
    rest = f" x {it.cp} ({'context and data' if it.exact else 'context'})" if it.cp > 1 else ""
    return (
        f"{it.gpus} GPUs are not {'' if it.exact else 'a multiple of '}{it.tp} (tensor) x {it.pp} (pipeline){rest}",
        "take a number of GPUs that their product divides, or smaller degrees",
    )


def _no_pipeline(it: Stated) -> tuple[str, str] | None:
    if not it.interleaved or it.pp > 1:
        return None
    return (
        "an interleaved schedule where the pipeline has one stage",
        "leave the virtual stages out, or take a pipeline of 2 or more",
    )


def _no_tensor(it: Stated) -> tuple[str, str] | None:
    if not it.sequence_parallel or it.tp > 1:
        return None
    return (
        "sequence parallelism without tensor parallelism",
        "leave sequence parallelism out, or take tensor parallelism of 2 or more",
    )


def _no_stage_precision(it: Stated) -> tuple[str, str] | None:
    if it.pp < 2 or it.stage_precision:
        return None
    return (
        "a pipeline whose stages send tensors of no stated precision",
        "say it: --bf16 (pipeline_dtype of Megatron-Core, parameters of a mesh)",
    )


def _heads(it: Stated) -> tuple[str, str] | None:
    if it.heads is None or it.heads % it.tp == 0:
        return None
    return (
        f"{it.heads} attention heads are not a multiple of tensor parallelism {it.tp}",
        "take a degree that divides the heads",
    )


def _no_experts(it: Stated) -> tuple[str, str] | None:
    if it.ep < 2 or it.experts is None or it.experts > 0:
        return None
    return f"expert parallelism {it.ep} of a model without experts", "leave it out, or say the number of experts"


def _precisions(it: Stated) -> tuple[str, str] | None:
    if not (it.fp16 and it.bf16):
        return None
    return "both fp16 and bf16", "take one of them: bf16 where the GPUs have it"


def _expert_world(it: Stated) -> tuple[str, str] | None:
    if it.form == "torchtitan" and it.ep > 1:
        return _expert_mesh(it)
    among = it.expert_tp * it.ep * it.pp
    if it.gpus is None or it.ep < 2 or it.gpus % among == 0:
        return None
    return (
        f"{it.gpus} GPUs are not a multiple of {it.expert_tp} (tensor, of experts) x {it.ep} (expert) x {it.pp} (pipeline)",
        "take an expert parallelism that divides what tensor and pipeline parallelism leave",
    )


def _expert_mesh(it: Stated) -> tuple[str, str] | None:
    """For torchtitan: it takes experts' ranks of all context-parallel ones and of shards, where experts are not split also of tensor-parallel ones.

    Its ParallelDims asserts both in 0.2.0 and 0.2.1; 0.2.2 makes no mesh of the second.
    """
    if it.expert_tp not in (1, it.tp):
        return (
            f"experts split over {it.expert_tp} ranks beside tensor parallelism {it.tp}",
            "let expert_tensor_parallel_degree be 1, or tensor_parallel_degree",
        )
    least = it.context * (1 if it.expert_tp == it.tp else it.tp)
    if it.ep % least == 0 and (it.shards is None or it.shards * least % it.ep == 0):
        return None
    shards = "some" if it.shards is None else str(it.shards)
    return (
        f"expert parallelism {it.ep} among {shards} shards x {least} (context{'' if least == it.context else ' and tensor'})",
        f"take a multiple of {least} that divides their product: replicas of shards hold no experts of one another",
    )


def _batch(it: Stated) -> tuple[str, str] | None:
    if it.batch is None or it.data is None or it.batch % (it.micro_batch * it.data) == 0:
        return None
    micro, whole = (
        ("local_batch_size", "global_batch_size")
        if it.form == "torchtitan"
        else ("--micro-batch-size", "--global-batch-size")
    )
    share = it.micro_batch * it.data
    below = it.batch // share * share
    nearest = f"{below} or {below + share}" if below else str(share)
    return (
        f"{whole} {it.batch} is not a multiple of {micro} {it.micro_batch} x {it.data} data-parallel ranks",
        f"let {whole} be {nearest}, or take a {micro} or degrees whose product divides it",
    )


_LAYERS_FIX = (
    "take a pipeline that divides the layers, or give its ends layers of their own (--decoder-first-pipeline-num-layers, "
    "--decoder-last-pipeline-num-layers; torchtitan: pipeline_parallel_first_stage_less_layers)"
)


def _layers(it: Stated) -> tuple[str, str] | None:
    if it.stages is None or it.pp < 2 or not (wrong := wrong_layers(it.stages)):
        return None
    return wrong, _LAYERS_FIX


RULES: dict[str, Rule] = {
    "gpus": _world,
    "interleaved": _no_pipeline,
    "sequence-parallel": _no_tensor,
    "stage-precision": _no_stage_precision,
    "heads": _heads,
    "experts": _no_experts,
    "precision": _precisions,
    "expert-gpus": _expert_world,
    "batch": _batch,
    "layers": _layers,
}
