"""Looks for values where they must not be: in files, as they are and as they may be written down, also within packed records."""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

PACKED = b"\0zlib\0"  # before large records (store/codec.py)
_PART = 12  # characters of a value that are enough to know it


def forms(value: str) -> set[bytes]:
    """How a value may stand somewhere: plain, escaped, in hex, in base64 at each of the three alignments."""
    raw = value.encode()
    found = {raw, raw[::-1], raw.hex().encode(), raw.hex().upper().encode(), quote(value, safe="").encode()}
    found |= {json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode()}
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * shift + raw)
            found.add(text[4 if shift else 0 : -4])  # what does not depend on its neighbours
    return {form for form in found if len(form) >= _PART}


def texts(path: Path) -> Iterator[bytes]:
    """What a file holds: its bytes, and what packed records in it unpack to."""
    with contextlib.suppress(OSError):
        data = path.read_bytes().rstrip(b"\0")  # logs of servers are made at their full size
        yield data
        at = data.find(PACKED)
        while at >= 0:
            with contextlib.suppress(zlib.error):
                yield zlib.decompressobj().decompress(data[at + len(PACKED) :])
            at = data.find(PACKED, at + 1)


def found_in(folder: Path, values: Iterable[str]) -> dict[str, list[str]]:
    """For each value the files below a folder that have it in whatever form."""
    wanted = {value: forms(value) for value in values}
    found: dict[str, list[str]] = {value: [] for value in wanted}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        held = list(texts(path))
        for value, written in wanted.items():
            if any(form in text for text in held for form in written):
                found[value].append(str(path.relative_to(folder)))
    return found


def command_lines(value: str) -> list[str]:
    """Processes that show a value to everybody who runs `ps`."""
    wanted, found = forms(value), []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and any(form in (folder / "cmdline").read_bytes() for form in wanted):
                found.append(folder.name)
    return found
