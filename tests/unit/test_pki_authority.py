"""The small authority: what it signs, what it refuses to sign, and how identities lie on disk."""

import os
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from whaleflux.errors import InvalidArgument, Unauthenticated
from whaleflux.rpc import pki
from whaleflux.rpc.auth import Identity

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CA = pki.CertificateAuthority.create(NOW)


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


class TestCertificates:
    def test_one_has_its_identity_its_server_name_and_both_uses(self):
        tls = CA.issue("agent", "onprem/n1", NOW)
        certificate = x509.load_pem_x509_certificate(tls.chain)
        names = extension(certificate, x509.SubjectAlternativeName)
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://whaleflux/agent/onprem/n1"]
        assert names.get_values_for_type(x509.DNSName) == ["n1.onprem.agent.whaleflux"]
        usages = set(extension(certificate, x509.ExtendedKeyUsage))
        assert usages == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        assert extension(certificate, x509.BasicConstraints).ca is False
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(tls.roots))

    def test_hosts_are_dns_names_or_addresses(self):
        tls = CA.issue("frontdoor", "1", NOW, hosts=["flux.example", "10.1.2.3"])
        names = extension(x509.load_pem_x509_certificate(tls.chain), x509.SubjectAlternativeName)
        assert names.get_values_for_type(x509.DNSName) == ["frontdoor.whaleflux", "flux.example"]
        assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]

    def test_it_lives_for_a_day_and_tolerates_late_clocks(self):
        certificate = x509.load_pem_x509_certificate(CA.issue("scheduler", "1", NOW).chain)
        assert certificate.not_valid_after_utc == NOW + timedelta(hours=24)
        assert certificate.not_valid_before_utc == NOW - pki.CLOCK_SKEW

    def test_names_asked_for_in_the_request_are_not_given(self):
        key = ec.generate_private_key(ec.SECP256R1())
        wish = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://whaleflux/admin/me")])
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(wish, critical=False)
        chain = CA.sign(request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), "agent", "onprem/n1", NOW)
        assert pki.identity_of(chain) == Identity("agent", "onprem/n1")

    @pytest.mark.parametrize("request_", [b"", b"garbage", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
    def test_a_malformed_request_is_refused(self, request_):
        with pytest.raises(InvalidArgument, match="csr"):
            CA.sign(request_, "agent", "onprem/n1", NOW)

    @pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
    def test_other_keys_are_refused(self, key):
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        with pytest.raises(InvalidArgument, match="P-256"):
            CA.sign(request.public_bytes(Encoding.PEM), "agent", "onprem/n1", NOW)

    @pytest.mark.parametrize(("role", "name"), [("agent", "n1"), ("agent", "../n1"), ("wizard", "x"), ("user", "a b")])
    def test_an_identity_that_would_not_be_believed_is_not_signed(self, role, name):
        with pytest.raises(Unauthenticated):
            CA.issue(role, name, NOW)

    def test_the_authority_survives_being_stored(self):
        again = pki.CertificateAuthority.load(CA.certificate_pem, CA.key_pem)
        assert again.trust_domain == "whaleflux"
        chain = again.issue("user", "ann", NOW).chain
        x509.load_pem_x509_certificate(chain).verify_directly_issued_by(
            x509.load_pem_x509_certificate(CA.certificate_pem)
        )

    def test_another_authoritys_key_is_refused(self):
        with pytest.raises(InvalidArgument, match="ca_key"):
            pki.CertificateAuthority.load(CA.certificate_pem, pki.CertificateAuthority.create(NOW).key_pem)

    def test_the_root_signs_no_further_authorities(self):
        root = x509.load_pem_x509_certificate(CA.certificate_pem)
        assert extension(root, x509.BasicConstraints).path_length == 0

    def test_another_trust_domain_has_other_names(self):
        other = pki.CertificateAuthority.create(NOW, "corp.example")
        assert pki.identity_of(other.issue("health_monitor", "1", NOW).chain).trust_domain == "corp.example"
        assert pki.server_name("health_monitor", trust_domain="corp.example") == "health-monitor.corp.example"


class TestFiles:
    def test_keys_are_readable_by_their_owner_alone(self, tmp_path):
        files = pki.TlsFiles.under(tmp_path / "tls", "scheduler")
        before = os.umask(0)
        try:
            files.save(CA.issue("scheduler", "1", NOW))
        finally:
            os.umask(before)
        for path in (files.key, files.chain, files.roots):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert sorted(path.name for path in files.key.parent.iterdir()) == ["ca.crt", "scheduler.crt", "scheduler.key"]

    def test_what_was_saved_is_loaded(self, tmp_path):
        files, tls = pki.TlsFiles.under(tmp_path, "a"), CA.issue("user", "ann", NOW)
        files.save(tls)
        assert files.load() == tls

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InvalidArgument, match=r"tls_key: cannot read .*a\.key: No such file"):
            pki.TlsFiles.under(tmp_path, "a").load()

    def test_a_pair_that_does_not_match_is_refused(self, tmp_path):
        files = pki.TlsFiles.under(tmp_path, "a")
        files.save(CA.issue("user", "ann", NOW))
        pki.write_private(files.key, CA.issue("user", "ann", NOW).key)
        with pytest.raises(InvalidArgument, match="is not the key of"):
            files.load()

    def test_a_failed_write_leaves_the_old_content_and_no_litter(self, tmp_path):
        path = tmp_path / "x.key"
        pki.write_private(path, b"old")
        with pytest.raises(TypeError):
            pki.write_private(path, "text")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_replaced_file_changes_the_stamp(self, tmp_path):
        files = pki.TlsFiles.under(tmp_path, "a")
        tls = CA.issue("user", "ann", NOW)
        files.save(tls)
        stamp = files.stamp()
        assert files.stamp() == stamp
        pki.write_private(files.chain, tls.chain)
        assert files.stamp() != stamp

    def test_a_key_does_not_reach_a_log_by_its_repr(self):
        assert "PRIVATE" not in repr(CA.issue("user", "ann", NOW))


class TestRenewal:
    def test_it_is_due_when_a_third_of_the_life_is_left(self):
        chain = CA.issue("user", "ann", NOW, lifetime=timedelta(hours=24) - pki.CLOCK_SKEW).chain
        assert not pki.needs_renewal(chain, NOW + timedelta(hours=15))
        assert pki.needs_renewal(chain, NOW + timedelta(hours=16))
