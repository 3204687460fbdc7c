"""Certificate requests, as far as inventory looks at them before the authority does."""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc.pki import request_key_sha256

MAX_REQUEST_BYTES = 8192


def certificate_key_sha256(certificate_pem: str) -> bytes:
    """Fingerprint of the key that a certificate of ours is for."""
    public = x509.load_pem_x509_certificate(certificate_pem.encode()).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def public_key_sha256(request_pem: str) -> bytes:
    """Fingerprint of the key that asks; what else is wrong with the request the authority says."""
    if len(request_pem) > MAX_REQUEST_BYTES:
        violation = f"has {len(request_pem)} characters; use at most {MAX_REQUEST_BYTES}"
        raise InvalidArgument(FieldViolation("certificate_request_pem", violation))
    try:
        return request_key_sha256(request_pem.encode())
    except (ValueError, TypeError):
        violation = "is not a PEM certificate signing request (PKCS #10)"
        raise InvalidArgument(FieldViolation("certificate_request_pem", violation)) from None
