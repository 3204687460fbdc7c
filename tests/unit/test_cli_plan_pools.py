"""`whaleflux plan` over several pools of GPUs, from the command line."""

import json
import math
import subprocess

import pytest
import yaml
from typer.testing import CliRunner

from tests.unit.fleets import GB, node
from whaleflux.cli.__main__ import app
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux_scheduler.core.placement.api import Placement
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.request import place_request

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


def test_a_job_file_of_both_pools_is_valid_and_has_the_shares_of_the_plan(tmp_path):
    done = plan("llama-3.1-8b", *POOLS, "--emit", "job")
    assert done.exit_code == 0, done.output
    path = tmp_path / "job.yaml"
    path.write_text(done.stdout)
    assert RUN.invoke(app, ["validate", str(path)]).exit_code == 0
    spec = job_from_yaml(done.stdout, tmp_path).spec
    balance, mesh = (json.loads(spec.environment[name]) for name in ("BALANCE", "MESH"))
    assert spec.environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True", "as memory is counted"
    assert spec.gpus == 48
    assert balance["global_batch"] == 512 == 16 * balance["samples"]["H100-80GB"] + 32 * balance["samples"]["A100-80GB"]
    assert balance["samples"]["H100-80GB"] > balance["samples"]["A100-80GB"]
    assert math.prod(mesh["mesh"].values()) == 48


def test_that_job_is_placed_on_both_pools_and_on_no_smaller_gpus(tmp_path):
    spec = spec_of(job_from_yaml(plan("llama-3.1-8b", *POOLS, "--emit", "job").stdout, tmp_path).spec)
    engine = Engine()
    for number in range(8):
        small = number > 5
        model = "RTX4090" if small else "H100-80GB" if number < 2 else "A100-80GB"
        engine.upsert_node(node(f"n{number}", model=model, memory=(24 if small else 80) * GB))
    placed = engine.place(place_request("job", spec))
    assert isinstance(placed, Placement), placed
    assert {name.rpartition("/")[2] for name in placed.node_names} == {f"n{number}" for number in range(6)}


def test_torchrun_starts_once_on_each_node_of_every_pool():
    done = plan("llama-3.1-8b", *POOLS, "--emit", "torchrun")
    assert "--nnodes=6 --nproc-per-node=8" in done.stdout
    assert "export BALANCE='{" in done.stdout
    assert "PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" in done.stdout
    assert "2 of H100-80GB, 4 of A100-80GB" in done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True).returncode == 0


def test_a_pipeline_through_pools_is_said_not_to_run_and_what_runs_says_what_it_loses():
    """A 70B model is fastest in stages of both pools."""
    shown = plan("llama-3.1-70b", *POOLS)
    assert "not to be run from here: no output format lays stages of a pipeline on types of GPU" in shown.output
    made = plan("llama-3.1-70b", *POOLS, "--emit", "job")
    assert "replicas: " in made.stdout
    assert "slower than stages: " in made.stderr
    assert yaml.safe_load(made.stdout)["parallel"] == {"tensor": 8}


def test_programs_are_told_what_cannot_be_run():
    found = json.loads(plan("llama-3.1-70b", *POOLS, "-o", "json").output)
    assert found["best"]["kind"] == "stages"
    assert "no output format" in found["best"]["cannot_run"]


def test_where_nothing_over_pools_can_be_run_that_is_said_with_the_reason():
    done = plan("llama-3.1-70b", "--gpu", "H100-80GB:8,A100-80GB:8", "--batch", "64", "--emit", "job")
    assert "nothing over these pools fits that job can express" in str(done.exception)
    assert not done.stdout


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
        (("--gpu", "H100-80GB:8,A100-80GB:8", "--emit", "megatron"), "--emit: megatron cannot express replicas"),
        (("--gpu", "H100-80GB", "--emit", "job"), "--emit: job is of pools"),
        (("--gpu", "H100-80GB", "--between-gbps", "10"), "--between-gbps: is for pools"),
        (("--gpu", "H100-80GB:8,A100-80GB:8", "--batch", "4194304"), "batch: 4194304 samples a step; take 1 to"),
        (("--gpu", "H200:1,H100-80GB:1,A100-80GB:1,A100-40GB:1,RTX4090:1"), "5 kinds of GPUs were given; take 1 to 4"),
    ],
)
def test_bad_input_names_the_option_and_the_fix(arguments, said):
    done = plan("llama-3.2-1b", *arguments)
    assert done.exit_code
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "H200:8,H200:8"), "--gpu: H200 was given twice"),
        (("--gpu", "H200:8,A100-80GB:8", "--batch", "2000000"), "--batch: 2000000 samples a step; take 1 to 1048576"),
        (("--gpu", "H200:8,A100-80GB:8", "--between-gbps", "1e-7"), "--between-gbps: is 1e-07; give 0.001 or more"),
    ],
)
def test_mistakes_are_named_as_they_are_typed(arguments, words):
    assert str(plan("llama-3.1-8b", *arguments).exception).startswith(words)


def test_idle_gpus_of_a_pool_are_said_and_paid_for_as_without_pools():
    words = ("llama-3.1-8b", "--batch", "64", "--sequence", "4096")
    pooled = plan(*words, "--gpu", "H100-80GB:72")
    assert "H100-80GB: uses 64 of its 72 GPUs; 8 stay idle, and are paid for" in pooled.output
    found = json.loads(plan(*words, "--gpu", "H100-80GB:72", "-o", "json").output)
    alone = json.loads(plan(*words, "--gpu", "H100-80GB", "--gpus", "72", "-o", "json").output)["chosen"]
    assert found["idle_gpus"] == {"H100-80GB": 8}
    assert found["usd_per_million_tokens"] == pytest.approx(alone["usd_per_million_tokens"])
