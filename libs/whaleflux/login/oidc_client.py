"""An ID token from a person's OpenID provider: by the device flow (RFC 8628), or by a code in the browser with PKCE (RFC 7636, 8252).

What comes back is checked by inventory, not here: this program belongs to whoever runs it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from whaleflux.errors import DeadlineExceeded, FailedPrecondition, Unauthenticated, Unavailable
from whaleflux.login.bounded_http import Answer, check_url, hostport_of, request
from whaleflux.reasons import ErrorReason

_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_INTERVAL_S = 5.0  # where the provider names none (RFC 8628, 3.2)
_SLOWER_S = 5.0  # more at each slow_down (3.5)
_MOST_WAIT_S = 1800.0  # whatever the provider says
CODE_WAIT_S = 300.0  # for a person at a browser


class Post(Protocol):
    """Sends a form; raises Unavailable when no answer comes."""

    def __call__(self, url: str, form: Mapping[str, str]) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Client:
    """Who we are at the provider, and what of it `discover` found; an endpoint that it does not have is ""."""

    issuer: str
    client_id: str
    client_secret: str = field(default="", repr=False)
    scopes: Sequence[str] = ("openid",)
    roots_pem: str = ""
    device_endpoint: str = ""
    authorization_endpoint: str = ""
    token_endpoint: str = ""

    def form(self, **more: str) -> dict[str, str]:
        """The fields of a request to its token endpoint."""
        known = {"client_id": self.client_id, "client_secret": self.client_secret}
        return {key: value for key, value in (*known.items(), *more.items()) if value}

    def post(self, url: str, form: Mapping[str, str]) -> Answer:
        """See `Post`."""
        return request(url, form=form, roots_pem=self.roots_pem)


@dataclass(frozen=True, slots=True)
class Asked:
    """The time and the pauses of a flow, so that tests have none."""

    monotonic: Callable[[], float]
    sleep: Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Got:
    """An ID token, and the nonce that was asked for with it; "" where the flow has none."""

    id_token: str = field(repr=False)
    nonce: str = ""


def discovery_url(issuer: str) -> str:
    """Where the provider describes itself (OpenID Connect Discovery, 4)."""
    return issuer.rstrip("/") + "/.well-known/openid-configuration"


def endpoints(client: Client, answer: Answer) -> Client:
    """The client with what the provider's description says. Raises Unavailable for one that is not the issuer's."""
    if answer.status != 200 or answer.content.get("issuer") != client.issuer:
        raise Unavailable(
            f"{hostport_of(client.issuer)} does not describe the OpenID provider {client.issuer} "
            f"(status {answer.status}, issuer {str(answer.content.get('issuer'))[:200]!r}); the fleet's setting oidc_issuer has to be its issuer, letter by letter",
            reason=ErrorReason.PROVIDER_UNREACHABLE,
        )
    found = {
        name: check_url(f"oidc_issuer: {name}", str(answer.content[name])) if answer.content.get(name) else ""
        for name in ("device_authorization_endpoint", "authorization_endpoint", "token_endpoint")
    }
    return Client(
        client.issuer,
        client.client_id,
        client.client_secret,
        client.scopes,
        client.roots_pem,
        found["device_authorization_endpoint"],
        found["authorization_endpoint"],
        found["token_endpoint"],
    )


def discover(client: Client) -> Client:
    """Asks the provider where its endpoints are."""
    return endpoints(client, request(discovery_url(client.issuer), roots_pem=client.roots_pem))


def by_device(client: Client, post: Post, say: Callable[[str], None], asked: Asked) -> Got:
    """The device flow: shows a URL and a code, and waits until somebody has entered it there."""
    answer = post(client.device_endpoint, client.form(scope=" ".join(client.scopes)))
    device_code, user_code, where = (
        str(answer.content.get(key, "")) for key in ("device_code", "user_code", "verification_uri")
    )
    if answer.status != 200 or not (device_code and user_code and where):
        raise _refused(client, answer)
    complete = str(answer.content.get("verification_uri_complete", ""))
    say(f"open {where} in a browser and enter the code {user_code}" + (f"\nor open {complete}" if complete else ""))
    lasts_s = min(_number(answer, "expires_in", _MOST_WAIT_S), _MOST_WAIT_S)
    form = client.form(grant_type=_DEVICE_GRANT, device_code=device_code)
    return Got(_polled(client, post, form, _number(answer, "interval", _INTERVAL_S), lasts_s, asked))


def _polled(
    client: Client, post: Post, form: Mapping[str, str], interval_s: float, lasts_s: float, asked: Asked
) -> str:
    deadline = asked.monotonic() + lasts_s
    while asked.monotonic() + interval_s < deadline:
        asked.sleep(interval_s)
        try:
            answer = post(client.token_endpoint, form)
        except Unavailable:
            interval_s *= 2  # a connection that timed out: back off (RFC 8628, 3.5)
            continue
        match answer.content.get("error"):
            case "authorization_pending":
                pass
            case "slow_down":
                interval_s += _SLOWER_S
            case _:
                return _id_token(client, answer)
    raise _too_late()


def _id_token(client: Client, answer: Answer) -> str:
    match answer.content.get("error"):
        case "access_denied":
            raise Unauthenticated(
                f"{hostport_of(client.issuer)} was told to deny the login; try again with: whaleflux login",
                reason=ErrorReason.LOGIN_REFUSED,
            )
        case "expired_token":
            raise _too_late()
    token = answer.content.get("id_token")
    if answer.status != 200 or not isinstance(token, str):
        raise _refused(client, answer)
    return token


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("nobody confirmed the login in time; try again with: whaleflux login")


def _refused(client: Client, answer: Answer) -> Unauthenticated:
    said = " ".join(str(answer.content.get(key, "")) for key in ("error", "error_description")).strip()[:300]
    return Unauthenticated(
        f"the OpenID provider {client.issuer} refused the login (status {answer.status}): {said or 'no reason given'}; "
        "an operator compares oidc_client_id with what is registered there",
        reason=ErrorReason.LOGIN_REFUSED,
    )


def _number(answer: Answer, key: str, default: float) -> float:
    value = answer.content.get(key)
    return float(value) if isinstance(value, int | float) and 0 < value < 1e6 else default


@dataclass(frozen=True, slots=True)
class CodeRequest:
    """A login in the browser: random values that the answer has to fit."""

    redirect_uri: str
    state: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(48), repr=False)

    def url(self, client: Client) -> str:
        """What the person opens."""
        challenge = base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).decode().rstrip("=")
        query = {
            "response_type": "code",
            "client_id": client.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": " ".join(client.scopes),
            "state": self.state,
            "nonce": self.nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        return f"{client.authorization_endpoint}{'&' if '?' in client.authorization_endpoint else '?'}{urllib.parse.urlencode(query)}"

    def answered(self, client: Client, post: Post, query: Mapping[str, str]) -> Got:
        """The ID token for what the browser brought back."""
        if not hmac.compare_digest(query.get("state", "").encode(), self.state.encode()):
            raise Unauthenticated(
                "the answer in the browser is not of this login; try again with: whaleflux login",
                reason=ErrorReason.LOGIN_REFUSED,
            )
        if not query.get("code"):
            raise _refused(client, Answer(200, query))
        form = client.form(
            grant_type="authorization_code",
            code=query["code"],
            redirect_uri=self.redirect_uri,
            code_verifier=self.verifier,
        )
        return Got(_id_token(client, post(client.token_endpoint, form)), self.nonce)


def by_code(
    client: Client,
    post: Post,
    say: Callable[[str], None],
    open_browser: Callable[[str], object] = lambda _: None,
    wait_s: float = CODE_WAIT_S,
) -> Got:
    """The browser flow: listens on this machine alone until the browser comes back from the provider."""
    from whaleflux.login.loopback import Loopback

    with Loopback() as loopback:
        asked = CodeRequest(loopback.redirect_uri)
        say(f"open this in a browser on this machine:\n{asked.url(client)}")
        open_browser(asked.url(client))
        query = loopback.wait(wait_s, asked.state)
    if query is None:
        raise _too_late()
    return asked.answered(client, post, query)


def log_in(
    client: Client,
    post: Post,
    say: Callable[[str], None],
    asked: Asked,
    *,
    browser: bool = False,
    open_browser: Callable[[str], object] = lambda _: None,
) -> Got:
    """The device flow where the provider has it, else, or where `browser` asks for it, the one with a code."""
    if client.device_endpoint and client.token_endpoint and not browser:
        return by_device(client, post, say, asked)
    if client.authorization_endpoint and client.token_endpoint:
        return by_code(client, post, say, open_browser)
    raise FailedPrecondition(
        f"the OpenID provider {client.issuer} offers neither the device flow nor a login in the browser; "
        "ask an operator for a code (whaleflux user link NAME)",
        reason=ErrorReason.LOGIN_NOT_OFFERED,
    )
