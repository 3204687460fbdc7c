"""What was spent, on what, and what of it was wasted."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import since_s
from whaleflux.cli.output import Format
from whaleflux.cli.price_commands import usd
from whaleflux.cli.state import NoHeaders, Output, fleet, job_name

cost = typer.Typer(
    invoke_without_command=True, help="What was spent, on what, and on whom. Alone: the last seven days by queue."
)
_BY = ("queue", "user", "job", "model", "site", "gpu", "node", "day", "hour")
_WIDTH = 30  # characters of a bar
_CLASSES = {  # of the contract, in its order, in the words of people
    "USEFUL": "useful",
    "RECOMPUTE": "recompute",
    "BUBBLE": "pipeline bubble",
    "COMM_IN_NODE": "communication in a node",
    "COMM_AVOIDABLE": "cross-node, avoidable",
    "COMM_STRUCTURAL": "cross-node, structural",
    "HOST": "waiting for the host",
    "DATA": "waiting for data",
    "SAVE": "waiting for saves",
    "STARTUP": "starting",
    "ALLOCATED_IDLE": "held and idle",
    "IDLE": "free",
    "FRAGMENTED": "free, of no use to those waiting",
    "UNAVAILABLE": "out of service",
    "LOST": "lost in failures",
    "UNKNOWN": "unknown",
}
_NO_WASTE = ("USEFUL", "COMM_STRUCTURAL", "UNKNOWN")
By = Annotated[str, typer.Option("--by", help=f"By what, up to three with commas: {', '.join(_BY)}.")]
Since = Annotated[str, typer.Option("--since", help="From when on: 7d, 24h, or a time such as 2026-11-01.")]
Until = Annotated[str, typer.Option("--until", help="Until when: a time; none: now.")]
Queue = Annotated[str, typer.Option("--queue", "-q", help="Only this queue.")]
User = Annotated[str, typer.Option("--user", help="Only this user, such as user/ann.")]
Site = Annotated[str, typer.Option("--site", help="Only this site.")]
Gpu = Annotated[str, typer.Option("--gpu", help="Only this class of GPU.")]
Model = Annotated[str, typer.Option("--model", help="Only this served model.")]
Most = Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many lines, the dearest.")]


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
      whaleflux cost job my-training
    """  # noqa: D301 - the escape tells click to keep the lines
    if context.invoked_subcommand is not None:
        return
    groups = _groupings(by)
    answer = _asked(_request(since, until, queue, user, site, gpu, model), groups, limit)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    rows = [(*map(_shown, one.keys), *_figures(one, answer.total)) for one in answer.groups]
    rows += [(label, *[""] * (len(groups) - 1), *_figures(one, answer.total)) for label, one in _rest(answer)]
    headers = [*(name.upper() for name in groups), "USD", "SHARE", "GPU-H", "USEFUL", "WASTE", "UNKNOWN"]
    if fmt is Format.csv:
        output.say_csv(headers, rows)
        return
    output.table([] if no_headers else headers, rows)
    _say_about(answer)


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
    _waterfall(answer.total)
    if answer.micros_per_useful_gpu_hour:
        output.note(f"{usd(answer.micros_per_useful_gpu_hour)} USD per useful GPU-hour")
    _say_until(answer)


@cost.command("forecast")
def cost_forecast(queue: Queue = "", user: User = "", site: Site = "", fmt: Output = Format.table) -> None:
    """What this month will have cost, out of the days before, and how far off such forecasts were.

    \b
      whaleflux cost forecast
      whaleflux cost forecast --queue research -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    asked = _request("7d", "", queue, user, site, "", "")
    with fleet() as client:
        request = pb.GetForecastRequest(queue=asked.queue, user=asked.user, site=asked.site)
        found = client.console.GetForecast(request, timeout=30)
    lines = [
        ("month", f"{_at(found, 'start_time')} until {_at(found, 'end_time')}"),
        (
            "spent",
            f"{usd(found.spent_micros)} USD"
            if found.HasField("watermark")
            else "unknown: nothing is in the ledger yet",
        ),
        ("expected", expected(found)),
        ("four of five were within", _range(found)),
        ("tried", f"on {found.trials} days of the past{_off(found)}"),
        ("usage known until", _at(found, "watermark")),
    ]
    output.show_one(found, lines, fmt)


def expected(found: Any) -> str:
    """Of the whole month, for people."""
    if not found.HasField("expected_micros"):
        return "unknown: fewer than 3 whole days are in the ledger"
    return f"{usd(found.expected_micros)} USD"


def _range(found: Any) -> str:
    known = found.HasField("low_micros")
    return f"{usd(found.low_micros)} to {usd(found.high_micros)} USD" if known else "unknown: too few days to try it on"


def _off(found: Any) -> str:
    return f"; half were off by {found.error_ppm / 10_000:.1f} % or less" if found.HasField("error_ppm") else ""


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
    """What a million trained tokens, a run and a useful GPU-hour cost, in hours that are closed.

    \b
      whaleflux cost units
      whaleflux cost units --by queue --since 30d
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import console_pb2 as pb

    if by not in ("job", "model", "queue"):
        raise InvalidArgument(FieldViolation("--by", f"{by!r}: use job, model or queue"))
    window = _request(since, until, queue, "", "", "", "")
    asked = pb.GetUnitCostsRequest(queue=window.queue, group_by=f"COST_GROUPING_{by.upper()}", limit=limit)
    asked.start_time.CopyFrom(window.start_time)
    if until:
        asked.end_time.CopyFrom(window.end_time)
    with fleet() as client:
        answer = client.console.GetUnitCosts(asked, timeout=120)
    columns = [
        output.Column(by.upper(), lambda one: _shown(one.key)),
        output.Column("USD/1M TOKENS", lambda one: _unit(one, "micros_per_million_tokens", 4)),
        output.Column("USD/RUN", lambda one: usd(one.micros_per_run)),
        output.Column("USD/USEFUL GPU-H", lambda one: _unit(one, "micros_per_useful_gpu_hour")),
        output.Column("RUNS", lambda one: str(one.runs)),
        output.Column("TOKENS", lambda one: f"{one.tokens:,}" if one.HasField("tokens") else "unknown"),
        output.Column("USD", lambda one: usd(one.bill_micros)),
    ]
    empty = "no run held GPUs in hours that are closed; see: whaleflux cost status"
    output.show(answer.units, columns, fmt, headers=not no_headers, empty=empty)
    if fmt is Format.table:
        _say_until(answer)


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
            f"{found.rows:,} charges ({found.corrections:,} corrections) from {_at(found, 'start_time')} until "
            f"{_at(found, 'end_time')}: {usd(found.billed_micros, 6)} USD, of a bill of {usd(found.bill_micros, 6)}"
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
        ("usage known until", _at(found, "watermark")),
        ("begins", _at(found, "start_time")),
        ("closed hours", f"{found.closed_hours}, of which closed again: {found.restated_hours}"),
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
    groups = _groupings(by) if by else ()
    answer = _asked(_request(since, until, queue, user, site, gpu, model), groups, limit)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    if not groups and fmt is Format.table:
        output.say(f"{usd(answer.total.bill_micros)} USD were spent, {usd(_wasted(answer.total))} USD of it wasted")
        _waterfall(answer.total)
        _say_about(answer)
        return
    found = sorted(answer.groups, key=_wasted, reverse=True) if groups else [answer.total]
    rows = [(*map(_shown, one.keys), usd(_wasted(one)), _most(one), usd(one.bill_micros)) for one in found]
    headers = [*(name.upper() for name in groups), "WASTE USD", "MOST OF IT", "BILL USD"]
    if fmt is Format.csv:
        output.say_csv(headers, rows)
        return
    output.table([] if no_headers else headers, rows)
    _say_about(answer)


def _groupings(by: str) -> tuple[str, ...]:
    from whaleflux.errors import FieldViolation, InvalidArgument

    found = tuple(word.strip() for word in by.split(",") if word.strip())
    wrong = [word for word in found if word not in _BY]
    if wrong or not 1 <= len(found) <= 3:
        said = f"{wrong[0]!r} is none of them" if wrong else "takes one to three"
        raise InvalidArgument(FieldViolation("--by", f"{said}; use up to three of {', '.join(_BY)}"))
    return found


def _request(since: str, until: str, queue: str, user: str, site: str, gpu: str, model: str) -> Any:
    from whaleflux.v1 import console_pb2 as pb

    asked = pb.CostFilter(user=user if not user or "/" in user else f"user/{user}", gpu_class=gpu)
    asked.queue = names.queue(queue.removeprefix("queues/")) if queue else ""
    asked.site = names.site(site.removeprefix("sites/")) if site else ""
    asked.model = names.model(model.removeprefix("models/")) if model else ""
    if until:
        asked.end_time.FromSeconds(int(since_s(until, "--until")))
    asked.start_time.FromSeconds(int(since_s(since)))
    return asked


def _asked(asked: Any, groups: tuple[str, ...], limit: int) -> Any:
    from whaleflux.v1 import console_pb2 as pb

    by: list[Any] = [
        pb.CostGrouping.Value(f"COST_GROUPING_{'GPU_CLASS' if one == 'gpu' else one.upper()}") for one in groups
    ]
    with fleet() as client:
        return client.console.GetCost(pb.GetCostRequest(filter=asked, group_by=by, limit=limit), timeout=30)


def _classes(one: Any) -> dict[str, int]:
    from whaleflux.v1 import console_pb2 as pb

    return {pb.CostClass.Name(part.cost_class).removeprefix("COST_CLASS_"): part.micros for part in one.classes}


def _wasted(one: Any) -> int:
    return sum(micros for name, micros in _classes(one).items() if name not in _NO_WASTE)


def _most(one: Any) -> str:
    """The class that most of a group's waste is of."""
    found = {name: micros for name, micros in _classes(one).items() if name not in _NO_WASTE}
    name = max(found, key=lambda each: found[each], default="")
    return f"{_CLASSES.get(name, name.lower())} {usd(found[name])}" if name else "-"


def _figures(one: Any, total: Any) -> tuple[str, ...]:
    classes = _classes(one)
    unknown = classes.get("UNKNOWN", 0)
    parts = (classes.get("USEFUL", 0), _wasted(one), unknown)
    share = f"{100 * one.bill_micros / total.bill_micros:.1f} %" if total.bill_micros else "-"
    return (usd(one.bill_micros), share, f"{one.gpu_hours:,.2f}", *(usd(part) for part in parts))


def _rest(answer: Any) -> list[tuple[str, Any]]:
    """What is not in the groups, and all of it."""
    found = [("(all others)", answer.others)] if answer.HasField("others") else []
    found += [("(queues not yours)", answer.hidden)] if answer.HasField("hidden") else []
    return [*found, ("TOTAL", answer.total)]


def _shown(key: str) -> str:
    if not key:
        return "(nobody)"
    for prefix in ("queues/", "models/", "sites/"):
        key = key.removeprefix(prefix)
    return key.replace("/jobs/", "/").replace("/nodes/", "/").replace("T00:00:00Z", "")


def _waterfall(one: Any) -> None:
    """Every class as a bar, in order, from the bill down."""
    classes = _classes(one)
    most = max((abs(micros) for micros in classes.values()), default=0)
    rows = []
    for name, words in _CLASSES.items():
        if micros := classes.get(name, 0):
            share = f"{100 * micros / one.bill_micros:.1f} %" if one.bill_micros else "-"
            rows.append((words, usd(micros), share, "#" * max(1, round(_WIDTH * abs(micros) / most))))
    output.table(("WHAT FOR", "USD", "SHARE", ""), rows)


def _say_about(answer: Any) -> None:
    if answer.unpriced_gpu_hours >= 0.005:
        hours = f"{answer.unpriced_gpu_hours:,.2f} GPU-hours have no price and count as 0"
        output.note(f"{hours}; declare one with: whaleflux prices set NAME")
    if answer.damaged_files:
        output.note(f"not in it, since these files are damaged: {', '.join(answer.damaged_files)}")
    _say_until(answer)


def _say_until(answer: Any) -> None:
    if not answer.HasField("watermark"):
        output.note("nothing is in the ledger yet; see: whaleflux cost status")
        return
    still = ""
    if "open_since" in answer.DESCRIPTOR.fields_by_name and answer.HasField("open_since"):
        still = f"; hours since {_at(answer, 'open_since')} are not closed and may change"
    output.note(f"usage known until {_at(answer, 'watermark')}{still}")


def _at(one: Any, field: str) -> str:
    return f"{getattr(one, field).ToDatetime(tzinfo=UTC):%Y-%m-%dT%H:%MZ}" if one.HasField(field) else "-"
