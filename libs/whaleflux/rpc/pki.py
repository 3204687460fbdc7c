"""The small certificate authority: short-lived identities for services, agents and people.

ECDSA P-256 throughout. Every certificate has one URI name, spiffe://{trust domain}/{role}/{name}, and one DNS name
made of it (`server_name`), which clients check instead of the host: so a stolen agent key cannot play the scheduler,
wherever it listens. Only the front door is known by its host names, because browsers and SDKs dial it.

A fleet has two authorities. The store's (trust domain `store.whaleflux`) signs for etcd, NATS and the services that dial them, so that
what admits a node or a person opens nothing there.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc.auth import DEFAULT_TRUST_DOMAIN, Identity
from whaleflux.rpc.tls_files import Tls, TlsFiles, write_private

__all__ = ["CertificateAuthority", "Tls", "TlsFiles", "write_private"]  # a module of its own for clients

STORE_TRUST_DOMAIN = f"store.{DEFAULT_TRUST_DOMAIN}"
CA_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(hours=24)
RENEW_BELOW = 1 / 3  # of the life is left


class Purpose(enum.Enum):
    """What a certificate may be shown for. Programs that check host names only must not take a client's for a server's."""

    BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
    CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)


def _belongs(key: bytes, chain: bytes) -> bool:
    public = load_pem_private_key(key, None).public_key()
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public.public_bytes(*spki) == x509.load_pem_x509_certificate(chain).public_key().public_bytes(*spki)


def server_name(role: str, name: str = "", trust_domain: str = DEFAULT_TRUST_DOMAIN) -> str:
    """The DNS name under which a certificate is known: scheduler.whaleflux, n1.onprem.agent.whaleflux, onprem.site.whaleflux."""
    label = role.replace("_", "-")
    if role == "site":
        label = f"{name}.site"
    if role == "agent":
        site, _, node = name.partition("/")
        label = f"{node}.{site}.agent"
    return f"{label}.{trust_domain}"


def new_key_and_request() -> tuple[bytes, bytes]:
    """A fresh private key (PKCS #8) and a signing request for it. Names are the authority's to give, not to ask for."""
    key_pem = _key_pem(ec.generate_private_key(ec.SECP256R1()))
    return key_pem, request_for(key_pem)


def request_for(key_pem: bytes) -> bytes:
    """A signing request that proves to hold this key."""
    key = load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # ours all are
    request = x509.CertificateSigningRequestBuilder().subject_name(_named("whaleflux")).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM)


class CertificateAuthority:
    """Signs identities of one trust domain. Its key belongs to inventory (or to `whaleflux up`) alone."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, trust_domain: str) -> None:
        self._certificate, self._key, self.trust_domain = certificate, key, trust_domain

    @classmethod
    def create(cls, now: datetime, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> CertificateAuthority:
        """A new root, valid for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _named(f"{trust_domain} root")
        builder = _builder(name, name, key.public_key(), now, now + CA_LIFETIME)
        usage = _key_usage(digital_signature=False, key_cert_sign=True)
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
                critical=False,
            )
        )
        return cls(builder.sign(key, hashes.SHA256()), key, trust_domain)

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> CertificateAuthority:
        """The authority that `certificate_pem` and `key_pem` were taken from."""
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = load_pem_private_key(key_pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not _belongs(key_pem, certificate_pem):
            raise InvalidArgument(FieldViolation("ca_key", "is not the EC key of the CA certificate"))
        return cls(certificate, key, _uri_names(certificate)[0].removeprefix("spiffe://"))

    @property
    def certificate_pem(self) -> bytes:
        """What everybody has to believe: the root, public."""
        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The root's private key; store it only where `certificate_pem`'s owner alone can read."""
        return _key_pem(self._key)

    def sign(
        self,
        request_pem: bytes,
        role: str,
        name: str,
        now: datetime,
        *,
        hosts: Sequence[str] = (),
        lifetime: timedelta = LEAF_LIFETIME,
        session: str = "",
        purpose: Purpose = Purpose.BOTH,
    ) -> bytes:
        """A certificate for the key in `request_pem`; every name in it is chosen here, none is taken from the request.

        `hosts` are DNS names or IP addresses by which it is dialled (front door, etcd, NATS); `session` is what the certificate came
        from (`auth.Identity`). Refuses a malformed
        request, one whose signature is wrong, and keys other than P-256.
        """
        identity = Identity.parse(Identity(role, name, self.trust_domain, session).uri)
        public = _requested_key(request_pem)
        builder = _builder(_named(f"{role}/{name}"[-64:]), self._certificate.subject, public, now, now + lifetime)
        names = [x509.UniformResourceIdentifier(identity.uri)]
        dns = [server_name(role, name, self.trust_domain), *hosts]
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True, key_cert_sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purpose.value), critical=False)
            .add_extension(issuer_key, critical=False)
            .add_extension(x509.SubjectAlternativeName([*names, *map(_host_name, dns)]), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def vouches_for(self, certificate_pem: bytes) -> bool:
        """Whether this authority has signed the certificate, which may have ended."""
        try:
            x509.load_pem_x509_certificate(certificate_pem).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def issue(
        self,
        role: str,
        name: str,
        now: datetime,
        *,
        hosts: Sequence[str] = (),
        lifetime: timedelta = LEAF_LIFETIME,
        session: str = "",
        purpose: Purpose = Purpose.BOTH,
    ) -> Tls:
        """Key and certificate in one step, where both ends are this process (`whaleflux up`, tests)."""
        key, request = new_key_and_request()
        chain = self.sign(request, role, name, now, hosts=hosts, lifetime=lifetime, session=session, purpose=purpose)
        return Tls(key, chain, self.certificate_pem)


def identity_of(chain_pem: bytes) -> Identity:
    """Whose certificate this is."""
    uris = _uri_names(x509.load_pem_x509_certificate(chain_pem))
    return Identity.parse(uris[0] if len(uris) == 1 else "")


def needs_renewal(chain_pem: bytes, now: datetime) -> bool:
    """Whether less than a third of the certificate's life is left."""
    return renewal_in_s(chain_pem, now) <= 0


def renewal_in_s(chain_pem: bytes, now: datetime) -> float:
    """Seconds until `needs_renewal`; negative when it is overdue."""
    certificate = x509.load_pem_x509_certificate(chain_pem)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (end - (end - start) * RENEW_BELOW - now).total_seconds()


def request_key_sha256(request_pem: bytes) -> bytes:
    """Fingerprint of the key that a signing request is for: SHA-256 of its SubjectPublicKeyInfo in DER. Raises ValueError, TypeError."""
    public = x509.load_pem_x509_csr(request_pem).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def expiry(chain_pem: bytes) -> datetime:
    """When the certificate ends, UTC."""
    return x509.load_pem_x509_certificate(chain_pem).not_valid_after_utc


def _requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(request_pem)
        valid = request.is_signature_valid
        public = request.public_key()
    except (ValueError, TypeError, InvalidSignature):
        raise InvalidArgument(FieldViolation("csr", "is not a PEM certificate signing request")) from None
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise InvalidArgument(FieldViolation("csr", "must be signed by its own ECDSA P-256 key"))
    return public


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - CLOCK_SKEW)
        .not_valid_after(end.astimezone(UTC))
    )


def _key_usage(*, digital_signature: bool, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _uri_names(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
