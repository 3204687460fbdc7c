"""Groups of users: whom queues can name together."""

from __future__ import annotations

from collections.abc import Callable

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FieldViolation, InvalidArgument
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Put, Store
from whaleflux.trust import audit, ownership
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2
from whaleflux_inventory import records
from whaleflux_inventory.people import read_user

MAX_MEMBERS = 10_000


def group_of(entry: Entry) -> trust_pb2.Group:
    """A stored group with its etag."""
    group = trust_pb2.Group.FromString(entry.value)
    group.etag = etag_of(entry)
    return group


class Groups:
    """What operators do with groups."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def create(self, request: pb.CreateGroupRequest) -> trust_pb2.Group:
        """A new group of users who are known."""
        names.check_id("group_id", request.group_id)
        _check_count(len(request.group.members))
        for member in request.group.members:
            await read_user(self._store, member)
        now = self._clock.now()
        group = trust_pb2.Group(name=names.group(request.group_id), members=sorted(set(request.group.members)))
        group.create_time.FromDatetime(now)
        group.last_change.CopyFrom(changes.asked(What.CREATED, now))
        key, value = keys.of_name(keys.GROUPS, group.name), group.SerializeToString(deterministic=True)
        try:
            revision = await self._store.commit(Put(key, value), when=[Absent(key)])
        except ConditionFailed:
            raise AlreadyExists("group", group.name) from None
        audit.note(after=f"{len(group.members)} members")
        return group_of(Entry(key, value, revision, revision))

    async def page(self, request: pb.ListGroupsRequest) -> Page[trust_pb2.Group]:
        """One page of the groups that the caller may see: all for operators, else its own."""
        ownership.note_asked()
        who = auth.principal()
        return await list_page(
            self._store,
            keys.GROUPS,
            group_of,
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda group: who.is_operator or who.is_service or names.last(group.name) in who.groups,
        )

    async def delete(self, request: pb.DeleteGroupRequest) -> None:
        """Forgets a group."""
        names.split(request.name, "groups")
        entry = await records.read(self._store, keys.GROUPS, request.name, "group")
        check_etag(request.etag, entry)
        marked = trust_pb2.Group.FromString(entry.value)
        marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            await changes.delete(self._store, entry, marked.SerializeToString(deterministic=True))
        except ConditionFailed:
            raise records.contended(request.name) from None

    async def add(self, request: pb.AddGroupMemberRequest) -> trust_pb2.Group:
        """A user who is known becomes a member."""
        await read_user(self._store, request.member)

        def change(members: set[str]) -> None:
            members.add(request.member)
            _check_count(len(members))

        return await self._change(request.name, change)

    async def remove(self, request: pb.RemoveGroupMemberRequest) -> trust_pb2.Group:
        """The user is no member any more."""
        names.split(request.member, "users", field="member")
        return await self._change(request.name, lambda members: members.discard(request.member))

    async def _change(self, name: str, how: Callable[[set[str]], None]) -> trust_pb2.Group:
        names.split(name, "groups")

        def change(group: trust_pb2.Group) -> None:
            members = set(group.members)
            how(members)
            if members == set(group.members):
                return
            audit.note(before=f"{len(group.members)} members", after=f"{len(members)} members")
            group.members[:] = sorted(members)
            group.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now()))

        return group_of(await records.change(self._store, keys.GROUPS, name, trust_pb2.Group, change, kind="group"))


def _check_count(members: int) -> None:
    if members > MAX_MEMBERS:
        raise InvalidArgument(FieldViolation("members", f"has {members} entries; use at most {MAX_MEMBERS}"))
