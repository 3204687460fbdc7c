"""`whaleflux plan` over several pools of GPUs, from the command line."""

import json

import pytest
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app

RUN = CliRunner()
POOLS = ("--gpu", "H100-80GB:16,A100-80GB:32", "--batch", "512", "--sequence", "4096")


def plan(*arguments):
    return RUN.invoke(app, ["plan", *arguments])


def test_people_see_who_does_what_and_what_else_there_is():
    done = plan("llama-3.1-8b", *POOLS, "--tokens", "1B")
    assert done.exit_code == 0, done.output
    for said in (
        "on 16 x H100-80GB + 32 x A100-80GB",
        "replicas: ",
        "1 B tokens take",
        "for 1M tokens",
        "busy s",
        "slower  one pool: ",
    ):
        assert said in done.output


def test_programs_get_shares_that_add_up():
    found = json.loads(plan("llama-3.1-8b", *POOLS, "--tokens", "1B", "-o", "json").output)
    best = found["best"]
    assert sum(sum(part["samples"]) for part in best["parts"]) == 512
    assert best["step_s"] < min(found["alone_s"].values())
    assert found["tokens_per_s"] == pytest.approx(512 * 4096 / best["step_s"])
    assert found["finish_s"] == pytest.approx(1e9 / found["tokens_per_s"])
    assert found["left_out"] == []


def test_fewer_tokens_than_a_step_are_a_step():
    found = json.loads(plan("llama-3.1-8b", *POOLS, "--tokens", "1", "-o", "json").output)
    assert found["finish_s"] == pytest.approx(found["best"]["step_s"])
    assert "1 tokens are less than a step of 2.1 M" in plan("llama-3.1-8b", *POOLS, "--tokens", "1").output


def test_a_pool_behind_a_slow_line_is_left_out():
    found = json.loads(plan("llama-3.1-8b", *POOLS, "--between-gbps", "1", "-o", "json").output)
    assert found["left_out"] == ["A100-80GB"]


def test_a_price_that_nobody_knows_is_not_zero():
    unknown = plan("llama-3.1-8b", "--gpu", "H800-80GB:8,A100-80GB:8", "--batch", "64")
    assert "what it costs is not known" in unknown.output
    priced = json.loads(
        plan("llama-3.1-8b", "--gpu", "H800-80GB:8,A100-80GB:8", "--batch", "64", "--price", "2", "-o", "json").output
    )
    assert priced["usd_per_million_tokens"] > 0


def test_what_fits_nowhere_ends_with_1():
    done = plan("llama-3.1-70b", "--gpu", "RTX4090:2,A100-40GB:1", "--batch", "8")
    assert done.exit_code == 1
    assert "does not fit" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "H100-80GB:16,A100-80GB"), "--gpu: has 'A100-80GB'; each pool must be TYPE:GPUS"),
        (("--gpu", "H100-80GB:0"), "--gpu: has 'H100-80GB:0'"),
        (("--gpu", "H100-80GB:9999999999"), "each pool must be TYPE:GPUS, 1 to 131072"),
        (("--gpu", ":8"), "--gpu: has ':8'"),
        (("--gpu", "H100-80GB:8,H100-80GB:8"), "H100-80GB was given twice"),
        (("--gpu", "X:8,A100-80GB:8"), "'X' is not known"),
        (("--gpu", "H100-80GB:8,A100-80GB:8", "--tp", "2"), "--tp: is not read where --gpu names pools"),
        (("--gpu", "H100-80GB:8,A100-80GB:8", "--gpus", "16"), "--gpus: is not read where --gpu names pools"),
        (("--gpu", "H100-80GB", "--between-gbps", "10"), "--between-gbps: is for pools"),
        (("--gpu", "H100-80GB:8,A100-80GB:8", "--batch", "4194304"), "batch: 4194304 samples a step; take 1 to"),
        (("--gpu", "H200:1,H100-80GB:1,A100-80GB:1,A100-40GB:1,RTX4090:1"), "5 kinds of GPUs were given; take 1 to 4"),
    ],
)
def test_bad_input_names_the_option_and_the_fix(arguments, said):
    done = plan("llama-3.2-1b", *arguments)
    assert done.exit_code
    assert said in str(done.exception)
