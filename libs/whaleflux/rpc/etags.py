"""Etags (AIP-154): the quoted store revision that last changed a resource."""

from __future__ import annotations

from whaleflux.errors import Aborted
from whaleflux.store.api import Entry


def etag_of(entry: Entry) -> str:
    """The etag that `entry` is shown with: its revision in double quotes."""
    return f'"{entry.revision}"'


def check_etag(given: str, entry: Entry) -> None:
    """Raises Aborted (ETAG_MISMATCH) when the caller read another version; "" means any version will do."""
    if given and given != (current := etag_of(entry)):
        raise Aborted(
            f"etag {given[:40]!r} is not the current {current}; read the resource again and repeat the change",
            metadata={"etag": given[:40], "current": current},
            retry_after_s=0.1,
        )
