"""Secrets in the store: what people may see and the wrapped keys in one record, each version's sealed value in one of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, ResourceExhausted
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.etags import etag_of
from whaleflux.rpc.paging import Page, list_page
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.store.reading import read_all
from whaleflux.v1 import secrets_pb2 as pb
from whaleflux_inventory import lease_book
from whaleflux_inventory.secret_rules import MAX_IN_ALL, MAX_PER_OWNER, Shared

_LIST_AT_ONCE = 500


class SecretRecords:
    """Reads and writes them whole; knows nothing of keys and people."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, name: str) -> tuple[Entry, pb.SecretRecord] | None:
        """The record of a name. Raises FailedPrecondition (RECORD_UNREADABLE): what cannot be read is not absent."""
        entry = await self._store.get(keys.of_name(keys.SECRETS, name))
        return None if entry is None else (entry, record_of(entry))

    async def value(self, name: str, version: int) -> pb.SealedValue:
        """The sealed value of a version that the record names. Raises FailedPrecondition where it cannot be read."""
        entry = await self._store.get(_value_key(name, version))
        try:
            return pb.SealedValue.FromString(entry.value if entry else b"\xff")
        except DecodeError:
            raise _unreadable(names.last(name)) from None

    async def create(self, record: pb.SecretRecord, sealed: pb.SealedValue) -> pb.Secret:
        """Raises AlreadyExists, ResourceExhausted."""
        name = record.secret.name
        key = keys.of_name(keys.SECRETS, name)
        await self._check_room(record.secret.owner)
        value = Put(_value_key(name, 1), sealed.SerializeToString())
        try:
            revision = await self._store.commit(Put(key, packed(record)), value, when=[Absent(key)])
        except ConditionFailed:
            raise taken(name) from None
        return shown(record.secret, revision)

    async def replace(
        self, entry: Entry, record: pb.SecretRecord, sealed: pb.SealedValue | None = None, gone: Sequence[int] = ()
    ) -> pb.Secret:
        """Writes a record over what was read, with the value of its newest version. Raises ConditionFailed when it changed meanwhile."""
        name = record.secret.name
        writes: list[Put | Delete] = [Put(entry.key, packed(record))]
        if sealed is not None:
            writes.append(Put(_value_key(name, record.secret.versions[-1].version), sealed.SerializeToString()))
        writes += [Delete(_value_key(name, version)) for version in gone]
        return shown(record.secret, await self._store.commit(*writes, when=[Unchanged(entry)]))

    async def delete(self, entry: Entry, secret: pb.Secret) -> None:
        """The record and all its values. Raises FailedPrecondition while machines are rented by it, Aborted when it changed meanwhile."""
        unused = await lease_book.without_keys(self._store, secret.name)
        values = [Delete(_value_key(secret.name, one.version)) for one in secret.versions]
        try:
            await self._store.commit(Delete(entry.key), *values, when=[Unchanged(entry), *unused])
        except ConditionFailed:
            raise Aborted(
                f"{secret.name} changed, or something was rented, while it was being deleted; read it again"
            ) from None

    async def delete_unreadable(self, name: str) -> None:
        """A record that nobody can read, and whatever values lie under its name."""
        values = await self._store.list(_value_key(name, ""), limit=100)
        await self._store.commit(Delete(keys.of_name(keys.SECRETS, name)), *(Delete(one.key) for one in values.entries))

    async def page(self, size: int, token: str, keep: Callable[[pb.Secret], bool]) -> Page[pb.Secret]:
        """One page of those that `keep` admits."""
        return await list_page(self._store, keys.SECRETS, _shown_entry, size=size, token=token, keep=keep)

    async def names(self) -> list[str]:
        """Of all, readable or not."""
        return [keys.name_of(entry.key) async for entry in self._entries()]

    async def _check_room(self, owner: str) -> None:
        """Counts; two who create at once may both be let in, which harms nobody."""
        total = own = 0
        async for entry in self._entries():
            total += 1
            own += any(record.secret.owner == owner for _, record in read_all([entry], record_of).values)
        for found, most, whose in ((own, MAX_PER_OWNER, f"{owner} has"), (total, MAX_IN_ALL, "this fleet keeps")):
            if found >= most:
                raise ResourceExhausted(
                    f"{whose} {found} secrets, at most {most}; delete some with: whaleflux secrets rm NAME",
                    metadata={"limit": str(most)},
                )

    async def _entries(self) -> AsyncIterator[Entry]:
        after, at = "", 0
        while True:
            page = await self._store.list(keys.SECRETS, after=after, limit=_LIST_AT_ONCE, at=at)
            for entry in page.entries:
                yield entry
            if not page.after:
                return
            after, at = page.after, page.revision


def taken(name: str) -> AlreadyExists:
    """Names are the whole fleet's, so this says no more than that."""
    hint = "names are the whole fleet's: choose another, such as one with yours in it; a job can still call its variable as it likes"
    return AlreadyExists("secret", name, hint)


def record_of(entry: Entry) -> pb.SecretRecord:
    """Raises FailedPrecondition (RECORD_UNREADABLE) for what is no record of its own key."""
    try:
        record = pb.SecretRecord.FromString(entry.value)
    except DecodeError:
        raise _unreadable(names.last(keys.name_of(entry.key))) from None
    if record.secret.name != keys.name_of(entry.key):
        raise _unreadable(names.last(keys.name_of(entry.key)))
    return record


def shared(secret: pb.Secret) -> Shared:
    """Who may use it, for the core."""
    return Shared(secret.owner, secret.team, tuple(secret.queues))


def shown(secret: pb.Secret, revision: int) -> pb.Secret:
    """As people see it."""
    found = pb.Secret()
    found.CopyFrom(secret)
    found.etag = f'"{revision}"'
    return found


def packed(record: pb.SecretRecord) -> bytes:
    return record.SerializeToString(deterministic=True)


def _shown_entry(entry: Entry) -> pb.Secret:
    found = record_of(entry).secret
    found.etag = etag_of(entry)
    return found


def _value_key(name: str, version: int | str) -> str:
    return f"{keys.SECRET_VALUES}{names.last(name)}/{version}"


def _unreadable(secret: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the record of secret {secret!r} cannot be read: it is damaged, or a newer version wrote it; it is not gone: update inventory, "
        "or delete it and store it anew",
        reason=ErrorReason.RECORD_UNREADABLE,
        metadata={"name": names.secret(secret)},
    )
