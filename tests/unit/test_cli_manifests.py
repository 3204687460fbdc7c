"""job.yaml and model.yaml: what is right becomes the contract's messages, what is wrong is named with its line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.cli.manifests import job_from_yaml, model_from_yaml
from whaleflux.errors import Invalid

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
deadline: 2026-12-01T08:00Z
budget: 12000 USD
on_partition: wait 10m
retry: {max_restarts: 5, backoff: 30 s}
"""


def violations(text, parse=job_from_yaml):
    with pytest.raises(Invalid) as refused:
        parse(text, Path("/base"))
    return {v.field: v.description for v in refused.value.violations}


def test_a_full_job_file():
    job = job_from_yaml(FULL, Path("/base"))
    spec = job.spec
    assert (job.queue, job.job_id, spec.gpus, spec.nodes.min) == ("research", "llama-70b-sft", 64, 2)
    assert list(spec.command) == ["python", "train.py", "--config", "my sft.yaml"]
    assert (list(spec.gpu.any_of), spec.gpu.min_memory_bytes) == (["H200", "H100-80GB"], 80 * 10**9)
    assert [(r.group, r.level, r.size, r.preferred) for r in spec.placement] == [
        ("tensor", 6, 0, False),
        ("pipeline", 4, 16, True),
    ]
    assert spec.on_partition.wait.seconds == 600
    assert spec.deadline_time.ToJsonString() == "2026-12-01T08:00:00Z"
    assert (spec.budget_usd, spec.checkpoint.keep, spec.retry.max_restarts) == (12000, 5, 5)


def test_every_mistake_is_named_at_once_with_its_line_and_fix():
    found = violations("name: Bad_Name\ngpu_count: 4\ngpus: 1000000000\nrun: 'python \"'\nnodes: {mim: 2}\n")
    assert set(found) == {"name", "gpu_count", "gpus", "run", "nodes.mim"}
    assert "line 1" in found["name"]
    assert "1 to 100000" in found["gpus"]
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
        ("run: x\ngpus: 1\nname: " + "a" * 1000 + "\n", "name"),
        ("run: x\ngpus: 1\nx: " + "[" * 60 + "]" * 60, "file"),
        ("!!python/object/apply:os.system ['true']", "file"),
        ("name: " + "a" * (2 << 20), "file"),
    ],
)
def test_bad_files(text, field):
    assert field in violations(text)


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
    assert "{port}" in parsed.model.engine.command
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
        except Invalid as refused:
            assert all(v.field and v.description for v in refused.violations)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_either_parses_or_names_fields(text):
    for parse in (job_from_yaml, model_from_yaml):
        try:
            parse(text, Path("/base"))
        except Invalid as refused:
            assert refused.violations
