"""Users, groups, logins and tokens over the memory store, called as the boundary would call them."""

import asyncio
from datetime import UTC, timedelta

import pytest

from whaleflux import names
from whaleflux.clock import VirtualClock
from whaleflux.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unauthenticated,
)
from whaleflux.login import credential
from whaleflux.rpc import auth, pki
from whaleflux.store import keys
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.view import TrustView
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory.identity_parts import assemble_identity
from whaleflux_inventory.people import People
from whaleflux_inventory.settings import Settings

ANN, BOB = "users/ann", "users/bob"


class Context:
    """What the servicer asks of gRPC's."""

    def __init__(self, peer="10.0.0.9:4711"):
        self._peer = peer

    def peer(self):
        return f"ipv4:{self._peer}"

    def auth_context(self):
        return {}

    def invocation_metadata(self):
        return ()


class SlowStore(MemoryStore):
    """Those who act at once have all read before the first of them commits."""

    async def commit(self, *writes, when=()):
        await asyncio.sleep(0.001)
        return await super().commit(*writes, when=when)


def csr():
    return pki.new_key_and_request()[1].decode()


class World:
    def __init__(self, **settings):
        self.store, self.clock = SlowStore(), VirtualClock()
        self.ca = pki.CertificateAuthority.create(self.clock.now(), "whaleflux")
        self.rpc = assemble_identity(self.store, self.clock, self.ca, Settings(**settings), self.ca.certificate_pem)

    async def start(self):
        await People(self.store, self.clock).ensure_admin("root")
        return self

    async def call(self, method, request=None, who="admin/root", context=None):
        """As `who`: "role/name", or a Principal."""
        principal = who if isinstance(who, auth.Principal) else auth.Principal(auth.Identity(*who.split("/")))
        request = request if request is not None else getattr(pb, f"{method}Request")()
        with auth.acting_as(principal):
            return await getattr(self.rpc, method)(request, context or Context())

    async def user(self, name, role="user", **more):
        user = trust_pb2.Principal(role=role, **more)
        return await self.call("CreateUser", pb.CreateUserRequest(user_id=name, user=user))

    async def code(self, name, who="admin/root", ttl_s=0):
        return (
            await self.call("CreateLoginLink", pb.CreateLoginLinkRequest(user=names.user(name), ttl_s=ttl_s), who)
        ).code

    async def login(self, request=None, *, peer="10.0.0.9:4711", **shown):
        request = request or pb.LoginRequest(certificate_request_pem=shown.pop("csr", "") or csr(), **shown)
        return await self.call("Login", request, "anonymous/-", Context(peer))

    async def token(self, who="admin/root", ttl_s=0, **token):
        return await self.call("CreateToken", pb.CreateTokenRequest(token=pb.Token(**token), ttl_s=ttl_s), who)

    async def admitted(self, answer):
        """What every service makes of the certificate."""
        view = TrustView(self.store, self.clock)
        async with view.running():  # which would wrap what is raised in it
            await view.until_known()
        return view.admit(pki.identity_of(answer.certificate_pem.encode()))

    async def revision(self):
        return (await self.store.list("")).revision


@pytest.fixture
async def world():
    return await World().start()


async def refused(kind, reason, awaitable):
    with pytest.raises(kind) as caught:
        await awaitable
    assert not reason or caught.value.reason == reason
    return caught.value


# users


async def test_a_user_logs_in_once_by_a_code_and_is_who_it_was_made_for(world):
    await world.user("ann")
    code = await world.code("ann")
    assert credential.parse(code).authority == credential.fingerprint(world.ca.certificate_pem)
    answer = await world.login(code=code)
    identity = pki.identity_of(answer.certificate_pem.encode())
    assert (identity.subject, answer.subject, names.is_ulid(identity.session)) == ("user/ann", "user/ann", True)
    expires = pki.expiry(answer.certificate_pem.encode())
    assert expires == world.clock.now() + timedelta(hours=12) == answer.certificate_expire_time.ToDatetime(tzinfo=UTC)
    assert (await world.admitted(answer)).subject == "user/ann"
    await refused(Unauthenticated, "LOGIN_REFUSED", world.login(code=code))
    who = await world.call("WhoAmI", who=auth.Principal(identity, frozenset({"research"})))
    assert (who.name, who.method, list(who.groups), who.peer) == (ANN, "code", ["research"], "10.0.0.9")


async def test_a_lost_answer_is_asked_for_again_with_the_same_key_and_with_no_other(world):
    await world.user("ann")
    code, mine = await world.code("ann"), csr()
    first = await world.login(code=code, csr=mine)
    again = await world.login(code=code, csr=mine)
    assert pki.identity_of(first.certificate_pem.encode()) == pki.identity_of(again.certificate_pem.encode())
    await refused(Unauthenticated, "LOGIN_REFUSED", world.login(code=code))


async def test_whatever_does_not_admit_gets_one_answer(world):
    await world.user("ann")
    code = await world.code("ann", ttl_s=60)
    kind, known, secret, authority = code.split(".")
    tampered = secret[:-2] + ("aa" if not secret.endswith("aa") else "bb")
    wrong = [
        f"{kind}.{known}.{tampered}.{authority}",
        f"{kind}.{names.ulid()}.{secret}.{authority}",
        f"wft.{known}.{secret}.{authority}",
        (await world.token("user/ann")).secret,  # good, but no code: it would make a login that outlives it
        "x" * 1000,
        code[:-1],
    ]
    said = {str(await refused(Unauthenticated, "LOGIN_REFUSED", world.login(code=text))) for text in wrong}
    await world.clock.advance(60)
    said.add(str(await refused(Unauthenticated, "LOGIN_REFUSED", world.login(code=code))))
    assert len(said) == 1 and "whaleflux user link" in said.pop()


async def test_of_two_who_show_a_code_at_once_one_gets_in(world):
    await world.user("ann")
    code = await world.code("ann")
    ended = await asyncio.gather(*(world.login(code=code) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(one, pb.LoginResponse) for one in ended) == 1
    assert all(isinstance(one, pb.LoginResponse | Unauthenticated) for one in ended)


async def test_secrets_are_kept_hashed_and_are_in_no_list(world):
    await world.user("ann")
    code, token = await world.code("ann"), (await world.token("user/ann")).secret
    stored = b"".join(entry.value for entry in (await world.store.list("")).entries)
    for text in (code, token):
        assert credential.parse(text).secret.encode() not in stored
        assert credential.parse(text).secret not in repr(credential.parse(text))
    listed = await world.call("ListTokens")
    assert [t.secret for t in listed.tokens] == [""]


async def test_who_is_disabled_is_refused_at_once_and_logs_in_anew_when_enabled(world):
    await world.user("ann")
    answer, code = await world.login(code=await world.code("ann")), await world.code("ann")
    await world.call("DisableUser", pb.DisableUserRequest(name=ANN, reason="left"))
    await refused(Unauthenticated, "DISABLED", world.admitted(answer))
    await refused(Unauthenticated, "DISABLED", world.login(code=code))
    await refused(Unauthenticated, "DISABLED", world.code("ann"))
    await world.call("EnableUser", pb.EnableUserRequest(name=ANN))
    await world.clock.advance(10)
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(answer))
    assert await world.admitted(await world.login(code=code))


async def test_a_lower_role_counts_at_once_and_a_higher_one_from_the_next_renewal(world):
    await world.user("ann", role="operator")
    answer = await world.login(code=await world.code("ann"))
    await world.call(
        "UpdateUser",
        pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN, role="user"), update_mask={"paths": ["role"]}),
    )
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(answer))
    answer = await world.login(code=await world.code("ann"))
    await world.call(
        "UpdateUser",
        pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN, role="operator"), update_mask={"paths": ["role"]}),
    )
    assert (await world.admitted(answer)).role == "user"
    renewed = await world.call(
        "RenewLogin", pb.RenewLoginRequest(certificate_request_pem=csr()), await world.admitted(answer)
    )
    assert (await world.admitted(renewed)).role == "operator"


async def test_a_login_is_renewed_until_it_ends(world):
    await world.user("ann")
    answer = await world.login(code=await world.code("ann"))
    await world.clock.advance(7 * 86_400 - 3600)
    who = await world.admitted(answer)
    renewed = await world.call("RenewLogin", pb.RenewLoginRequest(certificate_request_pem=csr()), who)
    assert pki.expiry(renewed.certificate_pem.encode()) == world.clock.now() + timedelta(hours=1)
    await world.clock.advance(3600)
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(renewed))
    await refused(
        Unauthenticated,
        "LOGIN_REFUSED",
        world.call("RenewLogin", pb.RenewLoginRequest(certificate_request_pem=csr()), who),
    )


async def test_who_slept_longer_than_the_certificate_comes_back_by_its_key(world):
    await world.user("ann")
    key, request = pki.new_key_and_request()
    answer = await world.login(code=await world.code("ann"), csr=request.decode())
    await world.clock.advance(5 * 86_400)
    mine = pki.request_for(key).decode()
    back = await world.login(certificate_pem=answer.certificate_pem, csr=mine)
    assert (await world.admitted(back)).identity == pki.identity_of(answer.certificate_pem.encode())
    other = pki.CertificateAuthority.create(world.clock.now(), "whaleflux")
    session = pki.identity_of(answer.certificate_pem.encode()).session
    forged = other.sign(request, "user", "ann", world.clock.now(), session=session).decode()
    beside = world.ca.sign(request, "user", "ann", world.clock.now()).decode()  # good, and of no login
    for certificate, shown in (
        (answer.certificate_pem, csr()),
        (forged, mine),
        (beside, mine),
        ("x", mine),
        ("x" * 9000, mine),
    ):
        await refused(Unauthenticated, "LOGIN_REFUSED", world.login(certificate_pem=certificate, csr=shown))
    await world.call("Logout", who=await world.admitted(back))
    await refused(Unauthenticated, "LOGIN_REFUSED", world.login(certificate_pem=answer.certificate_pem, csr=mine))


async def test_logging_out_ends_this_login_alone(world):
    await world.user("ann")
    here, there = [await world.login(code=await world.code("ann")) for _ in range(2)]
    await world.call("Logout", who=await world.admitted(here))
    await refused(Unauthenticated, "REVOKED", world.admitted(here))
    await world.clock.advance(700)
    await world.code("ann")  # which forgets what is over
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(here))
    who = await world.admitted(there)
    await world.login(code=await world.code("ann"))
    await world.call("Logout", pb.LogoutRequest(everywhere=True), who)
    assert not (await world.store.list(keys.SESSIONS)).entries
    await refused(FailedPrecondition, "LOGIN_FROM_ELSEWHERE", world.call("Logout"))


async def test_the_last_admin_stays(world):
    await world.user("eve", role="admin", kind=trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT)  # a program is no last resort
    lower = pb.UpdateUserRequest(
        user=trust_pb2.Principal(name="users/root", role="user"), update_mask={"paths": ["role"]}
    )
    before = await world.revision()
    for method, request in (("DisableUser", pb.DisableUserRequest(name="users/root")), ("UpdateUser", lower)):
        said = await refused(FailedPrecondition, "LAST_ADMIN", world.call(method, request))
        assert "whaleflux user add" in str(said)
    assert await world.revision() == before
    await world.user("olga", role="admin")
    ended = await asyncio.gather(
        world.call("DisableUser", pb.DisableUserRequest(name="users/root")),
        world.call("DisableUser", pb.DisableUserRequest(name="users/olga")),
        return_exceptions=True,
    )
    assert [getattr(one, "reason", "") for one in ended].count("LAST_ADMIN") == 1
    listed = (await world.call("ListUsers")).users
    assert sum(u.role == "admin" and not u.disabled and u.kind == trust_pb2.PRINCIPAL_KIND_USER for u in listed) == 1


async def test_the_first_admin_stays_disabled_through_restarts(world):
    await world.user("olga", role="admin")
    await world.call("DisableUser", pb.DisableUserRequest(name="users/root"))
    await world.start()
    assert (await world.call("GetUser", pb.GetUserRequest(name="users/root"))).disabled


async def test_nobody_gives_more_than_they_have(world):
    await world.user("olga", role="operator")
    await world.user("robot", role="admin", kind=trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT)
    await world.user("ann")
    before = await world.revision()
    admin = trust_pb2.Principal(role="admin")
    for method, request in (
        ("CreateUser", pb.CreateUserRequest(user_id="eve", user=admin)),
        (
            "UpdateUser",
            pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN, role="admin"), update_mask={"paths": ["role"]}),
        ),
        ("DisableUser", pb.DisableUserRequest(name="users/root")),
        ("CreateLoginLink", pb.CreateLoginLinkRequest(user="users/root")),
        ("CreateToken", pb.CreateTokenRequest(token=pb.Token(user="users/robot", role="admin"))),
    ):
        await refused(PermissionDenied, "ROLE_MISSING", world.call(method, request, "operator/olga"))
    assert await world.revision() == before
    await refused(
        PermissionDenied, "NOT_OWNER", world.token("operator/olga", user=ANN)
    )  # a program that is Ann is Ann's to make


async def test_people_see_themselves_and_nobody_else(world):
    await world.user("ann")
    await world.user("bob")
    assert [u.name for u in (await world.call("ListUsers", who="user/ann")).users] == [ANN]
    assert (await world.call("GetUser", pb.GetUserRequest(name=ANN), "user/ann")).name == ANN
    absent = await refused(NotFound, "", world.call("GetUser", pb.GetUserRequest(name="users/nobody"), "user/ann"))
    there = await refused(NotFound, "", world.call("GetUser", pb.GetUserRequest(name=BOB), "user/ann"))
    assert str(absent).replace("nobody", "bob") == str(there)
    await refused(NotFound, "", world.call("CreateLoginLink", pb.CreateLoginLinkRequest(user=BOB), "user/ann"))
    assert await world.code("ann", who="user/ann")  # for one's own next machine


async def test_bad_input_changes_nothing(world):
    await world.user("ann")
    before = await world.revision()
    for method, request in (
        ("CreateUser", pb.CreateUserRequest(user_id="Ann Lee")),
        ("CreateUser", pb.CreateUserRequest(user_id="bob", user=trust_pb2.Principal(role="scheduler"))),
        ("CreateUser", pb.CreateUserRequest(user_id="bob", user=trust_pb2.Principal(display_name="x" * 129))),
        ("CreateUser", pb.CreateUserRequest(user_id="bob", user=trust_pb2.Principal(kind=7))),
        ("UpdateUser", pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN), update_mask={"paths": ["disabled"]})),
        ("UpdateUser", pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN))),
        ("CreateLoginLink", pb.CreateLoginLinkRequest(user=ANN, ttl_s=8 * 86_400)),
        ("CreateToken", pb.CreateTokenRequest(ttl_s=367 * 86_400)),
        ("CreateToken", pb.CreateTokenRequest(token=pb.Token(role="root"))),
        ("CreateToken", pb.CreateTokenRequest(token=pb.Token(queues=["jobs/x"]))),
        ("Login", pb.LoginRequest(code="x", certificate_request_pem="no request")),
        ("Login", pb.LoginRequest(certificate_request_pem=csr())),
    ):
        await refused(InvalidArgument, "FIELD_INVALID", world.call(method, request))
    await refused(AlreadyExists, "USER_EXISTS", world.user("ann"))
    assert await world.revision() == before


# groups


async def test_members_of_a_group_are_those_who_are_known(world):
    await world.user("ann")
    await refused(
        NotFound,
        "",
        world.call("CreateGroup", pb.CreateGroupRequest(group_id="r", group=trust_pb2.Group(members=[BOB]))),
    )
    await world.call("CreateGroup", pb.CreateGroupRequest(group_id="research", group=trust_pb2.Group(members=[ANN])))
    await world.user("bob")
    added = await world.call("AddGroupMember", pb.AddGroupMemberRequest(name="groups/research", member=BOB))
    again = await world.call("AddGroupMember", pb.AddGroupMemberRequest(name="groups/research", member=BOB))
    assert list(added.members) == [ANN, BOB] and again.etag == added.etag
    answer = await world.login(code=await world.code("bob"))
    assert (await world.admitted(answer)).groups == {"research"}
    await world.call("RemoveGroupMember", pb.RemoveGroupMemberRequest(name="groups/research", member=BOB))
    assert (await world.admitted(answer)).groups == frozenset()
    ann = auth.Principal(auth.Identity("user", "ann"), frozenset({"research"}))
    assert [g.name for g in (await world.call("ListGroups", who=ann)).groups] == ["groups/research"]
    assert not (await world.call("ListGroups", who="user/bob")).groups
    await world.call("DeleteGroup", pb.DeleteGroupRequest(name="groups/research"))
    assert not (await world.call("ListGroups")).groups


# tokens


async def test_a_program_logs_in_by_a_token_with_its_scope_until_it_is_revoked(world):
    await world.user("ci", kind=trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT)
    made = await world.token(
        user="users/ci", role="viewer", queues=["queues/nightly"], display_name="builds", ttl_s=3600
    )
    answers = [await world.login(token=made.secret) for _ in range(2)]  # as often as it likes
    who = await world.admitted(answers[0])
    assert (who.subject, who.queues, who.identity.session) == ("viewer/ci", {"nightly"}, names.last(made.name))
    assert pki.expiry(answers[0].certificate_pem.encode()) == world.clock.now() + timedelta(
        hours=1
    )  # no longer than it
    (listed,) = (await world.call("ListTokens", pb.ListTokensRequest(user="users/ci"))).tokens
    assert listed.last_use_time.seconds and listed.display_name == "builds"
    assert not (await world.call("ListTokens", who="user/ann")).tokens
    await refused(NotFound, "", world.call("RevokeToken", pb.RevokeTokenRequest(name=made.name), "user/ann"))
    await refused(FailedPrecondition, "WRONG_STATE", world.call("Logout", who=who))
    await world.call("RevokeToken", pb.RevokeTokenRequest(name=made.name))
    await refused(Unauthenticated, "REVOKED", world.admitted(answers[0]))
    await refused(Unauthenticated, "LOGIN_REFUSED", world.login(token=made.secret))


async def test_a_token_gives_no_more_than_its_user_has_by_now_and_makes_no_tokens(world):
    await world.user("ann", role="operator")
    scoped = pb.CreateTokenRequest(token=pb.Token(queues=["queues/nightly"]))
    await refused(
        InvalidArgument, "FIELD_INVALID", world.call("CreateToken", scoped, "operator/ann")
    )  # it would bound nothing
    made = await world.token("operator/ann")
    assert (made.user, made.role) == (ANN, "operator")
    who = await world.admitted(await world.login(token=made.secret))
    await refused(PermissionDenied, "ROLE_MISSING", world.call("CreateToken", who=who))
    await refused(
        PermissionDenied, "ROLE_MISSING", world.call("CreateLoginLink", pb.CreateLoginLinkRequest(user=ANN), who)
    )
    await world.call(
        "UpdateUser",
        pb.UpdateUserRequest(user=trust_pb2.Principal(name=ANN, role="user"), update_mask={"paths": ["role"]}),
    )
    await refused(Unauthenticated, "LOGIN_REFUSED", world.login(token=made.secret))


async def test_what_has_ended_is_forgotten_after_a_day(world):
    await world.user("ann")
    await world.login(code=await world.code("ann"))
    made = await world.token("user/ann", ttl_s=60)
    await world.clock.advance(9 * 86_400)
    await world.code("ann")
    left = [
        entry.key
        for prefix in (keys.SESSIONS, keys.LOGIN_CODES, keys.TOKENS)
        for entry in (await world.store.list(prefix)).entries
    ]
    assert len(left) == 1 and names.last(made.name) not in left[0]


async def test_of_many_logins_of_one_person_the_oldest_make_room(world, monkeypatch):
    monkeypatch.setattr("whaleflux_inventory.sessions.MOST_LOGINS", 3)
    await world.user("ann")
    answers = []
    for _ in range(5):
        answers.append(await world.login(code=await world.code("ann")))
        await world.clock.advance(1)
    await world.clock.advance(700)
    await world.code("ann")
    assert len((await world.store.list(keys.SESSIONS)).entries) == 3
    await refused(Unauthenticated, "SESSION_ENDED", world.admitted(answers[1]))
    assert await world.admitted(answers[2])


# refusals


async def test_an_address_that_is_refused_again_and_again_waits_and_locks_nobody_out(world):
    await world.user("ann")
    code = await world.code("ann")
    ended = []
    for _ in range(22):
        try:
            await world.login(code="wfc.nothing", peer=f"10.0.0.9:{4000 + len(ended)}")
        except StatusError as error:
            ended.append(type(error))
    assert ended == [Unauthenticated] * 20 + [ResourceExhausted] * 2
    with pytest.raises(Unauthenticated):
        await world.login(code="wfc.nothing", peer="10.0.0.10:1")
    assert await world.login(code=code)  # the right one, from the very same address


async def test_without_an_authority_nothing_is_promised(world):
    rpc = assemble_identity(world.store, world.clock, None, Settings(), world.ca.certificate_pem)
    await world.user("ann")
    world.rpc = rpc
    await refused(FailedPrecondition, "NO_AUTHORITY", world.login(code="x"))
    await refused(FailedPrecondition, "NO_AUTHORITY", world.token("user/ann"))
    await refused(FailedPrecondition, "NO_AUTHORITY", world.code("ann"))
