"""How results are shown: a table, the same as JSON (the contract's own), or names; results on stdout, notes on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """-o FORMAT."""

    table = "table"
    wide = "wide"
    json = "json"
    name = "name"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its header, what to show of a message, and whether only -o wide shows it."""

    header: str
    cell: Callable[[Any], str]
    wide: bool = False


def show(
    messages: Sequence[Any],
    columns: Sequence[Column],
    fmt: Format,
    *,
    headers: bool = True,
    empty: str = "",
    name: Callable[[Any], str] = lambda m: str(m.name),
) -> None:
    """Prints the messages; for an empty table `empty` goes to stderr, with what to do next."""
    if fmt is Format.json:
        print(json.dumps([as_json(m) for m in messages], indent=2))
    elif fmt is Format.name:
        for message in messages:
            print(name(message))
    elif not messages:
        note(empty)
    else:
        shown = [c for c in columns if fmt is Format.wide or not c.wide]
        table([c.header for c in shown] if headers else [], [[c.cell(m) for c in shown] for m in messages])


def show_one(message: Any, lines: Sequence[tuple[str, str]], fmt: Format) -> None:
    """One resource as "key  value" lines, or as JSON."""
    if fmt is Format.json:
        print(json.dumps(as_json(message), indent=2))
    elif fmt is Format.name:
        print(message.name)
    else:
        width = max(len(key) for key, _ in lines)
        for key, value in lines:
            if value:
                print(f"{key:<{width}}  {value}")


def as_json(message: Any) -> Any:
    """The protobuf JSON of a message, with the contract's field names."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; nothing is cut off, so that pipes get whole names."""
    lines = [list(headers), *map(list, rows)] if headers else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(_bold(text) if headers and number == 0 else text)


def note(text: str) -> None:
    """Something beside the result, on stderr."""
    if text:
        print(text, file=sys.stderr)


def fail(text: str) -> None:
    """The one line of an error."""
    print(f"\033[31m{text}\033[0m" if colour(sys.stderr) else text, file=sys.stderr)


def colour(stream: Any) -> bool:
    """Whether colours are wanted there: a terminal, and NO_COLOR (no-color.org) not set."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if colour(sys.stdout) else text


def enum_name(enum: Any, value: int, prefix: str) -> str:
    """RUNNING for JOB_STATE_RUNNING; the number for a value that this version does not know."""
    try:
        return str(enum.Name(value)).removeprefix(prefix)
    except ValueError:
        return str(value)


def age(stamp: Any) -> str:
    """Time since a Timestamp; "" when it is not set."""
    import time

    from whaleflux.cli.quantities import shown_duration

    return shown_duration(max(0.0, time.time() - stamp.seconds)) if stamp.seconds else ""
