"""What a month may cost, and what is spent of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.absent_scopes import note_absent
from whaleflux.cli.cost_filters import narrow
from whaleflux.cli.cost_words import expected
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.price_commands import micros_of, usd, usd_exact
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

budget = typer.Typer(
    invoke_without_command=True,
    help="What a queue, a user, a site or all may cost a month, and what is spent of it. Alone: list budgets.",
)
BudgetName = Annotated[str, typer.Argument(metavar="BUDGET", help="Budget.")]


@budget.callback()
def budget_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_budgets(sort, fmt, no_headers)


@budget.command("ls")
def list_budgets(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Budgets, with what this month has cost of each and will have cost."""
    from whaleflux.v1 import console_pb2 as pb

    with fleet() as client:
        found: list[Any] = pages(client.console.ListBudgets, pb.ListBudgetsRequest(), "budgets")
    columns = [
        Column("NAME", lambda one: names.last(one.name)),
        Column("FOR", _scope),
        Column("USD/MONTH", lambda one: usd(one.micros_per_month)),
        Column("SPENT", lambda one: usd(one.forecast.spent_micros) if _is_known(one) else "unknown"),
        Column("SHARE", _share),
        Column("EXPECTED", lambda one: expected(one.forecast).partition(":")[0]),
        Column("ALERTS", lambda one: ", ".join(f"{percent} %" for percent in one.alert_percents)),
        Column("TOLD", _told),
        Column("STOPS", _stops),
    ]
    empty = "there are no budgets; declare one with: whaleflux budget set NAME --usd 10000 --queue QUEUE"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@budget.command("set")
def set_budget(
    name: BudgetName,
    usd_per_month: Annotated[str, typer.Option("--usd", help="US dollars a month (UTC).")],
    queue: Annotated[str, typer.Option("--queue", "-q", help="Queue that it is for.")] = "",
    user: Annotated[str, typer.Option("--user", help="User that it is for, such as user/ann.")] = "",
    site: Annotated[str, typer.Option("--site", help="Site that it is for; none of the three: everything.")] = "",
    alerts: Annotated[
        str, typer.Option("--alert", help="At which percents an event tells, with commas.")
    ] = "50,80,100",
    stop: Annotated[
        bool,
        typer.Option(
            "--stop", help="Once all of it is spent, start no work that has not begun, until the month is over."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check.")] = False,
) -> None:
    """Declares a budget, or changes it. An event tells once a month of each threshold that is reached; nothing that has begun is stopped.

    \b
      whaleflux budget set research --queue research --usd 20000
      whaleflux budget set edge --site edge --usd 3000 --stop
      whaleflux budget set all --usd 150000 --alert 80,100,120
      whaleflux events --what BUDGET_REACHED
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    one = pb.Budget(micros_per_month=micros_of("--usd", usd_per_month), alert_percents=_percents(alerts), stop=stop)
    narrow(one, queue, user, site)
    with fleet() as client:
        request = pb.SetBudgetRequest(budget_id=name, budget=one, validate_only=dry_run)
        made = client.console.SetBudget(request, timeout=20)
        then = ", then no new work starts" if stop else ""
        how = "could be" if dry_run else "is"
        output.note(f"{made.name} {how} set: {usd_exact(made.micros_per_month)} USD a month{then}")
        note_absent(client, [one])


@budget.command("rm")
def remove_budget(name: BudgetName, yes: Yes = False) -> None:
    """Forgets a budget."""
    from whaleflux.v1 import console_pb2 as pb

    full = names.join(("budgets", name.removeprefix("budgets/")))
    with fleet() as client:
        confirm(f"forget {full}?", yes)
        client.console.DeleteBudget(pb.DeleteBudgetRequest(name=full), timeout=20)
    output.note(f"{full} is forgotten")


def _percents(text: str) -> list[int]:
    from whaleflux.errors import FieldViolation, InvalidArgument

    words = [word.strip().removesuffix("%").strip() for word in text.split(",") if word.strip()]
    if not words or any(not word.isdigit() or len(word) > 4 for word in words):
        raise InvalidArgument(FieldViolation("--alert", f"{text!r}: use whole percents with commas, such as 50,80,100"))
    return [int(word) for word in words]


def _scope(one: Any) -> str:
    return one.queue or one.user or one.site or "everything"


def _share(one: Any) -> str:
    known = _is_known(one) and one.micros_per_month
    return f"{100 * one.forecast.spent_micros / one.micros_per_month:.1f} %" if known else "unknown"


def _is_known(one: Any) -> bool:
    """Whether a ledger says what is spent: one that has nothing yet does not."""
    return bool(one.forecast.HasField("watermark"))


def _told(one: Any) -> str:
    percents = ", ".join(f"{percent} %" for percent in one.alerted_percents)
    return f"{percents} in {one.alerted_month}" if percents else "-"


def _stops(one: Any) -> str:
    """That it stopped new work in a month that is over is no news."""
    from datetime import UTC, datetime

    if one.stop and one.stopped_month == f"{datetime.now(UTC):%Y-%m}":
        return f"new work, since {one.stopped_time.ToDatetime():%Y-%m-%d %H:%M} UTC"
    return "new work, at 100 %" if one.stop else "-"
