"""Text full of UUIDs in little more than their 16 bytes each, and each once however often it is there.

A record of a large gang names its GPUs, and after a restart those of two attempts: beyond the window of a usual compressor, and
their hexadecimal digits cost it as much as all else. Packed: five lengths, then four parts: the text without its UUIDs, the
length of each piece of it, which UUID follows each piece, and the UUIDs. Numbers are 32 bits wide, the lowest byte first.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable
from itertools import accumulate, chain, pairwise
from operator import sub

_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_HEAD = struct.Struct("<5I")  # bytes of each part, and of the whole text
_UUID_BYTES, _UUID_CHARS = 16, 36
_LEVEL = 1


def pack(text: bytes) -> bytes:
    """At most 4 GiB."""
    pieces, found = _UUID.split(text), _UUID.findall(text)
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(uuid, len(numbers)) for uuid in found]
    parts = (
        zlib.compress(b"".join(pieces), _LEVEL),
        zlib.compress(_to_bytes(map(len, pieces)), _LEVEL),
        zlib.compress(_to_bytes(map(sub, which, chain((0,), which))), _LEVEL),  # from one to the next: mostly the same
        bytes.fromhex(b"".join(numbers).replace(b"-", b"").decode()),
    )
    return _HEAD.pack(*map(len, parts), len(text)) + b"".join(parts)


def unpack(packed: bytes, most_bytes: int) -> bytes:
    """Raises ValueError for what `pack` did not make, and for more than `most_bytes`."""
    try:
        *sizes, length = _HEAD.unpack_from(packed)
        if length > most_bytes or _HEAD.size + sum(sizes) != len(packed):
            raise ValueError("cut short, or too long")
        ends = list(accumulate(sizes, initial=_HEAD.size))
        rest, lengths, steps, table = (packed[a:b] for a, b in pairwise(ends))
        uuids = [_text(table[at : at + _UUID_BYTES]) for at in range(0, len(table), _UUID_BYTES)]
        numbers = 4 * (length // _UUID_CHARS + 1)  # bytes of as many as there can be pieces
        which = [uuids[number] for number in accumulate(_from_bytes(_inflated(steps, numbers)))]
        text = _joined(_inflated(rest, length), _from_bytes(_inflated(lengths, numbers)), which)
    except (struct.error, zlib.error, IndexError) as error:
        raise ValueError(str(error)) from None
    if len(text) != length:
        raise ValueError(f"{len(text)} bytes instead of {length}")
    return text


def _joined(rest: bytes, lengths: Iterable[int], uuids: list[bytes]) -> bytes:
    ends = list(accumulate(lengths, initial=0))
    pieces = [rest[a:b] for a, b in pairwise(ends)]
    return b"".join(chain.from_iterable(zip(pieces, [*uuids, b""], strict=True)))


def _inflated(part: bytes, most_bytes: int) -> bytes:
    reader = zlib.decompressobj()
    text = reader.decompress(part, most_bytes + 1)  # one more, else the end is not seen
    if not reader.eof:
        raise ValueError("cut short, or too long")
    return text


def _text(uuid: bytes) -> bytes:
    digits = uuid.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}".encode()


def _to_bytes(numbers: Iterable[int]) -> bytes:
    return _little(array("i", numbers)).tobytes()


def _from_bytes(data: bytes) -> array[int]:
    numbers = array("i")
    numbers.frombytes(data)
    return _little(numbers)


def _little(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
