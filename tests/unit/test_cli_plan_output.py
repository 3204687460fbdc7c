"""`whaleflux plan --emit` and `--picture`, `whaleflux check-config`: from the command line, without a fleet."""

import json
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument

RUN = CliRunner()
SMALL = ("llama-3.1-8b", "--gpu", "H200", "--gpus", "8", "--batch", "64")


def plan(*arguments):
    return RUN.invoke(app, ["plan", *SMALL, *arguments])


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("megatron", ("--tp", "2")),
        ("torchtitan", ()),
        ("fsdp2", ()),
        ("deepspeed", ("--tp", "1", "--pp", "1", "--cp", "1")),
    ],
)
def test_what_is_emitted_is_all_of_stdout_and_breaks_no_rule(tmp_path, form, more):
    done = plan("--emit", form, *more)
    assert done.exit_code == 0, done.output
    path = tmp_path / "emitted"
    path.write_text(done.stdout)
    checked = RUN.invoke(app, ["check-config", str(path), "--gpus", "8"])
    assert checked.exit_code == 0, checked.output
    assert "breaks none of the 10 rules" in checked.output
    assert done.stderr  # what the format cannot say


def test_json_has_the_report_and_the_configuration():
    said = json.loads(plan("--emit", "torchrun", "-o", "json").stdout)
    assert said["emitted"]["file"] == "torchrun.sh"
    assert "--nproc-per-node=8" in said["emitted"]["text"]
    assert said["chosen"]["gpus"] == 8
    assert said["why"]


def test_a_format_that_cannot_express_the_plan_says_what_to_use():
    done = plan("--emit", "deepspeed", "--tp", "2")
    assert isinstance(done.exception, InvalidArgument)
    assert "tensor parallelism 2 is code there; use --emit megatron" in str(done.exception)
    assert not done.stdout


def test_a_picture_is_written_and_named(tmp_path):
    path = tmp_path / "plan.svg"
    done = plan("--picture", str(path))
    assert f"picture: {path}" in done.output
    words = " ".join(ET.parse(path).getroot().itertext())
    assert "llama-3.1-8b on 8 x H200" in words
    assert "Memory of a GPU" in words


def test_a_picture_and_a_configuration_at_once(tmp_path):
    path = tmp_path / "plan.svg"
    done = plan("--picture", str(path), "--emit", "fsdp2")
    assert json.loads(done.stdout)["mesh"]
    assert path.exists()


def test_a_picture_in_the_terminal_has_rows_for_stages():
    done = plan("--picture", "-", "--pp", "2")
    assert "> forward, < backward" in done.output
    assert "A weights" in done.output


def test_the_report_says_why():
    assert "why this split" in plan().output


def test_where_nothing_fits_the_nearest_is_drawn_and_nothing_is_emitted(tmp_path):
    path = tmp_path / "plan.svg"
    done = RUN.invoke(
        app, ["plan", "llama-3.1-405b", "--gpu", "RTX4090", "--gpus", "2", "--picture", str(path), "--emit", "megatron"]
    )
    assert done.exit_code == 1
    assert "does not fit" in done.output
    assert "too much" in path.read_text()
    assert "arguments=(" not in done.output


@pytest.mark.parametrize("where", ["/nowhere/at/all.svg", "/", "a\0b"])
def test_a_picture_that_cannot_be_written_names_the_option(where):
    done = plan("--picture", where)
    assert isinstance(done.exception, InvalidArgument)
    assert "--picture" in str(done.exception)


@pytest.mark.parametrize("where", ["plan.png", "plan", ".svg", "plan.svg.pdf"])
def test_a_picture_that_is_no_svg_is_refused_before_anything_is_planned(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = plan("--picture", where)
    assert isinstance(done.exception, InvalidArgument)
    assert f"--picture: is '{where}', and pictures are SVG; name a file that ends in .svg, or -" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_picture_for_the_terminal_is_refused_where_programs_read():
    done = plan("--picture", "-", "-o", "json")
    assert "--picture: is -, which draws in the terminal" in str(done.exception)


class TestCheckConfig:
    def check(self, tmp_path, text, *arguments):
        path = tmp_path / "config"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return RUN.invoke(app, ["check-config", str(path), *arguments])

    def test_each_broken_rule_has_its_numbers_and_a_fix(self, tmp_path):
        done = self.check(
            tmp_path,
            "--num-layers 8 --tensor-model-parallel-size 3 --num-attention-heads 32 --fp16 --bf16",
            "--gpus",
            "8",
        )
        assert done.exit_code == 1
        assert "gpus: 8 GPUs are not a multiple of 3 (tensor)" in done.output
        assert "heads: 32 attention heads" in done.output
        assert "precision: both fp16 and bf16" in done.output

    def test_json(self, tmp_path):
        said = json.loads(self.check(tmp_path, "--num-layers 8 --sequence-parallel", "-o", "json").output)
        assert said["valid"] is False
        assert [one["rule"] for one in said["broken"]] == ["sequence-parallel"]

    @pytest.mark.parametrize("text", [b"\xff\xfe\x00" * 9, b"x" * 3_000_000, b"", b"{"])
    def test_what_is_no_configuration_is_refused(self, tmp_path, text):
        assert isinstance(self.check(tmp_path, text).exception, InvalidArgument)

    def test_a_file_that_is_not_there(self):
        done = RUN.invoke(app, ["check-config", "/nowhere"])
        assert "FILE: /nowhere cannot be read" in str(done.exception)


@pytest.mark.parametrize("text", ["[parallelism]\ntensor_parallel_degree =\n", "[model]\nname = llama3\n"])
def test_toml_that_cannot_be_read_is_told_with_its_line(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    done = RUN.invoke(app, ["check-config", str(path)])
    assert "is no TOML" in str(done.exception)
    assert "at line 2" in str(done.exception)
