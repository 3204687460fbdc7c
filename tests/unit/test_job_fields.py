"""The table of job fields: every field of the contract is in it once, and files, conversion and checks follow it."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.manifests import reference
from whaleflux.manifests.field import name_in_file
from whaleflux.manifests.job_fields import ATTRIBUTES, JOB_FIELDS, Spec
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.job_values import Placement
from whaleflux.manifests.model_fields import MODEL_FIELDS
from whaleflux.manifests.ray_file import ray_from_yaml
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux.manifests.yaml_text import load
from whaleflux.v1 import router_pb2, scheduler_pb2, types_pb2
from whaleflux_scheduler.core.validate import check_spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BASE = Path("/base")
NOT_IN_FILES = {
    "name",
    "create_time",
    "ready_replicas",
    "last_change",
    "etag",
    "owner",
    "allowed_addresses",
    "version",
    "rollout",
    "measures",
    "engine.gpu_memory_bytes",
}  # of a model; a job's spec has none
LEAVES = {
    "google.protobuf.Duration",
    "google.protobuf.Timestamp",
    "whaleflux.v1.Dependency",
    "whaleflux.v1.GpuOption",
    "whaleflux.v1.ModelSite",
    "whaleflux.v1.PlacementRule",
    "whaleflux.v1.RequestClass",
    "whaleflux.v1.SecretUse",
}


def paths(message, prefix=""):
    """The paths of all fields of a message, without those of kinds that are one value to people."""
    for field in message.fields:
        inner = field.message_type
        if inner and inner.full_name not in LEAVES and not inner.GetOptions().map_entry:
            yield from paths(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def file_of(fields):
    """A file that says for each field what its example says."""
    content = {}
    for field in (field for field in fields if field.file and not field.apart):
        *groups, key = field.file.split(".")
        place = content
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = yaml.safe_load(field.example)
    return yaml.safe_dump(content)


def test_every_field_of_the_contract_is_in_the_table_once():
    assert sorted(paths(scheduler_pb2.JobSpec.DESCRIPTOR)) == sorted(field.path for field in ATTRIBUTES.values())
    found = paths(router_pb2.Model.DESCRIPTOR)
    of_models = {path for path in found if not {path, path.partition(".")[0]} & NOT_IN_FILES}
    assert of_models == {field.path for field in MODEL_FIELDS} - {"model_id"}


@pytest.mark.parametrize("field", [f for f in (*JOB_FIELDS, *MODEL_FIELDS) if f.file], ids=lambda f: f.file)
def test_every_field_says_what_it_is_for_what_holds_without_it_and_an_example(field):
    assert field.about.endswith(".")
    assert field.example
    assert field.default or field.required
    assert field.value.words()


def test_the_examples_of_all_fields_make_a_good_file():
    job = job_from_yaml(file_of(JOB_FIELDS), BASE)
    spec = spec_of(job.spec)
    check_spec(spec, job.spec.ByteSize(), NOW)
    unset = [one.name for one in dataclasses.fields(Spec) if getattr(spec, one.name) == one.default]
    parts = ["share_memory_bytes", "mig_profile", "mig_memory_bytes"]  # each excludes the others
    sizes = [name for name in ATTRIBUTES if name.startswith("elastic_")]  # not with types of which several count as one
    split = [name for name in ATTRIBUTES if "parallel" in name]  # not with a program that numbers its ranks itself
    planned = [name for name in ATTRIBUTES if name.startswith("train_")]  # not with GPUs and a split that the file says
    assert unset == [
        *sizes,
        *parts,
        *split,
        *planned,
        "partial_data",
        "datasets_by_rank",
        "never_reroute",
        "code",
        "secrets_groups",
        "array_index",
    ], "an example that sets nothing shows nothing"
    assert model_from_yaml(file_of(MODEL_FIELDS), BASE).model.classes


def test_what_is_left_out_of_a_group_keeps_its_default():
    spec = spec_of(job_from_yaml("run: x\ngpus: 1\nretry: {backoff: 30 s}\n", BASE).spec)
    assert (spec.backoff_s, spec.max_restarts) == (30.0, None)
    assert spec_of(job_from_yaml("run: x\ngpus: 1\nretry: {max_restarts: 0}\n", BASE).spec).max_restarts == 0


@pytest.mark.parametrize(
    ("text", "field"),
    [("gpu: {memory: 900000 TB}", "gpu.memory"), ("stop_grace: 3 h", "stop_grace"), ("environment: {RANK: 1}", "environment[RANK]"),
     ("gpu: [H200, H200]", "gpu.any"), ("retry: {backoff: 10 min}", "retry.backoff")],
)  # fmt: skip
def test_what_the_scheduler_would_refuse_is_refused_before_it_is_sent_by_its_name_in_the_file(text, field):
    with pytest.raises(InvalidArgument) as refused:
        job_from_yaml(f"run: x\ngpus: 1\n{text}\n", BASE)
    assert [v.field for v in refused.value.violations] == [field]


def test_the_scheduler_s_names_of_fields_are_those_of_the_file():
    for path, name in {
        "gpu.any_of[0]": "gpu.any[0]",
        "nodes.min": "nodes.min",
        "placement[1].size": "place[1].size",
        "deadline_time": "deadline",
        "environment[A]": "environment[A]",
        "command": "run",
        "unknown": "unknown",
    }.items():
        assert name_in_file(ATTRIBUTES.values(), path) == name


def test_levels_are_numbered_as_in_the_contract():
    levels = Placement(8).schema()["additionalProperties"]["anyOf"][0]["enum"]
    for level in levels:
        spec = job_from_yaml(f"run: x\ngpus: 2\nplace: {{g: {level}}}\n", BASE).spec
        assert types_pb2.TopologyLevel.Name(spec.placement[0].level) == f"TOPOLOGY_LEVEL_{level.upper()}"


class TestReference:
    @pytest.mark.parametrize("kind", ["job", "model", "ray"])
    def test_the_full_example_of_the_page_is_a_good_file_that_names_every_field(self, kind):
        text = reference.page(kind).partition("```yaml\n")[2].partition("```")[0]
        read = {"job": job_from_yaml, "model": model_from_yaml, "ray": lambda text, _: ray_from_yaml(text)}
        read[kind](text, BASE)
        jsonschema.validate(load(text), reference.json_schema(kind))
        for field in reference.fields_of(kind):
            assert f"| `{field.file}` |" in reference.page(kind)

    def test_the_schema_takes_what_the_reader_takes(self):
        schema = reference.json_schema("job")
        jsonschema.Draft202012Validator.check_schema(schema)
        for text in ("run: x\ngpus: 1\ngpu: H200\n", "run: x\ngpus: 2\nplace: {a: {level: leaf, size: 2}}\n"):
            job_from_yaml(text, BASE)
            jsonschema.validate(yaml.safe_load(text), schema)

    @pytest.mark.parametrize(
        "text", ["gpus: -1", "gpus: 1\nnodes: {mim: 1}", "gpus: 1\nfoo: 2", "gpus: 1\nplace: {a: rack}"]
    )
    def test_the_schema_refuses_what_the_reader_refuses(self, text):
        with pytest.raises(InvalidArgument):
            job_from_yaml("run: x\n" + text, BASE)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load("run: x\n" + text), reference.json_schema("job"))

    def test_the_command_prints_one_field_all_fields_and_the_schema(self):
        def printed(*arguments):
            result = CliRunner().invoke(app, ["explain-field", *arguments])
            assert result.exit_code == 0, result.output
            return result.output

        assert "1 to 1000" in printed("checkpoint.keep")
        assert "H100-80GB" in printed("gpu")
        assert "stop_grace" in printed()
        assert json.loads(printed("--model", "--json-schema"))["required"] == ["model"]

    def test_an_unknown_field_is_refused_with_the_known_ones(self):
        with pytest.raises(InvalidArgument, match=r"checkpoint\.keep"):
            reference.find("job", "checkpoints")


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ('{memory: ">= 80 GB"}', {"min_memory_bytes": 80 * 10**9}),
        ("{share: 20 GB}", {"share_memory_bytes": 20 * 10**9}),
        ("{mig: 1g.18gb}", {"mig_profile": "1g.18gb"}),
        ("{any: [H200], mig: 20 GB}", {"any_of": ["H200"], "mig_memory_bytes": 20 * 10**9}),
    ],
)
def test_parts_of_gpus_are_told_from_whole_ones(gpu, expected):
    job = job_from_yaml(f"run: x\ngpus: 1\ngpu: {gpu}\n", BASE)
    assert job.spec.gpu == scheduler_pb2.GpuRequirement(**expected)
    check_spec(spec_of(job.spec), job.spec.ByteSize(), NOW)


@pytest.mark.parametrize(
    ("text", "field", "fix"),
    [
        ("gpu: {memory: 20 GB}", "gpu.memory", "write share: 20 GB instead"),
        ("gpu: {share: 0 GB}", "gpu.share", "for whole GPUs, leave it out"),
        ("gpu: {memory: 20000000000}", "gpu.memory", "'>= 20000000000'"),
        ("gpu: {mig: half}", "gpu.mig", "1g.18gb"),
        ("gpu: {mig: 20 GB, share: 20 GB}", "gpu.mig", "exclude each other"),
        ("gpu: {mig: 1g.18gb}\nlaunch: once", "gpu.mig", "launch: once"),
        ('gpu: {share: 20 GB, memory: ">= 80 GB"}', "gpu.memory", "leave it out"),
        ("gpu: {share: 20 GB}\nplace: {tensor: nvlink}", "place[0].level", "use node or a wider level"),
        ("gpu: {share: 20 GB}\nplace: {pipeline: {level: leaf, size: 1}}", "place[0].size", "leave size out"),
    ],
)
def test_what_is_ambiguous_or_not_possible_with_parts_of_gpus_is_refused_with_a_way_out(text, field, fix):
    with pytest.raises(InvalidArgument) as refused:
        job = job_from_yaml(f"run: x\ngpus: 2\n{text}\n", BASE)
        check_spec(spec_of(job.spec), job.spec.ByteSize(), NOW)
    found = [
        (name_in_file(JOB_FIELDS, one.field.removeprefix("job.spec.")), one.description)
        for one in refused.value.violations
    ]
    assert any(name == field and fix in text for name, text in found), found
