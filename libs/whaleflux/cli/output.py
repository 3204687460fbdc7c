"""How results are shown: a table, the same as JSON (the contract's own), as CSV, or names; results on stdout, notes on stderr.

`-o json` is one document, whatever is read, so that any program can parse it; `-o jsonl` is each item on a line of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO

from whaleflux.foreign_text import harmless, in_one_line


class Format(StrEnum):
    """-o FORMAT."""

    table = "table"
    wide = "wide"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    name = "name"

    @property
    def is_json(self) -> bool:
        """Whether it is for programs that read JSON."""
        return self in (Format.json, Format.jsonl)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its header, what to show of a message, and whether only -o wide shows it.

    `value` is what programs get (CSV) and what is sorted by, where the cell is made for people: bytes for "2 TB",
    Unix seconds for "5m". Without it the cell counts.
    """

    header: str
    cell: Callable[[Any], str]
    wide: bool = False
    value: Callable[[Any], float | str] | None = None

    def of(self, message: Any) -> float | str:
        """The value of a message; the cell where there is no other."""
        return (self.value or self.cell)(message)


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
        say_json([as_json(m) for m in messages])
    elif fmt is Format.jsonl:
        for message in messages:
            say_json(as_json(message), fmt)
    elif fmt is Format.name:
        for message in messages:
            say(name(message))
    elif fmt is Format.csv:
        say_csv([c.header for c in columns] if headers else [], [[c.of(m) for c in columns] for m in messages])
    elif not messages:
        note(empty)
    else:
        shown = [c for c in columns if fmt is Format.wide or not c.wide]
        table([c.header for c in shown] if headers else [], [[c.cell(m) for c in shown] for m in messages])


def show_one(message: Any, lines: Sequence[tuple[str, str]], fmt: Format) -> None:
    """One resource as "key  value" lines, or as JSON."""
    if fmt.is_json:
        say_json(as_json(message), fmt)
    elif fmt is Format.name:
        say(message.name)
    else:
        width = max(len(key) for key, _ in lines)
        for key, value in lines:
            if value:
                say(f"{key:<{width}}  {value}")


def as_json(message: Any) -> Any:
    """The protobuf JSON of a message, with the contract's field names; what is no message is as it is."""
    if isinstance(message, dict):
        return message
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; nothing is cut off, so that pipes get whole names."""
    cells = [[in_one_line(cell) for cell in row] for row in rows]
    lines = [list(headers), *cells] if headers else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(_bold(text) if headers and number == 0 else text)


def say(*lines: str, stream: TextIO | None = None) -> None:
    """Each on a line of its own, whatever it quotes: what comes from elsewhere neither breaks lines nor commands the terminal."""
    for line in lines:
        print(in_one_line(line), file=stream or sys.stdout, flush=True)


def say_json(value: Any, fmt: Format = Format.json) -> None:
    """As JSON, in which control characters are escaped; on one line for JSON lines."""
    print(json.dumps(value, indent=None if fmt is Format.jsonl else 2), flush=True)


def say_csv(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """As CSV (RFC 4180): all columns, headers in lower case without spaces, numbers as they are."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if headers:
        writer.writerow([header.lower().replace(" ", "_") for header in headers])
    writer.writerows([in_one_line(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)


def write(data: bytes) -> None:
    """What a job printed, made harmless where a terminal shows it (`log_lines`); as it is into pipes and files."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def clear_screen() -> None:
    """For tables that are shown again and again."""
    print("\033[2J\033[H", end="")


def note(text: str) -> None:
    """Something beside the result, on stderr."""
    if text:
        print(harmless(text), file=sys.stderr)


def progress(text: str) -> None:
    """How far long work is, on stderr: in the place of what was said before."""
    print(f"\r{in_one_line(text)}\033[K", end="", file=sys.stderr, flush=True)


def aside(line: str) -> None:
    """One line on stderr beside what a job prints; dim on terminals, which no output of a job can be."""
    plain = in_one_line(line)
    print(f"\033[2m{plain}\033[0m" if colour(sys.stderr) else plain, file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """The one line of an error."""
    plain = harmless(text)
    print(f"\033[31m{plain}\033[0m" if colour(sys.stderr) else plain, file=sys.stderr)


def colour(stream: Any) -> bool:
    """Whether colours are wanted there: a terminal that has them (not TERM=dumb), and NO_COLOR (no-color.org) not set."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if colour(sys.stdout) else text


def enum_name(enum: Any, value: int, prefix: str) -> str:
    """RUNNING for JOB_STATE_RUNNING; the number for a value that this version does not know."""
    try:
        return str(enum.Name(value)).removeprefix(prefix)
    except ValueError:
        return str(value)


def job_state(job: Any) -> str:
    """In one word."""
    from whaleflux.v1 import scheduler_pb2

    return enum_name(scheduler_pb2.JobState, job.state, "JOB_STATE_")


def age(stamp: Any) -> str:
    """Time since a Timestamp; "" when it is not set."""
    import time

    from whaleflux.quantities import shown_duration

    return shown_duration(max(0.0, time.time() - stamp.seconds)) if stamp.seconds else ""


def ends_in(stamp: Any) -> str:
    """Time until a Timestamp."""
    import time

    from whaleflux.quantities import shown_duration

    left_s = stamp.seconds - time.time()
    return shown_duration(left_s) if left_s > 0 else "ended"


def age_s(stamp: Any) -> float | str:
    """The same in seconds, for sorting and CSV."""
    import time

    return round(max(0.0, time.time() - stamp.seconds)) if stamp.seconds else ""
