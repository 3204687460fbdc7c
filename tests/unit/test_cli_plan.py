"""`whaleflux plan`, from the command line, without a fleet: what it answers, and what it says of bad input."""

import json
import time

import pytest
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument

RUN = CliRunner()
GOOD = {
    "layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn": 8192, "vocabulary": 50304, "sequence": 4096,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def plan(*arguments):
    return RUN.invoke(app, ["plan", *arguments])


def answer(*arguments):
    done = plan(*arguments, "-o", "json")
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.output)


def test_people_get_split_step_money_memory_and_what_binds():
    done = plan("llama-3.1-70b", "--gpu", "H200", "--gpus", "128", "--tokens", "1T")
    assert done.exit_code == 0, done.output
    for said in ("128 x H200: ", "step ", "compute", "tokens/s on each GPU", "MFU", "1 T tokens take", "for 1M tokens", "memory of a GPU", "what binds: ", "other kinds"):  # fmt: skip
        assert said in done.output


def test_fewer_tokens_than_a_step_are_a_step():
    found = answer("llama-3.1-8b", "--gpu", "H200", "--tokens", "1")["chosen"]
    assert found["finish_s"] == pytest.approx(found["step_s"])
    assert found["usd"] > 0
    done = plan("llama-3.1-8b", "--gpu", "H200", "--tokens", "1", "--deadline", "1s")
    assert "1 tokens are less than a step of 4 M, which takes 47s" in done.output
    assert done.exit_code == 1


def test_a_name_that_is_longer_than_any_file_s_is_no_model():
    assert str(plan("x" * 5000, "--gpu", "H200").exception).startswith("MODEL: 'xxx")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--deadline", "999999999999d", "--tokens", "1T"), "--deadline: is '999999999999d'; it must be more than 0 and at most 10000000000 s"),
        (("--price", "20000"), "--price: is '20000'; it must be more than 0 and at most 10000 dollars"),
    ],
)  # fmt: skip
def test_limits_have_their_unit(more, words):
    assert words in str(plan("llama-3.1-8b", "--gpu", "H200", *more).exception)


def test_a_micro_batch_that_divides_no_batch_leads_to_one_that_does():
    done = plan("llama-3.1-8b", "--gpu", "H200", "--micro-batch", "3", "--batch", "8")
    assert "another split: dp 8, ZeRO-1, no recomputation, micro-batch 1" in done.output


@pytest.mark.parametrize("said", ["0.5", "1.5", "0"])
def test_tokens_are_whole(said):
    for option in ("--tokens", "--batch-tokens"):
        done = plan("llama-3.1-8b", "--gpu", "H200", option, said)
        assert f"{option}: is '{said}'; it must be a whole number from 1 on" in str(done.exception)


def test_the_split_is_said_as_a_job_file_says_it():
    done = plan("dense-700b", "--gpu", "H200", "--gpus", "128")
    assert "in a job file, gpus: 128 and parallel: {tensor: 8, pipeline: 16}" in done.output


def test_programs_get_numbers_that_add_up():
    found = answer("llama-3.1-70b", "--gpu", "H200", "--gpus", "128", "--tokens", "1T", "--batch", "512")
    chosen = found["chosen"]
    best = chosen["found"]["best"]
    assert found["meets"]
    assert best["split"]["global_batch"] == 512
    assert sum(best["seconds"].values()) == pytest.approx(chosen["step_s"])
    assert chosen["tokens_per_s"] == pytest.approx(512 * 8192 / chosen["step_s"])
    assert chosen["finish_s"] == pytest.approx(1e12 / chosen["tokens_per_s"])
    assert chosen["usd"] == pytest.approx(chosen["finish_s"] / 3600 * 128 * chosen["usd_per_gpu_hour"])
    assert chosen["usd_per_million_tokens"] == pytest.approx(chosen["usd"] / 1e6)
    assert 0.2 < chosen["mfu"] < 0.7


def test_a_price_that_nobody_knows_is_not_zero():
    done = plan("llama-3.1-8b", "--gpu", "H800-80GB")
    assert "what it costs is not known" in done.output
    assert answer("llama-3.1-8b", "--gpu", "H800-80GB")["chosen"]["usd_per_million_tokens"] is None
    priced = answer("llama-3.1-8b", "--gpu", "H800-80GB", "--price", "2.50")["chosen"]
    assert (priced["usd_per_gpu_hour"], priced["price_source"]) == (2.5, "--price")
    assert "--price: is missing" in str(plan("llama-3.1-8b", "--gpu", "H800-80GB", "--objective", "cost").exception)


def test_list_prices_come_with_their_source_and_date():
    assert "202" in answer("llama-3.1-8b", "--gpu", "H200")["chosen"]["price_source"]


def test_idle_gpus_are_said_and_paid_for():
    done = plan("llama-3.1-70b", "--gpu", "H200", "--gpus", "127")
    assert "of the 127 GPUs" in done.output
    chosen = answer("llama-3.1-70b", "--gpu", "H200", "--gpus", "127")["chosen"]
    assert chosen["usd_per_million_tokens"] == pytest.approx(127 * 3.5 / 3600 / chosen["tokens_per_s"] * 1e6)


def test_of_several_offers_the_cheapest_by_the_deadline_and_the_fastest_within_the_budget():
    words = ("llama-3.1-8b", "--gpu", "H200,H100-80GB", "--gpus", "8-64", "--tokens", "100B")
    every = answer(*words, "--objective", "cost")
    cheap = answer(*words, "--deadline", "3d")
    assert cheap["chosen"]["finish_s"] <= 3 * 86400
    rest = [one for one in every["others"] if one["finish_s"] <= 3 * 86400]
    assert cheap["chosen"]["usd"] == pytest.approx(min(one["usd"] for one in rest))
    fast = answer(*words, "--budget", "8500")
    assert fast["chosen"]["usd"] <= 8500
    within = [one for one in (every["chosen"], *every["others"]) if one["usd"] <= 8500]
    assert fast["chosen"]["finish_s"] == pytest.approx(min(one["finish_s"] for one in within))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--deadline", "1h"), "the deadline of 1h is too near: the fastest, 64 x H200"),
        (("--budget", "100"), "the budget of $100 is too small: the cheapest"),
        (("--deadline", "5d", "--budget", "8100"), "no offer meets both"),
    ],
)
def test_a_goal_that_nothing_meets_says_by_how_much(more, said):
    done = plan("llama-3.1-8b", "--gpu", "H200,H100-80GB", "--gpus", "8,64", "--tokens", "100B", *more)
    assert done.exit_code == 1
    assert said in done.output


def test_what_does_not_fit_says_what_would():
    done = plan("llama-3.1-70b", "--gpu", "RTX4090", "--gpus", "4")
    assert done.exit_code == 1
    for said in ("does not fit: optimizer state", "nearest: ", "what fits:", "--gpus"):
        assert said in done.output


def test_loaders_and_checkpoints_are_part_of_the_step():
    words = ("llama-3.1-8b", "--gpu", "H200")
    usual = answer(*words)["chosen"]["found"]["best"]["seconds"]
    slow = answer(*words, "--data-tokens-per-s", "2k", "--checkpoint-every", "30min", "--checkpoint-stall", "18s")
    seconds = slow["chosen"]["found"]["best"]["seconds"]
    assert usual["data_s"] == usual["checkpoint_s"] == 0
    assert seconds["checkpoint_s"] == pytest.approx(0.01 * (sum(seconds.values()) - seconds["checkpoint_s"]))
    assert slow["chosen"]["tokens_per_s_per_gpu"] == pytest.approx(2000 / 1.01, rel=0.01)
    assert slow["chosen"]["found"]["binding"]["kind"] == "data"


def test_adapters_need_fewer_gpus_than_all_weights():
    assert plan("llama-3.1-70b", "--gpu", "H200", "--gpus", "2").exit_code == 1
    assert plan("llama-3.1-70b", "--gpu", "H200", "--gpus", "2", "--method", "lora", "--batch", "16").exit_code == 0


YAML_BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
HOSTILE = {
    "zero heads": {**GOOD, "heads": 0},
    "heads that do not divide": {**GOOD, "heads": 17, "kv_heads": 17},
    "kv heads that do not divide": {**GOOD, "kv_heads": 7},
    "more kv heads than heads": {**GOOD, "kv_heads": 32},
    "a vocabulary of 10^9": {**GOOD, "vocabulary": 10**9},
    "negative layers": {**GOOD, "layers": -1},
    "10^6 layers": {**GOOD, "layers": 10**6},
    "half a layer": {**GOOD, "layers": 1.5},
    "not a number": json.dumps(GOOD).replace("2048", "NaN"),
    "infinity": json.dumps(GOOD).replace("2048", "Infinity"),
    "10^400": json.dumps(GOOD).replace("2048", "1" + "0" * 400),
    "1e400": json.dumps(GOOD).replace("2048", "1e400"),
    "10^5000": json.dumps(GOOD).replace("2048", "1" + "0" * 5000),
    "yaml's 10^5000": "layers: 1" + "0" * 5000 + "\nhidden: 2048\nheads: 16\nvocabulary: 50304\n",
    "yaml's nan": "layers: .nan\nhidden: 2048\nheads: 16\nvocabulary: 50304\n",
    "text": {**GOOD, "hidden": "wide"},
    "a list": {**GOOD, "hidden": [2048]},
    "true": {**GOOD, "layers": True},
    "an unknown field": {**GOOD, "layer": 24},
    "a missing field": {"layers": 24, "hidden": 2048},
    "experts without a choice": {**GOOD, "experts": 8, "expert_ffn": 1024},
    "more choices than experts": {**GOOD, "experts": 8, "top_k": 9, "expert_ffn": 1024},
    "more dense layers than layers": {**GOOD, "experts": 8, "top_k": 2, "expert_ffn": 1024, "dense_layers": 99},
    "latent that is no fields": {**GOOD, "latent": 5},
    "a family that nobody knows": {**LLAMA, "model_type": "mamba"},
    "a family that is a list": {**LLAMA, "model_type": ["llama"]},
    "hugging face's zero heads": {**LLAMA, "num_attention_heads": 0},
    "hugging face's text": {**LLAMA, "vocab_size": "many"},
    "a list of models": "[1, 2, 3]",
    "nothing": "",
    "cut off": json.dumps(LLAMA)[:-20],
    "nested too deep": '{"a":' * 100_000,
    "yaml nested too deep": "[" * 10_000,
    "a yaml bomb": YAML_BOMB,
    "a yaml object": "!!python/object/apply:os.system ['true']\n",
    "a yaml alias to itself": "a: &a [*a]\nlayers: *a\n",
    "binary": b"\x7fELF\x00\xff\xfe" * 1000,
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "zeros": b"\x00" * 2000,
    "two megabytes": b"{" + b" " * 2_000_000 + b"}",
    "many fields": {f"field{n}": n for n in range(5000)},
    "a long field": {**GOOD, "x" * 100_000: 1},
    "control characters": {**GOOD, "\x1b[2J": 1},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_hostile_model_file_is_refused_with_the_field_and_the_fix(tmp_path, content, ending):
    path = tmp_path / f"model.{ending}"
    raw = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    path.write_bytes(raw)
    began = time.process_time()
    done = plan(str(path), "--gpu", "H200")
    assert time.process_time() - began < 1
    assert isinstance(done.exception, InvalidArgument), (done.exception, done.output)
    said = str(done.exception)
    assert len(said) < 4000
    assert all(one.field and one.description for one in done.exception.violations)
    for trace in ("Traceback", "Error(", "object at 0x", "ValueError", "line 1, column 1 in"):
        assert trace not in said


HOSTILE_OPTIONS = {
    "no gpus": (("--gpus", "0"), "--gpus"), "negative gpus": (("--gpus", "-8"), "--gpus"), "half a gpu": (("--gpus", "1.5"), "--gpus"),
    "10^400 gpus": (("--gpus", "1" + "0" * 400), "--gpus"), "too many gpus": (("--gpus", "999999"), "--gpus"),
    "a range backwards": (("--gpus", "64-8"), "--gpus"), "too many numbers": (("--gpus", ",".join(str(n) for n in range(1, 200))), "--gpus"),
    "another digit": (("--gpus", "٨"), "--gpus"), "no type": (("--gpu", ""), "--gpu"), "nine types": (("--gpu", ",".join(["H200"] * 9)), "--gpu"),
    "no such type": (("--gpu", "H900"), "--gpu"), "tokens of nan": (("--tokens", "nan"), "--tokens"), "no tokens": (("--tokens", "0"), "--tokens"),
    "tokens without end": (("--tokens", "inf"), "--tokens"), "negative tokens": (("--tokens", "-1T"), "--tokens"), "many tokens": (("--tokens", "9" * 15 + "T"), "--tokens"),
    "two batches": (("--batch", "64", "--batch-tokens", "4M"), "--batch"), "a batch of words": (("--batch-tokens", "large"), "--batch-tokens"),
    "a deadline without tokens": (("--deadline", "30d"), "--tokens"), "a budget without tokens": (("--budget", "2M"), "--tokens"),
    "a deadline of words": (("--tokens", "1T", "--deadline", "soon"), "--deadline"), "euros": (("--tokens", "1T", "--budget", "2M EUR"), "--budget"),
    "a price of nan": (("--price", "nan"), "--price"), "a price of nothing": (("--price", "0"), "--price"), "a price per moon": (("--price", "99999999"), "--price"),
    "half a checkpoint": (("--checkpoint-every", "30min"), "--checkpoint-stall"), "a checkpoint of words": (("--checkpoint-every", "x", "--checkpoint-stall", "1s"), "--checkpoint-every"),
    "data of nan": (("--data-tokens-per-s", "nan"), "--data-tokens-per-s"), "csv": (("-o", "csv"), "-o"),
    "8 bit where there is none": (("--gpu", "H200,A100-80GB", "--precision", "fp8"), "--precision"),
    "8 bit in a pool without": (("--gpu", "H100-80GB:8,A100-80GB:8", "--precision", "fp8"), "--precision"),
    "software that nobody measured": (("--software", "eager"), "--software"),
    "live and software": (("--live", "--software", "eager"), "--live"), "live and data": (("--live", "--data-tokens-per-s", "9"), "--live"),
    "live and checkpoints": (("--live", "--checkpoint-every", "1h"), "--live"),
    "live and half a second": (("--live", "--tokens", "1T", "--deadline", "0.5s"), "--deadline"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "field"), HOSTILE_OPTIONS.values(), ids=HOSTILE_OPTIONS.keys())
def test_a_hostile_option_is_refused_by_its_name(words, field):
    usual = ("--gpu", "H200") if "--gpu" not in words else ()
    began = time.process_time()
    done = plan("llama-3.1-8b", *usual, *words)
    assert time.process_time() - began < 1
    assert isinstance(done.exception, InvalidArgument), done.output
    assert field in [one.field for one in done.exception.violations]


@pytest.mark.parametrize(
    "words",
    [
        ("--tp", "-1"),
        ("--zero", "4"),
        ("--sequence", "1" + "0" * 400),
        ("--batch", "-1"),
        ("--batch", "x"),
        ("--objective", "fun"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_command_line(words):
    done = plan("llama-3.1-8b", "--gpu", "H200", *words)
    assert done.exit_code == 2 or words[0] in [one.field for one in done.exception.violations]


@pytest.mark.parametrize(
    "words",
    [
        ("--sequence", "1"), ("--sequence", "134217728"), ("--batch", "1"), ("--batch", "16777213"), ("--gpus", "131072"), ("--gpus", "1-131072"),
        ("--tp", "7"), ("--pp", "4096"), ("--micro-batch", "65536"), ("--ep", "8"), ("--vp", "3"), ("--batch-tokens", "8192"),
    ],
)  # fmt: skip
def test_odd_but_possible_questions_have_an_answer(words):
    began = time.process_time()
    done = plan("llama-3.1-8b", "--gpu", "H200", *words)
    assert done.exit_code in (0, 1), done.exception
    assert done.output
    assert time.process_time() - began < 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("llama-3.1-8b", "--zero", "3", "--pp", "2"),
            "ZeRO-3 has no pipeline (pp 2, vp 0): take zero 0 or 1, or pp 1",
        ),
        (("llama-3.1-8b", "--zero", "2", "--pp", "4"), "ZeRO-2 has no pipeline"),
        (("llama-3.1-8b", "--zero", "2", "--vp", "4"), "ZeRO-2 has no pipeline"),
        (("llama-3.1-8b", "--ep", "2"), "ep 2: llama-3.1-8b has no experts"),
        (("llama-3.1-8b", "--vp", "4", "--pp", "1"), "vp 4 with pp 1"),
        (("mixtral-8x7b", "--ep", "3"), "ep 3 does not divide the 8 experts"),
        (("mixtral-8x7b", "--ep", "8", "--tp", "4"), "ep needs experts, must divide them, and divide dp x cp"),
        (("llama-3.1-8b", "--pp", "4", "--vp", "5"), "layers must be a multiple of pp x vp"),
    ],
)
def test_a_settled_part_that_cannot_be_is_named(arguments, said):
    done = plan(*arguments, "--gpu", "H200", "--gpus", "16")
    assert done.exit_code == 1, done.exception
    assert f"no such split is possible: {said}" in done.output


def test_zero_3_alone_is_planned_without_pipelines():
    found = answer("llama-3.1-70b", "--gpu", "RTX4090", "--gpus", "16", "--zero", "3")["chosen"]["found"]
    assert (found["best"] or found["nearest"])["split"]["pp"] == 1


def test_where_all_miss_the_goal_the_nearest_to_it_is_shown():
    words = ("llama-3.1-8b", "--gpu", "H200", "--gpus", "8,16,64", "--tokens", "100B")
    found = answer(*words, "--deadline", "1h")
    assert not found["meets"]
    assert found["chosen"]["gpus"] == 64
    assert [one["gpus"] for one in found["others"]] == [16, 8]
    cheapest = answer(*words, "--budget", "$100")
    assert cheapest["chosen"]["usd"] == min(one["usd"] for one in (cheapest["chosen"], *cheapest["others"]))


def test_fewer_tokens_than_a_sequence_are_no_batch():
    wrong = plan("llama-3.1-8b", "--gpu", "H200", "--batch-tokens", "1").exception
    assert isinstance(wrong, InvalidArgument)
    assert "--batch-tokens: is 1, less than one sequence of 8,192" in str(wrong)


def test_what_does_not_fit_is_said_without_powers_of_ten():
    done = plan("llama-3.1-405b", "--gpu", "L4", "--gpus", "1", "--batch", "4096", "--sequence", "131072")
    assert "does not fit" in done.output
    assert "e+" not in done.output
