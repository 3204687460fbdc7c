"""How help is laid out: commands in their groups, options in theirs, texts wrapped and never cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperGroup

WIDEST = 120  # columns; a narrower terminal counts
ELSEWHERE = "Commands"


class GroupedCommands(TyperGroup):
    """Lists commands under the panel that each names, in the order in which panels and commands were added."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes one section for each panel."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        shown = [(name, command) for name, command in commands.items() if command is not None and not command.hidden]
        for panel, rows in panels(shown).items():
            with formatter.section(panel):
                formatter.write_dl(rows)


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
