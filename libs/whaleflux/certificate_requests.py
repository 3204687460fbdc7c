"""Requests to cert-manager for what is not the cluster's to keep: a person's certificate. The key is made, and stays, with the person."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from whaleflux.rpc.auth import Identity
from whaleflux.rpc.pki import server_name


def certificate_request(identity: Identity, issuer: str, life: timedelta) -> tuple[bytes, dict[str, Any]]:
    """A fresh private key (PKCS #8) and the CertificateRequest of Kubernetes for it. Whoever may create one is whom it names."""
    key = ec.generate_private_key(ec.SECP256R1())
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, f"{identity.role}/{identity.name}"[-64:])
    names = [
        x509.UniformResourceIdentifier(identity.uri),
        x509.DNSName(server_name(identity.role, identity.name, identity.trust_domain)),
    ]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([common_name]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    manifest = {
        "apiVersion": "cert-manager.io/v1",
        "kind": "CertificateRequest",
        "metadata": {"name": f"{identity.role}-{identity.name}".lower(), "namespace": "whaleflux"},
        "spec": {
            "request": base64.b64encode(request.public_bytes(Encoding.PEM)).decode(),
            "issuerRef": {"group": "cert-manager.io", "kind": "Issuer", "name": issuer},
            "duration": f"{life // timedelta(hours=1)}h",
            "usages": ["digital signature", "client auth"],
        },
    }
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), manifest
