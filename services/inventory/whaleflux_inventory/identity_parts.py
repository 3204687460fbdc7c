"""How the parts behind IdentityService fit together, as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.login import bounded_http
from whaleflux.rpc import roles
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store.api import Store
from whaleflux.v1 import identity_pb2 as pb
from whaleflux_inventory.core.oidc import Provider
from whaleflux_inventory.groups import Groups
from whaleflux_inventory.id_tokens import Fetch, IdTokens, fetcher
from whaleflux_inventory.identity_servicer import IdentityServicer
from whaleflux_inventory.logins import LoginLife, Logins
from whaleflux_inventory.oidc_logins import OidcLogins
from whaleflux_inventory.people import People
from whaleflux_inventory.settings import Settings
from whaleflux_inventory.tokens import Tokens


def assemble_identity(
    store: Store,
    clock: Clock,
    authority: CertificateAuthority | None,
    settings: Settings,
    roots: bytes,
    fetch_from: Callable[[str], Fetch] = fetcher,
) -> IdentityServicer:
    """The servicer of one inventory. `roots`: the authority that everybody believes, PEM; `fetch_from`: how the provider is asked."""
    life = LoginLife(timedelta(hours=settings.certificate_hours), timedelta(days=settings.login_days))
    provider, options = provider_of(settings), _options(settings, roots)
    oidc = None
    if provider is not None:
        tokens = IdTokens(provider.issuer, clock, fetch_from(options.oidc_authority_pem))
        oidc = OidcLogins(store, clock, provider, tokens, life.login)
    return IdentityServicer(
        store,
        People(store, clock),
        Groups(store, clock),
        Logins(store, clock, authority, life, oidc),
        Tokens(store, clock, authority),
        options,
    )


def provider_of(settings: Settings) -> Provider | None:
    """The OpenID provider, None without one. Raises InvalidArgument for settings that do not fit together."""
    if not settings.oidc_issuer:
        return None
    bounded_http.check_url("oidc_issuer", settings.oidc_issuer)
    if not settings.oidc_client_id:
        raise InvalidArgument(
            FieldViolation("oidc_client_id", "is not set; register the fleet at the provider and give its client id")
        )
    return Provider(
        issuer=settings.oidc_issuer,
        client_id=settings.oidc_client_id,
        name_claim=settings.oidc_name_claim,
        groups_claim=settings.oidc_groups_claim,
        domains=tuple(_listed(settings.oidc_domains.lower())),
        role_of_group=_roles(settings.oidc_roles),
        default_role=settings.oidc_default_role,
    )


def _roles(text: str) -> dict[str, str]:
    found = {}
    for pair in _listed(text):
        group, _, role = (part.strip() for part in pair.partition("="))
        if not group or role not in roles.HUMANS:
            known = ", ".join(sorted(roles.HUMANS))
            raise InvalidArgument(
                FieldViolation("oidc_roles", f"{pair[:80]!r} is not group=role with a role of {known}")
            )
        found[group.removeprefix("/")] = role
    return found


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _options(settings: Settings, roots: bytes) -> pb.GetLoginOptionsResponse:
    answer = pb.GetLoginOptionsResponse(authority_pem=roots.decode(), trust_domain=settings.trust_domain)
    if settings.oidc_issuer:
        answer.oidc_issuer, answer.oidc_client_id = settings.oidc_issuer, settings.oidc_client_id
        answer.oidc_client_secret = _content("oidc_client_secret_file", settings.oidc_client_secret_file).strip()
        answer.oidc_scopes[:] = settings.oidc_scopes.split() or ["openid"]
        answer.oidc_authority_pem = _content("oidc_ca_file", settings.oidc_ca_file)
    return answer


def _content(field: str, path: Path | None) -> str:
    try:
        return path.read_text() if path is not None else ""
    except OSError as error:
        raise InvalidArgument(FieldViolation(field, f"cannot read {path}: {error.strerror}")) from None
