"""How a training went: its loss and what its steps took, step by step, over all of its attempts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import JobArgument, NoHeaders, Output, fleet, job_name

MOST_STEP = 1 << 53


def progress(
    name: JobArgument,
    points: Annotated[int, typer.Option("-n", "--points", help="About so many points.", min=1, max=2000)] = 30,
    first: Annotated[int, typer.Option("--from", metavar="STEP", help="From this step on.", min=0, max=MOST_STEP)] = 0,
    last: Annotated[int, typer.Option("--to", metavar="STEP", help="Up to this step.", min=0, max=MOST_STEP)] = 0,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """How a training went: loss, seconds per step, tokens per second.

    \b
      whaleflux progress llama-70b-sft
      whaleflux progress llama-70b-sft --from 12000 --to 13000 -o wide
      whaleflux progress llama-70b-sft -n 2000 -o csv > curve.csv

    A point is of the steps of a minute or more; its least and greatest loss are of all of these steps. Steps of the last 35 days.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    request = pb.GetStepHistoryRequest(job=job_name(name), points=points, first_step=first, last_step=last)
    with fleet() as client:
        answer = client.console.GetStepHistory(request, timeout=20)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    again = {one.attempt: one.done_again_after_step for one in answer.attempts if one.HasField("done_again_after_step")}
    empty = f"no steps of {request.job} are known; programs tell of them with whaleflux.sdk (steps, report), a minute later they are here"
    output.show(
        answer.points,
        _columns(again),
        fmt,
        headers=not no_headers,
        empty=empty,
        name=lambda point: str(point.last_step),
    )
    if fmt in {Format.table, Format.wide}:
        for attempt, step in again.items():
            output.note(f"what attempt {attempt} did behind step {step} was done again by a later one")
        output.note("losses are for those who may read the job's output" if answer.losses_hidden else "")


def _columns(again: dict[int, int]) -> list[Column]:
    return [
        Column("ATTEMPT", lambda p: str(p.attempt), value=lambda p: int(p.attempt)),
        Column("STEPS", lambda p: f"{p.first_step}-{p.last_step}" + " again" * (p.last_step > again.get(p.attempt, p.last_step))),
        Column("UNTIL", lambda p: output.age(p.end_time) + " ago", value=lambda p: p.end_time.ToMilliseconds() / 1000),
        Column("LOSS", lambda p: _loss(p, "mean") + _odd(p), value=lambda p: _number(p.loss, "mean")),
        Column("LEAST", lambda p: _loss(p, "min"), value=lambda p: _number(p.loss, "min")),
        Column("MOST", lambda p: _loss(p, "max"), value=lambda p: _number(p.loss, "max")),
        _figure("S/STEP", "step_s"),
        _figure("SLOWEST", "slowest_step_s"),
        _figure("TOKENS/S", "tokens_per_s"),
        _figure("FASTEST", "fastest_step_s", wide=True),
        *(_figure(part.upper().replace("_", " "), f"{part}_s", wide=True) for part in ("data", "host", "save", "comm_in_node", "comm_cross")),
        _figure("FLOP/S", "flops_per_s", wide=True),
        Column("RANKS", lambda p: str(p.ranks), wide=True, value=lambda p: int(p.ranks)),
    ]  # fmt: skip


def _figure(header: str, field: str, *, wide: bool = False) -> Column:
    """What was not told is -, and empty for programs."""

    def shown(point: Any) -> str:
        value = _number(point, field)
        return "-" if value == "" else f"{value:.4g}"

    return Column(header, shown, wide, lambda point: _number(point, field))


def _number(message: Any, field: str) -> float | str:
    told = not message.DESCRIPTOR.fields_by_name[field].has_presence or message.HasField(field)
    return float(getattr(message, field)) if told else ""


def _loss(point: Any, field: str) -> str:
    value = _number(point.loss, field)
    return "-" if value == "" else f"{value:.4f}"


def _odd(point: Any) -> str:
    """Losses that are no numbers are told beside those that are."""
    return f" ({point.loss.not_finite} NaN or infinite)" if point.loss.not_finite else ""
