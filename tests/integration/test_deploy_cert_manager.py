"""deploy/kubernetes/overlays/cert-manager: what cert-manager would issue is what services, etcd, NATS and Envoy accept.

There is no cert-manager here: each Certificate is issued as its reference says, from the specification alone, and the files of a Pod are
laid out as its volumes say. https://cert-manager.io/docs/reference/api-docs/
"""

import contextlib
import shutil
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.support.deploy_files import DEPLOY, of_kind, pods, rendered
from whaleflux.rpc import roles
from whaleflux.rpc.auth import Identity
from whaleflux.rpc.pki import STORE_TRUST_DOMAIN, CertificateAuthority, TlsFiles, identity_of, server_name
from whaleflux.rpc.store_authority import ETCD_MEMBER
from whaleflux.services import ROLES, SERVICES

OVERLAY = "overlays/cert-manager"
FOLDER = DEPLOY / "kubernetes" / "components" / "cert-manager"
NOW = datetime.now(UTC) - timedelta(minutes=1)
pytestmark = pytest.mark.integration
KNOWN = {
    "secretName", "issuerRef", "isCA", "commonName", "duration", "renewBefore", "privateKey", "usages", "uris", "dnsNames",
}  # fmt: skip
USAGES = {"server auth": ExtendedKeyUsageOID.SERVER_AUTH, "client auth": ExtendedKeyUsageOID.CLIENT_AUTH}


def specs():
    found = [
        d for name in ("issuers", "certificates") for d in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())
    ]
    return {d["metadata"]["name"]: d["spec"] for d in found if d["kind"] == "Certificate"}, [
        d for d in found if d["kind"] == "Issuer"
    ]


SPECS, ISSUERS = specs()
LEAVES = {name: spec for name, spec in SPECS.items() if not spec.get("isCA")}


def life(text):
    return timedelta(hours=int(text.removesuffix("h")))


def issued(spec, authority=None):
    """The Secret that cert-manager makes of a Certificate: tls.crt, tls.key, ca.crt. `authority` is certificate and key; none: its own."""
    assert spec["privateKey"]["algorithm"] == "ECDSA"
    assert spec["privateKey"]["size"] == 256
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, spec["commonName"])] if "commonName" in spec else []
    )
    names = [x509.UniformResourceIdentifier(uri) for uri in spec.get("uris", [])]
    names += [x509.DNSName(name) for name in spec.get("dnsNames", [])]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority[0].subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + life(spec["duration"]))
        .add_extension(x509.SubjectAlternativeName(names), critical=not subject.rdns)
        .add_extension(x509.BasicConstraints(ca=bool(spec.get("isCA")), path_length=None), critical=True)
    )
    if extended := [USAGES[usage] for usage in spec["usages"] if usage in USAGES]:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    made = builder.sign(authority[1] if authority else key, hashes.SHA256())
    root = authority[0] if authority else made
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {"tls.crt": made.public_bytes(Encoding.PEM), "tls.key": pem, "ca.crt": root.public_bytes(Encoding.PEM)}, (
        made,
        key,
    )


@pytest.fixture(scope="module")
def secrets():
    """Every Secret by its name, as after the installation."""
    made, roots = {}, {}
    for name, spec in SPECS.items():
        if spec.get("isCA"):
            made[spec["secretName"]], roots[name.removesuffix("-ca")] = issued(spec)
    for spec in LEAVES.values():
        made[spec["secretName"]], _ = issued(spec, roots[spec["issuerRef"]["name"]])
    made["whaleflux-secrets-keys"] = {"secrets.keys": b"k"}
    return made


def laid_out(template, volume, secrets, folder):
    """The files of a volume of Secrets, as the kubelet writes them."""
    (told,) = [v for v in template["spec"]["volumes"] if v["name"] == volume]
    whole = told.get("secret")
    sources = (
        [{"name": whole["secretName"], **whole}]
        if whole
        else [source["secret"] for source in told["projected"]["sources"]]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        held = secrets[source["name"]]
        for item in source.get("items") or [{"key": key, "path": key} for key in held]:
            (folder / item["path"]).write_bytes(held[item["key"]])
    return folder


@pytest.fixture(scope="module")
def placed(secrets, tmp_path_factory):
    """Folder of each process' /identity, by its name."""
    root = tmp_path_factory.mktemp("identity")
    parts = dict(pods(rendered(OVERLAY)))
    names = [*(s.host for s in SERVICES), "frontdoor", "etcd", "nats"]
    return {name: laid_out(parts[name], "identity", secrets, root / name) for name in names}


@pytest.mark.parametrize("name", LEAVES)
class TestCertificate:
    def test_it_says_nothing_that_cert_manager_does_not_know(self, name):
        assert LEAVES[name].keys() <= KNOWN
        assert LEAVES[name]["issuerRef"].keys() == {"group", "kind", "name"}
        assert {"kind": LEAVES[name]["issuerRef"]["kind"], "name": LEAVES[name]["issuerRef"]["name"]} in [
            {"kind": issuer["kind"], "name": issuer["metadata"]["name"]} for issuer in ISSUERS
        ]
        assert set(LEAVES[name]["usages"]) <= {"digital signature", *USAGES}

    def test_it_names_who_services_take_it_for(self, name):
        (uri,) = LEAVES[name]["uris"]
        identity = Identity.parse(uri)
        assert (
            identity.trust_domain
            == Identity.parse(f"{SPECS[LEAVES[name]['issuerRef']['name'] + '-ca']['uris'][0]}/admin/x").trust_domain
        )
        assert server_name(identity.role, identity.name, identity.trust_domain) in LEAVES[name]["dnsNames"]
        assert identity.role not in roles.HUMANS | {roles.AGENT}, (
            "keys of people and nodes have no business in the cluster"
        )

    def test_its_key_changes_and_it_is_renewed_when_services_would_say_so(self, name):
        spec = LEAVES[name]
        assert spec["privateKey"]["rotationPolicy"] == "Always"
        assert abs(life(spec["renewBefore"]) * 3 - life(spec["duration"])) < timedelta(hours=3)


def test_everybody_has_one_and_nobody_two():
    uris = [spec["uris"][0] for spec in LEAVES.values()]
    assert len(set(uris)) == len(uris)
    of = {
        domain: {Identity.parse(u).role for u in uris if Identity.parse(u).trust_domain == domain}
        for domain in ("whaleflux", STORE_TRUST_DOMAIN)
    }
    assert of["whaleflux"] == {*ROLES, roles.FRONTDOOR, roles.SCRAPER}
    assert of[STORE_TRUST_DOMAIN] == {*ROLES, roles.ETCD, roles.NATS}


def shake_hands(server, client, name):
    """A TLS handshake in memory with a certificate on each side, of their own authorities; ssl.SSLError when one refuses."""
    contexts = []
    for files, kind in ((server, ssl.PROTOCOL_TLS_SERVER), (client, ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(kind)
        context.load_cert_chain(files.chain, files.key)
        context.load_verify_locations(files.roots)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        contexts[0].wrap_bio(to_server, to_client, server_side=True),
        contexts[1].wrap_bio(to_client, to_server, server_hostname=name),
    ]
    for side in sides[::-1] * 3:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return dict(sides[0].getpeercert()["subjectAltName"])["URI"]


def of_fleet(folder):
    return TlsFiles.under(folder, "service")


def of_store(folder):
    return TlsFiles(folder / "store.key", folder / "store.crt", folder / "store-ca.crt")


class TestFiles:
    def test_every_process_finds_its_own_under_the_names_that_it_reads(self, placed):
        for service in SERVICES:
            own = (
                identity_of(of_fleet(placed[service.host]).load().chain),
                identity_of(of_store(placed[service.host]).load().chain),
            )
            assert own == (Identity(service.role, "1"), Identity(service.role, "1", STORE_TRUST_DOMAIN))
        assert identity_of(of_fleet(placed["frontdoor"]).load().chain).role == roles.FRONTDOOR
        assert {path.name for path in placed["nats"].iterdir()} == {
            "service.crt",
            "service.key",
            "ca.crt",
            "fleet-ca.crt",
        }

    @pytest.mark.parametrize("role", ROLES)
    def test_services_and_the_front_door_accept_one_another(self, placed, role):
        server = of_fleet(placed[role.replace("_", "-")])
        for other in (*(s.host for s in SERVICES), "frontdoor"):
            assert (
                shake_hands(server, of_fleet(placed[other]), server_name(role))
                == identity_of(of_fleet(placed[other]).load().chain).uri
            )
        with pytest.raises(ssl.SSLError):
            shake_hands(server, of_fleet(placed["frontdoor"]), "etcd")
        with pytest.raises(ssl.SSLError):
            shake_hands(server, of_store(placed["scheduler"]), server_name(role))

    def test_the_store_accepts_services_and_members_and_nobody_of_the_fleet(self, placed):
        etcd, nats = of_fleet(placed["etcd"]), of_fleet(placed["nats"])
        for name in ("etcd", "etcd-0.etcd-members", "etcd-2.etcd-members", ETCD_MEMBER):
            assert shake_hands(etcd, of_store(placed["inventory"]), name)
        assert shake_hands(etcd, etcd, "etcd-1.etcd-members")
        assert shake_hands(nats, of_store(placed["scheduler"]), "nats")
        for server, name in ((etcd, "etcd"), (nats, "nats")):
            with pytest.raises(ssl.SSLError):
                shake_hands(server, of_fleet(placed["scheduler"]), name)

    def test_a_services_certificate_at_the_store_plays_no_server(self, placed):
        with pytest.raises(ssl.SSLError):
            shake_hands(
                of_store(placed["scheduler"]),
                of_store(placed["inventory"]),
                server_name("scheduler", "", STORE_TRUST_DOMAIN),
            )

    def test_people_dial_the_front_door_by_its_name(self, placed):
        front = of_fleet(placed["frontdoor"])
        for name in ("frontdoor.whaleflux", "frontdoor.whaleflux.svc"):
            assert shake_hands(front, of_fleet(placed["scheduler"]), name)


def reads_key(template, secret):
    """Whether a volume of the Pod holds the key in that Secret."""
    for volume in template["spec"].get("volumes", []):
        whole = volume.get("secret", {})
        sources = [
            {"name": whole.get("secretName"), **whole},
            *(s["secret"] for s in volume.get("projected", {}).get("sources", [])),
        ]
        for source in (source for source in sources if source["name"] == secret):
            if "tls.key" in {item["key"] for item in source.get("items", [{"key": "tls.key"}])}:
                return True
    return False


class TestAdmission:
    def test_inventory_signs_for_agents_with_the_fleets_key_where_they_are_admitted(self, secrets, tmp_path):
        template = dict(pods(rendered(OVERLAY)))["inventory"]
        told = {e["name"]: e.get("value") for e in template["spec"]["containers"][0]["env"]}
        folder = laid_out(template, "fleet-ca", secrets, tmp_path)
        assert (told["WHALEFLUX_CA_CERT"], told["WHALEFLUX_CA_KEY"]) == ("/fleet-ca/ca.crt", "/fleet-ca/ca.key")
        authority = CertificateAuthority.load((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())
        assert identity_of(authority.issue("agent", "onprem/n1", NOW).chain) == Identity("agent", "onprem/n1")

    def test_without_that_component_nobody_but_cert_manager_has_the_key(self, tmp_path):
        """The same overlay without its last component."""
        copy = tmp_path / "deploy"
        shutil.copytree(DEPLOY, copy, ignore=shutil.ignore_patterns("docker", "observability", "compose"))
        file = copy / "kubernetes" / OVERLAY / "kustomization.yaml"
        told = yaml.safe_load(file.read_text())
        assert told["components"].pop() == "../../components/agents-by-inventory"
        file.write_text(yaml.safe_dump(told))
        found = rendered(file.parent)
        assert "agent" not in dict(pods(found))
        assert not any(reads_key(template, "whaleflux-fleet-ca") for _, template in pods(found))
        assert reads_key(dict(pods(rendered(OVERLAY)))["inventory"], "whaleflux-fleet-ca")
        assert "WHALEFLUX_CA_KEY" not in str(dict(pods(found))["inventory"])

    def test_secrets_that_pods_mount_are_made_by_somebody(self, secrets):
        found = rendered(OVERLAY)
        mounted = set()
        for _, template in pods(found):
            for volume in template["spec"].get("volumes", []):
                mounted |= {s["secret"]["name"] for s in volume.get("projected", {}).get("sources", [])}
                mounted |= {volume["secret"]["secretName"]} if "secret" in volume else set()
        assert mounted - set(secrets) == {"whaleflux-join-tokens"}
        assert set(secrets) - mounted == {"whaleflux-scraper", "whaleflux-store-ca"}
        assert not of_kind(found, "Secret")


def test_the_public_certificate_takes_the_place_of_the_front_doors(tmp_path):
    copy = tmp_path / "deploy"
    shutil.copytree(DEPLOY, copy, ignore=shutil.ignore_patterns("docker", "observability", "compose"))
    for overlay in ("overlays/production", OVERLAY):
        file = copy / "kubernetes" / overlay / "kustomization.yaml"
        told = yaml.safe_load(file.read_text())
        told["components"].append("../../components/public-certificate")
        file.write_text(yaml.safe_dump(told))
        secrets = {"whaleflux-public": {"tls.crt": b"crt", "tls.key": b"key"}}
        folder = laid_out(
            dict(pods(rendered(file.parent)))["frontdoor"], "public", secrets, tmp_path / overlay.replace("/", "-")
        )
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "service.crt": b"crt",
            "service.key": b"key",
        }
