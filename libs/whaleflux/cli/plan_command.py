"""`whaleflux plan`: how to train a model on GPUs, how long it takes and what it costs. Works without a fleet; the rules are `whaleflux.planning`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.calibrate_command import calibration
from whaleflux.cli.output import Format
from whaleflux.cli.plan_output import Form, Made, Wanted, picture_of
from whaleflux.cli.plan_pools import pools_of, refuse_unused, show
from whaleflux.cli.planning_options import (
    Again,
    Method,
    Objectives,
    Precision,
    Software,
    gpus_of,
    model_of,
    money,
    need_numpy,
    numbers_of,
    quantity_of,
    run_as,
)  # fmt: skip
from whaleflux.cli.state import Output, fleet
from whaleflux.planning.wish import MOST_BATCH, MOST_SEQUENCE

if TYPE_CHECKING:
    from whaleflux.fleet.gpu_types import GpuType
    from whaleflux.planning.model_shape import ModelShape
    from whaleflux.planning.offers import Goal, Offer
    from whaleflux.planning.space import Asked
    from whaleflux.planning.training import Training
    from whaleflux.v1 import scheduler_pb2 as pb

BATCH_TOKENS, BATCH_SLACK = "4M", 0.05  # where nobody says a batch; how far a plan's may be from so many tokens
_MOST_TOKENS, _MOST_SPAN_S, _MOST_USD = 1e16, 1e10, 1e13


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a Hugging Face config.json, or a YAML file.")
    ] = "",
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            help="Type of the GPUs; H200,H100-80GB compares several; H100-80GB:16,A100-80GB:32 uses both together.",
        ),
    ] = "",
    gpus: Annotated[
        str,
        typer.Option(
            "--gpus", help="How many: 128; 64,128; 8-128 compares what is between. 8; --live: what is free, and all."
        ),
    ] = "",
    tokens: Annotated[str, typer.Option("--tokens", help="To train on, in all: 1T, 300B.")] = "",
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", help="About so many in a step, 5 % more or less; 4M where nothing is said.")
    ] = "",
    batch: Annotated[int, typer.Option("--batch", min=0, max=MOST_BATCH, help="Samples in a step, exactly.")] = 0,
    sequence: Annotated[
        int, typer.Option("--sequence", min=0, max=MOST_SEQUENCE, help="Tokens; 0: the model's, at most 8192.")
    ] = 0,
    deadline: Annotated[str, typer.Option("--deadline", help="Done within: 30d, 12h.")] = "",
    budget: Annotated[str, typer.Option("--budget", help="At most so many dollars: 2M, $50000.")] = "",
    price: Annotated[str, typer.Option("--price", help="Dollars per GPU and hour; else a list price.")] = "",
    objective: Annotated[
        Objectives | None, typer.Option("--objective", help="What is made small; cost where a deadline is said.")
    ] = None,
    method: Annotated[
        Method, typer.Option("--method", help="What is trained: all weights, or adapters on frozen ones.")
    ] = Method.full,
    precision: Annotated[Precision, typer.Option("--precision", help="Of linear layers.")] = Precision.bf16,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=0, max=65536, help="0: the best.")] = 0,
    tp: Annotated[int, typer.Option("--tp", min=0, max=4096, help="Tensor parallelism; 0: the best.")] = 0,
    pp: Annotated[int, typer.Option("--pp", min=0, max=4096, help="Pipeline stages; 0: the best.")] = 0,
    cp: Annotated[int, typer.Option("--cp", min=0, max=4096, help="Context parallelism; 0: the best.")] = 0,
    ep: Annotated[int, typer.Option("--ep", min=0, max=65536, help="Expert parallelism; 0: the best.")] = 0,
    vp: Annotated[int, typer.Option("--vp", min=0, max=4096, help="Virtual stages of each stage; 0: the best.")] = 0,
    zero: Annotated[int, typer.Option("--zero", min=-1, max=3, help="Stage of ZeRO, 3 is FSDP; -1: the best.")] = -1,
    recompute: Annotated[
        Again | None, typer.Option("--recompute", help="Of all layers; where not said, of as few as make it fit.")
    ] = None,
    data_tokens_per_s: Annotated[
        str,
        typer.Option("--data-tokens-per-s", help="What loading data brings to one GPU; else it is never waited for."),
    ] = "",
    checkpoint_every: Annotated[str, typer.Option("--checkpoint-every", help="30min; with --checkpoint-stall.")] = "",
    checkpoint_stall: Annotated[str, typer.Option("--checkpoint-stall", help="Training halts for: 20s.")] = "",
    measured: Annotated[
        list[Path] | None,
        typer.Option("--calibration", help="What whaleflux calibrate measured on a type of GPU; once for each."),
    ] = None,
    software: Annotated[
        Software | None, typer.Option("--software", help="How layers run, with --calibration; compiled if not said.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="On the fleet's own GPUs, free and in all, at its own prices: asks the scheduler."),
    ] = False,
    emit: Annotated[
        Form | None, typer.Option("--emit", help="Print the configuration that runs the plan, not the report.")
    ] = None,
    picture: Annotated[
        str, typer.Option("--picture", metavar="FILE.svg", help="Draw the step, the pipeline and memory; - for here.")
    ] = "",
    between_gbps: Annotated[
        float,
        typer.Option(
            "--between-gbps", min=0, max=1e6, help="Pools are sites behind lines of so many Gb/s; 0: one fabric."
        ),
    ] = 0.0,
    fmt: Output = Format.table,
) -> None:
    """How to split training over GPUs: the fastest plan that fits, its step by component, when it is done, what it costs, and what binds it.

    \b
      whaleflux plan llama-3.1-70b --gpu H200 --gpus 128 --tokens 1T
      whaleflux plan llama-3.1-8b --gpu H200,H100-80GB --gpus 8-64 --tokens 100B --deadline 10d --objective cost
      whaleflux plan llama-3.1-70b --gpu H200 --gpus 128 --picture plan.svg --emit megatron > megatron.sh
      whaleflux plan llama-3.1-70b --gpu H100-80GB:16,A100-80GB:32 --batch 512
      whaleflux plan config.json --gpu H100-80GB --gpus 64 --batch 512 --sequence 4096 --price 2.20 -o json

      whaleflux plan llama-3.1-8b --live --tokens 100B

    Needs no fleet, but with --live. The exit code is 1 where nothing fits, or meets the deadline and the budget.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.quantities import seconds, whole_count

    if fmt is not Format.table and not fmt.is_json:
        _refuse("-o", f"{fmt.value} is not made of a plan; use table or json")
    if live:
        settled = (
            micro_batch
            or tp
            or pp
            or cp
            or ep
            or vp
            or zero >= 0
            or recompute
            or price
            or measured
            or software
            or data_tokens_per_s
            or checkpoint_every
            or checkpoint_stall
            or emit
            or picture
            or between_gbps
        )
        if settled:
            _refuse(
                "--live",
                "plans the whole split at the fleet's own prices; leave parts of the split, --price, --calibration, --software, --data-tokens-per-s, --checkpoint-every, --checkpoint-stall, --emit, --picture and --between-gbps out",
            )
        _on_fleet(
            _request(
                model, gpu, gpus, tokens, deadline, budget, batch, batch_tokens, sequence, method, precision, objective
            ),
            fmt,
        )
        return
    wanted = Wanted(emit, picture_of(picture, fmt))
    need_numpy()
    shape = model_of(model)
    types = [] if ":" in gpu else gpus_of(gpu)
    length = sequence or min(shape.sequence, 8192)
    from whaleflux.planning.offers import Goal, Objective
    from whaleflux.planning.plans import Recompute
    from whaleflux.planning.space import Asked

    samples, slack = _batch(batch, batch_tokens, length)
    if ":" in gpu:
        refuse_unused({
            "--gpus": gpus, "--deadline": deadline, "--budget": budget, "--objective": objective, "--micro-batch": micro_batch, "--tp": tp,
            "--pp": pp, "--cp": cp, "--ep": ep, "--vp": vp, "--zero": zero >= 0, "--recompute": recompute, "--data-tokens-per-s": data_tokens_per_s,
            "--checkpoint-every": checkpoint_every, "--checkpoint-stall": checkpoint_stall, "--calibration": measured, "--software": software, "--picture": picture,
        })  # fmt: skip
        trained = quantity_of("--tokens", tokens, whole_count, _MOST_TOKENS)
        how = _training(method, precision, "", "", "")
        pools = pools_of(gpu, precision.value, between_gbps)
        usd = quantity_of("--price", price, money, 1e4)
        return show(shape, pools, samples, length, how, trained, usd, fmt, emit.value if emit else "")
    if emit is Form.job:
        _refuse(
            "--emit",
            "job is of pools (--gpu H100-80GB:16,A100-80GB:32); a job file of one type says model, and submit plans it",
        )
    if between_gbps:
        _refuse("--between-gbps", "is for pools: give --gpu H100-80GB:16,A100-80GB:32")
    again = None if recompute is None else Recompute[recompute.value.upper()]
    asked = Asked(1, length, micro_batch, tp, pp, cp, ep, zero, again, vp, samples, slack)
    goal = Goal(
        quantity_of("--tokens", tokens, whole_count, _MOST_TOKENS), quantity_of("--deadline", deadline, seconds, _MOST_SPAN_S),
        quantity_of("--budget", budget, money, _MOST_USD),
    )  # fmt: skip
    chosen_by = _objective(objective, deadline)
    goal = _checked(Goal(goal.tokens, goal.deadline_s, goal.budget_usd, Objective(chosen_by.value)))
    offers = _offers(types, gpus or "8", quantity_of("--price", price, money, 1e4), goal)
    offers = _as_measured(offers, measured or [], run_as(software, measured), precision)
    how = _training(method, precision, data_tokens_per_s, checkpoint_every, checkpoint_stall)
    _show(shape, asked, offers, goal, how, precision.value, wanted, fmt)


def _request(
    model: str, gpu: str, gpus: str, tokens: str, deadline: str, budget: str, batch: int, batch_tokens: str, sequence: int, method: Method,
    precision: Precision, objective: Objectives | None,
) -> pb.PlanTrainingRequest:  # fmt: skip
    """The same question to the scheduler."""
    from whaleflux.manifests.training_values import model_text
    from whaleflux.quantities import seconds, whole_count
    from whaleflux.v1 import scheduler_pb2 as pb

    chosen = gpus.strip() or "0"
    if not chosen.isdigit():
        _refuse("--gpus", f"is {gpus[:40]!r}; with --live it is one number, or nothing: what is free, and all")
    request = pb.PlanTrainingRequest(
        training=pb.Training(
            model=model_text(model_of(model)), batch=batch, batch_tokens=int(quantity_of("--batch-tokens", batch_tokens, whole_count, 1e12)),
            sequence=sequence, adapters=method is Method.lora, fp8=precision is Precision.fp8,
        ),
        gpus=int(chosen), gpu_types=[one.name for one in gpus_of(gpu)] if gpu else [], tokens=quantity_of("--tokens", tokens, whole_count, _MOST_TOKENS),
        budget_usd=quantity_of("--budget", budget, money, _MOST_USD), cheapest=_objective(objective, deadline) is Objectives.cost,
    )  # fmt: skip
    if within_s := quantity_of("--deadline", deadline, seconds, _MOST_SPAN_S):
        if within_s < 1:
            _refuse("--deadline", f"is {deadline[:40]!r}; with --live it must be 1 s or more")
        request.deadline.FromSeconds(int(within_s))
    return request


def _objective(said: Objectives | None, deadline: str) -> Objectives:
    """Where nobody says it: by a deadline as cheaply as can be."""
    return said or (Objectives.cost if deadline else Objectives.time)


def _on_fleet(request: pb.PlanTrainingRequest, fmt: Format) -> None:

    from whaleflux.cli.training_plans import TIMEOUT_S, shown

    with fleet() as client:
        answer = client.scheduler.PlanTraining(request, timeout=TIMEOUT_S)
    if fmt.is_json:
        output.show_one(answer, [], fmt)
    else:
        output.say(*shown(answer, request.gpus))
    if not answer.plans or answer.words:
        raise typer.Exit(1)


def _refuse(field: str, what: str) -> None:
    from whaleflux.errors import FieldViolation, InvalidArgument

    raise InvalidArgument(FieldViolation(field, what))


def _batch(samples: int, tokens: str, sequence: int) -> tuple[int, float]:
    """(samples of a step, how far a plan may be from them)."""
    from whaleflux.quantities import whole_count

    if samples and tokens:
        _refuse("--batch", "and --batch-tokens both say the batch; say one")
    if samples:
        return samples, 0.0
    wanted = quantity_of("--batch-tokens", tokens or BATCH_TOKENS, whole_count, 1e12)
    if tokens and wanted < sequence:
        _refuse(
            "--batch-tokens",
            f"is {wanted:,.0f}, less than one sequence of {sequence:,}; take {sequence:,} or more, or a shorter --sequence",
        )
    return min(MOST_BATCH, max(1, round(wanted / sequence))), BATCH_SLACK


def _checked(goal: Goal) -> Goal:
    for option, said in (("--deadline", goal.deadline_s), ("--budget", goal.budget_usd)):
        if said and not goal.tokens:
            _refuse(
                "--tokens", f"is missing: {option} needs to know how many are to be trained on, such as --tokens 1T"
            )
    return goal


def _offers(types: list[GpuType], numbers: str, usd: float, goal: Goal) -> list[Offer]:
    """Each type in each number, at the price that was said or the type's list price."""
    from whaleflux.planning.machine import speed_of
    from whaleflux.planning.offers import MOST_OFFERS, Objective, Offer

    found = []
    for one in types:
        known = one.list_price
        price = usd or (known.usd_per_gpu_hour if known else None)
        source = "--price" if usd else known.source if known else ""
        if price is None and goal.objective is Objective.COST:
            _refuse("--price", f"is missing: what a {one.name} costs is not known; say dollars per GPU and hour")
        counts = numbers_of(numbers, max(8, speed_of(one).nvlink_domain))
        found += [Offer(one, count, price, source) for count in counts]
    if len(found) > MOST_OFFERS:
        _refuse("--gpus", f"and --gpu name {len(found)} offers; at most {MOST_OFFERS} are compared at once")
    return found


def _as_measured(offers: list[Offer], files: list[Path], software: Software, precision: Precision) -> list[Offer]:
    """Each with its type's calibration, where one was given."""
    from dataclasses import replace

    from whaleflux.planning.machine import Machine

    known = {}
    sheets = {one.gpu.name: Machine.of(one.gpu, precision.value) for one in offers}
    for path in files:
        found = calibration(path, sheets, software.value)
        if found.machine.name in known:
            _refuse("--calibration", f"{path}: {found.machine.name} has one already; give one file for each type")
        known[found.machine.name] = found
    return [replace(one, measured=known.get(one.gpu.name), software=software.value) for one in offers]


def _training(method: Method, precision: Precision, data: str, every: str, stall: str) -> Training:
    from whaleflux.planning.training import Training
    from whaleflux.quantities import count, seconds

    if bool(every) != bool(stall):
        _refuse(
            "--checkpoint-stall" if every else "--checkpoint-every",
            "is missing: one says how long, the other how often",
        )
    return Training(
        frozen=method is Method.lora, fp8=float(precision is Precision.fp8), data_tokens_per_s=quantity_of("--data-tokens-per-s", data, count),
        checkpoint_s=quantity_of("--checkpoint-stall", stall, seconds, 1e6), checkpoint_every_s=quantity_of("--checkpoint-every", every, seconds, 1e8),
    )  # fmt: skip


def _show(
    shape: ModelShape,
    asked: Asked,
    offers: list[Offer],
    goal: Goal,
    how: Training,
    precision: str,
    wanted: Wanted,
    fmt: Format,
) -> None:
    from dataclasses import replace

    from whaleflux.cli.plan_report import as_json, report
    from whaleflux.planning.fits import instead
    from whaleflux.planning.offers import as_known, choose

    choice = choose(shape, offers, asked, goal, how, precision, wanted.emit.value if wanted.emit else "")
    first = next(one for one in offers if (one.gpu.name, one.gpus) == (choice.chosen.gpu, choice.chosen.gpus))
    would_fit: list[str] = []
    if choice.chosen.plan is None:
        _, as_run, _ = as_known(first, how, precision)
        would_fit = instead(shape, first.gpu, replace(asked, gpus=first.gpus), as_run, precision)
    nearest = choice.chosen.plan or choice.chosen.found.nearest
    made = Made(shape, first, nearest, how, precision, choice.chosen.quicker) if nearest else None
    if fmt.is_json:
        output.say_json(as_json(shape, asked, goal, choice, would_fit) | (made.as_json(wanted) if made else {}), fmt)
    else:
        _say(report(shape, asked, goal, choice, would_fit), made, wanted)
    if not choice.meets:
        raise typer.Exit(1)


def _say(lines: list[str], made: Made | None, wanted: Wanted) -> None:
    """The report, or what was asked for instead of it. Where nothing fits there is nothing to configure."""
    drawn = made.picture(wanted.picture) if made and wanted.picture else []
    if made and wanted.emit and made.plan.fits:
        made.say_emitted(wanted.emit)
        for line in filter(None, drawn):
            output.note(line)
        return
    why = ["", "why this split", *(f"  {reason}" for reason in made.why())] if made and made.plan.fits else []
    output.say(*lines, *why, *drawn)
