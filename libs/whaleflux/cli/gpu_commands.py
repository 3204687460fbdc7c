"""GPUs by model and site: how many there are, how many are free, what they cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whaleflux.cli import gpu_history, output
from whaleflux.cli.event_commands import Until
from whaleflux.cli.filters import Since, Sort, contains, ordered
from whaleflux.cli.fleet_reads import all_health, all_nodes, gpu_groups, held_gpus
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, fleet

_OF_ALL = "is for the list of GPUs, and with a NODE its GPUs' history is shown; leave out one of the two"


def gpus(
    node: Annotated[
        str, typer.Argument(metavar="[NODE]", help="What the GPUs of this node did; none: all that there are.")
    ] = "",
    type_: Annotated[str, typer.Option("--type", help="Whose model has this in its name.")] = "",
    site: Annotated[str, typer.Option("--site", help="Of this site.")] = "",
    free: Annotated[bool, typer.Option("--free", help="Only where some are free.")] = False,
    sort: Sort = "",
    since: Since = "",
    until: Until = "",
    points: Annotated[
        int, typer.Option("-n", "--points", help="With NODE: so many points in time of each GPU.", min=0, max=1000)
    ] = 0,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What GPUs there are, what is free, what their nodes say that they cost (bills: whaleflux prices); with a NODE, what its GPUs did.

    \b
      whaleflux gpus --free --sort $/gpu-h      the cheapest that can be had now
      whaleflux gpus --type h200 -o json
      whaleflux gpus h200-a                     what each did in the last hour: tensor cores, power, memory
      whaleflux gpus h200-a --since 1d -n 96    the same by a quarter of an hour

    Of a node up to a week at once. -o wide also has the least of each figure in the time of a row, and bandwidth of memory.
    """  # noqa: D301 - the escape tells click to keep the lines
    if node:
        gpu_history.refuse({"--type": type_, "--site": site, "--free": free, "--sort": sort}, _OF_ALL)
        gpu_history.show(node, since, until, points or 1, fmt, headers=not no_headers)
        return
    gpu_history.refuse(
        {"--since": since, "--until": until, "-n": points},
        "is of one node's GPUs; name it: whaleflux gpus NODE --since 1h",
    )
    ordered([], _GPU_COLUMNS, sort)
    with fleet() as client:
        groups = gpu_groups(all_nodes(client), all_health(client), held_gpus(client))
    rows = [
        row for row in groups
        if contains(type_, row["model"]) and (not site or row["site"] == site.removeprefix("sites/"))
        and (not free or row["free"])
    ]  # fmt: skip
    if fmt is Format.name:
        output.say(*sorted({row["model"] for row in rows}))
        return
    empty = "no such GPUs" if groups else "no GPUs yet; make a token with: whaleflux token create --site NAME"
    output.show(ordered(rows, _GPU_COLUMNS, sort), _GPU_COLUMNS, fmt, headers=not no_headers, empty=empty)


def _shares(row: dict[str, Any]) -> str:
    from whaleflux.quantities import shown_bytes

    return shown_bytes(row["free_in_shares_bytes"]) if row["free_in_shares_bytes"] else "-"


def _memory(row: dict[str, Any]) -> str:
    from whaleflux.quantities import shown_bytes

    return shown_bytes(row["memory_bytes"])


def _prices(row: dict[str, Any]) -> str:
    least, most = f"{row['usd_per_gpu_hour']:.2f}", f"{row['most_usd_per_gpu_hour']:.2f}"
    return least if least == most else f"{least}-{most}"


def _count(header: str) -> Column:
    key = header.lower()
    return Column(header, lambda row: str(row[key]), value=lambda row: int(row[key]))


_GPU_COLUMNS = [
    Column("MODEL", lambda row: row["model"]),
    Column("SITE", lambda row: row["site"]),
    Column("MEMORY", _memory, value=lambda row: int(row["memory_bytes"])),
    *map(_count, ("TOTAL", "FREE", "HELD")),
    Column("FREE IN SHARES", _shares, value=lambda row: int(row["free_in_shares_bytes"])),
    *map(_count, ("UNAVAILABLE", "NODES")),
    Column("$/GPU-H", _prices, value=lambda row: float(row["usd_per_gpu_hour"])),
    Column("SIMULATED", lambda row: "simulated" if row["simulated"] else ""),
]
