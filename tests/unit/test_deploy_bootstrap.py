"""What a deployment needs before its first start: made once, renewed in time, told to nobody who does not need it."""

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

from whaleflux import bootstrap, services
from whaleflux.context import Context
from whaleflux.errors import InvalidArgument
from whaleflux.rpc.auth import Identity
from whaleflux.rpc.pki import CertificateAuthority, expiry, identity_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
EVERYBODY = (*services.ROLES, "frontdoor", "admin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("identity")
    bootstrap.write_identities(
        made, NOW, hosts=["fleet.example.org", "10.0.0.1"], life=WEEK, server="fleet:7443", sites=["a"]
    )
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
    assert {path.parent.name for path in folder.rglob("ca.key")} == {"authority", "store-authority"}


def test_files_are_for_their_owner_alone(folder):
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_a_context_file_leads_to_the_front_door(folder):
    context = Context.load(folder / "admin" / "context.json")
    assert (context.server, context.inference_url) == ("fleet:7443", "https://fleet:8080/v1")
    assert json.loads((folder / "admin" / "context.json").read_text())["key"].endswith("admin/service.key")


def test_what_opens_etcd_and_nats_comes_from_an_authority_that_signs_for_services_alone(folder):
    roots = (folder / "store-authority" / "ca.crt").read_bytes()
    fleet = (folder / "authority" / "ca.crt").read_bytes()
    for role in services.ROLES:
        shown = bootstrap.store_files_of(folder, role).load()
        certificate = x509.load_pem_x509_certificate(shown.chain)
        assert (identity_of(shown.chain).role, shown.roots) == (role, roots)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(roots))
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [x509.OID_CLIENT_AUTH], "it dials, and plays neither etcd nor NATS"
    signed = {
        part.name: identity_of(bootstrap.files_of(folder, part.name).load().chain)
        for part in folder.iterdir()
        if (part / "service.crt").exists() and (part / "ca.crt").read_bytes() == roots
    }
    assert {name: who.trust_domain for name, who in signed.items()} == dict.fromkeys(
        ("etcd", "nats", "backup"), "store.whaleflux"
    )
    assert (folder / "nats" / "fleet-ca.crt").read_bytes() == (folder / "site-a" / "ca.crt").read_bytes() == fleet
    assert (folder / "site-a" / "store-ca.crt").read_bytes() == roots


def test_no_password_is_left_anywhere(folder):
    assert not [path for path in folder.rglob("*") if path.suffix in (".env", ".yaml")]


def test_again_renews_certificates_and_keeps_the_rest(tmp_path):
    bootstrap.write_identities(tmp_path, NOW, hosts=["h"], life=WEEK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bootstrap.write_identities(tmp_path, NOW + WEEK, hosts=["h"], life=WEEK)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"service.crt", "service.key", "store.crt", "store.key"}
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
    own = {"ca.crt", "service.crt", "service.key"}
    assert set(secrets["whaleflux-health-monitor"]) == {*own, "store-ca.crt", "store.crt", "store.key"}
    assert set(secrets["whaleflux-etcd"]) == set(secrets["whaleflux-scraper"]) == own
    assert set(secrets["whaleflux-nats"]) == {*own, "fleet-ca.crt"}
    assert set(secrets["whaleflux-authority"]) == {"ca.crt", "ca.key", "secrets.keys"}
    assert not {"whaleflux-store-authority", "whaleflux-site-a", "whaleflux-admin"} & set(secrets)


def test_keys_that_no_process_in_the_cluster_reads_stay_where_they_were_made(folder):
    (folder / "tokens").mkdir()
    (folder / "tokens" / "node-1").write_text("a-join-token")
    kept = [(folder / "admin" / "service.key").read_bytes(), b"a-join-token"]
    secrets = {s["metadata"]["name"]: s["data"] for s in bootstrap.kubernetes_secrets(folder)}
    values = {name: [base64.b64decode(value) for value in data.values()] for name, data in secrets.items()}
    assert not any(key in value for of in values.values() for value in of for key in kept)
    authority = (folder / "authority" / "ca.key").read_bytes()
    assert [name for name, of in values.items() if authority in of] == ["whaleflux-authority"]


def test_a_folder_that_is_not_whole_makes_no_secrets(tmp_path):
    with pytest.raises(InvalidArgument, match="identities"):
        bootstrap.kubernetes_secrets(tmp_path)


class TestRequest:
    """A person's certificate where cert-manager has the authority: the key is made here and stays here."""

    def run(self, *arguments):
        return CliRunner().invoke(bootstrap.app, ["request", *map(str, arguments)])

    def test_the_request_names_the_person_and_holds_no_key(self, tmp_path):
        made = self.run("--folder", tmp_path / "ann", "--name", "ann", "--server", "fleet:7443", "--days", "1")
        assert made.exit_code == 0, made.output
        manifest = yaml.safe_load(made.output)
        request = x509.load_pem_x509_csr(base64.b64decode(manifest["spec"]["request"]))
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert Identity.parse(uri) == Identity("admin", "ann")
        assert manifest["spec"]["duration"] == "24h"
        key = (tmp_path / "ann" / "service.key").read_bytes()
        assert load_pem_private_key(key, None).public_key() == request.public_key()
        assert "PRIVATE" not in str(base64.b64decode(manifest["spec"]["request"]))
        assert (tmp_path / "ann" / "service.key").stat().st_mode & 0o777 == 0o600
        assert Context.load(tmp_path / "ann" / "context.json").server == "fleet:7443"

    def test_a_part_of_the_control_plane_is_no_person(self, tmp_path):
        made = self.run("--folder", tmp_path / "x", "--name", "x", "--server", "f:1", "--role", "scheduler")
        assert isinstance(made.exception, InvalidArgument)
        assert not (tmp_path / "x").exists()
