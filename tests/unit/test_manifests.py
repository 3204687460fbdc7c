"""job.yaml and model.yaml: what is right becomes the contract's messages, what is wrong is named with its line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.manifests.yaml_files import job_from_yaml, jobs_from_yaml, model_from_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
FULL = """
name: llama-70b-sft
queue: research
run: python train.py --config "my sft.yaml"
gpus: 64
nodes: {min: 2}
gpu: {any: [H200, H100-80GB], memory: ">= 80 GB"}
place: {tensor: nvlink, pipeline: {level: leaf, size: 16, preferred: true}}
data: [dataset:c4-en]
checkpoint: {every: auto, keep: 5}
deadline: 2036-12-01T08:00Z
budget: 12000 USD
on_partition: wait 10m
retry: {max_restarts: 5, backoff: 30 s}
"""


def violations(text, parse=job_from_yaml):
    with pytest.raises(InvalidArgument) as refused:
        parse(text, Path("/base"))
    return {v.field: v.description for v in refused.value.violations}


def test_a_full_job_file():
    job = job_from_yaml(FULL, Path("/base"))
    spec = job.spec
    assert (job.queue, job.job_id, spec.gpus, spec.nodes.min) == ("research", "llama-70b-sft", 64, 2)
    assert list(spec.command) == ["bash", "-euo", "pipefail", "-c", 'python train.py --config "my sft.yaml"']
    assert (list(spec.gpu.any_of), spec.gpu.min_memory_bytes) == (["H200", "H100-80GB"], 80 * 10**9)
    assert [(r.group, r.level, r.size, r.preferred) for r in spec.placement] == [
        ("tensor", 6, 0, False),
        ("pipeline", 4, 16, True),
    ]
    assert spec.on_partition.wait.seconds == 600
    assert spec.deadline_time.ToJsonString() == "2036-12-01T08:00:00Z"
    assert (spec.budget_usd, spec.checkpoint.keep, spec.retry.max_restarts) == (12000, 5, 5)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2 h", 7200), ("1.5 min", 90), ("12:00:00", 43200), ("'00:30:00'", 1800), ("100:00:01", 360001), ("1-00:00:00", 86400),
     ("2-12:30:00", 217800)],
)  # fmt: skip
def test_a_time_limit_has_a_unit_or_slurm_s_form_that_can_mean_one_thing_only(text, seconds):
    spec = job_from_yaml(f"run: /bin/true\ngpus: 1\ntime_limit: {text}\n", Path("/base")).spec
    assert spec.time_limit.ToMilliseconds() == 1000 * seconds


@pytest.mark.parametrize(
    "text", ["30", "'30'", "30.5", "90:00", "'90:00'", "1-00", "12:60:00", "1-00:00", "soon", "true"]
)
def test_a_time_limit_that_could_be_something_else_is_refused_with_the_units(text):
    found = violations(f"run: /bin/true\ngpus: 1\ntime_limit: {text}\n")
    assert "30 s, 30 min, 2 h or 3 d" in found["time_limit"]
    assert "1-00:00:00" in found["time_limit"]


def test_every_mistake_is_named_at_once_with_its_line_and_fix():
    found = violations("name: Bad_Name\ngpu_count: 4\ngpus: 1000000000\nrun: 'python \"'\nnodes: {mim: 2}\n")
    assert set(found) == {"name", "gpu_count", "gpus", "run", "nodes.mim"}
    assert "line 1" in found["name"]
    assert "0 to 100000" in found["gpus"]
    assert "did you mean 'min'" in found["nodes.mim"]
    assert "quotes" in found["run"]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "file"),
        ("- a\n- b\n", "file"),
        ("run: x\n", "gpus"),
        ("gpus: 4\n", "run"),
        ("run: x\ngpus: -1\n", "gpus"),
        ("run: x\ngpus: true\n", "gpus"),
        ("run: x\ngpus: 1\ngpus: 2\n", "file"),
        ("a: &a [1]\nb: *a\n", "file"),
        ("run: x\ngpus: 1\ngpu: {memory: -5 GB}\n", "gpu.memory"),
        ("run: x\ngpus: 1\nbudget: 5 EUR\n", "budget"),
        ("run: x\ngpus: 1\nbudget: 0 USD\n", "budget"),
        ("run: x\ngpus: 1\ngpu: {share: 20}\n", "gpu.share"),
        ("run: x\ngpus: 1\nmemory_per_rank: 64\n", "memory_per_rank"),
        ("run: x\ngpus: 1\nname: " + "a" * 1000 + "\n", "name"),
        ("run: x\ngpus: 1\nx: " + "[" * 60 + "]" * 60, "file"),
        ("!!python/object/apply:os.system ['true']", "file"),
        ("name: " + "a" * (2 << 20), "file"),
    ],
)
def test_bad_files(text, field):
    assert field in violations(text)


@pytest.mark.parametrize(
    ("value", "words"),
    [("9" * 5000, "has a number of thousands of digits"), ("2026-13-01", "a date or a number that there is not")],
)
def test_values_that_there_are_not_are_told_in_plain_words(value, words):
    with pytest.raises(InvalidArgument, match=words) as refused:
        job_from_yaml(f"run: sleep 1\nmodel: llama-3.1-8b\nbatch_tokens: {value}\n", Path())
    assert "sys." not in str(refused.value)


@pytest.mark.parametrize(("said", "tokens"), [("4M", 4_000_000), ("4.1M", 4_100_000), ("512k", 512_000), (4096, 4096)])
def test_tokens_of_a_batch_are_said_as_commands_take_them(said, tokens):
    job = job_from_yaml(f"run: sleep 1\nmodel: llama-3.1-8b\nbatch_tokens: {said}\n", Path())
    assert job.spec.training.batch_tokens == tokens


@pytest.mark.parametrize("said", ["0", "1.5", "4X", "2T", "-1", "true", "[4M]"])
def test_tokens_of_a_batch_that_are_none_are_refused_by_field(said):
    with pytest.raises(InvalidArgument) as refused:
        job_from_yaml(f"run: sleep 1\nmodel: llama-3.1-8b\nbatch_tokens: {said}\n", Path())
    assert [one.field for one in refused.value.violations] == ["batch_tokens"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cpus_per_rank: 20000", "cpus_per_rank: is 20000; give a number from 0.001 to 10000"),
        ("cpus_per_rank: 0.0001", "cpus_per_rank: is 0.0001; give a number from 0.001 to 10000"),
        ("memory_per_rank: 2000 TiB", "memory_per_rank: is 2000 TiB; give at most 1024 TiB"),
    ],
)
def test_limits_are_said_in_the_units_of_the_file(line, words):
    with pytest.raises(InvalidArgument) as refused:
        job_from_yaml(f"run: sleep 1\ngpus: 1\n{line}\n", Path())
    assert words in str(refused.value)


def test_long_values_are_not_repeated_in_full():
    assert all(len(text) < 300 for text in violations("run: x\ngpus: 1\nname: " + "a" * 100_000).values())


def test_examples_parse():
    for file in EXAMPLES.rglob("*job*.yaml"):
        assert job_from_yaml(file.read_text(), file.parent).spec.gpus > 0
    for file in EXAMPLES.rglob("*model*.yaml"):
        assert model_from_yaml(file.read_text(), file.parent).model_id


def test_a_model_file():
    parsed = model_from_yaml((EXAMPLES / "gpt" / "model.yaml").read_text(), EXAMPLES / "gpt")
    assert parsed.model.engine.working_directory == str(EXAMPLES / "gpt")
    assert "--port {port}" in parsed.model.engine.command[-1]
    assert parsed.model.replicas.min == 2
    assert list(parsed.model.engine.gpu_models) == ["RTX4090"]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
FIELDS = st.sampled_from(
    [
        "name",
        "queue",
        "run",
        "gpus",
        "nodes",
        "gpu",
        "place",
        "data",
        "checkpoint",
        "deadline",
        "budget",
        "on_partition",
        "retry",
    ]
)
TREES = st.recursive(
    SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(FIELDS | st.text(), t, max_size=4), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, TREES) | TREES)
def test_any_content_either_parses_or_names_fields(content):
    for parse in (job_from_yaml, model_from_yaml):
        try:
            parse(yaml.safe_dump(content), Path("/base"))
        except InvalidArgument as refused:
            assert all(v.field and v.description for v in refused.violations)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_either_parses_or_names_fields(text):
    for parse in (job_from_yaml, model_from_yaml):
        try:
            parse(text, Path("/base"))
        except InvalidArgument as refused:
            assert refused.violations


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "\n"])
def test_an_empty_file_is_no_job(text):
    with pytest.raises(InvalidArgument, match="file: must be fields and values, not nothing"):
        jobs_from_yaml(text, EXAMPLES)


@pytest.mark.parametrize("number", ["010", "1:30", "1_0", "0x2", "0b10", "+0o7"])
def test_a_number_that_yaml_reads_otherwise_than_people_is_refused(number):
    with pytest.raises(InvalidArgument, match="gpus: must be a whole number"):
        job_from_yaml(f"run: /bin/x\ngpus: {number}\n", EXAMPLES)
    with pytest.raises(InvalidArgument, match="time_limit: must be a time"):
        job_from_yaml("run: /bin/x\ngpus: 1\ntime_limit: 1:30\n", EXAMPLES)


def test_what_run_may_be_is_said():
    with pytest.raises(InvalidArgument, match="run: must be a bash script or a list of words, not a number"):
        job_from_yaml("run: 3\ngpus: 1\n", EXAMPLES)


@pytest.mark.parametrize(("text", "system"), [
    ("#!/bin/bash\n#SBATCH --gres=gpu:1\nsrun python a.py\n", "sbatch"), ("#!/bin/sh\ntorchrun a.py\n", "torchrun"),
    ("resources: {accelerators: H200:8}\nrun: x\n", "skypilot"), ("type: task\ncommands: [x]\n", "dstack"),
    ("compute_environment: LOCAL_MACHINE\n", "accelerate"),
])  # fmt: skip
def test_a_file_of_another_system_is_told_as_such(text, system):
    with pytest.raises(
        InvalidArgument, match=f"looks like one of {system}; make a job file of it with: whaleflux import"
    ):
        jobs_from_yaml(text, EXAMPLES)


def test_a_job_file_with_a_mistake_is_no_file_of_another_system():
    with pytest.raises(InvalidArgument, match="gpus: is missing"):
        jobs_from_yaml("setup: pip install x\nrun: x\n", EXAMPLES)


def test_yaml_and_length_are_told_without_names_that_nobody_gave():
    with pytest.raises(InvalidArgument, match=r"is not YAML: .*at line 1, column") as wrong:
        job_from_yaml("gpus: {", Path())
    assert "unicode string" not in str(wrong.value)
    with pytest.raises(InvalidArgument, match="file: is longer than 1048576 characters"):
        job_from_yaml("#" * (2 << 20), Path())
