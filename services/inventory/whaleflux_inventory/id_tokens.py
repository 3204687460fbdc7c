"""Whether an ID token was signed by the provider: its keys, kept for a while, fetched anew when a token names one that is not known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from whaleflux.clock import Clock
from whaleflux.errors import Unavailable
from whaleflux.login import bounded_http
from whaleflux.login.bounded_http import Answer
from whaleflux.login.oidc_client import discovery_url
from whaleflux.reasons import ErrorReason
from whaleflux_inventory.core.oidc import refused

ALGORITHMS = ("RS256", "ES256")  # never `none`, never a secret that a client could have too
MAX_TOKEN_CHARS = 16_384
MAX_KEYS = 64
KEPT_S = 600.0  # after that the provider is asked whether a key still counts
STALE_S = 3600.0  # for which known keys count while the provider does not answer
AGAIN_S = 30.0  # at least, between two questions that unknown keys cause
MIN_RSA_BITS = 2048

Fetch = Callable[[str], Answer]


def fetcher(roots_pem: str) -> Fetch:
    """GETs from the provider: bounded, and never led elsewhere."""
    return lambda url: bounded_http.request(url, roots_pem=roots_pem)


class IdTokens:
    """The claims of tokens whose signature is the provider's. One per process; fetches run in a thread, one at a time."""

    def __init__(self, issuer: str, clock: Clock, fetch: Fetch) -> None:
        self._issuer, self._clock, self._fetch = issuer, clock, fetch
        self._keys: Mapping[str, Mapping[str, Any]] = {}
        self._fetched_s = self._asked_s = float("-inf")
        self._asking = asyncio.Lock()

    async def claims(self, token: str) -> Mapping[str, Any]:
        """The claims of a token. Raises Unauthenticated (LOGIN_REFUSED), or Unavailable while no key can be had."""
        header = _header(token)
        kid = str(header.get("kid", ""))
        key = await self._key(kid)
        if key is None:
            raise refused(f"is signed by a key that {self._issuer} does not list")
        return _verified(token, key, str(header["alg"]))

    async def _key(self, kid: str) -> Mapping[str, Any] | None:
        async with self._asking:
            now_s = self._clock.monotonic()
            known = self._find(kid)
            old = now_s - self._fetched_s > KEPT_S
            if (known is None or old) and now_s - self._asked_s > AGAIN_S:
                self._asked_s = now_s
                await self._refresh()
                known = self._find(kid)
            if self._clock.monotonic() - self._fetched_s > STALE_S:
                raise Unavailable(f"the keys of {self._issuer} are not known", reason=ErrorReason.PROVIDER_UNREACHABLE)
            return known

    def _find(self, kid: str) -> Mapping[str, Any] | None:
        """The key of that id; of a provider with one key, a token need not name it."""
        if not kid and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    async def _refresh(self) -> None:
        try:
            self._keys = await asyncio.to_thread(self._listed)
            self._fetched_s = self._clock.monotonic()
        except Unavailable:
            if self._clock.monotonic() - self._fetched_s > STALE_S:
                raise

    def _listed(self) -> Mapping[str, Mapping[str, Any]]:
        described = self._fetch(discovery_url(self._issuer)).content
        if described.get("issuer") != self._issuer:
            raise self._no_provider(f"describes issuer {str(described.get('issuer'))[:200]!r}")
        where = bounded_http.check_url("oidc_issuer: jwks_uri", str(described.get("jwks_uri", "")))
        listed = self._fetch(where).content.get("keys")
        if not isinstance(listed, list):
            raise self._no_provider("lists no keys")
        return {str(key.get("kid", "")): key for key in listed[:MAX_KEYS] if _signs(key)}

    def _no_provider(self, what: str) -> Unavailable:
        return Unavailable(f"the OpenID provider {self._issuer} {what}", reason=ErrorReason.PROVIDER_UNREACHABLE)


def _signs(key: object) -> bool:
    return isinstance(key, dict) and key.get("kty") in {"RSA", "EC"} and key.get("use", "sig") == "sig"


def _header(token: str) -> Mapping[str, Any]:
    if len(token) > MAX_TOKEN_CHARS:
        raise refused(f"has {len(token)} characters, more than {MAX_TOKEN_CHARS}")
    import jwt  # a fleet without a provider never needs it

    try:
        header: Mapping[str, Any] = jwt.get_unverified_header(token)
    except jwt.PyJWTError:
        raise refused("is no JWT") from None
    if header.get("alg") not in ALGORITHMS or header.get("crit"):
        raise refused(f"is signed by {str(header.get('alg'))[:32]!r}; taken are {', '.join(ALGORITHMS)}")
    return header


def _verified(token: str, key: Mapping[str, Any], algorithm: str) -> Mapping[str, Any]:
    import jwt

    try:
        public = jwt.PyJWK(dict(key), algorithm=algorithm).key
        if getattr(public, "key_size", 0) < (MIN_RSA_BITS if algorithm == "RS256" else 256):
            raise refused("is signed by a key that is too short")
        claims = json.loads(jwt.api_jws.PyJWS(algorithms=[algorithm]).decode(token, public, algorithms=[algorithm]))
    except (jwt.PyJWTError, ValueError, TypeError):
        raise refused("has a signature that is wrong") from None
    if not isinstance(claims, dict):
        raise refused("has no claims")
    return claims
