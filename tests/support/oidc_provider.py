"""An OpenID provider as far as inventory asks one, in memory: keys that rotate, tokens with whatever claims, and how often it was asked."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from whaleflux.errors import Unavailable
from whaleflux.login.bounded_http import Answer

ISSUER = "https://id.example.org/realms/gpu"
CLIENT = "whaleflux"


@functools.cache
def key(kind: str, number: int = 0) -> Any:
    """A private key; made once, RSA takes a while."""
    return (
        ec.generate_private_key(ec.SECP256R1())
        if kind == "ES256"
        else rsa.generate_private_key(65537, 2048 if kind == "RS256" else 1024)
    )


def listed(private: Any, kid: str) -> dict[str, Any]:
    """As a provider publishes it."""
    algorithm = (
        jwt.algorithms.ECAlgorithm if isinstance(private, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    )
    return {**json.loads(algorithm.to_jwk(private.public_key())), "kid": kid, "use": "sig"}


class Provider:
    """`away`: it does not answer. `keys`: by id."""

    def __init__(self, now_s, keys=None) -> None:
        self.now_s, self.away, self.asked = now_s, False, []
        self.keys = keys if keys is not None else {"k1": key("RS256")}

    def fetch(self, url: str) -> Answer:
        self.asked.append(url)
        if self.away:
            raise Unavailable("away")
        if url.endswith("/.well-known/openid-configuration"):
            return Answer(200, {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys"})
        return Answer(200, {"keys": [listed(private, kid) for kid, private in self.keys.items()]})

    def claims(self, sub="s-ann", **more) -> dict[str, Any]:
        now_s = int(self.now_s())
        email = {"email": f"{sub.removeprefix('s-')}@example.org", "email_verified": True}
        made = {"iss": ISSUER, "aud": CLIENT, "sub": sub, "iat": now_s, "exp": now_s + 600, **email, **more}
        return {claim: value for claim, value in made.items() if value is not None}

    def token(self, sub="s-ann", *, kid="k1", private=None, alg="RS256", headers=None, **claims) -> str:
        signing = private if private is not None else self.keys.get(kid)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # short keys are what some tests are about
            return jwt.encode(
                self.claims(sub, **claims), signing, algorithm=alg, headers={"kid": kid, **(headers or {})}
            )
