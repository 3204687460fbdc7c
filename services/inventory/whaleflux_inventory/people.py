"""Users and service accounts: who is known, with which role, and who is not admitted any more."""

from __future__ import annotations

import hashlib

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Delete, Entry, Put, Store, Unchanged, Write
from whaleflux.store.reading import read_all
from whaleflux.trust import audit, ownership
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory import records
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.sessions import end_logins

MAX_DISPLAY_NAME = 128
_KINDS = {
    trust_pb2.PRINCIPAL_KIND_UNSPECIFIED,
    trust_pb2.PRINCIPAL_KIND_USER,
    trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT,
}
_CHANGEABLE = ("role", "display_name", "awaits_oidc")


def user_of(entry: Entry) -> trust_pb2.Principal:
    """A stored user with its etag."""
    user = trust_pb2.Principal.FromString(entry.value)
    user.etag = etag_of(entry)
    return user


class People:
    """The records of principals. Who may give which role is asked here; who may ask at all is the boundary's business."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def ensure_admin(self, user_id: str) -> None:
        """The admin whose certificate was made beside the fleet (bootstrap, `whaleflux up`) is known, unless it was before."""
        now = self._clock.now()
        user = trust_pb2.Principal(name=names.user(user_id), kind=trust_pb2.PRINCIPAL_KIND_USER, role=roles.ADMIN)
        user.create_time.FromDatetime(now)
        user.last_change.CopyFrom(changes.asked(What.CREATED, now))
        await self._created(user)

    async def create(self, request: pb.CreateUserRequest) -> trust_pb2.Principal:
        """A new user; the same request again (by its request_id) answers with what it made."""
        wanted, now = request.user, self._clock.now()
        names.check_id("user_id", request.user_id)
        found = Findings()
        found.text("request_id", request.request_id, 128)
        found.text("user.display_name", wanted.display_name, MAX_DISPLAY_NAME)
        if wanted.kind not in _KINDS:
            found.add("user.kind", f"{wanted.kind} is neither a person (1) nor a service account (2)")
        found.raise_if_any()
        user = trust_pb2.Principal(
            name=names.user(request.user_id),
            kind=wanted.kind or trust_pb2.PRINCIPAL_KIND_USER,
            role=checked_role(wanted.role or roles.USER),
            display_name=wanted.display_name,
            awaits_oidc=wanted.awaits_oidc,
            request_id=request.request_id,
        )
        if user.awaits_oidc and user.kind == trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT:
            raise InvalidArgument(FieldViolation("user.awaits_oidc", "is for people; programs log in by tokens"))
        user.create_time.FromDatetime(now)
        user.last_change.CopyFrom(changes.asked(What.CREATED, now))
        if (made := await self._created(user)) is not None:
            audit.note(after=f"role {user.role}")
            return made
        there = await self.get(user.name)
        if not request.request_id or there.request_id != request.request_id:
            raise AlreadyExists(
                "user", user.name, f"a new code for them is made with: whaleflux user link {names.last(user.name)}"
            )
        return there

    async def _created(self, user: trust_pb2.Principal) -> trust_pb2.Principal | None:
        key, value = keys.of_name(keys.PRINCIPALS, user.name), user.SerializeToString(deterministic=True)
        try:
            revision = await self._store.commit(Put(key, value), when=[Absent(key)])
        except ConditionFailed:
            return None
        return user_of(Entry(key, value, revision, revision))

    async def get(self, name: str) -> trust_pb2.Principal:
        """One user; to those who are no operators, others are not there."""
        require_self_or_operator(name)
        return user_of(await read_user(self._store, name))

    async def page(self, request: pb.ListUsersRequest) -> Page[trust_pb2.Principal]:
        """One page of users, or of oneself, whom the records may not know (an identity from the bootstrap folder)."""
        ownership.note_asked()
        who = auth.principal()
        return await list_page(
            self._store,
            keys.PRINCIPALS,
            user_of,
            size=page_size(request.page_size),
            token=request.page_token,
            scope="" if who.is_operator or who.is_service else keys.PRINCIPALS + who.name,
            keep=lambda user: is_self_or_operator(user.name),
        )

    async def update(self, request: pb.UpdateUserRequest) -> trust_pb2.Principal:
        """Role, display name, whether the provider's next login of the name is bound to it."""
        wanted, paths = request.user, paths_of(request.update_mask.paths, _CHANGEABLE)
        found = Findings()
        found.text("user.display_name", wanted.display_name, MAX_DISPLAY_NAME)
        found.raise_if_any()
        if "role" in paths:
            checked_role(wanted.role)

        def change(user: trust_pb2.Principal) -> None:
            require_manageable(user)
            for path in paths:
                setattr(user, path, getattr(wanted, path))
            if user.awaits_oidc:  # the next one takes the place of whoever was bound
                user.ClearField("oidc_issuer")
                user.ClearField("oidc_subject")

        return await self._change(wanted.name, wanted.etag, change)

    async def disable(self, request: pb.DisableUserRequest) -> trust_pb2.Principal:
        """Nobody admits the user any more, and the logins from before are gone for good."""

        def change(user: trust_pb2.Principal) -> None:
            require_manageable(user)
            user.disabled = True

        disabled = await self._change(request.name, request.etag, change, request.reason)
        await end_logins(self._store, disabled.name)
        return disabled

    async def enable(self, request: pb.EnableUserRequest) -> trust_pb2.Principal:
        """The user may log in again."""

        def change(user: trust_pb2.Principal) -> None:
            require_manageable(user)
            user.disabled = False

        return await self._change(request.name, request.etag, change)

    async def _change(
        self, name: str, etag: str, how: records.Change[trust_pb2.Principal], reason: str = ""
    ) -> trust_pb2.Principal:
        """Applies `how`; the transaction holds only while somebody else stays admin, where an admin goes by it."""
        for _ in range(records.ATTEMPTS):
            entry = await read_user(self._store, name)
            check_etag(etag, entry)
            before = trust_pb2.Principal.FromString(entry.value)
            user = trust_pb2.Principal.FromString(entry.value)
            how(user)
            if user == before:
                return user_of(entry)
            when: list[Condition] = [Unchanged(entry)]
            if is_admin(before) and not is_admin(user):
                when.append(await self._another_admin(name))
            user.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), reason))
            value = user.SerializeToString(deterministic=True)
            writes: list[Write] = [Put(entry.key, value)]
            if before.oidc_subject and not user.oidc_subject:
                writes.append(Delete(subject_key(before.oidc_issuer, before.oidc_subject)))
            try:
                revision = await self._store.commit(*writes, when=when)
            except ConditionFailed:
                continue
            audit.note(before=_told(before), after=_told(user))
            return user_of(Entry(entry.key, value, revision, entry.created, entry.version + 1))
        raise records.contended(name)

    async def _another_admin(self, name: str) -> Condition:
        """That an admin beside `name` stays one. Raises FailedPrecondition when there is none."""
        snapshot = await self._store.list(keys.PRINCIPALS)
        for entry, user in read_all(snapshot.entries, user_of).values:
            if user.name != name and is_admin(user):
                return Unchanged(entry)
        raise FailedPrecondition(
            f"{name} is the last admin of this fleet; make another one first: whaleflux user add NAME --role admin",
            reason=ErrorReason.LAST_ADMIN,
            metadata={"name": name},
        )


def subject_key(issuer: str, subject: str) -> str:
    """Where it is kept which user a person of an OpenID provider is."""
    return keys.OIDC_SUBJECTS + hashlib.sha256(f"{issuer}\0{subject}".encode()).hexdigest()


async def read_user(store: Store, name: str) -> Entry:
    """The entry of users/{user}; raises NotFound."""
    names.split(name, "users")
    return await records.read(store, keys.PRINCIPALS, name, "user")


def is_admin(user: trust_pb2.Principal) -> bool:
    """Whether it is a person who may everything now."""
    return user.role == roles.ADMIN and not user.disabled and user.kind == trust_pb2.PRINCIPAL_KIND_USER


def is_self_or_operator(name: str) -> bool:
    """Whether the caller may see users/{user}."""
    ownership.note_asked()
    who = auth.principal()
    return who.is_operator or who.is_service or name == names.user(who.name)


def require_self_or_operator(name: str) -> None:
    """Others are not there for those who are no operators: the same answer as for nobody."""
    if not is_self_or_operator(name):
        raise records.not_found("user", name)


def checked_role(role: str) -> str:
    """A role that the caller may give: none above its own."""
    if role not in roles.GIVEN:
        raise InvalidArgument(
            FieldViolation("user.role", f"{role[:40]!r} is no role; use one of {', '.join(roles.GIVEN)}")
        )
    mine = auth.principal().role
    if not roles.within(role, mine):
        raise PermissionDenied(
            f"role {mine} may not give role {role}; ask an admin",
            metadata={"role": mine, "needs": role},
        )
    return role


def require_manageable(user: trust_pb2.Principal) -> None:
    """Operators do not change admins."""
    mine = auth.principal().role
    if not roles.within(user.role, mine):
        raise PermissionDenied(
            f"{user.name} is {user.role}, which role {mine} may not change; ask an admin",
            metadata={"role": mine, "needs": user.role, "name": user.name},
        )


def require_may_act_as(user: trust_pb2.Principal, role: str = "") -> None:
    """Nobody makes what logs in as somebody who may more than they do: that would be theirs to use. `role`: less than the user's."""
    mine, wanted = auth.principal().role, role or user.role
    if not roles.within(wanted, mine):
        raise PermissionDenied(
            f"role {mine} may make nothing by which one logs in as {wanted}; ask an admin",
            metadata={"role": mine, "needs": wanted, "name": user.name},
        )


def _told(user: trust_pb2.Principal) -> str:
    return f"role {user.role}" + (", disabled" if user.disabled else "")
