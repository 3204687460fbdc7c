"""Which ID tokens are believed: signature, time, audience; and what they make of a person."""

import base64
import json
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.oidc_provider import CLIENT, ISSUER, Provider, key
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, PermissionDenied, Unauthenticated, Unavailable
from whaleflux.login.bounded_http import check_url
from whaleflux_inventory.core import oidc
from whaleflux_inventory.id_tokens import IdTokens
from whaleflux_inventory.identity_parts import provider_of
from whaleflux_inventory.settings import Settings

RULES = oidc.Provider(ISSUER, CLIENT)


class World:
    def __init__(self, keys=None):
        self.clock = VirtualClock()
        self.provider = Provider(lambda: self.clock.now().timestamp(), keys)
        self.tokens = IdTokens(ISSUER, self.clock, self.provider.fetch)

    async def believed(self, expects="", rules=RULES, **token):
        claims = await self.tokens.claims(self.provider.token(**token))
        oidc.check_claims(claims, rules, expects, self.clock.now())
        return oidc.person_of(claims, rules)


@pytest.fixture
async def world():
    return World()


async def refuses(world, match, **token):
    with pytest.raises(Unauthenticated, match=match) as caught:
        await world.believed(**token)
    assert caught.value.reason == "LOGIN_REFUSED"


@pytest.mark.parametrize("alg", ["RS256", "ES256"])
async def test_a_token_that_the_provider_signed_is_believed(alg):
    world = World({"k1": key(alg)})
    person = await world.believed(alg=alg, name="Ann Lee", groups=["/ml", "Not An Id", "ops"])
    assert (person.subject, person.name, person.display_name) == ("s-ann", "ann-example-org", "Ann Lee")
    assert person.groups == ("ml", "ops")


async def test_other_algorithms_are_refused_whatever_they_sign_with(world):
    public = key("RS256").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    await refuses(world, "is signed by 'none'", alg="none", private="")
    await refuses(
        world, "is signed by 'HS256'", alg="HS256", private=base64.b64encode(public)
    )  # the public key as a secret
    await refuses(world, "is signed by 'RS512'", alg="RS512")
    await refuses(world, "is signed by|is no JWT", headers={"crit": ["b64"], "b64": True})
    assert world.provider.asked == []  # nothing that costs anything was done for these


async def test_signatures_of_others_are_refused(world):
    await refuses(world, "has a signature that is wrong", private=key("RS256", 1))
    await refuses(
        world, "has a signature that is wrong", alg="ES256", private=key("ES256")
    )  # the id of a key of another kind
    head, claims, signature = world.provider.token().split(".")
    changed = base64.urlsafe_b64encode(json.dumps(world.provider.claims("s-eve")).encode()).decode().rstrip("=")
    for text in (f"{head}.{changed}.{signature}", f"{head}.{claims}.", f"{head}.{claims}", "", "a.b.c", "x" * 20_000):
        with pytest.raises(Unauthenticated):
            await world.tokens.claims(text)


async def test_a_short_key_is_refused():
    short = World({"k1": key("RSA-1024")})
    await refuses(short, "too short", alg="RS256")


async def test_a_new_key_is_fetched_when_a_token_names_it_and_not_more_often_than_each_half_minute(world):
    await world.believed()
    asked = len(world.provider.asked)
    await world.believed()
    assert len(world.provider.asked) == asked  # kept
    world.provider.keys = {"k2": key("RS256", 1)}
    await refuses(world, "does not list", kid="k9", private=key("RS256"))  # somebody makes it ask
    await world.clock.advance(31)
    await world.believed(kid="k2")
    asked = len(world.provider.asked)
    for _ in range(5):
        await refuses(world, "does not list", kid="k1", private=key("RS256"))  # the old one is gone
    assert len(world.provider.asked) == asked


async def test_a_provider_that_is_away_is_done_without_for_an_hour(world):
    world.provider.away = True
    with pytest.raises(Unavailable):
        await world.believed()
    world.provider.away = False
    await world.clock.advance(31)
    await world.believed()
    world.provider.away = True
    await world.clock.advance(3500)
    await world.believed()
    await world.clock.advance(200)
    with pytest.raises(Unavailable):
        await world.believed()


async def test_a_key_that_the_provider_withdrew_counts_no_longer_than_ten_minutes(world):
    await world.believed()
    world.provider.keys = {"k2": key("RS256", 1)}
    await world.clock.advance(601)
    await refuses(world, "does not list", kid="k1", private=key("RS256"))


@pytest.mark.parametrize(
    ("claims", "match"),
    [
        ({"iss": "https://id.example.org"}, "is of issuer"),
        ({"aud": "another"}, "is for client"),
        ({"aud": None}, "is for client"),
        ({"aud": [CLIENT, "another"]}, "was issued to client None"),
        ({"aud": [CLIENT, "another"], "azp": "another"}, "was issued to client"),
        ({"azp": "another"}, "was issued to client"),
        ({"exp": None}, "has no exp"),
        ({"iat": None}, "has no iat"),
        ({"exp": "soon"}, "has no exp"),
        ({"exp": True}, "has no exp"),
        ({"sub": ""}, "has no sub"),
        ({"nonce": "of-another"}, "is of another login"),
        ({"email": None}, "has no claim 'email'|address"),
    ],
)
async def test_a_token_that_is_not_for_us_is_refused(world, claims, match):
    with pytest.raises((Unauthenticated, PermissionDenied), match=match):
        await world.believed(**claims)


async def test_a_nonce_that_was_asked_for_has_to_be_there(world):
    with pytest.raises(Unauthenticated, match="nonce differs"):
        await world.believed(expects="n")
    claims = await world.tokens.claims(world.provider.token(nonce="n"))
    oidc.check_claims(claims, RULES, "n", world.clock.now())


async def test_clocks_may_differ_by_five_minutes(world):
    now_s = int(world.clock.now().timestamp())
    await world.believed(exp=now_s - 290)
    await refuses(world, "is good from", exp=now_s - 300)
    await world.believed(iat=now_s + 290)
    await refuses(world, "is good from", iat=now_s + 310)
    await refuses(world, "is good from", nbf=now_s + 310)
    await world.believed(iat=now_s - 1190)
    await refuses(world, "no login of now", iat=now_s - 1200)  # a token that somebody kept


@pytest.mark.parametrize(
    ("rules", "claims", "name"),
    [
        ({}, {"email": "Ann.Lee@Example.org"}, "ann-lee-example-org"),
        ({"domains": ("example.org",)}, {"email": "Ann.Lee@Example.org"}, "ann-lee"),
        ({"domains": ("example.org", "example.com")}, {"email": "ann@example.com"}, "ann-example-com"),
        ({"name_claim": "preferred_username"}, {"preferred_username": "ann_lee"}, "ann-lee"),
        ({"name_claim": "sub"}, {}, "s-ann"),
        ({"domains": ("example.org",)}, {"email": "ann@example.com"}, None),
        ({"domains": ("example.org",)}, {"email": "ann@example.org", "email_verified": False}, None),
        ({}, {"email": "ann@example.org", "email_verified": False}, None),
        ({"domains": ("example.org",)}, {"email": "@example.org"}, None),
        ({"name_claim": "preferred_username"}, {"preferred_username": "安"}, None),
    ],
)
async def test_names_are_made_of_a_claim(world, rules, claims, name):
    provider = oidc.Provider(ISSUER, CLIENT, **rules)
    if name is not None:
        assert (await world.believed(rules=provider, **claims)).name == name
        return
    with pytest.raises((PermissionDenied, Unauthenticated)):
        await world.believed(rules=provider, **claims)


def test_groups_that_are_no_ids_are_left_out_and_many_are_bounded():
    assert oidc.groups_of(["/ml", "ML", "a b", 7, "ops"]) == ("ml", "ops")
    assert oidc.groups_of("one") == ("one",)
    assert oidc.groups_of(None) == oidc.groups_of({"a": 1}) == ()
    assert len(oidc.groups_of([f"g{n}" for n in range(5000)])) == oidc.MAX_GROUPS


async def test_the_highest_role_of_ones_groups_counts(world):
    rules = oidc.Provider(
        ISSUER, CLIENT, role_of_group={"staff": "user", "ops": "operator", "board": "viewer"}, default_role=""
    )
    assert (await world.believed(rules=rules, groups=["board", "ops", "staff"])).role == "operator"
    assert (await world.believed(rules=rules, groups=["other"])).role == ""
    assert (await world.believed(groups=["ops"])).role == ""  # nobody said that it decides


def test_settings_that_do_not_fit_are_refused_by_name():
    assert provider_of(Settings()) is None
    good = {"oidc_issuer": ISSUER, "oidc_client_id": CLIENT}
    made = provider_of(Settings(**good, oidc_domains="Example.org, example.com", oidc_roles="/ops=operator, ml=user"))
    assert made.domains == ("example.org", "example.com") and made.role_of_group == {"ops": "operator", "ml": "user"}
    for wrong, field in (
        ({**good, "oidc_client_id": ""}, "oidc_client_id"),
        ({**good, "oidc_issuer": "http://id.example.org"}, "oidc_issuer"),
        ({**good, "oidc_roles": "ops=scheduler"}, "oidc_roles"),
        ({**good, "oidc_roles": "operator"}, "oidc_roles"),
    ):
        with pytest.raises(InvalidArgument, match=field):
            provider_of(Settings(**wrong))


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1/x", "ftp://a", "https://u:p@a/", "https://", "file:///etc/passwd", "https://a:x/", "x" * 3000],
)
def test_urls_of_a_provider_are_https(url):
    with pytest.raises(InvalidArgument):
        check_url("oidc_issuer", url)
    assert check_url("u", "http://127.0.0.1:1/x") and check_url("u", "https://a.example/x")
    assert timedelta(minutes=5) == oidc.SKEW
