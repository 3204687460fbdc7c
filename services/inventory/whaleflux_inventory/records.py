"""Resources as records of the store: read one, change one under compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from whaleflux.errors import Aborted, NotFound
from whaleflux.rpc.etags import check_etag
from whaleflux.store import keys
from whaleflux.store.api import Condition, ConditionFailed, Entry, Fenced, Put, Store, Unchanged, Write

M = TypeVar("M", bound=Message)
Change = Callable[[M], None]
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
    also: Sequence[Write] = (),
    when: Sequence[Condition] = (),
) -> Entry:
    """Applies `how` to the stored message and writes it, and `also` with it, again and again until nobody interfered.

    Nothing is written when `how` changes nothing. Raises NotFound, Aborted (the etag does not match, or others kept
    winning), Fenced (a `Held` of `when` does not hold), and whatever `how` refuses.
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
            revision = await store.commit(Put(entry.key, value), *also, when=[Unchanged(entry), *when])
        except Fenced:
            raise
        except ConditionFailed:
            continue
        return Entry(entry.key, value, revision, entry.created, entry.version + 1)
    raise contended(name)


def not_found(kind: str, name: str) -> NotFound:
    """The answer for what is not there, and for what is not there for the caller."""
    return NotFound(kind, name)


def contended(name: str) -> Aborted:
    """Too many writers at once."""
    return Aborted(f"{name} keeps changing; try again", metadata={"name": name}, retry_after_s=0.5)
