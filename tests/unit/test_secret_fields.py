"""Secrets in files: what may be said of them, and variables whose names say that they belong there."""

from pathlib import Path

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.manifests import job_checks
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.secret_values import SecretUse, advice, look_like_secrets
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux.v1 import scheduler_pb2 as pb


def job(secrets, more=""):
    return job_from_yaml(f"run: x\ngpus: 1\nsecrets: {secrets}\n{more}", Path("/")).spec


def test_a_secret_becomes_a_variable_a_file_or_both():
    spec = job(
        "[hf-token, {name: a, env: B, version: 3}, {name: c, file: key.json}, {name: d, file: .netrc, env: NETRC}]"
    )
    assert spec_of(spec).secrets == (
        SecretUse("secrets/hf-token", 0, "HF_TOKEN"),
        SecretUse("secrets/a", 3, "B"),
        SecretUse("secrets/c", 0, "", "key.json"),
        SecretUse("secrets/d", 0, "NETRC", ".netrc"),
    )
    assert [use.as_text for use in spec_of(spec).secrets] == [True, True, False, False]
    assert spec_of(job("hf-token")).secrets == spec_of(job("[secrets/hf-token]")).secrets


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        ("[{name: a, value: hunter2}]", "whaleflux secrets add"),
        ("[A]", "names of secrets"),
        ("[1st]", "not a digit first"),
        ("[a, a]", "variable A is that of a already"),
        ("[a, {name: b, env: A}]", "variable A is that of a already"),
        ("[{name: a, file: x}, {name: b, file: x}]", "file x is that of a already"),
        ("[{name: a, file: ../x}]", "without folders"),
        ("[{name: a, file: ..}]", "without folders"),
        ("[{name: a, version: 0}]", "from 1"),
        ("[{name: a, env: RANK}]", "set for each rank by the agent"),
        ("[{name: a, env: WHALEFLUX_X}]", "set for each rank by the agent"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can_and_without_a_value(secrets, said):
    with pytest.raises(InvalidArgument, match=said) as refused:
        job(secrets)
    assert "hunter2" not in refused.value.message
    with pytest.raises(InvalidArgument, match="environment too"):
        job("[a]", "environment: {A: b}\n")


def test_the_contract_is_checked_too():
    uses = [
        {},
        {"secret": "a"},
        {"secret": "secrets/a", "variable": "A=B"},
        {"secret": "secrets/a", "file": "/etc/x"},
        {"secret": "secrets/a", "file": "x", "version": -1},
    ]
    spec = pb.JobSpec(command=["x"], gpus=1, secrets=[pb.SecretUse(**use) for use in uses])
    wrong = [one.field for one in job_checks.violations(spec_of(spec))]
    assert wrong == [
        "secrets[0].secret", "secrets[0]", "secrets[1].secret", "secrets[1]", "secrets[2].variable", "secrets[3].file", "secrets[4].version",
    ]  # fmt: skip
    many = pb.JobSpec(
        command=["x"], gpus=1, secrets=[pb.SecretUse(secret="secrets/a", file=f"f{i}") for i in range(65)]
    )
    assert [one.field for one in job_checks.violations(spec_of(many))] == ["secrets"]


def test_a_model_takes_them_as_well():
    text = "model: m\nengine:\n  run: serve --port {port}\n  secrets: [hf-token]\n"
    assert model_from_yaml(text, Path("/")).model.engine.secrets[0].variable == "HF_TOKEN"
    with pytest.raises(InvalidArgument, match="environment too"):
        model_from_yaml(text + "  environment: {HF_TOKEN: x}\n", Path("/"))


def test_variables_that_look_like_secrets():
    secret = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "DB_PASSWORD", "PGPASSWORD", "SSH_PRIVATE_KEY",
              "GITHUB_TOKEN", "OPENAI_KEY", "client_secret", "MYSQL_ROOT_PASSWORD_2", "GCP_CREDENTIALS"]  # fmt: skip
    plain = [
        "MAX_TOKENS",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "NCCL_DEBUG",
        "LR",
        "SECRETARY",
        "MONKEY",
        "TOKENIZER",
        "PASS_ID",
    ]
    assert look_like_secrets((name, "x") for name in secret + plain) == secret
    assert not look_like_secrets(
        [("GOOGLE_APPLICATION_CREDENTIALS", "/mnt/key.json"), ("HF_TOKEN", ""), ("A_TOKEN", "$B")]
    )
    said = advice(["HF_TOKEN"])
    assert "secrets: [hf-token]" in said and not advice([])
