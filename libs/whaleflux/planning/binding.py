"""What binds a plan, in words: memory, where the fastest split does not fit; else the part of the step that is longest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from whaleflux.planning.found import PART_WORDS, Binding, Candidate
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.space import Asked, frames_in_turn
from whaleflux.quantities import shown_number

_COUNTS = 0.02  # slower by less than this, memory is not what binds
_KINDS = {
    "compute": ("compute_s", "recompute_s", "optimizer_s"),
    "bubble": ("bubble_s",),
    "host": ("host_s",),
    "data": ("data_s", "checkpoint_s"),
}
_NEXT = {
    "communication": "faster links, or a larger batch on each GPU, would shorten it",
    "bubble": "a larger batch would shorten it",
    "host": "the GPUs wait for kernels to be launched: a larger micro-batch, or CUDA graphs, would shorten it",
    "data": "faster loading or rarer checkpoints would shorten it",
}
SECONDS_WORDS = {
    "tp_s": "tensor parallelism", "cp_s": "context parallelism", "ep_s": "expert parallelism", "pp_s": "sends between stages",
    "dp_s": "data parallelism",
}  # fmt: skip


def nothing_fits(nearest: Candidate) -> Binding:
    """`nearest` is the split that needs least."""
    return Binding("memory", f"no split fits; nearest is {nearest.split.words()}: {lacks(nearest)}")


def binding_of(best: Candidate, near: Candidate, free: Candidate, eased: Candidate | None) -> Binding:
    """Of the best plan.

    `near` would be fastest of those that fit with more recomputation or ZeRO, `free` of all, if memory did not matter; `eased` is `near` with
    the recomputation that makes it fit.
    """
    loses = best.token_s / free.token_s - 1
    if loses < _COUNTS:
        return _longest(best)
    words = [
        f"with room for everything, {free.split.words()} would be fastest: what was chosen is {loses:.1%} slower than that"
    ]
    if not near.fits:
        words.insert(0, f"{near.split.words()} does not fit: {lacks(near)}")
        if eased is not None:
            words.insert(
                1,
                f"{eased.split.recomputation()} would fit, {eased.token_s / near.token_s - 1:.1%} slower than that would be with room",
            )
    return Binding("memory", "memory: " + "; ".join(words), loses)


def lacks(plan: Candidate) -> str:
    """Why a plan does not fit: activations 61 GB of 140 at stage 0."""
    part = max(plan.parts_bytes, key=lambda name: plan.parts_bytes[name])
    where = f" at stage {plan.fullest}" if plan.split.pp > 1 else ""
    needed, there = plan.total_bytes / 1e9, plan.usable_bytes / 1e9
    most = shown_number(plan.parts_bytes[part] / 1e9)
    return f"{PART_WORDS[part]} {most} GB of {there:.4g}{where}, {shown_number(needed)} GB in all"


def _longest(best: Candidate) -> Binding:
    shares = {kind: sum(best.seconds[part] for part in parts) / best.step_s for kind, parts in _KINDS.items()}
    shares["communication"] = best.exposed_s / best.step_s
    rest = {kind: share for kind, share in shares.items() if kind != "compute"}
    largest = max(rest, key=lambda kind: rest[kind])
    if rest[largest] < 0.1 or shares["compute"] >= 0.8:
        return Binding(
            "compute", f"compute: {shares['compute']:.0%} of the step; only more or faster GPUs would shorten it much"
        )
    what = largest
    if largest == "communication":
        part = max(SECONDS_WORDS, key=lambda name: best.seconds[name])
        what = f"communication that nothing hides, most of it {SECONDS_WORDS[part]}"
    return Binding(largest, f"{what}: {rest[largest]:.0%} of the step; {_NEXT[largest]}")


def settled_wrong(shape: ModelShape, asked: Asked) -> Binding | None:
    """What is settled and cannot be, whatever the rest of the split is: None where nothing is."""
    if asked.zero > 1 and (asked.pp > 1 or asked.vp > 1):
        return Binding(
            "rule", f"ZeRO-{asked.zero} has no pipeline (pp {asked.pp}, vp {asked.vp}): take zero 0 or 1, or pp 1"
        )
    if asked.vp > 1 and asked.pp == 1:
        return Binding("rule", f"vp {asked.vp} with pp 1: virtual stages are of a pipeline; take pp 2 or more, or vp 1")
    if asked.ep > 1 and not shape.experts:
        return Binding("rule", f"ep {asked.ep}: {shape.name} has no experts; leave it out")
    if asked.ep > 1 and shape.experts % asked.ep:
        return Binding("rule", f"ep {asked.ep} does not divide the {shape.experts} experts of {shape.name}")
    return None


def no_split(shape: ModelShape, asked: Asked, every: Plans) -> Binding:
    """Which rule forbids all."""
    if not len(every) and (asked.least_gpus > 1 or asked.gpus_step > 1):
        step = f" and a multiple of {asked.gpus_step}" if asked.gpus_step > 1 else ""
        words = f"no split uses {asked.least_gpus} to {asked.gpus} GPUs{step}; take a batch that more ranks can share"
        return Binding("rule", words)
    if not len(every):
        return Binding("rule", f"tp x pp x cp must be at most the {asked.gpus} GPUs")
    every = replace(every, zero=np.array(float(max(asked.zero, 0))))
    free = Asked(asked.gpus, asked.sequence, asked.micro_batch, asked.tp, asked.pp, asked.cp, asked.ep, vp=asked.vp)
    if asked.batch and any(True for _ in frames_in_turn(shape, free, every)):
        return Binding(
            "batch", f"global_batch {asked.batch} must be a multiple of dp x micro_batch; take a power of two near it"
        )
    micro, vp = asked.micro_batch or 1, asked.vp or 1
    least = every.dp * micro * (every.pp if vp > 1 else 1)  # a batch that breaks no rule
    settled = replace(
        every,
        ep=np.array(asked.ep or 1.0),
        vp=np.array(vp, dtype=np.float64),
        micro_batch=np.array(micro, dtype=np.float64),
        global_batch=least,
    )
    faults = settled.faults(shape)
    return Binding("rule", max(faults, key=lambda rule: int(faults[rule].sum())))
