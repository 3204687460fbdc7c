"""Join tokens: a secret that admits one node to one site, once, for a while.

The text "<id>.<secret>" is shown once; kept are its id and the SHA-256 of the secret (the secret is 256 random bits,
so that no slow hash is needed). Using a token binds it to the node and the public key that used it: when the answer
was lost, the same node with the same key may ask again until the token ends, and nobody else ever.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unauthenticated
from whaleflux.names import ID_PATTERN
from whaleflux.reasons import ErrorReason

DEFAULT_TTL_S = 3600
MAX_TTL_S = 604_800
SECRET_CHARS = 43  # 32 bytes in URL-safe base64 without padding
MAX_TEXT = 128


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is kept. `used_by` is the node's full name, "" while unused; instants are UTC."""

    site: str
    secret_sha256: bytes
    expire_time: datetime
    used_by: str = ""
    key_sha256: bytes = b""
    node: str = ""  # the only one that it admits, its full name; "": any of the site


def lifetime(ttl_s: int) -> timedelta:
    """How long a token lives: 0 means an hour, at most a week."""
    if not 0 <= ttl_s <= MAX_TTL_S:
        raise InvalidArgument(FieldViolation("ttl_s", f"{ttl_s} is outside of 0 (for {DEFAULT_TTL_S}) to {MAX_TTL_S}"))
    return timedelta(seconds=ttl_s or DEFAULT_TTL_S)


def text_of(token_id: str, secret: str) -> str:
    """What the operator hands to the new node."""
    return f"{token_id}.{secret}"


def parse(text: str) -> tuple[str, str]:
    """Id and secret. What is not shaped like a token is refused like one that is unknown: nothing can be learnt."""
    token_id, _, secret = text.partition(".") if len(text) <= MAX_TEXT else ("", "", "")
    if not (ID_PATTERN.fullmatch(token_id) and len(secret) == SECRET_CHARS):
        raise refused()
    return token_id, secret


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def admits(token: Token, secret: str, node: str, key_sha256: bytes, now: datetime) -> bool:
    """Whether this use is the token's first (True: mark it used) or the repetition of a lost one (False).

    Raises Unauthenticated (TOKEN_REFUSED) for everybody else; the reason is the same whatever was wrong. A token counts five minutes
    longer than it says: the clock of whoever judges it may be ahead of the one that made it.
    """
    if not hmac.compare_digest(digest(secret), token.secret_sha256) or now >= token.expire_time + CLOCK_SKEW:
        raise refused()
    if not token.used_by:
        return True
    if token.used_by == node and hmac.compare_digest(token.key_sha256, key_sha256):
        return False
    raise refused()


def check_node(token: Token, node: str) -> None:
    """Refuses another node than the token names, which only who has the secret is told. Raises FailedPrecondition (WRONG_NODE)."""
    if token.node and token.node != node:
        raise FailedPrecondition(
            f"this join token admits {token.node} alone, not {node}; it was not used up: start the agent with "
            f"--node-id {names.last(token.node)}, or ask for another token (whaleflux token create --site {names.top(node)})",
            reason=ErrorReason.WRONG_NODE,
            metadata={"node": token.node, "expected": node},
        )


def check_named(site: str, node: str) -> None:
    """Refuses a node that is not of the token's site; "" names none."""
    if node and names.split(node, "sites", "nodes", field="node")[0] != names.last(site):
        raise InvalidArgument(FieldViolation("node", f"{node[:150]} is not of {site}; name a node of that site"))


def refused() -> Unauthenticated:
    """The one answer to any token that does not admit."""
    return Unauthenticated(
        "this join token is unknown, used or expired; ask an operator for a new one (whaleflux token create --site SITE)",
        reason=ErrorReason.TOKEN_REFUSED,
    )
