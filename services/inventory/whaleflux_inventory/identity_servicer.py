"""IdentityService: each rpc is one call of the part that does the work."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from whaleflux import names
from whaleflux.rpc import auth, roles
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import identity_pb2_grpc as rpc
from whaleflux.v1 import trust_pb2
from whaleflux_inventory.groups import Groups
from whaleflux_inventory.logins import Logins
from whaleflux_inventory.people import People
from whaleflux_inventory.sessions import session_of
from whaleflux_inventory.tokens import Tokens

Context = Any


class IdentityServicer(rpc.IdentityServiceServicer):
    """Which role may call is the boundary's business; whom a caller may see, give roles, act as is asked in the parts."""

    def __init__(
        self,
        store: Store,
        people: People,
        groups: Groups,
        logins: Logins,
        tokens: Tokens,
        options: pb.GetLoginOptionsResponse,
    ) -> None:
        self._store, self._people, self._groups = store, people, groups
        self._logins, self._tokens, self._options = logins, tokens, options

    async def GetLoginOptions(self, request: pb.GetLoginOptionsRequest, context: Context) -> pb.GetLoginOptionsResponse:
        return self._options

    async def Login(self, request: pb.LoginRequest, context: Context) -> pb.LoginResponse:
        return await self._logins.log_in(request, _address(context))

    async def RenewLogin(self, request: pb.RenewLoginRequest, context: Context) -> pb.LoginResponse:
        return await self._logins.renew(request)

    async def Logout(self, request: pb.LogoutRequest, context: Context) -> Empty:
        await self._logins.log_out(request)
        return Empty()

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        who = auth.principal()
        answer = pb.WhoAmIResponse(
            subject=who.subject,
            role=who.role,
            name=names.user(who.name) if who.role in roles.LOGIN and names.ID_PATTERN.fullmatch(who.name) else "",
            groups=sorted(who.groups),
            queues=[names.queue(queue) for queue in sorted(who.queues or ())],
            session=who.identity.session,
            fleet=who.identity.trust_domain,
            peer=_address(context),
        )
        kept = await self._store.get(keys.SESSIONS + answer.session) if answer.session else None
        if kept is not None:
            session = session_of(kept)
            answer.session_expire_time.CopyFrom(session.expire_time)
            answer.method = session.method
        return answer

    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> trust_pb2.Principal:
        return await self._people.create(request)

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> trust_pb2.Principal:
        return await self._people.get(request.name)

    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> pb.ListUsersResponse:
        page = await self._people.page(request)
        return pb.ListUsersResponse(users=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable)

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: Context) -> trust_pb2.Principal:
        return await self._people.update(request)

    async def DisableUser(self, request: pb.DisableUserRequest, context: Context) -> trust_pb2.Principal:
        return await self._people.disable(request)

    async def EnableUser(self, request: pb.EnableUserRequest, context: Context) -> trust_pb2.Principal:
        return await self._people.enable(request)

    async def CreateLoginLink(self, request: pb.CreateLoginLinkRequest, context: Context) -> pb.LoginLink:
        return await self._logins.create_link(request)

    async def CreateGroup(self, request: pb.CreateGroupRequest, context: Context) -> trust_pb2.Group:
        return await self._groups.create(request)

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Context) -> pb.ListGroupsResponse:
        page = await self._groups.page(request)
        return pb.ListGroupsResponse(
            groups=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def DeleteGroup(self, request: pb.DeleteGroupRequest, context: Context) -> Empty:
        await self._groups.delete(request)
        return Empty()

    async def AddGroupMember(self, request: pb.AddGroupMemberRequest, context: Context) -> trust_pb2.Group:
        return await self._groups.add(request)

    async def RemoveGroupMember(self, request: pb.RemoveGroupMemberRequest, context: Context) -> trust_pb2.Group:
        return await self._groups.remove(request)

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.Token:
        return await self._tokens.create(request)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        page = await self._tokens.page(request)
        return pb.ListTokensResponse(
            tokens=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> Empty:
        await self._tokens.revoke(request)
        return Empty()


def _address(context: Context) -> str:
    """Who dialled; "" where that is not known."""
    return auth.address_of(context.peer() or "", context.auth_context(), context.invocation_metadata() or ())
