"""What is shown before anything is reached: help in groups, whole texts, the version."""

import re

import pytest
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.cli.examples import EXAMPLES
from whaleflux.version import version

RUN = CliRunner()


def asked(*argv):
    done = RUN.invoke(app, list(argv), prog_name="whaleflux", env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def sections(text):
    """Heading -> what stands under it."""
    parts = re.split(r"(?m)^(\S[^\n]*):\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def listed(section):
    return re.findall(r"(?m)^  (\S+) ", section)


def test_every_command_stands_in_its_group():
    found = sections(asked("--help"))
    for command in app.registered_commands:
        assert command.rich_help_panel, f"{command.callback.__name__} is in no group"
        name = command.name or command.callback.__name__
        assert (name in listed(found[command.rich_help_panel])) is not command.hidden
    assert "Commands" not in found, "a command without a group"


def test_no_text_is_cut():
    text = asked("--help")
    assert "..." not in text.partition("Options:")[2]
    words = " ".join(text.split())
    for command in app.registered_commands:
        first = " ".join((command.callback.__doc__ or "").partition("\n\n")[0].split())
        assert first, f"{command.name} says nothing of itself"
        assert first in words, command.name


def test_groups_name_what_is_in_them():
    assert "(create, list, delete)" in asked("--help")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_the_distributions_and_the_commits(flag):
    assert asked(flag) == f"whaleflux {version()}\n"
    assert re.fullmatch(r"\d+(\.\d+)*( \(git .+\))?", version())


def registered():
    """Every command by its words."""
    for command in app.registered_commands:
        yield command.name, command
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            yield f"{group.name} {command.name}", command


@pytest.mark.parametrize(("words", "command"), list(registered()))
def test_every_command_shows_how_it_is_called(words, command):
    assert f"whaleflux {words}" in asked(*words.split(), "--help") if words != "agent" else command.epilog


def test_examples_are_of_commands_that_exist():
    assert set(EXAMPLES) <= {words for words, _ in registered()}
