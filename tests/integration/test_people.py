"""People through the real front door: codes, tokens, an OpenID provider; and what remains of them once they are disabled."""

import asyncio
import json
import os
import stat
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.oidc_device import device_provider
from tests.support.strangers import let_in
from tests.support.suite import running_suite
from whaleflux.cli import __main__ as program
from whaleflux.cli.state import GLOBAL
from whaleflux.context import Context
from whaleflux.errors import StatusError, Unauthenticated
from whaleflux.login.loopback import Loopback
from whaleflux.sdk.client import AsyncClient, Client
from whaleflux.v1 import checkpoint_pb2, health_pb2, identity_pb2, inventory_pb2, router_pb2, scheduler_pb2

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # of the mock's own parts
RUN = CliRunner()


@pytest.fixture(scope="module")
def provider():
    with device_provider() as made:
        yield made


@pytest.fixture(scope="module")
def suite(provider, tmp_path_factory):
    secret = tmp_path_factory.mktemp("oidc") / "secret"
    secret.write_text("of-a-program\n")  # the mock has no public clients
    settings = {
        "WHALEFLUX_OIDC_CLIENT_SECRET_FILE": str(secret),
        "WHALEFLUX_OIDC_ISSUER": provider.issuer,
        "WHALEFLUX_OIDC_CLIENT_ID": "whaleflux",
        "WHALEFLUX_OIDC_DOMAINS": "example.org",
    }
    with running_suite(settings=settings) as running:
        yield running


class Machine:
    """Somebody's machine: a home of its own."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.home = home
        self.variables = {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
            **variables,
        }

    def run(self, *argv: str, code: int = 0, typed: str = "") -> str:
        """What a command prints (both streams), which ends with `code`."""
        GLOBAL.context, kept = "", os.getcwd()
        self.home.mkdir(exist_ok=True)
        os.chdir(self.home)
        try:
            done = RUN.invoke(program.app, [*argv], env=self.variables, input=typed)
        finally:
            os.chdir(kept)
        if isinstance(done.exception, StatusError):
            assert code, done.exception
            return str(done.exception)
        assert done.exit_code == code, done.output + repr(done.exception)
        return done.stdout if "json" in argv else done.output

    def context_file(self) -> Path:
        (found,) = (self.home / "config" / "whaleflux" / "logins").glob("*/context.json")
        return found


@pytest.fixture
def admin(suite, tmp_path):
    return Machine(tmp_path / "admin", WHALEFLUX_CONTEXT=str(suite.context_file))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "home")


def added(admin, *argv):
    """The words of the command that logs somebody in."""
    (line,) = [line for line in admin.run("user", "add", *argv).splitlines() if line.startswith("whaleflux login")]
    return line.split()[1:]


def test_a_newcomer_logs_in_by_the_command_that_was_printed(suite, admin, machine):
    login = added(admin, "ann")
    forged = [*login[:-1], login[-1][:-43] + "A" * 43]  # the code of another fleet: nothing of it is shown to this one
    assert "another fleet" in machine.run(*forged, code=1)
    assert "you are user/ann" in machine.run(*login)
    who = json.loads(machine.run("whoami", "-o", "json"))
    assert (who["subject"], who["name"], who["method"], who["server"]) == (
        "user/ann",
        "users/ann",
        "code",
        suite.context.server,
    )
    assert "used" in machine.run(*login, code=1)
    kept = machine.context_file().parent
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept.iterdir() if file.name != ".lock"} == {0o600}
    assert machine.run("user", "ls", "-o", "name").split() == ["users/ann"]
    assert "may not call" in machine.run("user", "add", "eve", code=1)
    _is_renewed_when_due(machine, who["session"])
    machine.run("logout", "-y")
    assert not kept.exists()
    assert "whaleflux login" in machine.run("whoami", code=1)


def _is_renewed_when_due(machine, session):
    file = machine.context_file()
    due = json.loads(file.read_text()) | {"renew_after": "1"}
    before = Path(due["cert"]).read_bytes()
    file.write_text(json.dumps(due))
    assert json.loads(machine.run("whoami", "-o", "json"))["session"] == session
    made = Path(due["cert"]).read_bytes()
    file.write_text(
        json.dumps(due | {"expires": "2"})
    )  # as after a week asleep: by its key, since no handshake takes the certificate
    assert json.loads(machine.run("whoami", "-o", "json"))["session"] == session
    assert before != made != Path(due["cert"]).read_bytes() and float(Context.load(file).renew_after) > time.time()


async def calls(client: AsyncClient):
    """One of each service."""
    yield "inventory", client.inventory.ListNodes(inventory_pb2.ListNodesRequest(), timeout=30)
    yield "health", client.health.ListNodeHealth(health_pb2.ListNodeHealthRequest(), timeout=30)
    yield "scheduler", client.scheduler.ListQueues(scheduler_pb2.ListQueuesRequest(), timeout=30)
    yield "checkpoint", client.checkpoint.ListCheckpoints(checkpoint_pb2.ListCheckpointsRequest(), timeout=30)
    yield "router", client.router.ListModels(router_pb2.ListModelsRequest(), timeout=30)


async def test_what_admits_people_and_nodes_opens_neither_the_store_nor_the_bus(suite, tmp_path):
    assert await let_in(suite, tmp_path) == {"etcd": {"a service"}, "NATS": {"a service"}}


async def test_who_is_disabled_is_refused_everywhere_within_a_second(suite, admin, machine):
    login = await asyncio.to_thread(added, admin, "bob")
    await asyncio.to_thread(machine.run, *login)
    async with AsyncClient.from_context(machine.context_file()) as bob, suite.client() as root:
        async for _, call in calls(bob):
            await call
        begun, watches = [], []
        for stream in (
            bob.inventory.WatchNodes(inventory_pb2.WatchNodesRequest()),
            bob.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest()),
            bob.health.WatchNodeHealth(health_pb2.WatchNodeHealthRequest()),
        ):
            begun.append(asyncio.Event())
            watches.append(asyncio.create_task(_to_its_end(stream, begun[-1])))
        await asyncio.wait_for(asyncio.gather(*(one.wait() for one in begun)), 45)
        await root.identity.DisableUser(identity_pb2.DisableUserRequest(name="users/bob"), timeout=30)
        began = time.monotonic()
        reasons = [error.reason for error in await asyncio.wait_for(asyncio.gather(*watches), 30)]
        async for name, call in calls(bob):
            with pytest.raises(Unauthenticated) as refused:
                await call
            assert refused.value.reason == "DISABLED", name
        assert time.monotonic() - began < 5  # a second, and what a busy machine adds
        assert reasons == ["DISABLED"] * 3


async def _to_its_end(stream, begun):
    """What ends it; `begun` once something came."""
    try:
        async with stream as changes:
            async for _ in changes:
                begun.set()
    except StatusError as error:
        return error
    return None


def test_a_program_needs_two_variables(suite, admin, tmp_path):
    admin.run("user", "add", "ci", "--service-account")
    secret = admin.run("tokens", "create", "--user", "ci", "--role", "viewer", "--queue", "default").splitlines()[0]
    ci = Machine(tmp_path / "ci", WHALEFLUX_TOKEN=secret, WHALEFLUX_SERVER=suite.context.server)
    who = json.loads(ci.run("whoami", "-o", "json"))
    assert (who["subject"], who["queues"], who["method"]) == ("viewer/ci", ["queues/default"], "token")
    (folder,) = (tmp_path / "ci" / "cache" / "whaleflux" / "tokens").iterdir()
    made = (folder / "client.crt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ci.variables.items():
            patch.setenv(name, value)
        with Client.from_context() as client:
            assert client.identity.WhoAmI(identity_pb2.WhoAmIRequest(), timeout=30).subject == "viewer/ci"
    assert (folder / "client.crt").read_bytes() == made and stat.S_IMODE(folder.stat().st_mode) == 0o700
    (token,) = json.loads(admin.run("tokens", "ls", "--user", "ci", "-o", "json"))
    assert "secret" not in token
    admin.run("tokens", "rm", token["name"], "-y")
    assert "was ended by admin/" in ci.run("whoami", code=1)


def test_people_log_in_at_their_provider(suite, provider, admin, machine):
    provider.person("sub-1", email="Carol@example.org", email_verified=True, groups=["ml"], name="Carol")
    login = ("login", "--server", suite.context.server, "--ca-file", suite.context.ca)
    assert "deny" in machine.run(*login, code=1)
    provider.confirms = "sub-1"
    said = machine.run(*login)
    assert "WXYZ" in said and "you are user/carol" in said
    who = json.loads(machine.run("whoami", "-o", "json"))
    assert (who["subject"], who["groups"], who["method"]) == ("user/carol", ["ml"], "oidc")
    provider.person("sub-2", email="carol@example.org", email_verified=True)
    provider.confirms = "sub-2"
    refused = machine.run(*login, code=1)
    assert "sub-1" in refused and "sub-2" in refused
    shown = json.loads(admin.run("user", "show", "carol", "-o", "json"))
    assert (shown["oidc_subject"], shown["oidc_issuer"]) == ("sub-1", provider.issuer)


def test_people_log_in_in_their_browser(suite, provider, machine, monkeypatch):
    """Authorization code with PKCE, against the mock itself."""
    provider.person("sub-3", email="dan@example.org", email_verified=True)
    login = ("login", "--server", suite.context.server, "--ca-file", suite.context.ca)
    monkeypatch.setattr("webbrowser.open", lambda url: threading.Thread(target=_enters, args=(url, "sub-3")).start())
    assert "you are user/dan" in machine.run(*login, "--browser")
    provider.without_device = True  # then it is the only way, and the person opens what is shown
    told = []

    def note(text):
        told.append(text)
        if "/oauth2/authorize?" in text:
            threading.Thread(target=_enters, args=(text.split()[-1], "sub-3")).start()

    monkeypatch.setattr("whaleflux.cli.output.note", note)
    machine.run(*login)
    assert any("you are user/dan" in text for text in told)


def _enters(url: str, sub: str) -> None:
    form = urllib.parse.urlencode({"sub": sub}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, form), timeout=45) as page:  # and is led to the loopback
        assert b"Done" in page.read()


def test_first_contact_without_a_code_asks_the_person(suite, machine):
    refused = machine.run("login", "--server", suite.context.server, code=2)
    assert "-y" in refused  # nobody can be asked here


def test_what_else_comes_to_the_loopback_is_turned_away():
    with Loopback() as loopback:
        urls = [loopback.redirect_uri + "?code=forged&state=other", loopback.redirect_uri + "?code=c&state=s"]
        caller = threading.Thread(target=lambda: [_opened(url) for url in urls])
        caller.start()
        found = loopback.wait(45, "s")
        caller.join()
        assert found == {"code": "c", "state": "s"}


def _opened(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status
    except OSError:
        return 0
