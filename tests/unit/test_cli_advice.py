"""What messages advise can be done: every command and flag that a text names exists, and every number of the command line is bounded."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from whaleflux.cli import next_step
from whaleflux.cli.__main__ import app
from whaleflux.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from whaleflux.nearness import near
from whaleflux.reasons import ErrorReason

ROOT = Path(__file__).parents[2]
PROGRAM = typer.main.get_command(app)
NAMED = re.compile(r"whaleflux ((?:[a-z][a-z-]*)(?: [^\n|`;]*)?)")
NO_COMMANDS = {"agent"}  # its flags are those of its settings
PROSE = {"upwards"}


def texts() -> Iterator[tuple[str, str]]:
    """Every string of the libraries and services, formatted ones with {} where a value stands."""
    for path in sorted([*ROOT.glob("libs/**/*.py"), *ROOT.glob("services/**/*.py")]):
        if "/v1/" in str(path):
            continue
        file = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                yield f"{file}:{node.lineno}", said
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file}:{node.lineno}", node.value


def wrong_in(line: str) -> str:
    """What is wrong with a command line without the program's name; "" when it could be typed."""
    typed = re.split(r"#|\(|\bwhaleflux\b| -- ", line)[0]  # a remark, the next command, or another program's
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "QUOTED", typed)  # another program's words
    words = re.sub(r"--sort -\S+", "--sort", plain).replace("...", "").split()
    command = PROGRAM
    while words and hasattr(command, "commands") and words[0].strip(".,:)'\"") in command.commands:
        command = command.commands[words.pop(0).strip(".,:)'\"")]
    if command is PROGRAM:
        first = words[0].strip(".,:)'\"") if words else ""
        return "" if first in PROSE or first.startswith(("{", "-")) else f"no command {first!r}"
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"-h", "--help"}
    used = re.findall(r"(?<![\w}-])(--?[a-z][a-z-]*)", " ".join(words)) if command.name not in NO_COMMANDS else []
    return "; ".join(f"{command.name} has no {flag}" for flag in used if flag not in flags)


def test_every_command_and_flag_that_a_text_names_exists():
    wrong = [
        f"{where}: whaleflux {line}: {why}"
        for where, text in texts()
        for line in NAMED.findall(text)
        if (why := wrong_in(line))
    ]
    assert wrong == []


def test_what_is_looked_for_would_be_found():
    assert wrong_in("lgos -f x") == "no command 'lgos'"
    assert wrong_in("logs --fellow x") == "logs has no --fellow"
    assert wrong_in("token create --site onprem        # then start it with --node-id n7") == ""


@pytest.mark.parametrize("command", sorted(set(next_step.LISTS.values())))
def test_every_list_that_errors_point_to_exists(command):
    assert wrong_in(command) == ""


ERRORS = [
    (NotFound("queue", "queues/x"), "whaleflux queue ls", 1),
    (NotFound("anything", "x"), "whaleflux status", 1),
    (AlreadyExists("model", "models/x"), "whaleflux models", 1),
    (Unavailable("x", reason=ErrorReason.NO_READY_REPLICA), "whaleflux replicas -o wide", 1),
    (Unavailable("x", reason=ErrorReason.NOT_LEADER), "repeat the command", 3),
    (DeadlineExceeded("x"), "whaleflux up", 3),
    (Unavailable("x", reason=ErrorReason.BUS_UNAVAILABLE), "the log of NATS", 3),
    (Unavailable("x", reason=ErrorReason.STORE_UNAVAILABLE), "the log of etcd", 3),
    (InvalidArgument(FieldViolation("--rank", "x")), "whaleflux set-priority --help", 2),
    (InvalidArgument(FieldViolation("context", "x")), "whaleflux config", 2),
    (Unauthenticated("x", reason=ErrorReason.SESSION_ENDED), "whaleflux login", 1),
    (Unauthenticated("x", reason=ErrorReason.DISABLED), "whaleflux user enable NAME", 1),
]


@pytest.mark.parametrize(("error", "advice", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_each_error_ends_with_a_step_that_can_be_taken(error, advice, code):
    said = next_step.after(error, ["set-priority"])
    assert said.endswith(advice)
    assert all(wrong_in(line) == "" for line in NAMED.findall(said))
    assert next_step.exit_code(error) == code


def test_who_could_not_log_in_is_not_told_to_log_in():
    said = next_step.after(Unauthenticated("x", reason=ErrorReason.IDENTITY_MISSING), ["login"])
    assert said == "see: whaleflux login --help"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("nam", ["name"]), ("gpsu", ["gpus"]), ("time", []), ("checkpiont", ["checkpoint"]), ("x", []), ("imag", ["image"])],
)  # fmt: skip
def test_only_slips_of_the_fingers_are_guessed(word, meant):
    assert near(word, ["name", "gpus", "image", "checkpoint", "environment"]) == meant


def all_parameters(command, path=""):
    for param in command.params:
        yield f"{path} {param.opts[0]}", param
    for name, inner in getattr(command, "commands", {}).items():
        yield from all_parameters(inner, f"{path} {name}")


def test_every_number_of_the_command_line_has_bounds():
    given = [(name, param) for name, param in all_parameters(PROGRAM) if param.type_descriptor is not None]
    numbers = [(name, param) for name, param in given if param.type_descriptor.annotation in (int, float)]
    assert len(numbers) > 5
    as_in_the_file = {" submit --gpus"}  # its limits are those of the field
    assert {name for name, param in numbers if param.max is None} <= as_in_the_file
