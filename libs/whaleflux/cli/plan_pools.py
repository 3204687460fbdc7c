"""`whaleflux plan --gpu H100-80GB:16,A100-80GB:32`: one training over several pools; the rules are `whaleflux.planning.mixed`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.planning_options import MOST_GPUS, billions, gpu_of, named
from whaleflux.errors import FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from whaleflux.planning.emit.planned import Emitted
    from whaleflux.planning.mixed import MixedAsked
    from whaleflux.planning.mixed_plan import MixedFound, MixedPlan, PoolPart
    from whaleflux.planning.model_shape import ModelShape
    from whaleflux.planning.pools import Pool
    from whaleflux.planning.training import Training

_BETWEEN_HOP_S = 0.01  # between sites, one way
_LEAST_GBPS = 0.001  # a megabit a second
_MOST_OTHERS = 8


def pools_of(said: str, precision: str, between_gbps: float) -> list[Pool]:
    """H100-80GB:16,A100-80GB:32. `between_gbps`: each pool is a site behind a line of so many Gb/s, 10 ms away; 0: one fabric. Raises InvalidArgument."""
    from whaleflux.planning.machine import Machine
    from whaleflux.planning.pools import SITE_HOP_S, Pool

    if 0 < between_gbps < _LEAST_GBPS:
        raise InvalidArgument(
            FieldViolation("--between-gbps", f"is {between_gbps:g}; give {_LEAST_GBPS:g} or more, or 0 for one fabric")
        )
    found = []
    for part in (one.strip() for one in said.split(",")):
        name, _, number = part.rpartition(":")
        if not name or not number.isdecimal() or len(number) > len(str(MOST_GPUS)) or not 1 <= int(number) <= MOST_GPUS:
            raise InvalidArgument(
                FieldViolation(
                    "--gpu", f"has {part[:40]!r}; each pool must be TYPE:GPUS, 1 to {MOST_GPUS}, such as A100-80GB:32"
                )
            )
        machine, gpus = Machine.of(gpu_of(name), precision), int(number)
        uplink = between_gbps / 8 * 1e9 / gpus
        found.append(Pool(machine, gpus, uplink, _BETWEEN_HOP_S if between_gbps else SITE_HOP_S))
    return found


def refuse_unused(given: Mapping[str, object]) -> None:
    """Options that plans over pools do not read."""
    for name, value in given.items():
        if value:
            raise InvalidArgument(
                FieldViolation(
                    name, "is not read where --gpu names pools (TYPE:GPUS): leave it out, or ask for one type of GPU"
                )
            )


def show(
    shape: ModelShape,
    pools: list[Pool],
    samples: int,
    sequence: int,
    how: Training,
    tokens: float,
    usd: float,
    fmt: Format,
    form: str = "",
) -> None:
    """Plans, prints: the report, or what runs the best plan that `form` can say. The exit code is 1 where nothing fits."""
    from whaleflux.planning.mixed import MixedAsked, mixed_search

    with named({"gpu": "--gpu", "batch": "--batch"}):
        found = mixed_search(shape, pools, MixedAsked(samples, sequence), how)
    prices = {pool.name: usd or _list_price(pool.name) for pool in pools}
    made = (
        _emitted(form, shape, pools, MixedAsked(samples, sequence, runnable=True), how, found)
        if form and found.best
        else None
    )
    if fmt.is_json:
        output.say_json(
            _as_json(shape, pools, found, tokens, prices) | ({"emitted": asdict(made)} if made else {}), fmt
        )
    elif made:
        output.write(made.text.encode())
        for note in made.notes:
            output.note(note)
    else:
        output.say(*_report(shape, pools, found, tokens, prices))
    if found.best is None:
        raise typer.Exit(1)


def _emitted(
    form: str, shape: ModelShape, pools: list[Pool], asked: MixedAsked, how: Training, found: MixedFound
) -> Emitted:
    """Of the best plan over several pools that can be run, with a note of what that loses. Raises InvalidArgument where none can."""
    from dataclasses import replace

    from whaleflux.planning.emit.mixed import FORMATS, cannot_run
    from whaleflux.planning.mixed import mixed_search

    if form not in FORMATS:
        raise InvalidArgument(
            FieldViolation(
                "--emit",
                f"{form} cannot express replicas that take different numbers of samples; take {' or '.join(FORMATS)}",
            )
        )
    best = found.best
    assert best is not None
    why = cannot_run(best)
    plan = mixed_search(shape, pools, asked, how).best if why else best
    if plan is None:
        raise InvalidArgument(
            FieldViolation(
                "--emit", f"nothing over these pools fits that {form} can express; the best is {best.words()}: {why}"
            )
        )
    made = FORMATS[form](shape, plan, how)
    lost = f"{plan.step_s / best.step_s - 1:.1%} slower than {best.words()}: {why}"
    return replace(made, notes=(*made.notes, lost)) if why else made


def _list_price(name: str) -> float | None:
    known = gpu_of(name).list_price
    return known.usd_per_gpu_hour if known else None


def _usd_per_hour(plan: MixedPlan, pools: list[Pool], prices: Mapping[str, float | None]) -> float | None:
    """Of all GPUs of the pools that it uses: those that stay idle are paid for, too; None: a price is not known."""
    used = {part.pool for part in plan.parts}
    each = [(pool.gpus, prices[pool.name]) for pool in pools if pool.name in used]
    return sum(gpus * price for gpus, price in each if price) if all(price for _, price in each) else None


def _report(
    shape: ModelShape, pools: list[Pool], found: MixedFound, tokens: float, prices: Mapping[str, float | None]
) -> list[str]:
    offered = " + ".join(f"{pool.gpus} x {pool.name}" for pool in pools)
    lines = [f"{shape.name} ({billions(shape.parameters)} parameters) on {offered}"]
    if found.best is None:
        return [
            *lines,
            "",
            "does not fit, in any pool and over all of them: take more GPUs, shorter sequences, or --method lora",
        ]
    best = found.best
    lines += [
        f"{best.words()}{_unrunnable(best)}",
        f"batch {best.global_batch:,} samples of {best.sequence:,} tokens; {_batches(best)}",
    ]
    lines += [
        f"{part.pool}: uses {part.gpus} of its {part.gpus + idle} GPUs; {idle} stay idle, and are paid for"
        for part, idle in _idle(best, pools)
    ]
    if found.left_out:
        lines.append(f"left out, since they cost more time than they bring: {', '.join(found.left_out)}")
    lines += [
        "",
        f"step {best.step_s:.4g} s, {best.tokens_per_s:,.0f} tokens/s",
        *_money(best, pools, tokens, prices),
        "",
        *_parts(best),
    ]
    lines += ["", "other ways"]
    for plan in found.others[:_MOST_OTHERS]:
        lines.append(f"  {plan.step_s / best.step_s - 1:>7.1%} slower  {plan.words()}{_unrunnable(plan)}")
    nothing = [name for name, step_s in found.alone_s.items() if step_s is None]
    return lines + [f"  does not fit  one pool: {name}" for name in nothing]


def _idle(plan: MixedPlan, pools: list[Pool]) -> list[tuple[PoolPart, int]]:
    """(part, GPUs of its pool that it has no use for), where there are some."""
    there = {pool.name: pool.gpus for pool in pools}
    return [(part, there[part.pool] - part.gpus) for part in plan.parts if there[part.pool] > part.gpus]


def _unrunnable(plan: MixedPlan) -> str:
    """Said of plans over several pools."""
    from whaleflux.planning.emit.mixed import cannot_run

    why = cannot_run(plan) if len(plan.parts) > 1 else ""
    return f" (not to be run from here: {why})" if why else ""


def _batches(plan: MixedPlan) -> str:
    if not plan.micro_batch:
        return f"{plan.micro_batches} micro-batches, of each rank's own size"
    return f"micro-batches of {plan.micro_batch}"


def _finish_s(plan: MixedPlan, tokens: float) -> float | None:
    """None: there is no end."""
    return max(tokens, plan.tokens_per_step) * plan.token_s if tokens else None


def _money(plan: MixedPlan, pools: list[Pool], tokens: float, prices: Mapping[str, float | None]) -> list[str]:
    from whaleflux.cli.plan_report import taken

    finish_s = _finish_s(plan, tokens)
    lines = [] if finish_s is None else [taken(tokens, plan.tokens_per_step, finish_s)]
    hourly = _usd_per_hour(plan, pools, prices)
    if hourly is None:
        return [*lines, "what it costs is not known: not every GPU has a price; say one for all with --price"]
    return [
        *lines,
        f"${hourly * plan.token_s * 1e6 / 3600:.4g} for 1M tokens, at ${hourly:,.2f} an hour for the GPUs of the pools that are used",
    ]


def _parts(plan: MixedPlan) -> list[str]:
    lines = [f"  {'pool':<16}{'GPUs':>6}{'busy s':>10}{'waits':>8}{'GB of a GPU':>14}{'there are':>11}"]
    for part in plan.parts:
        waits = 1 - part.busy_s / plan.step_s
        lines.append(
            f"  {part.pool:<16}{part.gpus:>6}{part.busy_s:>10.3g}{waits:>8.1%}{part.needed_bytes / 1e9:>14.1f}{part.usable_bytes / 1e9:>11.1f}"
        )
    return lines


def _as_json(
    shape: ModelShape, pools: list[Pool], found: MixedFound, tokens: float, prices: Mapping[str, float | None]
) -> dict[str, Any]:
    """For programs: seconds, bytes, dollars. What is not known is null."""
    from whaleflux.planning.emit.mixed import cannot_run

    best, hourly = found.best, _usd_per_hour(found.best, pools, prices) if found.best else None
    return {
        "model": shape.name, "parameters": shape.parameters, "pools": [{"gpu": pool.name, "gpus": pool.gpus} for pool in pools],
        "best": asdict(best) | {"cannot_run": cannot_run(best)} if best else None, "words": best.words() if best else "does not fit", "left_out": list(found.left_out), "idle_gpus": {part.pool: idle for part, idle in _idle(best, pools)} if best else {},
        "tokens_per_s": best.tokens_per_s if best else None, "finish_s": _finish_s(best, tokens) if best else None,
        "usd_per_million_tokens": hourly * best.token_s * 1e6 / 3600 if best and hourly else None, "alone_s": found.alone_s,
        "others": [asdict(plan) | {"words": plan.words(), "cannot_run": cannot_run(plan)} for plan in found.others],
    }  # fmt: skip
