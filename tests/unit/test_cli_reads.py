"""Every command that reads gives programs what it gives people: -o json."""

import json

import pytest
import typer
from typer.testing import CliRunner

from tests.support.canned_fleet import canned_fleet
from whaleflux.cli.__main__ import app

RUN = CliRunner()
ACTS = {
    "up", "down", "demo", "demo-elastic", "agent", "cordon", "uncordon", "drain", "retire", "replace", "cancel", "hold", "release", "requeue",
    "set-priority", "delete", "exec", "shell", "port-forward", "cp", "serve", "deploy", "unserve", "rollout undo", "config use", "config add", "config remove",
    "keys create", "keys delete", "datasets add", "datasets pin", "datasets unpin", "datasets rm", "queue create", "queue set", "queue rm", "reservation create", "reservation update", "reservation rm", "token delete",
    "login", "logout", "user add", "user link", "user set", "user disable", "user enable", "group create", "group add", "group remove", "group rm",
    "prices set", "prices import", "prices end", "prices rm", "prices adjust", "prices unadjust", "budget set", "budget rm", "cost recommendations accept", "cost recommendations dismiss",
    "tokens rm", "secrets set", "secrets rm", "offers add", "offers rm", "leases add", "leases end", "ray up", "ray down",
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


PROGRAM = typer.main.get_command(app)
COMMANDS = dict(commands(PROGRAM))


def formats(command):
    """What its -o takes."""
    return [name for option in command.params if "-o" in option.opts for name in type(option.default).__members__]


def test_commands_that_act_are_commands():
    assert set(COMMANDS) >= ACTS | FILES


READS = sorted(set(COMMANDS) - ACTS - FILES)
GIVEN = {
    "audit verify": [], "describe": ["job", "x"], "explain-field": ["gpus"], "rebalance apply": ["--yes"], "token create": ["--site", "a"],
    "secrets add": ["x", "--from-file", "VALUE"], "secrets rotate": ["x", "--from-file", "VALUE"],
    "submit": ["JOB", "-y", "-d"], "validate": ["JOB"], "simulate": ["CLUSTER", "JOBS"], "reservation create": ["x", "--gpus", "1", "--for", "1h"],
    "config": ["--help"], "ray explain": ["DEMAND"], "fits": ["llama-3.1-8b", "--gpu", "H200"], "plan": ["llama-3.1-8b", "--gpu", "H200"],
    "check-config": ["CONFIG"], "cost job": ["x"], "cost export": ["--check"],
}  # fmt: skip
NO_DOCUMENT = {
    "audit export": "writes a file of JSON lines",
    "simulate": "another process prints",
    "config": "reads a file",
    "calibrate": "measures a GPU",
}


def words_of(words, tmp_path):
    """The command with what it needs: files that are there, and x for each name."""
    (tmp_path / "job.yaml").write_text("run: /bin/true\ngpus: 1\nworkdir: none\n")
    (tmp_path / "value").write_text("v")
    (tmp_path / "config.json").write_text('{"train_micro_batch_size_per_gpu": 1}')
    (tmp_path / "demand.json").write_text('{"bundles": [{"resources": {"GPU": 1}, "count": 2}]}')
    files = {
        "JOB": str(tmp_path / "job.yaml"),
        "CONFIG": str(tmp_path / "config.json"),
        "VALUE": str(tmp_path / "value"),
        "DEMAND": str(tmp_path / "demand.json"),
    }
    needed = ["x" for param in COMMANDS[words].params if param.required and param.param_type_name == "argument"]
    return [*words.split(), *(files.get(word, word) for word in GIVEN.get(words, needed))]


def answered(words, monkeypatch, capsys):
    """What the command prints, of a fleet that answers everything with two of each."""
    with canned_fleet(monkeypatch) as channel:
        try:
            PROGRAM.main(words, standalone_mode=False)
        except typer.Exit as left:
            assert left.exit_code in (0, 1)
    return capsys.readouterr().out, channel.asked


@pytest.mark.parametrize("words", [words for words in READS if words not in NO_DOCUMENT])
def test_every_read_prints_one_document_as_json_and_an_item_a_line_as_jsonl(words, monkeypatch, capsys, tmp_path):
    line = words_of(words, tmp_path)
    shown, asked = answered([*line, "-o", "json"], monkeypatch, capsys)
    document = json.loads(shown)
    lines = [json.loads(one) for one in answered([*line, "-o", "jsonl"], monkeypatch, capsys)[0].splitlines()]
    assert lines == (document if isinstance(document, list) else [document]), words
    assert (
        document
        or not asked
        or words in {"secrets rewrap", "burst history", "cost status", "cost export", "cost forecast"}
    ), "nothing was made of the answers"


def test_what_prints_no_document_is_a_read():
    assert set(NO_DOCUMENT) <= set(READS) and set(GIVEN) <= set(COMMANDS)


@pytest.mark.parametrize(("words", "name"), [(["events", "-w"], "event"), (["logs", "-f", "x"], "line")])
def test_what_has_no_end_is_an_object_a_line(words, name, monkeypatch, capsys):
    monkeypatch.setattr("whaleflux.cli.kept_events.follow", lambda *_: iter(()))
    for form in ("json", "jsonl"):
        shown, _ = answered([*words, "-o", form], monkeypatch, capsys)
        assert all(isinstance(json.loads(line), dict) for line in shown.splitlines()), name


@pytest.mark.parametrize("words", READS)
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
