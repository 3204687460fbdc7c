"""The command line's side of a login at a provider: pauses of the device flow, what the browser brings back, first contact's fingerprints."""

import base64
import hashlib
import urllib.parse

import pytest

from tests.support.oidc_provider import CLIENT, ISSUER
from whaleflux.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable
from whaleflux.login import oidc_client
from whaleflux.login.bounded_http import Answer
from whaleflux.login.first_contact import parsed_fingerprint
from whaleflux.login.oidc_client import Asked, Client, CodeRequest

DEVICE = Client(ISSUER, CLIENT, device_endpoint=f"{ISSUER}/device", token_endpoint=f"{ISSUER}/token")
BROWSER = Client(ISSUER, CLIENT, authorization_endpoint=f"{ISSUER}/auth", token_endpoint=f"{ISSUER}/token")
BEGUN = {"device_code": "d", "user_code": "WXYZ", "verification_uri": "https://id/go", "expires_in": 300, "interval": 5}
DONE = Answer(200, {"id_token": "the.id.token"})


def pending(error="authorization_pending"):
    return Answer(400, {"error": error})


class World:
    """Answers in order; pauses pass at once and are noted."""

    def __init__(self, *answers, begun=BEGUN):
        self.answers, self.begun = list(answers), begun
        self.sent, self.pauses, self.said = [], [], []

    def post(self, url, form):
        self.sent.append((url, form))
        if url.endswith("/device"):
            return Answer(200, self.begun)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def got(self, client=DEVICE):
        asked = Asked(lambda: sum(self.pauses), self.pauses.append)
        return oidc_client.log_in(client, self.post, self.said.append, asked)


def test_the_device_flow_waits_as_the_provider_says():
    world = World(pending(), pending("slow_down"), pending(), Unavailable("x"), DONE)
    assert world.got() == oidc_client.Got("the.id.token")
    assert world.pauses == [5, 5, 10, 10, 20]  # more at slow_down, twice as much after no answer
    assert "https://id/go" in world.said[0] and "WXYZ" in world.said[0]
    url, form = world.sent[1]
    assert (
        url == f"{ISSUER}/token"
        and form["device_code"] == "d"
        and form["client_id"] == CLIENT
        and "client_secret" not in form
    )


@pytest.mark.parametrize(
    ("answers", "kind", "match"),
    [
        ([pending("access_denied")], Unauthenticated, "deny"),
        ([pending("expired_token")], DeadlineExceeded, "in time"),
        ([pending("invalid_client")], Unauthenticated, "invalid_client.*oidc_client_id"),
        ([Answer(200, {"access_token": "a"})], Unauthenticated, "refused"),
        ([pending()] * 100, DeadlineExceeded, "in time"),
    ],
)
def test_each_end_of_the_device_flow_says_what_to_do(answers, kind, match):
    with pytest.raises(kind, match=match):
        World(*answers).got()


def test_nobody_is_waited_for_longer_than_half_an_hour_whatever_a_provider_says():
    world = World(*[pending()] * 1000, begun={**BEGUN, "expires_in": 10**9, "interval": -3})
    with pytest.raises(DeadlineExceeded):
        world.got()
    assert sum(world.pauses) <= 1800


def test_a_provider_that_describes_another_is_none():
    good = {"issuer": ISSUER, "token_endpoint": f"{ISSUER}/token", "device_authorization_endpoint": f"{ISSUER}/device"}
    assert oidc_client.endpoints(Client(ISSUER, CLIENT), Answer(200, good)) == DEVICE
    for wrong in ({**good, "issuer": ISSUER + "/"}, {}):
        with pytest.raises(Unavailable, match="letter by letter"):
            oidc_client.endpoints(Client(ISSUER, CLIENT), Answer(200, wrong))
    with pytest.raises(InvalidArgument, match="token_endpoint"):
        oidc_client.endpoints(Client(ISSUER, CLIENT), Answer(200, {**good, "token_endpoint": "http://10.0.0.1/token"}))
    with pytest.raises(FailedPrecondition, match="whaleflux user link"):
        World().got(Client(ISSUER, CLIENT))


def test_a_login_in_the_browser_binds_code_state_and_nonce():
    asked, world = CodeRequest("http://127.0.0.1:1/callback"), World(DONE)
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(asked.url(BROWSER)).query))
    challenge = base64.urlsafe_b64encode(hashlib.sha256(asked.verifier.encode()).digest()).decode().rstrip("=")
    assert (query["code_challenge"], query["code_challenge_method"], query["state"]) == (challenge, "S256", asked.state)
    for wrong in ({"code": "c", "state": "x"}, {"code": "c"}):
        with pytest.raises(Unauthenticated, match="not of this login"):
            asked.answered(BROWSER, world.post, wrong)
    with pytest.raises(Unauthenticated, match="access_denied"):
        asked.answered(BROWSER, world.post, {"state": asked.state, "error": "access_denied"})
    assert not world.sent
    assert asked.answered(BROWSER, world.post, {"state": asked.state, "code": "c"}) == oidc_client.Got(
        "the.id.token", asked.nonce
    )
    assert world.sent[0][1]["code_verifier"] == asked.verifier
    assert asked.verifier not in repr(asked) and "the.id.token" not in repr(oidc_client.Got("the.id.token"))


def test_fingerprints_are_read_as_people_have_them():
    digest = hashlib.sha256(b"x").digest()
    plain = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert {parsed_fingerprint(text) for text in (plain, digest.hex(), digest.hex(":").upper())} == {plain}
    for wrong in ("", "abc", digest.hex()[:-2]):
        with pytest.raises(InvalidArgument):
            parsed_fingerprint(wrong)
