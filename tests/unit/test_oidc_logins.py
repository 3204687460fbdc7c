"""Who a person of the OpenID provider is here: the first login, the later ones, and whoever claims somebody else's name."""

import asyncio

from tests.support.oidc_provider import CLIENT, ISSUER, Provider
from tests.unit.test_identity_service import ANN, World, csr, refused
from whaleflux.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory.identity_parts import assemble_identity
from whaleflux_inventory.settings import Settings


class OidcWorld(World):
    def __init__(self, **settings):
        super().__init__()
        self.provider = Provider(lambda: self.clock.now().timestamp())
        known = {"oidc_issuer": ISSUER, "oidc_client_id": CLIENT, "oidc_domains": "example.org"} | settings
        self.rpc = assemble_identity(
            self.store, self.clock, self.ca, Settings(**known), self.ca.certificate_pem, lambda _: self.provider.fetch
        )

    async def sign_in(self, sub="s-ann", *, nonce="", key=None, **claims):
        shown = pb.OidcLogin(id_token=self.provider.token(sub, **claims), nonce=nonce)
        return await self.login(pb.LoginRequest(oidc=shown, certificate_request_pem=key or csr()))

    async def get(self, name=ANN):
        return await self.call("GetUser", pb.GetUserRequest(name=name))


async def made(**settings):
    return await OidcWorld(**settings).start()


async def test_the_first_login_makes_the_user_and_groups_hold_for_that_login():
    world = await made()
    answer = await world.sign_in(groups=["ml"], name="Ann")
    user = await world.get()
    assert (user.role, user.oidc_issuer, user.oidc_subject, user.display_name) == ("user", ISSUER, "s-ann", "Ann")
    assert user.last_change.actor == "inventory/oidc"
    who = await world.admitted(answer)
    assert (who.subject, who.groups) == ("user/ann", {"ml"})
    again = await world.sign_in(groups=[])
    assert (await world.admitted(again)).groups == frozenset()
    assert (await world.admitted(answer)).groups == {"ml"}


async def test_the_same_person_keeps_the_name_whatever_else_changes():
    world = await made()
    await world.sign_in()
    answer = await world.sign_in(email="ann.married@example.org")
    assert (await world.admitted(answer)).subject == "user/ann"
    listed = (await world.call("ListUsers")).users
    assert [u.name for u in listed] == [ANN, "users/root"]


async def test_another_person_who_claims_a_known_name_is_refused_with_both_facts():
    world = await made()
    await world.sign_in()
    before = await world.revision()
    said = str(await refused(PermissionDenied, "USER_NAME_TAKEN", world.sign_in("s-eve", email="ann@example.org")))
    assert "'s-ann'" in said and "'s-eve'" in said and ISSUER in said
    assert await world.revision() == before


async def test_an_account_made_here_is_nobodys_at_the_provider_until_an_operator_says_so():
    world = await made()
    await world.user("ann", role="operator")
    said = str(await refused(PermissionDenied, "USER_NAME_TAKEN", world.sign_in()))
    assert "whaleflux user set ann --oidc" in said
    waits = pb.UpdateUserRequest(
        user=trust_pb2.Principal(name=ANN, awaits_oidc=True), update_mask={"paths": ["awaits_oidc"]}
    )
    await world.call("UpdateUser", waits)
    assert (await world.admitted(await world.sign_in())).subject == "operator/ann"
    await refused(PermissionDenied, "USER_NAME_TAKEN", world.sign_in("s-eve", email="ann@example.org"))
    await world.call("UpdateUser", waits)  # the person has a new account at the provider
    assert await world.sign_in("s-ann2", email="ann@example.org")
    await refused(PermissionDenied, "USER_NAME_TAKEN", world.sign_in())  # the old one is not bound any more


async def test_a_token_makes_one_login_and_its_lost_answer_can_be_had_again():
    world = await made()
    shown = pb.OidcLogin(id_token=world.provider.token())
    mine = csr()
    first = await world.login(pb.LoginRequest(oidc=shown, certificate_request_pem=mine))
    again = await world.login(pb.LoginRequest(oidc=shown, certificate_request_pem=mine))
    assert (await world.admitted(first)).identity.session == (await world.admitted(again)).identity.session
    await refused(
        Unauthenticated, "LOGIN_REFUSED", world.login(pb.LoginRequest(oidc=shown, certificate_request_pem=csr()))
    )


async def test_of_those_who_show_one_token_at_once_one_gets_in():
    world = await made()
    await world.sign_in()
    shown = pb.OidcLogin(id_token=world.provider.token(jti="2"))
    requests = [pb.LoginRequest(oidc=shown, certificate_request_pem=csr()) for _ in range(4)]
    ended = await asyncio.gather(*map(world.login, requests), return_exceptions=True)
    assert sorted(type(one).__name__ for one in ended) == ["LoginResponse", *["Unauthenticated"] * 3]


async def test_two_first_logins_at_once_make_one_user():
    world = await made()
    ended = await asyncio.gather(*(world.sign_in(jti=str(n)) for n in range(4)), return_exceptions=True)
    assert {type(one) for one in ended} == {pb.LoginResponse}
    other = await made()
    ended = await asyncio.gather(
        *(other.sign_in(f"s-{n}", email="ann@example.org") for n in range(4)), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in ended) == ["LoginResponse", *["PermissionDenied"] * 3]


async def test_the_providers_groups_decide_roles_where_the_settings_say_so():
    world = await made(oidc_roles="ops=operator,fleet=admin", oidc_default_role="")
    assert (await world.admitted(await world.sign_in(groups=["ops"]))).role == "operator"
    answer = await world.sign_in(groups=["fleet", "ops"])
    assert (await world.admitted(answer)).role == "admin"
    lower = await world.sign_in(groups=["ops"], jti="3")
    assert (await world.admitted(lower)).role == "operator"
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(answer))  # it said admin
    await refused(PermissionDenied, "LOGIN_REFUSED", world.sign_in("s-eve", groups=["other"]))
    assert [u.name for u in (await world.call("ListUsers")).users] == [ANN, "users/root"]


async def test_only_those_whom_an_operator_added_get_in_without_a_default_role():
    world = await made(oidc_default_role="")
    assert "whaleflux user add ann --oidc" in str(await refused(PermissionDenied, "LOGIN_REFUSED", world.sign_in()))
    await world.user("ann", role="viewer", awaits_oidc=True)
    assert (await world.admitted(await world.sign_in())).role == "viewer"


async def test_who_is_disabled_is_refused_at_the_provider_too():
    world = await made()
    answer = await world.sign_in()
    await world.call("DisableUser", pb.DisableUserRequest(name=ANN))
    await refused(Unauthenticated, "DISABLED", world.admitted(answer))
    await refused(Unauthenticated, "DISABLED", world.sign_in(jti="2"))


async def test_a_fleet_without_a_provider_says_so_and_one_with_tells_how():
    world = await World().start()
    await refused(
        FailedPrecondition,
        "LOGIN_NOT_OFFERED",
        world.login(pb.LoginRequest(oidc=pb.OidcLogin(id_token="x"), certificate_request_pem=csr())),
    )
    told = await (await made()).call("GetLoginOptions", who="anonymous/-")
    assert (told.oidc_issuer, told.oidc_client_id, told.trust_domain) == (ISSUER, CLIENT, "whaleflux")
    assert list(told.oidc_scopes) == ["openid", "email", "profile"]
