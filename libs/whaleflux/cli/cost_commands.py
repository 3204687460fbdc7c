"""What was spent, on what, and what of it was wasted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.cost_filters import (
    CLASS,
    By,
    Gpu,
    Model,
    Most,
    Queue,
    Since,
    Site,
    Until,
    User,
    answered,
    groupings,
    narrow,
    which,
)
from whaleflux.cli.cost_nothing import is_nothing, note_nothing, note_rounded
from whaleflux.cli.cost_words import (
    NO_WASTE,
    at,
    by_class,
    by_group,
    expected,
    off,
    say_about,
    say_until,
    shown,
    waste_by_group,
    wasted,
    waterfall,
    within,
)
from whaleflux.cli.output import Format
from whaleflux.cli.price_commands import usd
from whaleflux.cli.state import NoHeaders, Output, fleet, job_name

cost = typer.Typer(
    invoke_without_command=True, help="What was spent, on what, and on whom. Alone: the last seven days by queue."
)


@cost.callback()
def cost_alone(
    context: typer.Context,
    by: By = "queue",
    since: Since = "7d",
    until: Until = "",
    queue: Queue = "",
    user: User = "",
    site: Site = "",
    gpu: Gpu = "",
    model: Model = "",
    limit: Most = 50,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What was spent.

    \b
      whaleflux cost
      whaleflux cost --by job --since 24h
      whaleflux cost --by day,queue --since 30d -o csv
      whaleflux cost --by queue,class
      whaleflux cost job my-training
    """  # noqa: D301 - the escape tells click to keep the lines
    if context.invoked_subcommand is not None:
        return
    groups = groupings(by)
    asked = which(since, until, queue, user, site, gpu, model)
    answer = answered(asked, groups, limit)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    headers, rows = by_class(answer, groups) if CLASS in groups else by_group(answer, groups)
    if fmt is Format.csv:
        output.say_csv(headers, rows)
        return
    output.table([] if no_headers else headers, rows)
    _say_about(asked, answer)


def _say_about(asked: Any, answer: Any) -> None:
    note_rounded(asked, answer)
    say_about(answer)
    if is_nothing(answer.total):
        note_nothing(asked)


@cost.command("job")
def cost_job(name: Annotated[str, typer.Argument(metavar="JOB", help="Job.")], fmt: Output = Format.table) -> None:
    """What one job cost and why: from its bill to what was useful.

    \b
      whaleflux cost job my-training
      whaleflux cost job my-training -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    with fleet() as client:
        answer = client.console.GetJobCost(pb.GetJobCostRequest(job=job_name(name)), timeout=20)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    if not answer.total.gpu_hours:
        output.note(
            f"{job_name(name)} held no GPU in the last year, as far as the ledger is; see: whaleflux cost status"
        )
        return
    output.say(f"{job_name(name)}: {usd(answer.total.bill_micros)} USD for {answer.total.gpu_hours:,.2f} GPU-hours")
    waterfall(answer.total)
    if answer.micros_per_useful_gpu_hour:
        output.note(f"{usd(answer.micros_per_useful_gpu_hour)} USD per useful GPU-hour")
    say_until(answer)


@cost.command("forecast")
def cost_forecast(queue: Queue = "", user: User = "", site: Site = "", fmt: Output = Format.table) -> None:
    """What this month will have cost, out of the days before, and how far off such forecasts were.

    \b
      whaleflux cost forecast
      whaleflux cost forecast --queue research -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    request = pb.GetForecastRequest()
    narrow(request, queue, user, site)
    with fleet() as client:
        found = client.console.GetForecast(request, timeout=30)
    lines = [
        ("month", f"{at(found, 'start_time')} until {at(found, 'end_time')}"),
        (
            "spent",
            f"{usd(found.spent_micros)} USD"
            if found.HasField("watermark")
            else "unknown: nothing is in the ledger yet",
        ),
        ("expected", expected(found)),
        ("four of five were within", within(found)),
        ("tried", f"on {found.trials} days of the past{off(found)}"),
        ("usage known until", at(found, "watermark")),
    ]
    output.show_one(found, lines, fmt)
    if fmt is Format.table and not found.spent_micros:
        month = pb.CostFilter(start_time=found.start_time, queue=request.queue, user=request.user, site=request.site)
        note_nothing(month)


@cost.command("units")
def cost_units(
    by: Annotated[str, typer.Option("--by", help="job, model or queue.")] = "job",
    since: Since = "7d",
    until: Until = "",
    queue: Queue = "",
    limit: Most = 50,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What a million tokens, a run, one that succeeded and a useful GPU-hour cost, in hours that are closed.

    \b
      whaleflux cost units
      whaleflux cost units --by model
      whaleflux cost units --by queue --since 30d
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import console_pb2 as pb

    if by not in ("job", "model", "queue"):
        raise InvalidArgument(FieldViolation("--by", f"{by!r}: use job, model or queue"))
    window = which(since, until, queue, "", "", "", "")
    asked = pb.GetUnitCostsRequest(queue=window.queue, group_by=f"COST_GROUPING_{by.upper()}", limit=limit)
    asked.start_time.CopyFrom(window.start_time)
    if until:
        asked.end_time.CopyFrom(window.end_time)
    with fleet() as client:
        answer = client.console.GetUnitCosts(asked, timeout=120)
    served = [
        output.Column("USD/1M SERVED", lambda one: _unit(one, "micros_per_million_served_tokens", 4)),
        output.Column("USD/1M ANSWERED", lambda one: _unit(one, "micros_per_million_output_tokens", 4)),
        output.Column("TOKENS IN", lambda one: _tokens(one, "input_tokens")),
        output.Column("TOKENS OUT", lambda one: _tokens(one, "output_tokens")),
        output.Column("USD", lambda one: usd(one.bill_micros)),
    ]
    trained = [
        output.Column("USD/1M TOKENS", lambda one: _unit(one, "micros_per_million_tokens", 4)),
        output.Column("USD/RUN", lambda one: usd(one.micros_per_run)),
        output.Column("USD/USEFUL GPU-H", lambda one: _unit(one, "micros_per_useful_gpu_hour")),
        output.Column("USD/SUCCESS", lambda one: _unit(one, "micros_per_successful_run")),
        output.Column("FAILED", _failed),
        output.Column("RUNS", lambda one: str(one.runs)),
        output.Column("TOKENS", lambda one: _tokens(one, "tokens")),
        output.Column("USD", lambda one: usd(one.bill_micros)),
    ]
    columns = [output.Column(by.upper(), lambda one: shown(one.key)), *(served if by == "model" else trained)]
    empty = "no run held GPUs in hours that are closed; see: whaleflux cost status"
    output.show(answer.units, columns, fmt, headers=not no_headers, empty=empty)
    if fmt is Format.table:
        note_rounded(window, answer)
        say_until(answer)
        if not answer.units:
            note_nothing(window)


def _tokens(one: Any, field: str) -> str:
    return f"{getattr(one, field):,}" if one.HasField(field) else "unknown"


def _failed(one: Any) -> str:
    """How many runs, and which share of the bill was theirs."""
    share = f", {100 * one.failed_micros / one.bill_micros:.1f} %" if one.bill_micros else ""
    return f"{one.failed_runs}{share}" if one.failed_runs else "-"


def _unit(one: Any, field: str, digits: int = 2) -> str:
    return usd(getattr(one, field), digits) if one.HasField(field) else "unknown"


@cost.command("export")
def cost_export(
    file: Annotated[Path | None, typer.Argument(help="Where to write.", metavar="FILE")] = None,
    kind: Annotated[str, typer.Option("-f", "--format", help="csv or parquet.")] = "csv",
    since: Annotated[
        str, typer.Option("--since", help="From which day on, such as 2026-11-01; none: this month.")
    ] = "",
    until: Until = "",
    account: Annotated[str, typer.Option("--account", help="BillingAccountId of every charge.")] = "whaleflux",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; only say whether it is right.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Writes closed hours as charges of FOCUS 1.2, and says whether they keep its rules and sum to the bill. Exit code 1: they do not.

    \b
      whaleflux cost export november.csv --since 2026-11-01 --until 2026-12-01
      whaleflux cost export november.parquet -f parquet --since 2026-11-01 --until 2026-12-01
      whaleflux cost export --check
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import cost_export as export

    request = export.request(kind, since, until, account, file, check=check)
    with fleet() as client:
        found = export.write(client.console.ExportCost(request, timeout=export.LONGEST_S), None if check else file)
    if fmt.is_json:
        output.say_json(output.as_json(found), fmt)
    else:
        output.say(
            f"{found.rows:,} charges ({found.corrections:,} corrections) from {at(found, 'start_time')} until "
            f"{at(found, 'end_time')}: {usd(found.billed_micros, 6)} USD, of a bill of {usd(found.bill_micros, 6)}"
        )
    for fault in found.faults:
        output.fail(fault)
    if found.faults:
        raise typer.Exit(1)


@cost.command("status")
def cost_status(fmt: Output = Format.table) -> None:
    """How far the usage ledger is, and what of it is missing."""
    from whaleflux.v1 import console_pb2 as pb

    with fleet() as client:
        found = client.console.GetLedger(pb.GetLedgerRequest(), timeout=20)
    lines = [
        ("usage known until", at(found, "watermark")),
        ("begins", at(found, "start_time")),
        (
            "closed hours",
            f"{found.closed_hours}, of which closed again: {found.restated_hours}, to be closed again soon: {found.waiting_hours}",
        ),
        ("files", f"{found.size_bytes / 1e6:,.1f} MB, manifest {found.manifest}"),
        ("reports missed", str(found.missed_reports)),
        ("damaged files", ", ".join(found.damaged_files) or "none"),
        ("trouble", found.trouble or "none"),
    ]
    output.show_one(found, lines, fmt)


def waste(
    by: By = "",
    since: Since = "7d",
    until: Until = "",
    queue: Queue = "",
    user: User = "",
    site: Site = "",
    gpu: Gpu = "",
    model: Model = "",
    limit: Most = 20,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What was paid for and did nothing, by class; with --by, whose it was.

    \b
      whaleflux waste
      whaleflux waste --by job --since 24h
    """  # noqa: D301 - the escape tells click to keep the lines
    groups = groupings(by) if by else ()
    asked = which(since, until, queue, user, site, gpu, model)
    answer = answered(asked, groups, limit)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    if not groups and fmt is Format.table:
        output.say(f"{usd(answer.total.bill_micros)} USD were spent, {usd(wasted(answer.total))} USD of it wasted")
        waterfall(answer.total)
        _say_about(asked, answer)
        return
    headers, rows = by_class(answer, groups, NO_WASTE) if CLASS in groups else waste_by_group(answer, groups)
    if fmt is Format.csv:
        output.say_csv(headers, rows)
        return
    output.table([] if no_headers else headers, rows)
    _say_about(asked, answer)
