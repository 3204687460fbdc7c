"""Text that comes from elsewhere (jobs, users, other machines), made harmless for a terminal. Pure.

A terminal obeys what is printed to it: escape sequences move its cursor, hide or forge lines, set its title, and some make
it type. So nothing that the fleet says reaches one with its control characters; they are shown as what they are.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Colour and weight alone, "select graphic rendition" (ECMA-48, 8.3.117): common in logs and without effect on what is read.
_COLOUR = re.compile("\x1b\\[[0-9;:]*m")
# C0 and C1 controls, DEL, line separators, and what turns the direction of writing (unicode.org/reports/tr9).
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def harmless(text: str, keep: str = "\n\t") -> str:
    """`text` without colours, and with every control character but those in `keep` shown as its escape, as in repr."""
    if not _HARMFUL.search(text):
        return text
    plain = _COLOUR.sub("", text)
    return _HARMFUL.sub(lambda found: found[0] if found[0] in keep else _shown(found[0]), plain)


@lru_cache(maxsize=256)
def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def in_one_line(text: str) -> str:
    """Harmless, and without line breaks: for cells and for lines of which each is one fact."""
    return harmless(" ".join(text.split("\n")), keep="")
