"""Which files of a dataset stay on a node whose cache is too small for all of them. Pure.

Training reads everything once in each epoch, in another order each time. A cache that keeps what was read last has thrown out what comes
next; one that keeps a fixed part serves that part in every epoch (MinIO of CoorDL, Mohan et al., 2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fixed_subset(sizes: Iterable[tuple[str, int]], room_bytes: int, seed: str) -> frozenset[str]:
    """Paths that together take at most `room_bytes`: the same for the same files, and another part for another seed."""
    chosen, left = list[str](), room_bytes
    for path, size in sorted(sizes, key=lambda one: hashlib.blake2b(f"{seed} {one[0]}".encode()).digest()):
        if size <= left:
            chosen.append(path)
            left -= size
    return frozenset(chosen)
