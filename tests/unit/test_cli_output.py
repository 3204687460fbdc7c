"""What the fleet says does not command the terminal that shows it."""

import ast
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux import cli
from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.foreign_text import harmless, in_one_line
from whaleflux.v1 import scheduler_pb2 as pb

TITLE, CLEAR, RED = "\x1b]0;owned\x07", "\x1b[2J", "\x1b[1;31m"


def commands(text):
    """Characters that a terminal obeys."""
    return [c for c in text if (ord(c) < 32 and c not in "\n") or 0x7F <= ord(c) < 0xA0]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, also with ü, 漢 and 🐳", "plain, also with ü, 漢 and 🐳"),
        (TITLE, "\\x1b]0;owned\\x07"),
        (CLEAR, "\\x1b[2J"),
        (f"{RED}red\x1b[0m", "red"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb", "a\\x0db"),
        ("abc\u202edef", "abc\\u202edef"),
        ("two\nlines\there", "two\nlines\there"),
    ],
)
def test_control_characters_are_shown_and_colours_go(given, shown):
    assert harmless(given) == shown


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    assert commands(harmless(text, keep="")) == []
    assert "\n" not in in_one_line(text)
    assert harmless(harmless(text)) == harmless(text)


def test_what_is_harmless_is_left_as_it_is():
    text = "héllo wörld — 42 %"
    assert harmless(text) is text


def test_tables_lists_lines_and_errors(capsys):
    hostile = f"{CLEAR}{TITLE}x\nqueues/default/jobs/forged  SUCCEEDED"
    message = pb.Job(name=hostile, state_message=hostile)
    output.show([message], [Column("NAME", lambda j: j.name), Column("WHY", lambda j: j.state_message)], Format.table)
    for fmt in Format:
        output.show_one(message, [("state", message.state_message)], fmt)
    output.say(hostile)
    output.note(hostile)
    output.fail(hostile)
    shown = capsys.readouterr()
    assert commands(shown.out + shown.err) == []
    assert not [line for line in shown.out.splitlines() if line.startswith("queues/default/jobs/forged")]


def test_commands_print_through_the_output_layer_alone():
    """One place cleans, so nothing may go past it."""
    around = []
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        if path.name == "output.py":
            continue
        for found in ast.walk(ast.parse(path.read_text())):
            prints = isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and found.func.id == "print"
            writes = isinstance(found, ast.Attribute) and ast.unparse(found) in {
                "sys.stdout.write",
                "sys.stdout.buffer",
            }
            if prints or writes:
                around.append(f"{path.name}:{found.lineno}")
    assert around == []


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals_that_have_them(monkeypatch, variables, wanted):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert output.colour(terminal) is wanted
    assert not output.colour(io.StringIO())
