"""Which fleet this program talks to, and which others it knows: config, config list, use, add, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import GLOBAL, NoHeaders, Output

config = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Its name in: whaleflux config list.")]


@config.callback()
def show(call: typer.Context, fmt: Output = Format.table) -> None:
    """Which fleet this program talks to; `use` chooses another.

    \b
      whaleflux config                        the fleet that commands reach from this folder
      whaleflux config list                   all that are known here
      whaleflux config use NAME               the one for all folders
      whaleflux --context NAME jobs           another one, for one command
      WHALEFLUX_CONTEXT=NAME whaleflux jobs   the same

    Searched in this order: --context, WHALEFLUX_CONTEXT, WHALEFLUX_TOKEN with WHALEFLUX_SERVER, .whaleflux/context.json in this folder or above, the one in use.
    """  # noqa: D301 - the escape tells click to keep the lines
    if call.invoked_subcommand:
        return
    from dataclasses import asdict

    from whaleflux.context import Context, find
    from whaleflux.login import current

    if current.by_variables(GLOBAL.context):
        path, context = Path("WHALEFLUX_TOKEN"), current.current()
    else:
        path = find(GLOBAL.context)
        context = Context.load(path)
    shown = asdict(context) | {"api_key": "***"}
    if fmt.is_json:
        output.say_json({"context": str(path), **shown}, fmt)
        return
    output.table([], [["context", str(path)], *([key, value] for key, value in shown.items())])


@config.command("list")
def list_contexts(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Fleets that are known by name."""
    contexts = _contexts()
    current = contexts.current()
    rows = [_row(contexts.file(name), name, in_use=name == current) for name in contexts.names()]
    columns = [
        Column("IN USE", lambda row: "*" if row["in_use"] else ""),
        Column("NAME", lambda row: row["name"]),
        Column("SERVER", lambda row: row["server"] or "-"),
        Column("FILE", lambda row: row["file"]),
        Column("", lambda row: row["problem"]),
    ]
    empty = "no fleet has a name here; start one with: whaleflux up, or add one with: whaleflux config add NAME FILE"
    output.show(rows, columns, fmt, headers=not no_headers, empty=empty, name=lambda row: str(row["name"]))


def _row(path: Path, name: str, *, in_use: bool) -> dict[str, Any]:
    from whaleflux.context import Context
    from whaleflux.errors import InvalidArgument

    where = path.readlink() if path.is_symlink() else path
    row: dict[str, Any] = {"in_use": in_use, "name": name, "server": "", "file": str(where), "problem": ""}
    try:
        row["server"] = Context.load(path).server
    except InvalidArgument:
        row["problem"] = "not running, or removed" if not path.exists() else "cannot be read"
    return row


@config.command("use")
def use(name: Name) -> None:
    """Makes a fleet the one that commands reach from any folder."""
    _contexts().use(name)
    output.note(f"commands talk to {name} now, where no folder, option or variable says otherwise")


@config.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    file: Annotated[Path, typer.Argument(help="Its context file, as written for you by whoever runs it.")],
) -> None:
    """Gives a fleet a name; a link to its context file is kept.

    \b
      whaleflux config add prod ~/prod/context.json
      whaleflux config use prod
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.context import Context

    Context.load(file)
    _contexts().link(name, file)
    output.note(f"{name} is known; use it with: whaleflux config use {name}")


@config.command("remove")
def remove(name: Name) -> None:
    """Forgets a name; the fleet stays as it is."""
    _contexts().remove(name)
    output.note(f"{name} is forgotten")


def _contexts() -> Any:
    from whaleflux.contexts import Contexts, config_folder
    from whaleflux.errors import FieldViolation, InvalidArgument

    if (folder := config_folder()) is None:
        raise InvalidArgument(FieldViolation("HOME", "is not set, so nothing can be kept; set it or XDG_CONFIG_HOME"))
    return Contexts(folder)
