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
from whaleflux.planning.serving import Lack, Requests, decode_s, kv_bytes, longest, prefill_s, replica, usual
from whaleflux.planning.serving_sizes import ServingOffer, serve

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
    assert small.lack is Lack.WEIGHTS
    assert "too much for each GPU" in small.binding


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
        [ServingOffer.listed(CATALOGUE.types[name]) for name in ("H200", "H100-80GB", "A100-80GB")],
        Requests(2000, 500, token_s=0.05),
    )
    made = [size.replica for size in found]
    good = [one.usd_per_million_tokens for one in made if one.meets]
    assert good
    assert good == sorted(good)
    assert [one.meets for one in made] == sorted((one.meets for one in made), reverse=True)


OFFERS = st.builds(
    ServingOffer,
    st.sampled_from([CATALOGUE.types[name] for name in ("H200", "H100-80GB", "A100-40GB", "RTX4090", "L4")]),
    st.one_of(st.none(), st.floats(0.1, 10)),
    node_gpus=st.integers(1, 8),
    free_gpus=st.integers(0, 8),
)


@given(
    st.sampled_from([EIGHT, SEVENTY]),
    st.lists(OFFERS, max_size=4),
    st.integers(0, 131_072),
    st.sampled_from([0.0, 0.01, 0.05]),
    st.sampled_from([0.0, 0.5, 20.0]),
)
def test_nothing_is_picked_that_does_not_fit_or_keep_what_is_asked(shape, offers, context, token_s, per_s):
    asked = Requests(2000, 500, token_s=token_s, context=context, per_s=per_s)
    found = serve(shape, offers, asked)
    for size in found:
        one = size.replica
        assert one.tp <= size.offer.node_gpus
        keeps = one.at_once >= 1 and (not token_s or one.token_s <= token_s) and one.requests_per_s >= per_s
        needed = one.weights_bytes + one.kv_bytes_per_token * max(asked.longest, one.at_once * 2500)
        assert not one.meets or (keeps and needed <= one.usable_bytes and one.context >= min(context, longest(shape)))
        assert one.meets or one.usd_per_million_tokens is None
    ranks = [(not one.replica.meets, not one.replica.fits, not one.starts_now) for one in found]
    assert ranks == sorted(ranks)


def test_the_longest_request_has_to_fit_and_how_long_it_may_be_is_said():
    short, long = one(EIGHT, 1), one(EIGHT, 1, machine=Machine.of(CATALOGUE.types["RTX4090"]), context=65_536)
    assert (short.context, short.lack) == (131_072, Lack.NOTHING)
    assert 0 < long.context < 65_536
    assert long.lack is Lack.CONTEXT
    assert f"{long.context:,} tokens fit" in long.binding
    assert one(EIGHT, 1, machine=Machine.of(CATALOGUE.types["RTX4090"]), context=long.context).fits


def test_with_a_rate_the_cheapest_is_what_costs_least_by_the_hour():
    offers = [ServingOffer.listed(CATALOGUE.types[name]) for name in ("H200", "RTX4090", "L40S")]
    best, *others = serve(EIGHT, offers, Requests(2000, 500, per_s=0.5))
    assert best.usd_per_hour == min(one.usd_per_hour for one in (best, *others) if one.replica.meets)
    too_much = serve(EIGHT, offers, Requests(2000, 500, per_s=1e6))
    assert {one.replica.lack for one in too_much if one.replica.fits} == {Lack.RATE}


def test_what_can_start_now_stands_before_what_is_cheaper_and_waits():
    free, taken = (ServingOffer(CATALOGUE.types["H200"], usd, "", "", 8, free) for usd, free in ((4.0, 2), (1.0, 0)))
    found = [one for one in serve(EIGHT, [taken, free], Requests(2000, 500)) if one.replica.meets]
    assert (found[0].offer, found[0].starts_now, found[0].replica.tp <= 2) == (free, True, True)
    assert serve(EIGHT, [taken], Requests(2000, 500))[0].replica.meets


def test_a_number_of_gpus_that_is_said_is_the_only_one():
    assert {
        one.replica.tp for one in serve(EIGHT, [ServingOffer.listed(CATALOGUE.types["H200"])], Requests(9, 9), gpus=4)
    } == {4}
    assert not serve(EIGHT, [ServingOffer.listed(CATALOGUE.types["H200"])], Requests(9, 9), gpus=3)


def test_usual_requests_stay_within_the_context():
    assert usual(EIGHT, 0, 0) == (2000, 500)
    assert usual(EIGHT, 0, 0, 1000) == (800, 200)
    assert usual(EIGHT, 4000, 0) == (4000, 500)


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

    def test_types_without_8_bit_are_left_out_of_it(self):
        done = RUN.invoke(app, ["fits", "llama-3.1-8b", "--serve", "--precision", "fp8", "-o", "json"])
        assert done.exit_code == 0, done.output
        named = {one["gpu"] for one in json.loads(done.output)["replicas"]}
        assert "H200" in named
        assert "A100-80GB" not in named

    def test_a_longest_request_and_a_rate_bound_what_serves(self):
        asked = [
            "fits",
            "llama-3.1-8b",
            "--serve",
            "--gpu",
            "RTX4090",
            "--context",
            "60000",
            "--rate",
            "0.2",
            "-o",
            "json",
        ]
        found = json.loads(RUN.invoke(app, asked).output)["replicas"]
        assert {one["tp"]: one["lack"] for one in found}[1] == "context"
        assert all(one["context"] >= 60_000 and one["requests_per_s"] >= 0.2 for one in found if one["meets"])

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--context", "200000"), "131,072"),
            (("--context", "-1"), "--context"),
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
