"""The server's configuration: readable by its owner alone, closed to injection, and accepted by the real server."""

import subprocess
from pathlib import Path

import pytest

from whaleflux.embedded import nats
from whaleflux.errors import Invalid

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"
APP = nats.User("app", "app-secret")


def hub(folder, **more):
    return nats.Hub(folder / "store", "127.0.0.1:4222", "127.0.0.1:8222", (APP,), **more)


def site(folder, **more):
    options = {"site": "a", "hub_url": "nats://a:leaf@127.0.0.1:7422", **more}
    return nats.Site(folder / "store", "127.0.0.1:4223", "127.0.0.1:8223", (APP,), **options)


def accepted(path, **environment):
    """Whether nats-server -t takes the file."""
    checked = subprocess.run(
        [nats.program(), "-t", "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=20,
        env=environment,
        check=False,
    )
    return checked.returncode == 0 or checked.stderr + checked.stdout


@pytest.mark.integration
def test_the_real_server_accepts_what_is_written(tmp_path):
    confined = nats.publishing_user("agent", "agent-secret", "wf.v1.a.>")
    leaves = {"leaf_address": "127.0.0.1:7422", "sites": (nats.User("a", "s1"), nats.User("b", "s2"))}
    texts = [
        nats.hub_config(hub(tmp_path)),
        nats.hub_config(hub(tmp_path, **leaves, fsync_always=True)),
        nats.hub_config(nats.Hub(tmp_path / "s", "127.0.0.1:1", "127.0.0.1:2", (APP, confined))),
        nats.site_config(site(tmp_path)),
    ]
    for text in texts:
        nats.write_config(tmp_path / "nats.conf", text)
        assert accepted(tmp_path / "nats.conf") is True


@pytest.mark.integration
@pytest.mark.parametrize("name", ["hub.conf", "site.conf"])
def test_the_real_server_accepts_the_files_for_production(tmp_path, name):
    environment = {
        "NATS_STORE": str(tmp_path), "NATS_APP_PASSWORD": "p1", "NATS_SYS_PASSWORD": "p2", "NATS_SITE_A_PASSWORD": "p3",
        "NATS_SITE_B_PASSWORD": "p4", "NATS_SITE": "site-a", "NATS_HUB_URL": "nats://site-a:p3@127.0.0.1:7422",
    }  # fmt: skip
    assert accepted(DEPLOY / name, **environment) is True


def test_secrets_are_for_the_owner_alone_and_never_on_the_command_line(tmp_path):
    path = tmp_path / "deep" / "nats.conf"
    nats.write_config(path, nats.hub_config(hub(tmp_path)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert "app-secret" in path.read_text()
    assert "app-secret" not in " ".join(nats.command(path))
    assert "app-secret" not in repr(hub(tmp_path))
    assert "leaf" not in repr(site(tmp_path))


@pytest.mark.parametrize("secret", ['a" }', "a\nb", "a\\", "a\x00"])
def test_a_value_that_would_break_out_of_its_quotes_is_refused(tmp_path, secret):
    bad = nats.Hub(tmp_path, "127.0.0.1:1", "127.0.0.1:2", (nats.User("app", secret),))
    with pytest.raises(Invalid):
        nats.hub_config(bad)


def test_a_site_needs_a_name_and_a_hub(tmp_path):
    with pytest.raises(Invalid):
        nats.site_config(site(tmp_path, site="a.b"))
    with pytest.raises(Invalid):
        nats.site_config(site(tmp_path, hub_url=""))


async def test_nobody_there_is_not_ready():
    assert not await nats.is_ready("127.0.0.1:1")
