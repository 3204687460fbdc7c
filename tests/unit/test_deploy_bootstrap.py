"""What a deployment needs before its first start: made once, renewed in time, told to nobody who does not need it."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from whaleflux import bootstrap
from whaleflux.context import Context
from whaleflux.rpc.pki import CertificateAuthority, expiry, identity_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
EVERYBODY = (*bootstrap.SERVICES, "frontdoor", "admin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("identity")
    bootstrap.write_identities(made, NOW, hosts=["fleet.example.org", "10.0.0.1"], life=WEEK, server="fleet:7443")
    return made


@pytest.mark.parametrize("role", EVERYBODY)
def test_everybody_has_an_identity_of_its_role(folder, role):
    chain = bootstrap.files_of(folder, role).load().chain
    assert identity_of(chain).role == role
    assert expiry(chain) == NOW + WEEK


def test_the_authority_is_one_that_inventory_can_sign_with(folder):
    certificate, key = ((folder / "authority" / name).read_bytes() for name in ("ca.crt", "ca.key"))
    authority = CertificateAuthority.load(certificate, key)
    assert authority.certificate_pem == bootstrap.files_of(folder, "scheduler").load().roots
    assert {path.parent.name for path in folder.rglob("ca.key")} == {"authority"}


def test_files_are_for_their_owner_alone(folder):
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_a_context_file_leads_to_the_front_door(folder):
    context = Context.load(folder / "admin" / "context.json")
    assert (context.server, context.inference_url) == ("fleet:7443", "http://fleet:8080/v1")
    assert json.loads((folder / "admin" / "context.json").read_text())["key"].endswith("admin/service.key")


def test_passwords_survive_as_variables_of_nats_and_of_a_shell(folder):
    lines = (folder / "nats" / "nats.env").read_text().splitlines()
    values = [line.partition("=")[2] for line in lines]
    assert len(set(values)) == 4
    assert all(value.isalnum() and value[0].isalpha() for value in values)


def test_again_renews_certificates_and_keeps_the_rest(tmp_path):
    bootstrap.write_identities(tmp_path, NOW, hosts=["h"], life=WEEK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bootstrap.write_identities(tmp_path, NOW + WEEK, hosts=["h"], life=WEEK)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"service.crt", "service.key"}
    assert expiry(bootstrap.files_of(tmp_path, "inventory").load().chain) == NOW + 2 * WEEK


def test_renewal_is_due_when_a_third_is_left_or_something_is_missing(tmp_path):
    assert bootstrap.due(tmp_path, NOW)
    bootstrap.write_identities(tmp_path, NOW, hosts=["h"], life=timedelta(days=6))
    assert not bootstrap.due(tmp_path, NOW + timedelta(days=3.9))
    assert bootstrap.due(tmp_path, NOW + timedelta(days=4.1))
    (tmp_path / "admin" / "service.crt").unlink()
    assert bootstrap.due(tmp_path, NOW)


def test_secrets_of_kubernetes_hold_one_part_each(folder):
    secrets = {s["metadata"]["name"]: s["data"] for s in bootstrap.kubernetes_secrets(folder)}
    assert set(secrets["whaleflux-health-monitor"]) == {"ca.crt", "service.crt", "service.key", "service.yaml"}
    assert set(secrets["whaleflux-authority"]) == {"ca.crt", "ca.key"}
    assert "NATS_APP_PASSWORD" in secrets["whaleflux-nats"]
