"""How far a pull is, in the words that agents report and people read; and read back, where somebody reckons with it."""

from __future__ import annotations

import re
from typing import NamedTuple

from whaleflux import quantities
from whaleflux.quantities import shown_bytes

_SIZE = r"\d+(?:\.\d+)?(?:e\+\d+)? (?:B|kB|MB|GB|TB)"
_WORDS = re.compile(rf"\((?P<done>{_SIZE}) of (?P<total>{_SIZE})(?:, (?P<rate>{_SIZE})/s)?\)")


class Pulled(NamedTuple):
    """Bytes, to three digits; a rate of 0: not known."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: int


def words(done_bytes: int, total_bytes: int, bytes_per_s: float) -> str:
    """(120 MB of 1 GB, 5 MB/s)."""
    rate = f", {shown_bytes(bytes_per_s)}/s" if bytes_per_s else ""
    return f"({shown_bytes(done_bytes)} of {shown_bytes(total_bytes)}{rate})"


def read(text: str) -> Pulled | None:
    """What `words` said somewhere in a text; None: nothing of the kind."""
    found = _WORDS.search(text)
    if found is None:
        return None
    sizes = (quantities.size_bytes(found[part] or "0 B") for part in ("done", "total", "rate"))
    return Pulled(*sizes)
