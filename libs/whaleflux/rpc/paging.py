"""Pages of a listing (AIP-158): sizes with a default and a limit, and opaque tokens.

A token holds the last key of its page and the store revision of the first page, so that all pages show one state.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.reading import read_all

T = TypeVar("T")
MAX_TOKEN_CHARS = 2048


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """What one List answers: `next_page_token` is "" on the last page, `revision` where a watch goes on.

    `unreadable` names resources of this page that exist and whose records cannot be read.
    """

    items: tuple[T, ...]
    next_page_token: str
    revision: int
    unreadable: tuple[str, ...] = ()


def page_size(asked: int, *, default: int = 100, most: int = 1000) -> int:
    """How many to give: 0 means `default`, more than `most` means `most`; negative is refused."""
    if asked < 0:
        raise InvalidArgument(FieldViolation("page_size", f"{asked} is negative; use 0 (for {default}) to {most}"))
    return min(asked or default, most)


def page_token(last_key: str, revision: int) -> str:
    """The token of the page behind `last_key` in the state at `revision`."""
    return base64.urlsafe_b64encode(f"{revision}:{last_key}".encode()).decode()


def parse_token(token: str, prefix: str) -> tuple[str, int]:
    """Last key and revision of a token of ours for this listing; ("", 0) for the first page."""
    if not token:
        return "", 0
    try:
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError
        revision, _, key = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().partition(":")
        if not (revision.isascii() and revision.isdecimal() and len(revision) < 20 and key.startswith(prefix)):
            raise ValueError
    except (ValueError, binascii.Error):
        raise InvalidArgument(
            FieldViolation("page_token", "is not a token of this listing; start again without one")
        ) from None
    return key, int(revision)


async def list_page(
    store: Store,
    prefix: str,
    decode: Callable[[Entry], T],
    *,
    size: int,
    token: str = "",
    scope: str = "",
    keep: Callable[[T], bool] = lambda _: True,
) -> Page[T]:
    """One page of at most `size` resources under `prefix` that `keep` admits, in key order.

    `scope` narrows the listing to keys that begin with it ("" for all of `prefix`). Raises InvalidArgument for a bad token
    and Compacted when the token's state is gone (list again).
    """
    within = scope or prefix
    after, revision = parse_token(token, within)
    found: list[tuple[str, T]] = []
    unreadable: list[str] = []
    while len(found) <= size:  # one more than asked for tells whether there is a next page
        snapshot = await store.list(within, after=after, limit=size + 1, at=revision)
        revision = snapshot.revision
        read = read_all(snapshot.entries, decode)
        found += [(entry.key, item) for entry, item in read.values if keep(item)]
        unreadable += read.unreadable
        if not snapshot.after:
            break
        after = snapshot.after
    page, last = found[:size], found[size - 1][0] if len(found) > size else ""
    here = tuple(keys.name_of(key) for key in unreadable if not last or key <= last)
    return Page(tuple(item for _, item in page), page_token(last, revision) if last else "", revision, here)
