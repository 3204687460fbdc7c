"""What `validate` refuses is what the scheduler refuses: one core, by the names of the file here, by those of the contract there."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux.v1 import scheduler_pb2
from whaleflux_scheduler.core.validate import check_spec

ELASTIC = "run: x\ngpus: 4\ncheckpoint: {every: 9}\nelastic: "
BASE, NOW = Path("/base"), datetime(2026, 1, 1, tzinfo=UTC)


def refused(text, parse=job_from_yaml):
    with pytest.raises(InvalidArgument) as error:
        parse(text, BASE)
    return {violation.field: violation.description for violation in error.value.violations}


@pytest.mark.parametrize(
    ("text", "field", "word"),
    [
        ("run: []\ngpus: 1", "run", "give what starts one rank"),
        ("run: ''\ngpus: 1", "run", "no command"),
        ("gpus: 1", "run", "is empty"),
        ("run: x\ngpus: 4\nnodes: {min: 3, max: 2}", "nodes.max", "below nodes.min"),
        ("run: x\ngpus: 2\nnodes: {min: 3}", "nodes.min", "use at most 2"),
        ("run: x\ngpus: 1\ndeadline: 2020-01-01T00:00Z", "deadline", "is over"),
        ("run: x\ngpus: 1\nrequire_local_data: true", "require_local_data", "needs datasets"),
        ("run: x\ngpus: 1\ndata: a\ndata_by_rank: b", "data_by_rank[0]", "which data does not name"),
        (
            "run: x\ngpus: 1\ndata: a\ndata_by_rank: a\nrequire_local_data: true",
            "data_by_rank",
            "leave one of them out",
        ),
        (
            "run: torchrun x\ngpus: 8",
            "run",
            "in each of 8 ranks, which starts processes of its own there; write launch: once, or remove torchrun",
        ),
        ("run: [torchrun, x]\ngpus: 1", "run", "launch: once"),
        ("run: mpirun x\ngpus: 8\nlaunch: once", "run", "nodes: {max: 1}"),
        ("run: x\ngpus: 1\nimage: i\nsetup: pip install x", "setup", "build it into the image"),
        ("run: x\ngpus: 1\nsetup: torchrun x", "setup", "start it in `run`"),
        ("run: x\ngpus: 1\nlaunch: twice", "launch", "per_rank, once"),
        (ELASTIC + "{max: 8}", "elastic.min", "is missing"),
        (ELASTIC + "{min: 8}", "elastic.min", "use at most 4"),
        (ELASTIC + "{min: 1, max: 2}", "elastic.max", "use at least 4"),
        (ELASTIC + "{min: 3, max: 8, step: 4}", "elastic.min", "no multiple of elastic.step (4); use 4"),
        (ELASTIC + "{min: 2, step: 3}", "gpus", "use 3"),
        ("run: x\ngpus: 4\nelastic: {min: 2}", "elastic.resumes", "checkpoint: {every: N}"),
        (ELASTIC + "{min: 2}\nkind: service", "elastic.min", "replicas"),
        (ELASTIC + "{min: 2}\ngpu: {share: 10 GB}", "elastic.min", "whole GPUs"),
        (
            ELASTIC + "{min: 2}\nplace: {tensor: {level: nvlink, size: 2}}",
            "place[0].size",
            "does not divide elastic.step (1)",
        ),
        (ELASTIC + "{min: 2}\nnodes: {min: 3}", "nodes.min", "elastic.min is 2"),
        (ELASTIC + "{min: 2, speeds: {2: fast}}", "elastic.speeds", "a speed above 0"),
        (ELASTIC + "{min: 2, speeds: {}}", "elastic.speeds", "1 to 64 speeds"),
        ("run: x\ngpus: 0\ncheckpoint: {every: 9}\nelastic: {min: 1}", "elastic.min", "use at most 0"),
    ],
)
def test_a_bad_job_file_is_refused_without_a_fleet(text, field, word):
    assert word in refused(text)[field]


@pytest.mark.parametrize("text", ["run: torchrun x\ngpus: 8\nlaunch: once", "run: mpirun x\ngpus: 8\nlaunch: once\nnodes: {max: 1}",
                                  "run: x\ngpus: 1\nimage: i\nlaunch: once\nsetup: pip install x",
                                  "run: x\ngpus: 4\nelastic: {min: 2, max: 8, step: 2, resumes: true}\nplace: {t: {level: nvlink, size: 2}}"])  # fmt: skip
def test_good_ones_pass_here_and_there(text):
    spec = job_from_yaml(text, BASE).spec
    check_spec(spec_of(spec), spec.ByteSize(), NOW)


def test_the_scheduler_refuses_the_same_of_other_clients():
    spec = scheduler_pb2.JobSpec(command=["torchrun", "x"], gpus=2)
    with pytest.raises(InvalidArgument) as error:
        check_spec(spec_of(spec), spec.ByteSize(), NOW)
    assert [v.field for v in error.value.violations] == ["job.spec.command"]


@pytest.mark.parametrize(
    ("text", "field", "word"),
    [
        ("run: vllm serve x", "engine.run", "{port}"),
        ("url: [http://h:1]\n  run: x {port}", "engine", "not both"),
        ("run: a {port} && b\n  args: [c]", "engine.args", "single command"),
    ],
)
def test_a_model_that_could_never_serve_is_refused_without_a_fleet(text, field, word):
    assert word in refused(f"model: m\nengine:\n  {text}\n", model_from_yaml)[field]


@pytest.mark.parametrize("run", ["serve --port {port}", "serve --port $PORT", "PORT=$PORT serve", "[serve, '{port}']"])
def test_a_model_says_where_it_listens(run):
    assert model_from_yaml(
        f"model: m\nengine: {{run: {run!r}}}\n".replace("'[", "[").replace("]'", "]").replace('"', ""), BASE
    )


def test_more_words_of_a_model_s_command_stand_behind_its_script():
    model = model_from_yaml("model: m\nengine:\n  run: serve --port {port}\n  args: [--name, a b]\n", BASE).model
    assert list(model.engine.command)[-1] == "serve --port {port} --name 'a b'"


class TestEnvironment:
    def values(self, lines):
        return dict(job_from_yaml(f"run: x\ngpus: 1\nenvironment:\n{lines}\n", BASE).spec.environment)

    @pytest.mark.parametrize(
        ("written", "value"),
        [("1.10", "1.10"), ("010", "010"), ("yes", "yes"), ("True", "True"), ("2026-01-01", "2026-01-01"), ("12:30:00", "12:30:00"),
         ("1e3", "1e3"), ("0x1F", "0x1F"), ("''", ""), ("'{\"a\": [1]}'", '{"a": [1]}'), ("größe ☃", "größe ☃"), ('"a\\nb"', "a\nb"), ('"\\t"', "\t")],
    )  # fmt: skip
    def test_a_value_is_the_text_that_is_written(self, written, value):
        assert self.values(f"  A: {written}") == {"A": value}

    def test_a_key_of_several_lines(self):
        assert self.values("  KEY: |\n    -----BEGIN KEY-----\n    abc\n    -----END KEY-----") == {
            "KEY": "-----BEGIN KEY-----\nabc\n-----END KEY-----\n"
        }

    @pytest.mark.parametrize(
        ("line", "field", "word"),
        [
            ("  A:", "environment.A", 'write ""'),
            ("  A: null", "environment.A", 'write ""'),
            ("  A: [1]", "environment.A", "a list"),
            ("  A: {b: 1}", "environment.A", "JSON"),
            ('  A: "x\\0y"', "environment[A]", "NUL"),
            (f"  A: {'x' * 70_000}", "environment[A]", "70000 bytes; at most 65536"),
            ("\n".join(f"  A{i}: {'x' * 60_000}" for i in range(3)), "environment", "in all"),
            ("  1A: x", "environment[1A]", "letters"),
            ("  PET_NNODES: 2", "environment[PET_NNODES]", "by the agent"),
            ('  A: "\\ud800"', "environment.A", "surrogate"),
        ],
    )
    def test_what_is_wrong_names_its_variable(self, line, field, word):
        assert word in refused(f"run: x\ngpus: 1\nenvironment:\n{line}\n")[field]


@pytest.mark.parametrize("written", ["3.10", "010", "1_000", "0x10", "1.0"])
def test_numbers_where_text_is_wanted_are_taken_as_they_are_written(written):
    spec = job_from_yaml(f"run: [python, {written}]\ngpus: 1\nimage: {written}\n", BASE).spec
    assert (list(spec.command), spec.image) == (["python", written], written)
