"""What bash says of scripts in job files, without running them."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from whaleflux.cli import bash_syntax
from whaleflux.cli.__main__ import app
from whaleflux.manifests.yaml_files import jobs_from_yaml

RUN = CliRunner()
BROKEN = "set -e\nif true; then\n  echo (\nfi\n"
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")


def said_of(script, within_s=bash_syntax.WITHIN_S, **fields):
    text = yaml.safe_dump({"gpus": 1, "run": script, **fields})
    return [(one.field, one.description) for one in bash_syntax.mistakes(jobs_from_yaml(text, Path()), within_s)]


@needs_bash
def test_a_syntax_error_is_told_with_its_line_by_validate(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "a", "gpus": 1, "run": BROKEN}))
    done = RUN.invoke(app, ["validate", str(tmp_path / "job.yaml"), "-o", "json"])
    assert done.exit_code != 0
    assert "line 3 of the script: syntax error near" in done.stdout
    assert '"field": "run"' in done.stdout


@needs_bash
def test_each_script_is_read_and_none_is_run(tmp_path, monkeypatch):
    (tmp_path / "env").write_text(f"touch {tmp_path}/ran")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "env"))
    assert said_of(f"touch {tmp_path}/ran\necho $(touch {tmp_path}/ran)", setup="true\nfor x in; do") != []
    assert not (tmp_path / "ran").exists()
    assert [field for field, _ in said_of("echo a", setup="echo a\nfi")] == ["setup"]


@needs_bash
@pytest.mark.parametrize(
    "script", ["shopt -s extglob\nls !(x|y)", "cat <<EOF\na ( b\nEOF", "diff <(ls) <(ls)", "echo \u00e9"]
)
def test_what_bash_can_read_is_right(script):
    assert said_of(script) == []


def test_without_bash_or_time_nothing_is_said(tmp_path, monkeypatch):
    slow = tmp_path / "bash"
    slow.write_text("#!/bin/sh\nwhile :; do :; done\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said_of(BROKEN, within_s=0.05) == []
    slow.unlink()
    assert said_of(BROKEN) == []
