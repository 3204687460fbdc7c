"""`whaleflux secrets`: where a value comes from, and where it never does."""

import contextlib
import json

import pytest
from typer.testing import CliRunner

from whaleflux.cli import secret_commands
from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import secrets_pb2 as pb

RUN = CliRunner()


class Service:
    """Answers like SecretService, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def _secret(self, name="secrets/hf-token"):
        made = pb.Secret(name=name, owner="user/ann", team="groups/nlp", queues=["queues/a"])
        made.versions.add(version=2, size_bytes=7, creator="user/ann", key_id="k-1")
        return made

    def CreateSecret(self, request, timeout):
        self.asked.append(request)
        return self._secret()

    UpdateSecret = CreateSecret

    def GetSecret(self, request, timeout):
        return self._secret(request.name)

    def ListSecrets(self, request, timeout):
        return pb.ListSecretsResponse(secrets=[self._secret()])

    def DeleteSecret(self, request, timeout):
        self.asked.append(request)

    def RewrapSecrets(self, request, timeout):
        yield pb.RewrapSecretsResponse(total=2)
        yield pb.RewrapSecretsResponse(total=2, done=2, rewrapped=1, failed=["secrets/lost"], key_id="k-2")


@pytest.fixture
def service(monkeypatch):
    found = Service()
    client = type("Client", (), {"secrets": found})()
    monkeypatch.setattr(secret_commands, "fleet", lambda: contextlib.nullcontext(client))
    return found


def run(*words, input=None, code=0):
    done = RUN.invoke(app, ["secrets", *words], input=input)
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def test_a_value_comes_from_a_pipe_or_a_file(service, tmp_path):
    run("add", "hf-token", "--team", "nlp", "--queue", "a", "--queue", "queues/b", input="canary\n")
    (made,) = service.asked
    assert (made.secret_id, made.value, made.secret.team) == ("hf-token", b"canary", "groups/nlp")
    assert list(made.secret.queues) == ["queues/a", "queues/b"] and made.request_id
    pem = b"-----BEGIN\nx\n"
    (tmp_path / "key").write_bytes(pem)
    run("rotate", "secrets/hf-token", "--from-file", str(tmp_path / "key"))
    assert service.asked[-1].value == pem and service.asked[-1].secret.name == "secrets/hf-token"
    run("rotate", "hf-token", "--from-file", "-", input="canary")
    assert service.asked[-1].value == b"canary"


def test_of_one_line_the_newline_goes_and_nothing_else():
    kept = [b"a", b"a b ", b"a\nb\n", b"\n\n", b"\0\n", b""]
    assert [secret_commands.without_newline(value) for value in kept] == [*kept[:-3], b"\n\n", b"\0\n", b""]
    assert secret_commands.without_newline(b"a\n") == secret_commands.without_newline(b"a\r\n") == b"a"


@pytest.mark.parametrize(
    "words", [("add", "hf-token", "canary"), ("rotate", "hf-token", "canary", "x"), ("add", "hf-token=canary")]
)
def test_a_value_on_the_command_line_is_refused_without_being_repeated(service, words):
    with pytest.raises(InvalidArgument, match="not taken from the command line") as refused:
        RUN.invoke(app, ["secrets", *words], catch_exceptions=False)
    assert "canary" not in refused.value.message and not service.asked


def test_a_value_that_is_empty_or_too_large_is_refused(service, tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    for words, given in (
        (("add", "a"), ""),
        (("add", "a"), "\n"),
        (("add", "a", "--from-file", str(tmp_path / "large")), None),
    ):
        with pytest.raises(InvalidArgument, match="1 byte to 64 KiB"):
            RUN.invoke(app, ["secrets", *words], input=given, catch_exceptions=False)
    with pytest.raises(InvalidArgument, match="cannot read"):
        RUN.invoke(app, ["secrets", "add", "a", "--from-file", str(tmp_path / "absent")], catch_exceptions=False)
    assert not service.asked


def test_what_is_shown_is_never_a_value(service):
    assert "hf-token" in run("ls") and "hf-token" in run()
    (listed,) = json.loads(run("ls", "-o", "json"))
    assert listed["versions"][0]["key_id"] == "k-1"
    shown = run("show", "hf-token")
    assert "user/ann" in shown and "nlp" in shown
    assert "value" not in json.dumps(json.loads(run("show", "hf-token", "-o", "json")))


def test_whom_it_is_shared_with_is_set_and_taken_back(service):
    run("set", "hf-token", "--team", "none", "--queue", "all")
    assert list(service.asked[-1].update_mask.paths) == ["team", "queues"]
    assert (service.asked[-1].secret.team, list(service.asked[-1].secret.queues)) == ("", [])
    with pytest.raises(InvalidArgument, match="nothing to change"):
        RUN.invoke(app, ["secrets", "set", "hf-token"], catch_exceptions=False)


def test_a_rewrap_names_what_it_could_not_open_and_fails_then(service):
    assert "secrets/lost" in run("rewrap", code=1)
    assert json.loads(run("rewrap", "-o", "json", code=1).partition("}")[0] + "}")["failed"] == ["secrets/lost"]


def test_files_with_secrets_in_clear_are_valid_and_say_so(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("run: x\ngpus: 1\nenvironment: {HF_TOKEN: canary}\n")
    said = RUN.invoke(app, ["validate", str(file)]).output
    assert "secrets: [hf-token]" in said and "canary" not in said
    assert "canary" not in RUN.invoke(app, ["validate", str(file), "-o", "json"]).output
