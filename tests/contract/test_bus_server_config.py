"""The server's configuration: readable by its owner alone, closed to injection, and accepted by the real server."""

import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from whaleflux import bootstrap
from whaleflux.embedded import nats
from whaleflux.errors import InvalidArgument
from whaleflux.events import nats_config
from whaleflux.rpc.store_authority import new_authority
from whaleflux.rpc.tls_files import TlsFiles

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"
NOW = datetime.now(UTC)
APP = nats_config.User("app", "app-secret")


def hub(folder, **more):
    return nats_config.Hub(folder / "store", "127.0.0.1:4222", "127.0.0.1:8222", (APP,), **more)


def site(folder, **more):
    options = {"site": "a", "hub_url": "nats://a:leaf@127.0.0.1:7422", **more}
    return nats_config.Site(folder / "store", "127.0.0.1:4223", "127.0.0.1:8223", (APP,), **options)


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
    leaves = {"leaf_address": "127.0.0.1:7422", "sites": (nats_config.Leaf("a", "s1"), nats_config.Leaf("b-2", "s2"))}
    files = TlsFiles.under(tmp_path, "nats")
    files.save(new_authority(NOW).issue("nats", "1", NOW))
    certified = {"tls": files, "leaf_authority": files.roots}
    texts = [
        nats_config.hub_config(hub(tmp_path)),
        nats_config.hub_config(hub(tmp_path, **leaves, fsync_always=True)),
        nats_config.hub_config(
            replace(hub(tmp_path, **leaves, **certified), users=nats_config.service_users(["a", "b-2"]))
        ),
        nats_config.site_config(site(tmp_path)),
        nats_config.site_config(site(tmp_path, tls=files, hub_url="tls://127.0.0.1:7422", hub_authority=files.roots)),
    ]
    for text in texts:
        nats.write_config(tmp_path / "nats.conf", text)
        assert accepted(tmp_path / "nats.conf") is True


@pytest.mark.integration
@pytest.mark.parametrize("name", ["hub.conf", "site-a.conf"])
def test_the_real_server_accepts_the_files_for_deployments(tmp_path, name):
    bootstrap.write_identities(tmp_path, NOW, hosts=["h"], life=timedelta(days=1), sites=["site-a"])
    identity = tmp_path / ("nats" if name == "hub.conf" else "site-site-a")
    text = (DEPLOY / name).read_text().replace("/identity", str(identity)).replace('"/data"', json.dumps(str(tmp_path)))
    nats.write_config(tmp_path / "nats.conf", text)
    assert accepted(tmp_path / "nats.conf") is True
    assert "password" not in text


def test_secrets_are_for_the_owner_alone_and_never_on_the_command_line(tmp_path):
    path = tmp_path / "deep" / "nats.conf"
    nats.write_config(path, nats_config.hub_config(hub(tmp_path)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert "app-secret" in path.read_text()
    assert "app-secret" not in " ".join(nats.command(path))
    assert "app-secret" not in repr(hub(tmp_path))
    assert "leaf" not in repr(site(tmp_path))


@pytest.mark.parametrize("secret", ['a" }', "a\nb", "a\\", "a\x00"])
def test_a_value_that_would_break_out_of_its_quotes_is_refused(tmp_path, secret):
    bad = nats_config.Hub(tmp_path, "127.0.0.1:1", "127.0.0.1:2", (nats_config.User("app", secret),))
    with pytest.raises(InvalidArgument):
        nats_config.hub_config(bad)


def test_a_site_needs_a_name_and_a_hub(tmp_path):
    with pytest.raises(InvalidArgument):
        nats_config.site_config(site(tmp_path, site="a.b"))
    with pytest.raises(InvalidArgument):
        nats_config.site_config(site(tmp_path, hub_url=""))


async def test_nobody_there_is_not_ready():
    assert not await nats.is_ready("127.0.0.1:1")
