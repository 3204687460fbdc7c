"""How a secret's value is sealed: AES-256-GCM with a key of its own, which the keys outside of the store wrap. Pure.

What is sealed is bound to where it belongs (name, uid, version, owner): a record that somebody copies to another place of the store
does not open there. Who may use it (team, queues) may change without a new value; that is proven by a seal of its own with the same
key. Random bytes come from the caller. Nothing here tells an older state of a whole record from the newest one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

DATA_KEY_BYTES = 32
NONCE_BYTES = 12  # NIST SP 800-38D, 8.2
_VALUE, _POLICY, _KEY = b"whaleflux secret value 1", b"whaleflux secret policy 1", b"whaleflux secret key 1"


class Unsealable(Exception):  # named for what it says
    """It is not what was sealed for this place, or by this key."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value belongs. `owner` is a subject ("user/ann")."""

    name: str
    uid: str
    version: int
    owner: str


def seal(value: bytes, data_key: bytes, nonce: bytes, place: Place) -> bytes:
    """The nonce, and the value as only `data_key` opens it at `place`."""
    return nonce + AESGCM(data_key).encrypt(nonce, value, _joined(_VALUE, *_words(place)))


def unseal(sealed: bytes, data_key: bytes, place: Place) -> bytes:
    """The value. Raises Unsealable."""
    return _opened(sealed, data_key, _joined(_VALUE, *_words(place)))


def policy_seal(data_key: bytes, place: Place, team: str, queues: Sequence[str]) -> bytes:
    """Proves who may use the value, and in which queues."""
    key = hmac.digest(data_key, _POLICY, hashlib.sha256)
    parts = [word.encode() for word in (team, *sorted(queues))]
    return hmac.digest(key, _joined(_POLICY, *_words(place), *parts), hashlib.sha256)


def check_policy(found: bytes, data_key: bytes, place: Place, team: str, queues: Sequence[str]) -> None:
    """Raises Unsealable where team or queues are not those that were set."""
    if not hmac.compare_digest(found, policy_seal(data_key, place, team, queues)):
        raise Unsealable


def wrap(data_key: bytes, key: bytes, nonce: bytes, context: bytes) -> bytes:
    """The nonce, and a data key as only `key` opens it for this `context`."""
    return nonce + AESGCM(key).encrypt(nonce, data_key, _joined(_KEY, context))


def unwrap(wrapped: bytes, key: bytes, context: bytes) -> bytes:
    """The data key. Raises Unsealable."""
    return _opened(wrapped, key, _joined(_KEY, context))


def _opened(sealed: bytes, key: bytes, associated: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):  # a key or a nonce of another length
        raise Unsealable from None


def _words(place: Place) -> tuple[bytes, ...]:
    return place.name.encode(), place.uid.encode(), str(place.version).encode(), place.owner.encode()


def _joined(*parts: bytes) -> bytes:
    """Each part with its length, so that no other parts give the same bytes."""
    return b"".join(len(part).to_bytes(4) + part for part in parts)
