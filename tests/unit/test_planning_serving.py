"""Which GPUs serve a model within an objective."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.serving import Requests, decode_s, kv_bytes, prefill_s, replica, serve

RUN = CliRunner()
SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces"
SEVENTY, EIGHT = model_named("llama-3.1-70b"), model_named("llama-3.1-8b")
H200 = Machine.of(CATALOGUE.types["H200"])


def one(shape=SEVENTY, tp=4, machine=H200, weight_bytes=2.0, **asked):
    return replica(shape, machine, tp, Requests(**({"prompt": 2000, "answer": 500} | asked)), weight_bytes, 3.5)


def test_keys_and_values_of_a_token_are_counted_by_head_and_once_where_they_are_compressed():
    assert kv_bytes(EIGHT, 1) == 2 * 2 * 8 * 128 * 32
    assert kv_bytes(EIGHT, 4) == kv_bytes(EIGHT, 1) / 4
    assert kv_bytes(EIGHT, 32) == kv_bytes(EIGHT, 8)  # a head is not divided
    deepseek = model_named("deepseek-v3")
    assert kv_bytes(deepseek, 8) == kv_bytes(deepseek, 1)


def test_weights_that_do_not_fit_are_no_replica():
    small = replica(SEVENTY, Machine.of(CATALOGUE.types["RTX4090"]), 2, Requests(2000, 500), 2.0, 0.34)
    assert not small.fits
    assert small.binding == "the weights do not fit"


def test_a_tighter_objective_takes_fewer_at_once_and_costs_more():
    loose, tight = one(), one(token_s=0.025)
    assert 1 <= tight.at_once < loose.at_once
    assert tight.token_s <= 0.025
    assert tight.usd_per_million_tokens > loose.usd_per_million_tokens


def test_an_objective_that_one_request_alone_misses_is_named():
    late = one(first_token_s=0.001)
    assert not late.meets
    assert "first token comes" in late.binding


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 20_000), st.integers(1, 4_000))
def test_what_is_served_fits_and_keeps_its_objective(tp, prompt, answer):
    found = one(EIGHT, tp, prompt=prompt, answer=answer, token_s=0.05, first_token_s=2.0)
    assert found.at_once <= found.held
    assert not found.meets or (found.token_s <= 0.05 and found.first_token_s <= 2.0)
    held = found.at_once * (prompt + answer) * found.kv_bytes_per_token
    assert not found.meets or found.weights_bytes + held <= found.usable_bytes


@given(st.integers(1, 511))
def test_more_requests_never_make_a_step_faster(count):
    fewer, more = decode_s(EIGHT, H200, 1, np.array([count, count + 1.0]), 1000, 2.0)
    assert fewer <= more


def test_what_meets_it_stands_first_by_price():
    found = serve(
        SEVENTY,
        [CATALOGUE.types[name] for name in ("H200", "H100-80GB", "A100-80GB")],
        Requests(2000, 500, token_s=0.05),
    )
    good = [replica.usd_per_million_tokens for replica in found if replica.meets]
    assert good == sorted(good)
    assert [replica.meets for replica in found] == sorted((replica.meets for replica in found), reverse=True)


@pytest.mark.parametrize("gpu", ["A100-80GB", "H100-80GB"])
def test_prompts_take_what_was_measured(gpu):
    """Splitwise's table: llama-2-70b on 2 and 4 GPUs, single prompts of 512 to 8,192 tokens, an engine of 2023."""
    path = SHARED / "splitwise_perf" / "perf_model.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there: the measured table comes with the reference data")
    shape, machine, errors = model_named("llama-2-70b"), Machine.of(CATALOGUE.types[gpu]), []
    for row in csv.DictReader(path.open()):
        if (row["model"], row["hardware"], row["batch_size"]) == ("llama2-70b", gpu.lower(), "1") and row[
            "tensor_parallel"
        ] in "24":
            found = prefill_s(shape, machine, int(row["tensor_parallel"]), int(row["prompt_size"]), 2.0)
            errors.append(found / (float(row["prompt_time"]) / 1e3) - 1)
    assert len(errors) > 20
    assert np.abs(errors).mean() < 0.20


def test_tokens_take_what_was_measured_on_one_card():
    """vLLM 0.8.5 on one RTX 4090, one request a second: the median time for each token."""
    path = SHARED / "iog_vllm_bench" / "all_results.json"
    if not path.exists():
        pytest.skip(f"{path} is not there: the measured table comes with the reference data")
    shapes = {
        "DeepSeek-R1-Distill-Llama-8B": "llama-3.1-8b",
        "Meta-Llama-3-8B-Instruct": "llama-3-8b",
        "DeepSeek-R1-Distill-Qwen-7B": "qwen2.5-7b",
    }
    errors = []
    for row in json.loads(path.read_text()):
        if (
            row["gpu"].endswith("4090")
            and int(row["gpus"]) == 1
            and float(row["qps"]) == 1
            and row["model"].rpartition("/")[2] in shapes
        ):
            under_way = max(
                1.0,
                row["request_throughput"] * row["mean_tpot_ms"] / 1e3 * row["total_output_tokens"] / row["completed"],
            )
            shape = model_named(shapes[row["model"].rpartition("/")[2]])
            found = decode_s(shape, Machine.of(CATALOGUE.types["RTX4090"]), 1, np.array([under_way]), 400, 2.0)[0]
            errors.append(found / (row["median_tpot_ms"] / 1e3) - 1)
    assert errors
    assert np.abs(errors).mean() < 0.25


class TestCommand:
    def test_a_table_and_the_same_as_json(self):
        asked = ["fits", "llama-3.1-70b", "--serve", "--token", "50ms"]
        table, said = RUN.invoke(app, asked), RUN.invoke(app, [*asked, "-o", "json"])
        assert table.exit_code == 0, table.output
        assert "x H200" in table.output
        first = json.loads(said.output)["replicas"][0]
        assert first["meets"]
        assert first["token_s"] <= 0.05

    def test_what_nothing_serves_says_why_and_what_to_do(self):
        done = RUN.invoke(app, ["fits", "llama-3.1-405b", "--serve", "--gpu", "RTX4090"])
        assert done.exit_code == 1
        assert "the weights do not fit" in done.output
        assert "take larger GPUs" in done.output

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--token", "0ms"), "more than 0"),
            (("--first-token", "fast"), "--first-token"),
            (("--gpu", "H20O"), "take one of"),
            (("--prompt", "-1"), "--prompt"),
        ],
    )
    def test_bad_input_is_named(self, more, said):
        done = RUN.invoke(app, ["fits", "llama-3.1-8b", "--serve", *more])
        assert done.exit_code != 0
        assert said in str(done.exception) + done.output
