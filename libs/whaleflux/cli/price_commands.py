"""What GPUs cost: declared, imported, ended; and what invoices say beside."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.absent_scopes import note_absent
from whaleflux.cli.files import read
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

prices = typer.Typer(
    invoke_without_command=True,
    help="What GPUs cost, and what invoices say beside: declare, import, end. Alone: list prices.",
)
PriceName = Annotated[str, typer.Argument(metavar="PRICE", help="Price.")]
Gpu = Annotated[str, typer.Option("--gpu", help="Class of GPU, such as H200; none: any.")]
Site = Annotated[str, typer.Option("--site", help="Site; none: any.")]
From = Annotated[str, typer.Option("--from", help="From when on, such as 2026-12-01 or 2026-12-01T08:00Z.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only check.")]


@prices.callback()
def prices_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_prices(sort, fmt, no_headers)


@prices.command("ls")
def list_prices(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Prices, for which GPUs, from when to when, and whose figures they are."""
    from whaleflux.v1 import console_pb2 as pb
    from whaleflux.v1 import types_pb2

    with fleet() as client:
        found: list[Any] = pages(client.console.ListPrices, pb.ListPricesRequest(), "prices")
    columns = [
        Column("NAME", lambda one: names.last(one.name)),
        Column("FOR", scope),
        Column("USD/GPU/H", lambda one: usd(one.micros_per_gpu_hour, 4)),
        Column("KIND", lambda one: output.enum_name(types_pb2.PriceKind, one.kind, "PRICE_KIND_").lower()),
        Column("FROM", lambda one: _at(one, "start_time")),
        Column("UNTIL", lambda one: _at(one, "end_time")),
        Column("SOURCE", lambda one: f"{one.source} ({one.source_date})"),
        Column("PARTS", _parts, wide=True),
    ]
    empty = "no prices are declared: what nodes say counts; declare one with: whaleflux prices set NAME"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@prices.command("set")
def set_price(
    name: PriceName,
    usd_per_gpu_hour: Annotated[str, typer.Option("--usd-per-gpu-hour", help="US dollars per GPU and hour.")],
    source: Annotated[str, typer.Option("--source", help="Whose figure it is: a contract, a price list.")],
    start: From,
    kind: Annotated[str, typer.Option("--kind", help="owned, on-demand, reserved or spot.")] = "on-demand",
    gpu: Gpu = "",
    site: Site = "",
    node: Annotated[str, typer.Option("--node", help="Node, as site/node; none: any.")] = "",
    until: Annotated[str, typer.Option("--until", help="Until when; none: for good.")] = "",
    source_date: Annotated[str, typer.Option("--source-date", help="When it was read there; none: today.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Declares what GPUs cost. The narrowest price counts: a node's, a site's for a class, a class's, a site's, everybody's.

    \b
      whaleflux prices set h100-2026 --gpu H100-80GB --usd-per-gpu-hour 2.95 --kind reserved --from 2026-01-01 --source "Contract 17"
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.manifests.price_file import price_from_fields

    said = {
        "name": name, "usd_per_gpu_hour": usd_per_gpu_hour, "source": source, "from": start, "kind": kind, "gpu": gpu, "site": site,
        "node": node, "until": until, "source_date": source_date,
    }  # fmt: skip
    _declare([price_from_fields({key: value for key, value in said.items() if value})], dry_run)


@prices.command("import")
def import_prices(
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="Prices as YAML, or - for stdin.")],
    dry_run: DryRun = False,
) -> None:
    """Declares the prices of a file, also of what is owned; all are checked before the first is stored.

    \b
      whaleflux prices import -f prices.yaml --dry-run
      whaleflux prices import -f prices.yaml
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.manifests.price_file import prices_from_yaml

    _declare(prices_from_yaml(read(file)[0]), dry_run, of_a_file=True)


@prices.command("end")
def end_price(
    name: PriceName,
    at: Annotated[str, typer.Option("--at", help="When, such as 2026-12-31; none: now.")] = "",
) -> None:
    """Says until when a price holds. Hours that it changes are closed again."""
    from whaleflux.v1 import console_pb2 as pb

    request = pb.EndPriceRequest(name=_price_name(name))
    if at:
        request.end_time.FromDatetime(_instant("--at", at))
    with fleet() as client:
        ended = client.console.EndPrice(request, timeout=20)
    output.note(f"{ended.name} holds until {_at(ended, 'end_time')}")


@prices.command("rm")
def remove_price(name: PriceName, yes: Yes = False) -> None:
    """Forgets a price as if it had never been; `end` keeps what it was."""
    from whaleflux.v1 import console_pb2 as pb

    full = _price_name(name)
    with fleet() as client:
        confirm(f"forget {full} as if it had never been? (`whaleflux prices end` keeps what it was)", yes)
        client.console.DeletePrice(pb.DeletePriceRequest(name=full), timeout=20)
    output.note(f"{full} is forgotten")


@prices.command("adjust")
def adjust(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for it, such as invoice-2026-11.")],
    usd_more: Annotated[str, typer.Option("--usd", help="What the invoice has more; negative: less, a credit.")],
    start: From,
    until: Annotated[str, typer.Option("--until", help="Until when.")],
    reason: Annotated[str, typer.Option("--reason", help="Which invoice, and why.")],
    gpu: Gpu = "",
    site: Site = "",
    dry_run: DryRun = False,
) -> None:
    """Says what an invoice has more, or less, than the prices: it is spread over what its window cost.

    \b
      whaleflux prices adjust credit-november --usd -1200 --from 2026-11-01 --until 2026-12-01 --reason "Invoice 1234: credit"
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import console_pb2 as pb

    one = pb.Adjustment(micros=micros_of("--usd", usd_more), gpu_class=gpu, reason=reason)
    one.site = names.site(site.removeprefix("sites/")) if site else ""
    one.start_time.FromDatetime(_instant("--from", start))
    one.end_time.FromDatetime(_instant("--until", until))
    request = pb.CreateAdjustmentRequest(adjustment_id=name, adjustment=one, validate_only=dry_run)
    with fleet() as client:
        made = client.console.CreateAdjustment(request, timeout=20)
        output.note(f"{made.name} {'could be' if dry_run else 'is'} declared: {usd_exact(made.micros)} USD")
        note_absent(client, [one])


@prices.command("adjustments")
def list_adjustments(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """What invoices have more, or less, than the prices."""
    from whaleflux.v1 import console_pb2 as pb

    with fleet() as client:
        found: list[Any] = pages(client.console.ListAdjustments, pb.ListAdjustmentsRequest(), "adjustments")
    columns = [
        Column("NAME", lambda one: names.last(one.name)),
        Column("USD", lambda one: usd_exact(one.micros)),
        Column("FOR", scope),
        Column("FROM", lambda one: _at(one, "start_time")),
        Column("UNTIL", lambda one: _at(one, "end_time")),
        Column("STATE", _how_far),
        Column("REASON", lambda one: one.reason),
    ]
    empty = "no invoice was adjusted; declare one with: whaleflux prices adjust NAME"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@prices.command("unadjust")
def remove_adjustment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Adjustment.")], yes: Yes = False
) -> None:
    """Takes an adjustment back."""
    from whaleflux.v1 import console_pb2 as pb

    full = names.join(("adjustments", name.removeprefix("adjustments/")))
    with fleet() as client:
        confirm(f"take {full} back?", yes)
        client.console.DeleteAdjustment(pb.DeleteAdjustmentRequest(name=full), timeout=20)
    output.note(f"{full} is taken back; hours that have a part of it are closed again without it")


def _how_far(one: Any) -> str:
    from whaleflux.v1 import console_pb2 as pb

    said = output.enum_name(pb.AdjustmentState, one.state, "ADJUSTMENT_STATE_").lower().replace("_", " ")
    return "too old: declare it for a later window" if said == "too old" else said


def usd(micros: int, digits: int = 2) -> str:
    """Micro-dollars as US dollars, for people."""
    return f"{micros / 1_000_000:z,.{digits}f}"


def usd_exact(micros: int) -> str:
    """The same to the micro-dollar, with two decimals at least: 1,200.00, -0.000007."""
    whole, part = usd(micros, 6).split(".")
    return f"{whole}.{part.rstrip('0'):0<2}"


def scope(one: Any) -> str:
    """For which GPUs a price or an adjustment is."""
    place = getattr(one, "node", "") or one.site
    said = (place.removeprefix("sites/").replace("/nodes/", "/"), one.gpu_class)
    return " ".join(part for part in said if part) or "every GPU"


def _declare(found: Sequence[Any], dry_run: bool, *, of_a_file: bool = False) -> None:
    with fleet() as client:
        for only_check in (True, False):  # all are checked before the first is stored
            for one in found if only_check or not dry_run else ():
                _create(client, one, only_check, of_a_file)
        note_absent(client, [one.price for one in found])
    what = "could be declared" if dry_run else "are declared; see: whaleflux prices ls"
    output.note(f"{', '.join(_price_name(one.price_id) for one in found)} {what}")


def _create(client: Any, one: Any, only_check: bool, of_a_file: bool) -> None:
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests.price_file import field_in_file
    from whaleflux.v1 import console_pb2 as pb

    try:
        request = pb.CreatePriceRequest(price_id=one.price_id, price=one.price, validate_only=only_check)
        client.console.CreatePrice(request, timeout=20)
    except InvalidArgument as error:
        if not of_a_file:
            raise
        named = [
            FieldViolation(f"prices/{one.price_id}: {field_in_file(v.field, one.price)}", v.description)
            for v in error.violations
        ]
        raise InvalidArgument(named) from None


def _price_name(name: str) -> str:
    return names.join(("prices", name.removeprefix("prices/")))


def _instant(flag: str, value: str) -> Any:
    from whaleflux import quantities

    return _parsed(flag, value, quantities.instant)


def micros_of(flag: str, value: str) -> int:
    """An amount of US dollars as micro-dollars. Raises InvalidArgument naming the flag."""
    from whaleflux.manifests.price_file import micros

    return int(_parsed(flag, value, micros))


def _parsed(flag: str, value: str, parse: Any) -> Any:
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        return parse(value)
    except ValueError as error:
        raise InvalidArgument(FieldViolation(flag, f"{value[:40]!r} {error}")) from None


def _at(one: Any, field: str) -> str:
    if not one.HasField(field):
        return "-"
    at = getattr(one, field).ToDatetime(tzinfo=UTC)
    return f"{at:%Y-%m-%d}" if (at.hour, at.minute, at.second) == (0, 0, 0) else f"{at:%Y-%m-%dT%H:%MZ}"


def _parts(one: Any) -> str:
    return ", ".join(f"{part.name} {usd(part.micros_per_gpu_hour, 4)}" for part in one.components) or "-"
