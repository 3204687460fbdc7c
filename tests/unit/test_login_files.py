"""Which context a program works by, and where a login is kept."""

import contextlib
import fcntl
import json
import os
import threading
from dataclasses import asdict, replace

import pytest

from whaleflux import names
from whaleflux.cli import login_commands
from whaleflux.context import Context
from whaleflux.contexts import Contexts
from whaleflux.errors import InvalidArgument
from whaleflux.login import by_token, credential, current, signing_in
from whaleflux.v1 import identity_pb2

PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
TOKEN = credential.new(credential.TOKEN, names.ulid(1), PEM).text
NEVER = str(2**40)  # not before the year 36000
CODE = credential.new(credential.CODE, names.ulid(1), PEM).text


def context(folder, **more):
    at = {name: str(folder / name) for name in ("ca", "cert", "key")}
    return Context(server="h:7443", **at, **more)


def write(folder, made):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "context.json").write_text(json.dumps(asdict(made)))


def test_a_credential_is_read_back_and_shows_no_secret():
    parsed = credential.parse(f" {TOKEN}\n")
    assert parsed.text == TOKEN and parsed.kind == "wft" and parsed.secret not in repr(parsed)
    assert signing_in.shown(TOKEN).token == TOKEN and signing_in.shown(CODE).code == CODE
    for wrong in (
        "",
        "wft",
        TOKEN.replace("wft", "wfx"),
        TOKEN + "x",
        TOKEN[:-1],
        TOKEN + "." + TOKEN,
        "wft." + "x" * 500,
    ):
        assert credential.parse(wrong) is None and signing_in.shown(wrong) is None


@pytest.mark.parametrize(
    "variables", [{}, {by_token.SERVER: "h:1"}, {by_token.TOKEN: TOKEN}, {by_token.TOKEN: CODE, by_token.SERVER: "h:1"}]
)
def test_what_is_missing_beside_a_token_is_said(variables):
    with pytest.raises(InvalidArgument, match=r"whaleflux tokens create.*WHALEFLUX_SERVER"):
        by_token.context(variables)


def test_a_token_that_has_logged_in_does_not_again_until_it_is_due(tmp_path):
    variables = {by_token.TOKEN: TOKEN, by_token.SERVER: "h:7443", "XDG_CACHE_HOME": str(tmp_path)}
    assert by_token.kept(variables) is None
    (folder,) = (tmp_path / "whaleflux" / "tokens").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and TOKEN not in str(folder)
    write(folder, context(folder, renew_after=NEVER))
    assert by_token.kept(variables) == by_token.context(variables) == Context.load(folder / "context.json")
    write(folder, context(folder, renew_after="1"))
    assert by_token.kept(variables) is None
    folder.chmod(0o755)  # somebody else may read it: not used
    write(folder, context(folder, renew_after=NEVER))
    assert by_token.kept(variables) is None


def test_a_named_context_comes_before_a_token(tmp_path, monkeypatch):
    write(tmp_path, context(tmp_path))
    monkeypatch.setenv("WHALEFLUX_TOKEN", TOKEN)
    monkeypatch.delenv("WHALEFLUX_CONTEXT", raising=False)
    assert current.by_variables() and not current.by_variables("prod")
    with pytest.raises(InvalidArgument, match="WHALEFLUX_SERVER"):
        current.known()
    assert current.current(str(tmp_path / "context.json")).server == "h:7443"
    monkeypatch.setenv("WHALEFLUX_CONTEXT", str(tmp_path / "context.json"))
    assert current.known().server == "h:7443"


def test_a_certificate_that_is_not_due_or_of_no_login_asks_nobody(tmp_path):
    plain = context(tmp_path)
    assert signing_in.renewed(plain) is plain
    login = replace(plain, renew_after="1000", expires="2000")
    assert signing_in.renewed(login, now_s=999) is login
    write(tmp_path, replace(login, renew_after="1500"))  # another program has renewed it
    assert signing_in.renewed(login, now_s=1200).renew_after == "1500"


def test_who_cannot_renew_where_the_login_lies_goes_on_while_it_is_good(tmp_path):
    gone = replace(context(tmp_path / "logged-out"), renew_after="1000", expires="2000")
    assert signing_in.renewed(gone, now_s=1200) is gone
    with pytest.raises(InvalidArgument, match="log in again: whaleflux login"):
        signing_in.renewed(gone, now_s=1900)
    write(tmp_path, replace(context(tmp_path), renew_after="soon"))
    with pytest.raises(InvalidArgument, match="is not a context file"):
        Context.load(tmp_path / "context.json")


class Door:
    """Gives everybody who logs in a certificate, and says so."""

    server, name = "h:7443", "frontdoor.whaleflux"

    def __init__(self):
        self.asked = threading.Event()

    @contextlib.contextmanager
    def channel(self):
        yield self

    def unary_unary(self, *_, **__):
        def call(request, timeout):
            self.asked.set()
            return identity_pb2.LoginResponse(certificate_pem="c", authority_pem="a")

        return call


def test_commands_that_log_in_side_by_side_leave_one_key_with_its_certificate(tmp_path):
    """Both write three files: one of them at a time."""
    door, folder = Door(), tmp_path / "tokens"
    folder.mkdir()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the other command
        thread = threading.Thread(target=signing_in.log_in, args=(door, folder, signing_in.shown(TOKEN)))
        thread.start()
        assert door.asked.wait(10)
        thread.join(0.2)
        assert thread.is_alive() and not (folder / "client.key").exists()
        fcntl.flock(held, fcntl.LOCK_UN)
        thread.join(10)
    assert (folder / "client.key").stat().st_mode & 0o777 == 0o600 and Context.load(folder / signing_in.FILE)


def test_a_login_at_a_front_door_keeps_its_name_and_takes_no_other_fleets(tmp_path):
    contexts = Contexts(tmp_path)
    write(tmp_path / "logins" / "h", context(tmp_path))
    contexts.link("h", tmp_path / "logins" / "h" / "context.json")
    assert contexts.login_at("h:7443") == "h" and contexts.login_at("other:7443") == ""
    contexts.check_is_login_or_free("h")
    contexts.check_is_login_or_free("new")
    write(tmp_path / "up", context(tmp_path))
    contexts.link("local", tmp_path / "up" / "context.json")
    with pytest.raises(InvalidArgument, match="another fleet's"):
        contexts.check_is_login_or_free("local")
    os.remove(tmp_path / "logins" / "h" / "context.json")
    assert contexts.login_at("h:7443") == ""


@pytest.mark.parametrize("code", ["x", CODE[:-1], "wfc."])
def test_a_code_that_was_cut_is_refused_before_a_fleet_is_looked_for(code):
    with pytest.raises(InvalidArgument, match="neither a code nor a token"):
        login_commands.login(server="127.0.0.1:1", code=code)
