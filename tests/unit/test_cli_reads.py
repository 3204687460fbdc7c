"""Every command that reads gives programs what it gives people: -o json."""

import json

import pytest
import typer
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app

RUN = CliRunner()
ACTS = {
    "up", "down", "demo", "agent", "cordon", "uncordon", "drain", "retire", "replace", "cancel", "hold", "release", "requeue",
    "set-priority", "delete", "exec", "shell", "port-forward", "cp", "serve", "unserve", "config use", "config add", "config remove",
    "keys create", "keys delete", "datasets add", "datasets pin", "datasets unpin", "datasets rm", "queue create", "queue set", "queue rm", "reservation create", "reservation update", "reservation rm", "token delete",
    "login", "logout", "user add", "user link", "user set", "user disable", "user enable", "group create", "group add", "group remove", "group rm",
    "tokens rm", "secrets set", "secrets rm",
}  # fmt: skip
FILES = {"import"}  # what it makes is a job file, and -o says where it goes


def commands(group, before=""):
    """Every command by its words; a group that does something by itself, too."""
    for name, command in group.commands.items():
        if not hasattr(command, "commands"):
            yield before + name, command
            continue
        if command.invoke_without_command:
            yield before + name, command
        yield from commands(command, f"{before}{name} ")


COMMANDS = dict(commands(typer.main.get_command(app)))


def formats(command):
    """What its -o takes."""
    return [name for option in command.params if "-o" in option.opts for name in type(option.default).__members__]


def test_commands_that_act_are_commands():
    assert set(COMMANDS) >= ACTS | FILES


@pytest.mark.parametrize("words", sorted(set(COMMANDS) - ACTS - FILES))
def test_every_read_has_json(words):
    assert "json" in formats(COMMANDS[words]), f"whaleflux {words} has no -o json"


@pytest.fixture
def job_file(tmp_path):
    def job_file(text):
        (tmp_path / "job.yaml").write_text(text)
        return str(tmp_path / "job.yaml")

    return job_file


def test_a_file_is_validated_for_programs(job_file):
    file = job_file("name: a\nrun: /bin/true\ngpus: 1\n---\nname: b\nrun: /bin/true\ngpus: 1\n")
    done = RUN.invoke(app, ["validate", file, "-o", "json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "file": file,
        "valid": True,
        "kind": "job",
        "names": ["a", "b"],
        "violations": [],
        "notes": [],
    }
    assert RUN.invoke(app, ["validate", file, "-o", "name"]).stdout == "a\nb\n"


def test_what_is_wrong_with_a_file_is_told_to_programs(job_file):
    done = RUN.invoke(app, ["validate", job_file("name: a\nrun: /bin/true\ngpus: -1\n"), "-o", "json"])
    assert done.exit_code != 0
    found = json.loads(done.stdout)
    assert not found["valid"]
    assert [wrong["field"] for wrong in found["violations"]] == ["gpus"]


def test_fields_are_explained_to_programs():
    one = json.loads(RUN.invoke(app, ["explain-field", "time_limit", "-o", "json"]).stdout)
    assert [row["field"] for row in one] == ["time_limit"]
    assert {"for", "value", "default", "example", "contract"} <= set(one[0])
    every = json.loads(RUN.invoke(app, ["explain-field", "-o", "json"]).stdout)
    assert one[0] in every
