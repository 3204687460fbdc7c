"""What somebody logs in by, as text: `wfc.<id>.<secret>.<authority>` is a one-time code, `wft.` a token.

The last part is the SHA-256 of the fleet's authority: a machine that knows nothing of the fleet believes the right front door before
it shows the secret to anybody. The secret has 256 random bits, so that no slow hash is needed to keep it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import ssl
from dataclasses import dataclass

from whaleflux.names import is_ulid

CODE, TOKEN = "wfc", "wft"
MAX_TEXT = 160
_SECRET = re.compile("[A-Za-z0-9_-]{43}")  # 32 bytes in URL-safe base64 without padding


@dataclass(frozen=True, slots=True)
class Credential:
    """`kind` is CODE or TOKEN, `id` a ULID; `authority` the URL-safe base64 of a SHA-256."""

    kind: str
    id: str
    secret: str
    authority: str

    def __repr__(self) -> str:
        return f"Credential({self.kind}, {self.id}, ***)"

    @property
    def text(self) -> str:
        """As people and programs get it, once."""
        return f"{self.kind}.{self.id}.{self.secret}.{self.authority}"

    @property
    def secret_sha256(self) -> bytes:
        """What is kept of it."""
        return hashlib.sha256(self.secret.encode()).digest()


def new(kind: str, credential_id: str, authority_pem: bytes) -> Credential:
    """A fresh one of the fleet whose authority this is."""
    return Credential(kind, credential_id, secrets.token_urlsafe(32), fingerprint(authority_pem))


def parse(text: str) -> Credential | None:
    """The credential that `text` is; None for what has not its form."""
    kind, *rest = text.strip().split(".") if len(text) <= MAX_TEXT else [""]
    if kind not in {CODE, TOKEN} or len(rest) != 3:
        return None
    known, secret, authority = rest
    if not (is_ulid(known) and _SECRET.fullmatch(secret) and _SECRET.fullmatch(authority)):
        return None
    return Credential(kind, known, secret, authority)


def fingerprint(authority_pem: bytes) -> str:
    """SHA-256 of a certificate (DER), URL-safe base64 without padding. Raises ValueError for what is no PEM."""
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(authority_pem.decode())).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
