"""What `whaleflux plan` prints: sections of lines, and the same as JSON. Pure; `SECTIONS` is where another picture of a plan goes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from whaleflux.cli.planning_options import billions
from whaleflux.planning.binding import lacks
from whaleflux.planning.found import PART_WORDS, STEP_WORDS, Candidate, Split
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.offers import Choice, Estimate, Goal
from whaleflux.planning.space import Asked
from whaleflux.quantities import shown_count, shown_duration

_BAR, _MOST_STAGES, _MOST_OTHERS = 30, 8, 8


def report(shape: ModelShape, asked: Asked, goal: Goal, choice: Choice, would_fit: Sequence[str]) -> list[str]:
    """For people."""
    one = choice.chosen
    lines = [f"{shape.name} ({billions(shape.parameters)} parameters), sequences of {asked.sequence:,} tokens"]
    if one.plan is None:
        return [*lines, *_nothing(one, would_fit), *_offers(choice)]
    for section in SECTIONS:
        lines += section(one, one.plan, goal)
    return [*lines, *_offers(choice), *(["", f"nothing meets the goal: {choice.words}"] if choice.words else [])]


def _nothing(one: Estimate, would_fit: Sequence[str]) -> list[str]:
    lines = [f"{one.gpus} x {one.gpu}", ""]
    if one.found.nearest is None:
        return [*lines, f"no such split is possible: {one.found.binding.words}", *_would_fit(would_fit)]
    nearest = one.found.nearest
    return [*lines, f"does not fit: {lacks(nearest)}", f"nearest: {nearest.split.words()}", *_would_fit(would_fit)]


def _would_fit(would_fit: Sequence[str]) -> list[str]:
    if not would_fit:
        return ["nothing near it fits either: take a smaller model, or many more GPUs"]
    return ["what fits:", *(f"  {one}" for one in would_fit)]


def _split(one: Estimate, plan: Candidate, goal: Goal) -> list[str]:
    split = plan.split
    lines = [f"{one.gpus} x {one.gpu}: {split.words()}"]
    if one.found.idle_gpus:
        lines.append(
            f"uses {split.gpus} of the {one.gpus} GPUs: no split of all of them is as fast; {one.found.idle_gpus} stay idle, and are paid for"
        )
    together = ", sequence parallel" if split.sequence_parallel else ""
    batch = f"batch {split.global_batch:,} samples ({shown_count(split.tokens_per_step)} tokens)"
    return [
        *lines,
        f"{batch}: {split.micro_batches} micro-batches of {split.micro_batch} on each of {split.dp} ranks{together}",
        *_job_file(split),
    ]


def _job_file(split: Split) -> list[str]:
    """What lays its ranks along the links."""
    sizes = {"tensor": split.tp, "context": split.cp, "expert": split.ep, "pipeline": split.pp}
    said = ", ".join(f"{name}: {size}" for name, size in sizes.items() if size > 1)
    return [f"in a job file, gpus: {split.gpus} and parallel: {{{said}}}"] if said else []


def _step(one: Estimate, plan: Candidate, goal: Goal) -> list[str]:
    lines = ["", f"step {plan.step_s:.4g} s"]
    for part, took in plan.seconds.items():
        share = took / plan.step_s
        if share >= 0.0005:
            lines.append(f"  {STEP_WORDS[part]:<20}{took:>9.3g} s {share:>6.1%}  {'#' * round(_BAR * share)}".rstrip())
    lines.append(f"  {plan.exposed_s / plan.step_s:.1%} of it is communication that nothing hides")
    mfu = f"{one.mfu:.1%} of the data sheet's arithmetic (MFU)"
    return [*lines, f"{one.tokens_per_s_per_gpu:,.0f} tokens/s on each GPU, {one.tokens_per_s:,.0f} in all; {mfu}"]


def _money(one: Estimate, plan: Candidate, goal: Goal) -> list[str]:
    lines = [""]
    if one.finish_s is not None:
        lines.append(taken(goal.tokens, plan.split.tokens_per_step, one.finish_s))
    if one.usd_per_gpu_hour is None or one.usd_per_million_tokens is None:
        return [*lines, f"what it costs is not known: no price of a {one.gpu} is; say it with --price"]
    all_ = f"${one.usd:,.0f} in all, " if one.usd is not None else ""
    per = f"${one.usd_per_million_tokens:.4g} for 1M tokens"
    return [*lines, f"{all_}{per}, at ${one.usd_per_gpu_hour:.4g} per GPU and hour ({one.price_source})"]


def taken(tokens: float, tokens_per_step: float, finish_s: float) -> str:
    """How long the training takes, in words."""
    less = (
        f" are less than a step of {shown_count(tokens_per_step)}, which takes" if tokens < tokens_per_step else " take"
    )
    return f"{shown_count(tokens)} tokens{less} {shown_duration(finish_s)}"


def _memory(one: Estimate, plan: Candidate, goal: Goal) -> list[str]:
    heads = [word.split(" ")[0] for word in PART_WORDS.values()]
    lines = ["", f"memory of a GPU, GB of {plan.usable_bytes / 1e9:.4g} that there are"]
    lines.append("  stage" + "".join(f"{head:>13}" for head in (*heads, "in all")))
    stages = list(enumerate(plan.stages_bytes))
    cut = len(stages) > _MOST_STAGES
    for number, parts in [*stages[: _MOST_STAGES - 2], *stages[-1:]] if cut else stages:
        cells = [*(parts[part] for part in PART_WORDS), sum(parts.values())]
        if cut and number == len(stages) - 1:
            lines.append("    ...")
        lines.append(f"  {number:>5}" + "".join(f"{cell / 1e9:>13.1f}" for cell in cells))
    return lines


def _others(one: Estimate, plan: Candidate, goal: Goal) -> list[str]:
    lines = ["", f"what binds: {one.found.binding.words}"]
    if one.found.runners_up:
        lines += ["", "the best of other kinds"]
    for other in one.found.runners_up:
        lines.append(
            f"  {other.loses:>6.1%} slower  {other.kind}: {other.plan.split.words()}, micro-batch {other.plan.split.micro_batch}"
        )
    return lines


def _offers(choice: Choice) -> list[str]:
    """How the other offers would do."""
    if not choice.others:
        return []
    lines = ["", "other offers"]
    for one in choice.others[:_MOST_OTHERS]:
        what = f"  {one.gpus} x {one.gpu}: "
        if one.plan is None:
            lines.append(what + "does not fit")
            continue
        time = shown_duration(one.finish_s) if one.finish_s is not None else f"{one.tokens_per_s:,.0f} tokens/s"
        cost = f"${one.usd:,.0f}" if one.usd is not None else f"${one.usd_per_million_tokens:.4g} for 1M tokens" if one.usd_per_million_tokens else "price not known"  # fmt: skip
        missed = f" (misses the {'; the '.join(one.misses)})" if one.misses else ""
        lines.append(f"{what}{time}, {cost}{missed}")
    left = len(choice.others) - _MOST_OTHERS
    return [*lines, f"  and {left} more: -o json has them all"] if left > 0 else lines


SECTIONS: tuple[Callable[[Estimate, Candidate, Goal], list[str]], ...] = (_split, _step, _money, _memory, _others)


def as_json(shape: ModelShape, asked: Asked, goal: Goal, choice: Choice, would_fit: Sequence[str]) -> dict[str, Any]:
    """For programs: seconds, bytes, dollars. What is not known is null."""
    goal_ = asdict(goal) | {"objective": goal.objective.value}
    return {
        "model": shape.name, "parameters": shape.parameters, "sequence": asked.sequence, "goal": goal_, "meets": choice.meets, "words": choice.words,
        "chosen": asdict(choice.chosen), "others": [_in_short(one) for one in choice.others], "instead": list(would_fit),
    }  # fmt: skip


def _in_short(one: Estimate) -> dict[str, Any]:
    """An offer that was not taken: its figures and its split."""
    return asdict(one) | {
        "found": {"split": asdict(one.plan.split) if one.plan else None, "binding": asdict(one.found.binding)},
        "quicker": asdict(one.quicker.split) if one.quicker else None,
    }
