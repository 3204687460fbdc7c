"""Rented machines: what can be rented (offers), and what is (leases)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.files import read
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

offers = typer.Typer(
    invoke_without_command=True, help="Machines that can be rented: declare, list, forget. Alone: list them."
)
leases = typer.Typer(
    invoke_without_command=True, help="Machines that are rented: rent, list, look, give back. Alone: list them."
)
OfferName = Annotated[str, typer.Argument(metavar="OFFER", help="Offer.")]
LeaseName = Annotated[str, typer.Argument(metavar="LEASE", help="Lease, or the end of its name.")]
_ENDING = 8  # letters of a lease's name that people read and type


@offers.callback()
def offers_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_offers(sort, fmt, no_headers)


@offers.command("ls")
def list_offers(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """What can be rented, the cheapest GPU first, and who had nothing lately."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        found: list[Any] = pages(client.inventory.ListOffers, pb.ListOffersRequest(), "offers")
    found.sort(key=lambda one: (one.trust < 0.5, one.usd_per_hour / max(one.gpus, 1), one.name))
    columns = [
        Column("NAME", lambda o: o.name),
        Column("GPUS", lambda o: f"{o.gpus} {o.gpu_type}"),
        Column("USD/GPU/H", lambda o: f"{o.usd_per_hour / max(o.gpus, 1):.2f}"),
        Column("MARKET", _market),
        Column("PROVIDER", _provider),
        Column("SITE", lambda o: names.last(o.site)),
        Column("BOOT", lambda o: _shown_s(o.boot_s or 180)),
        Column("MAX", lambda o: str(o.max_machines or 1)),
        Column("STOCK", _stock),
        Column("MACHINE", lambda o: o.machine_type, wide=True),
        Column("ZONE", lambda o: "/".join(filter(None, (o.region, o.zone))) or "-", wide=True),
        Column("SECRET", lambda o: names.last(o.secret) or "-", wide=True),
        Column("OWNER", lambda o: o.owner or "-", wide=True),
    ]
    empty = "nothing can be rented; declare offers with: whaleflux offers add -f FILE"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@offers.command("add")
def add_offers(
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="Offers as YAML, or - for stdin.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check.")] = False,
) -> None:
    """Declares what can be rented; nothing is rented by that.

    \b
      whaleflux offers add -f offers.yaml --dry-run
      whaleflux offers add -f offers.yaml
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import InvalidArgument
    from whaleflux.manifests.offer_file import offers_from_yaml
    from whaleflux.v1 import inventory_pb2 as pb

    found = offers_from_yaml(read(file)[0])
    with fleet() as client:
        for only_check in (True, False):  # all are checked before the first is stored
            for one in found if only_check or not dry_run else ():
                request = pb.CreateOfferRequest(
                    offer_id=one.offer_id, offer=one.offer, request_id=names.ulid(), validate_only=only_check
                )
                try:
                    client.inventory.CreateOffer(request, timeout=20)
                except InvalidArgument as refused:
                    raise one.as_in_file(refused) from None
    what = "could be declared" if dry_run else "are declared; rent one with: whaleflux leases add OFFER --for 2h"
    output.note(f"{', '.join(names.offer(one.offer_id) for one in found)} {what}")


@offers.command("rm")
def remove_offer(name: OfferName, yes: Yes = False) -> None:
    """Forgets an offer of which nothing is rented."""
    from whaleflux.v1 import inventory_pb2 as pb

    full = names.offer(name)
    with fleet() as client:
        confirm(f"forget {full}?", yes)
        client.inventory.DeleteOffer(pb.DeleteOfferRequest(name=full), timeout=10)
    output.note(f"{full} is forgotten")


@leases.callback()
def leases_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_leases(False, sort, fmt, no_headers)


@leases.command("ls")
def list_leases(
    all_: Annotated[bool, typer.Option("--all", "-a", help="Those that are over too.")] = False,
    sort: Sort = "",
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What is rented, what it has cost, and when it ends."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        found: list[Any] = pages(client.inventory.ListLeases, pb.ListLeasesRequest(show_gone=all_), "leases")
    columns = [
        Column("NAME", lambda one: names.last(one.name)[-_ENDING:] if fmt is Format.table else one.name),
        Column("STATE", lease_state),
        Column("OFFER", lambda one: names.last(one.offer.name)),
        Column("GPUS", lambda one: f"{one.offer.gpus} {one.offer.gpu_type}"),
        Column("NODE", lambda one: one.node.removeprefix("sites/").replace("/nodes/", "/")),
        Column("USD", lambda one: f"{one.cost_usd:.2f}"),
        Column("CAP", lambda one: f"{one.cost_cap_usd:.2f}"),
        Column("ENDS", lambda one: _at(one.hard_end_time)),
        Column("AGE", lambda one: output.age(one.create_time)),
        Column("QUEUE", lambda one: names.last(one.queue) or "-"),
        Column("WHY", lambda one: one.end_reason or one.reason or "-", wide=True),
        Column("MACHINE", lambda one: one.provider_id or "-", wide=True),
    ]
    empty = "nothing is rented; see what can be: whaleflux offers ls"
    output.show(ordered(found, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@leases.command("show")
def show_lease(name: LeaseName, fmt: Output = Format.table) -> None:
    """One lease: its machine, what it costs, and what became of it."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        found = client.inventory.GetLease(pb.GetLeaseRequest(name=_full(client, name)), timeout=10)
    lines = [
        ("name", found.name),
        ("state", lease_state(found)),
        ("for", found.queue or "nobody in particular"),
        ("why", found.reason),
        ("offer", f"{found.offer.name}: {found.offer.gpus} {found.offer.gpu_type}, {_market(found.offer)}"),
        ("provider", f"{_provider(found.offer)} {found.provider_id}".strip()),
        ("node", found.node),
        ("then", ", ".join(names.last(one) for one in found.offers if one != found.offer.name)),
        ("attempt", f"{found.attempt}, {found.calls} call(s)"),
        ("cost", f"{found.cost_usd:.2f} USD of at most {found.cost_cap_usd:.2f}"),
        ("ends", f"{_at(found.hard_end_time)} whatever happens"),
        ("ends because", found.end_reason),
        ("strays", f"{', '.join(found.strays)}: {found.stray_usd:.2f} USD" if found.strays else ""),
        ("rented", output.age(found.create_time) + f" ago by {found.owner or 'nobody known'}"),
    ]
    output.show_one(found, lines, fmt)


@leases.command("add")
def add_lease(
    offer: Annotated[
        list[str], typer.Argument(metavar="OFFER...", help="Offers, in the order in which they are tried.")
    ],
    for_: Annotated[str, typer.Option("--for", metavar="TIME", help="When it ends at the latest, such as 2h.")],
    cap: Annotated[
        str, typer.Option("--cap", metavar="USD", help="Most that it may cost, above 0; without: all of that time.")
    ] = "",
    queue: Annotated[str, typer.Option("--queue", metavar="QUEUE", help="For whom, for its budget.")] = "",
    message: Annotated[str, typer.Option("-m", "--message", metavar="TEXT", help="Why.")] = "",
    yes: Yes = False,
) -> None:
    """Rents a machine by hand, by the first offer that has one. It costs money from now on.

    \b
      whaleflux leases add cloud-h200 --for 4h
      whaleflux leases add cloud-h200-spot cloud-h200 --for 8h --cap "200 USD" -m "deadline of the paper"
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux import quantities
    from whaleflux.v1 import inventory_pb2 as pb

    request = pb.CreateLeaseRequest(
        offers=[names.offer(one) for one in offer],
        ttl_s=int(_read("--for", for_, quantities.seconds)),
        cost_cap_usd=_read("--cap", cap, _cap_usd) if cap else None,
        queue=names.queue(queue.removeprefix("queues/")) if queue else "",
        reason=message,
        request_id=names.ulid(),
    )
    with fleet() as client:
        confirm(f"rent a machine of {', '.join(offer)} for up to {for_}?", yes)
        made = client.inventory.CreateLease(request, timeout=10)
    ending = names.last(made.name)[-_ENDING:]
    output.note(
        f"{made.name} is wanted, {made.cost_cap_usd:.2f} USD at most; it joins as {made.node}; "
        f"watch it with: whaleflux leases show {ending}"
    )


@leases.command("end")
def end_lease(
    name: LeaseName,
    message: Annotated[str, typer.Option("-m", "--message", metavar="TEXT", help="Why.")] = "",
    yes: Yes = False,
) -> None:
    """Gives a machine back; its work is moved away through checkpoints first."""
    from whaleflux.v1 import inventory_pb2 as pb

    with fleet() as client:
        full = _full(client, name)
        confirm(f"give {full} back?", yes)
        ended = client.inventory.EndLease(pb.EndLeaseRequest(name=full, reason=message), timeout=10)
    output.note(f"{ended.name} ends: {ended.end_reason or 'it is over'}")


def _cap_usd(said: object) -> float:
    """Raises ValueError for what caps nothing: it would rent without a cap."""
    from whaleflux import quantities

    if (usd := quantities.dollars(said)) <= 0:
        raise ValueError("caps nothing; say an amount above 0, or leave it out: all of that time")
    return usd


def _read(option: str, text: str, how: Callable[[object], float]) -> float:
    """Raises InvalidArgument that names the option."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        return how(text)
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation(option, f"{text[:64]!r} {wrong}")) from None


def _full(client: Any, name: str) -> str:
    """leases/x as it is; else the one lease whose name ends so."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import inventory_pb2 as pb

    if name.startswith("leases/"):
        return name
    listed = pages(client.inventory.ListLeases, pb.ListLeasesRequest(show_gone=True), "leases")
    found = sorted({one.name for one in listed if one.name.endswith(name)}) if name else []
    if len(found) != 1:
        which = "there is none" if not found else "several end so: " + ", ".join(found[:5])
        raise InvalidArgument(FieldViolation("lease", f"{name[:64]!r}: {which}; see: whaleflux leases ls -a"))
    return str(found[0])


def lease_state(lease: Any) -> str:
    """Its state, in the words of people."""
    from whaleflux.v1 import inventory_pb2 as pb

    known = lease.state in pb.LeaseState.values()
    return pb.LeaseState.Name(lease.state).removeprefix("LEASE_STATE_") if known else str(lease.state)


def _market(offer: Any) -> str:
    from whaleflux.v1 import types_pb2

    known = offer.market in types_pb2.PriceKind.values()
    return types_pb2.PriceKind.Name(offer.market).removeprefix("PRICE_KIND_").lower() if known else str(offer.market)


def _provider(offer: Any) -> str:
    return f"{offer.provider} (played)" if offer.provider == "simulated" else str(offer.provider)


def _stock(offer: Any) -> str:
    """What is believed of it, for people."""
    if not offer.refusals:
        return "yes"
    return f"{offer.trust:.0%}: {offer.refusal}"


def _shown_s(span_s: float) -> str:
    """4m10s."""
    from whaleflux.quantities import shown_duration

    return shown_duration(span_s)


def _at(stamp: Any) -> str:
    return str(stamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%dT%H:%MZ"))
