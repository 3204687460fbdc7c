"""What an ID token says of a person, and whether it is for us (OpenID Connect Core, 3.1.3.7). Signatures are checked before.

A person of the provider is known by (issuer, sub) alone: other claims change hands. The name here is made of a claim once, at the first
login, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from whaleflux.errors import PermissionDenied, Unauthenticated
from whaleflux.names import ID_PATTERN
from whaleflux.reasons import ErrorReason

SKEW = timedelta(minutes=5)
FRESH = timedelta(minutes=15)  # an older ID token was not made for this login
MAX_GROUPS = 256
MAX_SUBJECT = 255  # OpenID Connect Core, 2
NAME_CLAIMS = ("email", "preferred_username", "sub")


@dataclass(frozen=True, slots=True)
class Provider:
    """What the settings say of the provider. Groups of each role are ids as `groups_of` makes them."""

    issuer: str
    client_id: str
    name_claim: str = "email"
    groups_claim: str = "groups"
    domains: Sequence[str] = ()
    role_of_group: Mapping[str, str] = field(default_factory=dict)
    default_role: str = "user"

    @property
    def decides_roles(self) -> bool:
        """Whether roles come from the provider's groups, at each login."""
        return bool(self.role_of_group)


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody of the provider. `role` is "" where the provider does not decide it or gives none."""

    issuer: str
    subject: str
    name: str
    display_name: str
    groups: tuple[str, ...]
    role: str


def check_claims(claims: Mapping[str, Any], provider: Provider, nonce: str, now: datetime) -> None:
    """Refuses an ID token that is of another issuer, for another client, of another time, or of another login."""
    if claims.get("iss") != provider.issuer:
        raise refused(f"is of issuer {_shown(claims.get('iss'))}, not of {provider.issuer}")
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or provider.client_id not in audiences:
        raise refused(f"is for client {_shown(audience)}, not for {provider.client_id}")
    if (len(audiences) > 1 or "azp" in claims) and claims.get("azp") != provider.client_id:
        raise refused(f"was issued to client {_shown(claims.get('azp'))}, not to {provider.client_id}")
    expires, issued = _instant(claims, "exp"), _instant(claims, "iat")
    if now >= expires + SKEW or now < issued - SKEW or now < _instant(claims, "nbf", issued) - SKEW:
        raise refused(f"is good from {issued:%H:%M:%S} to {expires:%H:%M:%S} UTC, and it is {now:%H:%M:%S} here")
    if now >= issued + FRESH + SKEW:
        raise refused(f"is of {issued:%Y-%m-%d %H:%M:%S} UTC, which is no login of now")
    if (claims.get("nonce") or "") != nonce:
        raise refused("is of another login (its nonce differs)")


def person_of(claims: Mapping[str, Any], provider: Provider) -> Person:
    """Who it is, under which name. PermissionDenied for people whom this fleet does not take."""
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise refused("has no sub")
    groups = groups_of(claims.get(provider.groups_claim))
    display = claims.get("name")
    return Person(
        provider.issuer,
        subject,
        _name_of(claims, provider),
        display[:128] if isinstance(display, str) and display.isprintable() else "",
        groups,
        _role_of(groups, provider),
    )


def groups_of(claim: object) -> tuple[str, ...]:
    """Ids of groups that a claim names: "ml", "/ml" (Keycloak), a GUID. What is no id after that is left out: it could be taken for another."""
    named = claim if isinstance(claim, list) else [claim]
    ids = [name.removeprefix("/") for name in named[: 4 * MAX_GROUPS] if isinstance(name, str)]
    return tuple(sorted({name for name in ids if ID_PATTERN.fullmatch(name)})[:MAX_GROUPS])


def user_id_of(text: str) -> str:
    """An id made of a name or an address: "Ann.Lee" is ann-lee; "" when nothing is left."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].rstrip("-")
    return plain if ID_PATTERN.fullmatch(plain) else ""


def _role_of(groups: Sequence[str], provider: Provider) -> str:
    """The first role of the settings (highest first) that one of the groups has."""
    if not provider.decides_roles:
        return ""
    given = [role for group, role in provider.role_of_group.items() if group in groups]
    return min(given, key=_RANKS.index) if given else provider.default_role


_RANKS = ("admin", "operator", "user", "viewer")


def _name_of(claims: Mapping[str, Any], provider: Provider) -> str:
    value = claims.get(provider.name_claim)
    if not isinstance(value, str) or not value or len(value) > MAX_SUBJECT:
        raise refused(
            f"has no claim {provider.name_claim!r}; an operator chooses another with the setting oidc_name_claim"
        )
    local, at, domain = value.rpartition("@")
    if provider.domains or provider.name_claim == "email":
        _check_address(claims, provider)
    # One domain: nobody else can have the local part. With several, or any, the domain is part of the name.
    user_id = user_id_of(local if at and [domain.lower()] == list(provider.domains) else value)
    if not user_id:
        raise refused(f"has a claim {provider.name_claim!r} of which no name can be made: {_shown(value)}")
    return user_id


def _check_address(claims: Mapping[str, Any], provider: Provider) -> None:
    email = claims.get("email")
    local, _, domain = email.rpartition("@") if isinstance(email, str) else ("", "", "")
    foreign = provider.domains and domain.lower() not in provider.domains
    if not local or foreign or claims.get("email_verified") is False:
        whom = f"people of {', '.join(provider.domains)}" if provider.domains else "people"
        raise PermissionDenied(
            f"this fleet takes {whom} with an address that the provider has verified; this is {_shown(email)}",
            reason=ErrorReason.LOGIN_REFUSED,
        )


def _instant(claims: Mapping[str, Any], claim: str, default: datetime | None = None) -> datetime:
    value = claims.get(claim)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e11:
        raise refused(f"has no {claim}")
    return datetime.fromtimestamp(value, tz=UTC)


def _shown(value: object) -> str:
    return repr(value)[:120]


def refused(why: str) -> Unauthenticated:
    """The refusal of an ID token; whoever has one may know what is wrong with it."""
    return Unauthenticated(
        f"the ID token {why}; log in again (whaleflux login), and when that repeats ask an operator to compare the oidc settings",
        reason=ErrorReason.LOGIN_REFUSED,
    )
