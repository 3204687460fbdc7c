"""Records that people declare: created once, listed, changed and forgotten under their etags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from whaleflux.clock import Clock
from whaleflux.errors import Aborted, AlreadyExists, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import changes
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Put, Store, Unchanged

M = TypeVar("M", bound=Message)


class Records(Generic[M]):
    """Of one kind, below one prefix. `hint`: the command that lists them."""

    def __init__(self, store: Store, clock: Clock, kind: type[M], prefix: str, word: str, hint: str) -> None:
        self._store, self._clock, self._kind = store, clock, kind
        self._prefix, self._word, self._hint = prefix, word, hint

    def shown(self, entry: Entry) -> M:
        """The record with its etag. Raises DecodeError for what is none."""
        message = self._kind()
        message.ParseFromString(entry.value)
        message.etag = etag_of(entry)  # type: ignore[attr-defined]
        return message

    async def create(self, name: str, message: Any, when: Sequence[Condition] = ()) -> M:
        """Stores a new one. Raises AlreadyExists, and ConditionFailed when `when` does not hold."""
        message.name = name
        message.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        key, value = keys.of_name(self._prefix, name), message.SerializeToString(deterministic=True)
        try:
            revision = await self._store.commit(Put(key, value), when=[Absent(key), *when])
        except ConditionFailed:
            if await self._store.get(key) is None:
                raise
            raise AlreadyExists(self._word, name, f"choose another name; see: {self._hint}") from None
        return self.shown(Entry(key, value, revision, revision))

    async def page(self, size: int, token: str) -> Page[M]:
        """One page in order of names."""
        return await list_page(self._store, self._prefix, self.shown, size=page_size(size), token=token)

    async def read(self, name: str) -> tuple[Entry, M]:
        """One of them. Raises NotFound."""
        entry = await self._store.get(keys.of_name(self._prefix, name))
        if entry is None:
            raise NotFound(self._word, name, f"see: {self._hint}")
        return entry, self.shown(entry)

    async def change(self, name: str, etag: str, edit: Callable[[M], None], reason: str) -> M:
        """Stores it edited. Raises NotFound, and Aborted when it is another version by then."""
        entry, message = await self.read(name)
        check_etag(etag, entry)
        edit(message)
        return await self._stored(entry, message, changes.asked(What.CHANGED, self._clock.now(), reason))

    async def delete(self, name: str, etag: str) -> None:
        """Forgets it. Raises NotFound, and Aborted when it is another version by then."""
        entry, message = await self.read(name)
        check_etag(etag, entry)
        self._bare(message).last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            await changes.delete(self._store, entry, message.SerializeToString(deterministic=True))
        except ConditionFailed:
            raise self._changed(name) from None

    async def _stored(self, entry: Entry, message: Any, asked: Message) -> M:
        self._bare(message).last_change.CopyFrom(asked)
        value = message.SerializeToString(deterministic=True)
        try:
            revision = await self._store.commit(Put(entry.key, value), when=[Unchanged(entry)])
        except ConditionFailed:
            raise self._changed(message.name) from None
        return self.shown(Entry(entry.key, value, revision, entry.created))

    def _bare(self, message: Any) -> Any:
        message.ClearField("etag")
        return message

    def _changed(self, name: str) -> Aborted:
        return Aborted(f"{name} changed meanwhile; read it again and repeat the change", retry_after_s=0.1)
