"""How help is laid out: commands in their groups, options in theirs, texts wrapped and never cut; and how a value that cannot be is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer import BadParameter
from typer.core import TyperGroup

from whaleflux.cli.state import GLOBAL
from whaleflux.cli.typed_words import argument_word
from whaleflux.errors import FieldViolation, InvalidArgument

WIDEST = 120  # columns; a narrower terminal counts
ELSEWHERE = "Commands"


class GroupedCommands(TyperGroup):
    """Lists commands under the panel that each names, in the order in which panels and commands were added."""

    def invoke(self, ctx: Any) -> Any:
        """As ever; a number that is none, or out of its bounds, is refused as services refuse: field, limits, fix."""
        GLOBAL.program = self
        try:
            return super().invoke(ctx)
        except BadParameter as wrong:
            if (said := out_of_bounds(wrong.param)) is None:
                wrong.message = wrong.message.removeprefix("Value error, ")  # of the library that reads them
                raise
            raise InvalidArgument(FieldViolation(option_of(wrong.param), _given(wrong) + said)) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes one section for each panel."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        shown = [(name, command) for name, command in commands.items() if command is not None and not command.hidden]
        for panel, rows in panels(shown).items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def out_of_bounds(param: Any) -> str | None:
    """What a number of the command line may be; None for what is no number."""
    described = getattr(param, "type_descriptor", None)
    if described is None or described.annotation not in (int, float):
        return None
    kind = "a whole number" if described.annotation is int else "a number"
    least, most = param.min, param.max
    bounds = f", {least:.15g} to {most:.15g}" if None not in (least, most) else ""
    return f"must be {kind}{bounds}"


def option_of(param: Any) -> str:
    """The longest name of an option; an argument as the help calls it."""
    if param.param_type_name == "argument":
        return argument_word(param)
    return str(max(param.opts, key=len))


def _given(wrong: BadParameter) -> str:
    """What stood there, where that is known."""
    found: list[Any] = getattr(wrong.__cause__, "errors", list)()
    return f"{str(found[0]['input'])[:40]!r} " if found else ""


def panels(commands: Iterable[tuple[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Name and first paragraph of each command, by panel; a group names the commands in it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, command in commands:
        found.setdefault(getattr(command, "rich_help_panel", None) or ELSEWHERE, []).append((name, _summary(command)))
    return found


def _summary(command: Any) -> str:
    inner = getattr(command, "commands", {})
    first = " ".join((command.help or "").partition("\n\n")[0].split())
    return f"{first.rstrip('.')} ({', '.join(inner)})." if inner else first
