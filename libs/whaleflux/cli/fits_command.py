"""`whaleflux fits`: the memory calculator. Works without a fleet; the rules are `whaleflux.planning`, imported when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.calibrate_command import calibration
from whaleflux.cli.output import Format
from whaleflux.cli.planning_options import (
    MOST_GPUS,
    Again,
    Method,
    Precision,
    Software,
    billions,
    gpu_of,
    gpus_of,
    model_of,
    need_numpy,
    quantity_of,
    run_as,
)
from whaleflux.cli.state import Output
from whaleflux.planning.wish import MOST_SEQUENCE

if TYPE_CHECKING:
    from whaleflux.fleet.gpu_types import GpuType
    from whaleflux.planning.fits import Verdict
    from whaleflux.planning.model_shape import ModelShape
    from whaleflux.planning.serving import Requests
    from whaleflux.planning.space import Asked

_BAR = 30
_ERROR = 0.03  # of memory, on the mean (docs/guide/planning.md)


def fits(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name, a Hugging Face config.json, or a YAML file.")
    ] = "",
    gpu: Annotated[str, typer.Option("--gpu", help="Type of the GPUs: H200, RTX4090.")] = "",
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=MOST_GPUS, help="How many.")] = 1,
    sequence: Annotated[
        int, typer.Option("--sequence", min=0, max=MOST_SEQUENCE, help="Tokens; 0: the model's, at most 8192.")
    ] = 0,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, max=65536, help="Samples at once on a rank.")] = 1,
    tp: Annotated[int, typer.Option("--tp", min=0, max=4096, help="Tensor parallelism; 0: the best.")] = 0,
    pp: Annotated[int, typer.Option("--pp", min=0, max=4096, help="Pipeline stages; 0: the best.")] = 0,
    cp: Annotated[int, typer.Option("--cp", min=0, max=4096, help="Context parallelism; 0: the best.")] = 0,
    ep: Annotated[int, typer.Option("--ep", min=0, max=65536, help="Expert parallelism; 0: the best.")] = 0,
    zero: Annotated[
        int, typer.Option("--zero", min=-1, max=3, help="Stage of ZeRO, 3 is FSDP; -1: the best of 1 and 3.")
    ] = -1,
    recompute: Annotated[
        Again | None, typer.Option("--recompute", help="Activations computed again; the best where not said.")
    ] = None,
    method: Annotated[
        Method, typer.Option("--method", help="What is trained: all weights, or adapters on frozen ones.")
    ] = Method.full,
    precision: Annotated[Precision, typer.Option("--precision", help="Of linear layers.")] = Precision.bf16,
    measured: Annotated[
        Path | None, typer.Option("--calibration", help="What whaleflux calibrate measured on this type of GPU.")
    ] = None,
    software: Annotated[
        Software | None, typer.Option("--software", help="How layers run, with --calibration; compiled if not said.")
    ] = None,
    serving: Annotated[
        bool, typer.Option("--serve", help="Which GPUs serve it, how many requests at once, and what tokens cost.")
    ] = False,
    prompt: Annotated[
        int, typer.Option("--prompt", min=0, max=1 << 24, help="With --serve: tokens of a prompt; 0: 2000, or less.")
    ] = 0,
    answer: Annotated[
        int, typer.Option("--answer", min=0, max=1 << 24, help="With --serve: tokens of an answer; 0: 500, or less.")
    ] = 0,
    first_token: Annotated[
        str, typer.Option("--first-token", help="With --serve: at most so long to it: 500ms, 2s.")
    ] = "",
    token: Annotated[
        str, typer.Option("--token", help="With --serve: at most so long for each further one: 50ms.")
    ] = "",
    context: Annotated[
        int,
        typer.Option(
            "--context", min=0, max=MOST_SEQUENCE, help="With --serve: tokens of the longest request; 0: a usual one."
        ),
    ] = 0,
    rate: Annotated[
        float,
        typer.Option(
            "--rate", min=0, max=1e6, help="With --serve: requests a second of one replica; 0: as many as it can."
        ),
    ] = 0.0,
    known: Annotated[bool, typer.Option("--list", help="Models that are known by name, and GPU types.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Whether training a model fits into GPUs: memory by component on the fullest one, what binds, and what would fit. Needs no fleet.

    \b
      whaleflux fits llama-3.1-8b --gpu RTX4090 --gpus 2 --method lora
      whaleflux fits llama-3.1-70b --gpu H200 --gpus 16 --sequence 8192
      whaleflux fits config.json --gpu H100-80GB --gpus 64 --tp 8 --pp 2 -o json
      whaleflux fits llama-3.1-70b --serve --prompt 4000 --answer 500 --first-token 1s --token 40ms
      whaleflux fits --list
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument

    if fmt is not Format.table and not fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a verdict; use table or json"))
    need_numpy()
    if known:
        _show_known(fmt)
        return
    if serving:
        from whaleflux.planning.serving import Requests
        from whaleflux.quantities import seconds

        _refuse_unread(
            {
                "--gpus": gpus > 1, "--sequence": sequence, "--micro-batch": micro_batch > 1, "--tp": tp, "--pp": pp, "--cp": cp, "--ep": ep,
                "--zero": zero >= 0, "--recompute": recompute, "--method": method is not Method.full, "--calibration": measured, "--software": software,
            },
            "is of training, and not read with --serve, which tries each number of a type's GPUs; leave it out",
        )  # fmt: skip

        limits = (
            quantity_of("--first-token", first_token, seconds, 3600.0),
            quantity_of("--token", token, seconds, 60.0),
        )
        shape = model_of(model)
        asked_for = Requests(*_tokens(shape, prompt, answer, context), *limits, context=context, per_s=rate)
        _serve(shape, gpus_of(gpu) if gpu else None, asked_for, precision, fmt)
        return
    _refuse_unread(
        {
            "--prompt": prompt,
            "--answer": answer,
            "--first-token": first_token,
            "--token": token,
            "--context": context,
            "--rate": rate,
        },
        "is of serving; give --serve too, or leave it out",
    )
    shape, type_ = model_of(model), gpu_of(gpu)
    from whaleflux.planning.fits import verdict
    from whaleflux.planning.machine import Machine
    from whaleflux.planning.plans import Recompute
    from whaleflux.planning.space import Asked
    from whaleflux.planning.training import Training

    again = None if recompute is None else Recompute[recompute.value.upper()]
    tokens = sequence or min(shape.sequence, 8192)
    asked = Asked(gpus, tokens, micro_batch, tp, pp, cp, ep, zero, again)
    how = Training(frozen=method is Method.lora, fp8=float(precision is Precision.fp8))
    found, ran = None, run_as(software, measured)
    if measured is not None:
        sheet = Machine.of(type_, precision.value)
        how, found = calibration(measured, {sheet.name: sheet}, ran.value).running(how, ran.value)
    _show(shape, type_, asked, verdict(shape, type_, asked, how, precision.value, found), fmt)


def _refuse_unread(given: Mapping[str, object], why: str) -> None:
    from whaleflux.errors import FieldViolation, InvalidArgument

    if wrong := [FieldViolation(name, why) for name, value in given.items() if value]:
        raise InvalidArgument(wrong)


def _serve(
    shape: ModelShape,
    types: list[GpuType] | None,
    asked: Requests,
    precision: Precision,
    fmt: Format,
) -> None:
    from whaleflux.cli.serve_report import as_json, report
    from whaleflux.fleet.gpu_types import CATALOGUE
    from whaleflux.planning.machine import lacks_precision
    from whaleflux.planning.serving_sizes import ServingOffer, serve

    able = [one for one in CATALOGUE.types.values() if one.speed and not lacks_precision(one, precision.value)]
    offers = [ServingOffer.listed(one) for one in types or able]
    found = [one.replica for one in serve(shape, offers, asked, 1.0 if precision is Precision.fp8 else 2.0)]
    if fmt.is_json:
        output.say_json(as_json(shape, asked, found), fmt)
    else:
        output.say(*report(shape, asked, found))
    if not any(one.meets for one in found):
        raise typer.Exit(1)


def _tokens(shape: ModelShape, prompt: int, answer: int, context: int) -> tuple[int, int]:
    """(of a prompt, of an answer), within the model's context; what was not said gives way to it. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.serving import longest, usual

    most, (prompted, answered) = longest(shape), usual(shape, prompt, answer, context)
    reads = f"{shape.name} reads {most:,} at most (sequence of a model's file)"
    if 0 < context <= most and prompted + answered > context:
        what = f"{prompted:,} tokens and --answer {answered:,} are {prompted + answered:,}, more than --context {context:,}: take fewer, or a longer context"
        raise InvalidArgument(FieldViolation("--prompt", what))
    if prompted + answered > most:
        what = f"{prompted:,} tokens and --answer {answered:,} are {prompted + answered:,}; {reads}: take fewer, or a model with a longer context"
        raise InvalidArgument(FieldViolation("--prompt", what))
    if context > most:
        raise InvalidArgument(
            FieldViolation("--context", f"is {context:,} tokens; {reads}: take fewer, or leave it out")
        )
    return prompted, answered


def _show_known(fmt: Format) -> None:
    from whaleflux.fleet.gpu_types import CATALOGUE
    from whaleflux.planning.known_models import MODELS

    types = [one for one in CATALOGUE.types.values() if one.speed]
    if fmt.is_json:
        output.say_json({
            "models": [{"name": one.name, "parameters": one.parameters, "active_parameters": one.active_parameters, "sequence": one.sequence}
                       for one in MODELS.values()],
            "gpus": [{"name": one.name, "memory_bytes": one.speed.nvml_bytes} for one in types if one.speed],
        }, fmt)  # fmt: skip
        return
    rows = [
        [one.name, billions(one.parameters), billions(one.active_parameters), f"{one.sequence:,}"]
        for one in MODELS.values()
    ]
    output.table(["MODEL", "PARAMETERS", "ACTIVE", "SEQUENCE"], rows)
    output.say("", "GPU types: " + ", ".join(one.name for one in types))


def _show(shape: ModelShape, gpu: GpuType, asked: Asked, found: Verdict, fmt: Format) -> None:
    if fmt.is_json:
        output.say_json(_as_json(shape, gpu, asked, found), fmt)
    else:
        output.say(*_lines(shape, gpu, asked, found))
    if not found.fits:
        raise typer.Exit(1)


def _as_json(shape: ModelShape, gpu: GpuType, asked: Asked, found: Verdict) -> dict[str, Any]:
    from dataclasses import asdict

    picture = found.picture
    answer: dict[str, Any] = {
        "model": shape.name, "parameters": shape.parameters, "gpu": gpu.name, "gpus": asked.gpus, "fits": found.fits,
        "instead": list(found.instead), "rule": found.rule,
    }  # fmt: skip
    if picture is not None:
        answer |= {
            "split": asdict(picture.split), "recompute": picture.split.recompute, "parts_bytes": {k: round(v) for k, v in picture.parts_bytes.items()},
            "total_bytes": round(picture.total_bytes), "usable_bytes": round(picture.usable_bytes), "binding": picture.binding,
            "step_s": picture.step_s,
        }  # fmt: skip
    return answer


def _lines(shape: ModelShape, gpu: GpuType, asked: Asked, found: Verdict) -> list[str]:
    from whaleflux.planning.found import PART_WORDS
    from whaleflux.quantities import shown_bytes

    head = f"{shape.name} ({billions(shape.parameters)} parameters) on {asked.gpus} x {gpu.name}, sequences of {asked.sequence:,} tokens"
    picture = found.picture
    if picture is None:
        return [head, f"no such split is possible: {found.rule}", *_next(found)]
    most = max(picture.usable_bytes, picture.total_bytes)
    lines = [head, f"split: {picture.split.words()}, micro-batch {picture.split.micro_batch}"]
    if picture.split.gpus < asked.gpus:
        lines.append(f"it has work for {picture.split.gpus} of the {asked.gpus} GPUs")
    lines += ["", "on the fullest GPU"]
    for part, size in picture.parts_bytes.items():
        lines.append(f"  {PART_WORDS[part]:<24}{shown_bytes(size):>9}  {'#' * round(_BAR * size / most)}".rstrip())
    lines.append(f"  {'in all':<24}{shown_bytes(picture.total_bytes):>9}")
    lines.append(
        f"  {'there is':<24}{shown_bytes(picture.usable_bytes):>9}  of what the driver reports, less what it and NCCL hold"
    )
    if picture.fits:
        spare = picture.usable_bytes - picture.total_bytes
        tight = f"; tight: the model itself errs by {_ERROR:.0%}" if spare < _ERROR * picture.usable_bytes else ""
        return [*lines, "", f"fits, {shown_bytes(spare)} to spare{tight}"]
    short = shown_bytes(picture.total_bytes - picture.usable_bytes)
    largest = shown_bytes(max(picture.parts_bytes.values()))
    return [*lines, "", f"does not fit: {short} too much; most of it {picture.binding}, {largest}", *_next(found)]


def _next(found: Verdict) -> list[str]:
    if not found.instead:
        return ["nothing near it fits either: take a smaller model, or many more GPUs"]
    return ["what fits:", *(f"  {one}" for one in found.instead)]
