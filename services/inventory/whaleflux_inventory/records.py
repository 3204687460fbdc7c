"""Resources as records of the store: read one, change one under compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from whaleflux.errors import Conflict, NotFound
from whaleflux.rpc.etags import check_etag
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Entry, Put, Store, Unchanged

M = TypeVar("M", bound=Message)
ATTEMPTS = 16  # of a change that others keep winning


async def read(store: Store, prefix: str, name: str, kind: str) -> Entry:
    """The entry of a resource name; raises NotFound."""
    entry = await store.get(keys.of_name(prefix, name))
    if entry is None:
        raise NotFound(kind, name)
    return entry


async def change(
    store: Store,
    prefix: str,
    name: str,
    message: type[M],
    how: Callable[[M], None],
    *,
    kind: str,
    etag: str = "",
) -> Entry:
    """Applies `how` to the stored message and writes it, again and again until nobody interfered.

    Nothing is written when `how` changes nothing. Raises NotFound, Conflict (the etag does not match, or others kept
    winning), and whatever `how` refuses.
    """
    for _ in range(ATTEMPTS):
        entry = await read(store, prefix, name, kind)
        check_etag(etag, entry)
        record = message.FromString(entry.value)
        how(record)
        value = record.SerializeToString(deterministic=True)
        if value == entry.value:
            return entry
        try:
            revision = await store.commit(Put(entry.key, value), when=[Unchanged(entry)])
        except ConditionFailed:
            continue
        return Entry(entry.key, value, revision, entry.created, entry.version + 1)
    raise contended(name)


def contended(name: str) -> Conflict:
    """Too many writers at once."""
    return Conflict(f"{name} keeps changing; try again", metadata={"name": name}, retry_after_s=0.5)
