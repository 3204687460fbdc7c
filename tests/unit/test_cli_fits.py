"""`whaleflux fits`, from the command line, without a fleet."""

import json
import re

import pytest
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument

RUN = CliRunner()


def fits(*arguments):
    return RUN.invoke(app, ["fits", *arguments])


def test_a_table_for_people_says_what_fits_and_by_how_much():
    done = fits("llama-3.1-70b", "--gpu", "H200", "--gpus", "16")
    assert done.exit_code == 0, done.output
    assert "fits, " in done.output
    assert "optimizer state" in done.output


def test_json_for_programs_is_in_bytes_and_adds_up():
    done = fits("llama-3.1-8b", "--gpu", "RTX4090", "--gpus", "2", "--sequence", "4096", "-o", "json")
    assert done.exit_code == 1
    answer = json.loads(done.output)
    assert answer["fits"] is False
    assert sum(answer["parts_bytes"].values()) == pytest.approx(answer["total_bytes"], abs=10)
    assert answer["total_bytes"] > answer["usable_bytes"]
    assert answer["instead"]


def test_adapters_need_less():
    assert fits("llama-3.1-8b", "--gpu", "RTX4090", "--method", "lora", "--sequence", "2048").exit_code == 0


def test_a_file_is_a_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("layers: 24\nhidden: 2048\nheads: 16\nvocabulary: 50304\n")
    done = fits(str(path), "--gpu", "H100-80GB", "-o", "json")
    assert json.loads(done.output)["model"] == "mine"


def test_what_there_is_is_listed():
    assert "deepseek-v3" in fits("--list").output
    assert {one["name"] for one in json.loads(fits("--list", "-o", "json").output)["gpus"]} >= {"H200", "RTX4090"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "MODEL: is missing"),
        (("llama-3.1-8b",), "--gpu: is missing"),
        (("llama-3.1-8b", "--gpu", "H100"), "several sizes: H100-80GB, H100-94GB"),
        (("llama-3.1-8b", "--gpu", "H20O"), "take one of: H200"),
        (("nowhere.json", "--gpu", "H200"), "there is no such file"),
        (("lama-3-8b", "--gpu", "H200"), "did you mean"),
        (("llama-3.1-8b", "--gpu", "H200", "-o", "csv"), "use table or json"),
        (
            ("llama-3.1-8b", "--gpu", "A100-80GB", "--precision", "fp8"),
            "fp8: the A100-80GB has none; take bf16, or a type that has it: H",
        ),
        (("llama-3.1-8b", "--gpu", "H200", "--software", "eager"), "--software: is known of what was measured only"),
        (("llama-3.1-8b", "--serve", "--prompt", "200000"), "llama-3.1-8b reads 131,072 at most"),
        (("gpt2", "--serve", "--prompt", "4000"), "gpt2 reads 1,024 at most"),
        (("llama-3.1-8b", "--serve", "--prompt", "131000", "--answer", "73"), "are 131,073"),
        (("llama-3.1-8b", "--serve", "--context", "100", "--prompt", "200"), "more than --context 100"),
        (("llama-3.1-8b", "--serve", "--context", "100", "--prompt", "50", "--answer", "60"), "are 110, more than"),
        (("llama-3.1-8b", "--serve", "--tp", "8"), "--tp: is of training"),
        (("llama-3.1-8b", "--serve", "--gpus", "3"), "--gpus: is of training"),
        (("llama-3.1-8b", "--serve", "--calibration", "x"), "--calibration: is of training"),
        (("llama-3.1-8b", "--serve", "--method", "lora"), "--method: is of training"),
        (("llama-3.1-8b", "--gpu", "H200", "--first-token", "1s"), "--first-token: is of serving"),
        (("llama-3.1-8b", "--gpu", "H200", "--token", "1s"), "--token: is of serving"),
        (("llama-3.1-8b", "--gpu", "H200", "--prompt", "7"), "--prompt: is of serving"),
    ],
)
def test_wrong_input_names_its_field_and_the_fix(arguments, said):
    done = fits(*arguments)
    assert isinstance(done.exception, InvalidArgument)
    assert said in str(done.exception)


def test_weights_are_no_description(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x00" * 1000)
    done = fits(str(tmp_path / "model.safetensors"), "--gpu", "H200")
    assert "is no text" in str(done.exception)
    (tmp_path / "big.json").write_bytes(b"x" * 3_000_000)
    assert "is longer than" in str(fits(str(tmp_path / "big.json"), "--gpu", "H200").exception)


def test_a_short_context_shortens_what_was_not_said_of_requests():
    done = fits("gpt2", "--serve", "--gpu", "H200", "--prompt", "1000")
    assert done.exit_code == 0, done.output
    assert fits("gpt2", "--serve", "--gpu", "H200").exit_code == 0


def test_zero_3_has_no_pipeline():
    done = fits("llama-3.1-8b", "--gpu", "H200", "--gpus", "16", "--zero", "3", "--pp", "2")
    assert (done.exit_code, "ZeRO-3 has no pipeline" in done.output) == (1, True)


def test_a_prompt_and_its_answer_may_fill_the_context():
    done = fits("llama-3.1-8b", "--serve", "--gpu", "H200", "--context", "100", "--prompt", "50", "--answer", "50")
    assert done.exit_code == 0, done.output


def test_columns_of_what_serves_stay_apart():
    done = fits("llama-3.1-8b", "--serve", "--prompt", "100000", "--answer", "1")
    table = [line for line in done.output.splitlines() if line.startswith("REPLICA") or " x " in line]
    assert len(table) > 5
    assert {len(re.split(r"\s{2,}", line)) for line in table} == {8}
    assert "e+" not in done.output


def test_what_is_missed_is_said_with_units_and_without_powers_of_ten():
    words = ("llama-3.1-8b", "--serve", "--gpu", "A100-40GB")
    assert "ms alone, 1 ms are wanted" in fits(*words, "--first-token", "1ms").output
    assert "ms alone, 0.1 ms are wanted" in fits(*words, "--token", "0.1ms").output
    assert "100,000 are wanted" in fits(*words, "--rate", "100000").output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("sequence: 0\n", ["mine.yaml: sequence"]),
        (
            "latent: {query_rank: -1, kv_rank: 64, rope: 32, value: 64}\n",
            ["mine.yaml: latent.query_rank"],
        ),
    ],
)
def test_a_mistake_of_a_model_s_file_names_the_file_once(tmp_path, more, said):
    path = tmp_path / "mine.yaml"
    path.write_text("layers: 24\nhidden: 2048\nheads: 16\nvocabulary: 50304\n" + more)
    done = fits(str(path), "--gpu", "H200")
    assert isinstance(done.exception, InvalidArgument)
    assert [one.field for one in done.exception.violations] == said


def test_what_fits_within_the_model_s_own_error_is_called_tight():
    words = ("llama-3.1-8b", "--gpu", "RTX4090", "--method", "lora", "--sequence")
    assert "to spare; tight: " in fits(*words, "2048").output
    assert fits(*words, "512").output.endswith("to spare\n")
