"""Renting by the fleet itself: what it would rent now and why, and what it has rented."""

from __future__ import annotations

from typing import Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, fleet, pages

burst = typer.Typer(
    no_args_is_help=True, help="Machines rented for jobs that wait: what is worth it now, and what was rented."
)
_BY_ITSELF = {
    "off": "the scheduler looks at nothing by itself (setting burst: off)",
    "plan": "the scheduler tells this in events, and rents nothing (setting burst: plan)",
    "on": "the scheduler rents and gives back by itself (setting burst: on)",
}


@burst.command("plan")
def plan(fmt: Output = Format.table) -> None:
    """What would be rented now for jobs that wait, what given back, and why not more. Changes nothing.

    \b
      whaleflux burst plan
      whaleflux burst plan -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found = client.scheduler.PlanBurst(pb.PlanBurstRequest(), timeout=30)
    if fmt.is_json:
        output.say_json(output.as_json(found), fmt)
        return
    if fmt is not Format.table:
        from whaleflux.errors import FieldViolation, InvalidArgument

        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a plan; use table or json"))
    rows = [_rent(one) for one in found.rents]
    rows += [("give back", one.lease, "-", "-", one.why) for one in found.ends]
    rows += [("nothing", one.job, "-", "-", one.why) for one in found.waits]
    if rows:
        output.table(("WHAT", "FOR", "USD", "WORTH", "WHY"), rows)
    else:
        output.say("no job waits for GPUs that could be rented, and no rented machine is idle")
    left = ", ".join(f"{scope}: {usd:.2f} USD" for scope, usd in sorted(found.left_usd.items()))
    output.note((f"left of today's budgets: {left}; " if left else "") + _BY_ITSELF.get(found.mode, ""))


@burst.command("history")
def history(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """What the fleet has rented by itself in the last 30 days, for whom, and what it cost.

    \b
      whaleflux burst history
      whaleflux burst history -o csv
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli.rental_commands import lease_state
    from whaleflux.v1 import inventory_pb2 as ipb

    with fleet() as client:
        listed: list[Any] = pages(client.inventory.ListLeases, ipb.ListLeasesRequest(show_gone=True), "leases")
    found = [one for one in listed if one.owner.startswith("scheduler/")]
    columns = [
        Column("NAME", lambda one: one.name),
        Column("STATE", lease_state),
        Column("OFFER", lambda one: names.last(one.offer.name)),
        Column("GPUS", lambda one: f"{one.offer.gpus} {one.offer.gpu_type}"),
        Column("QUEUE", lambda one: names.last(one.queue) or "-"),
        Column("USD", lambda one: f"{one.cost_usd:.2f}"),
        Column("AGE", lambda one: output.age(one.create_time)),
        Column("FOR", lambda one: one.reason.removeprefix("for ")),
        Column("ENDED", lambda one: one.end_reason or "-", wide=True),
    ]
    empty = "the fleet has rented nothing by itself; see what it would: whaleflux burst plan"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


def _rent(one: Any) -> tuple[str, ...]:
    return (
        f"rent {one.machines} by {names.last(one.offers[0]) if one.offers else '-'}",
        one.job,
        f"{one.usd:.2f}",
        f"{one.worth_usd:.2f}",
        one.why,
    )
