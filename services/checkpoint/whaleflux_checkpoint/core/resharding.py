"""Who can read a checkpoint: what its program said, held against what it wrote. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from enum import Enum

_METADATA = ".metadata"  # of torch.distributed.checkpoint: where each part of each tensor lies


class Resharding(Enum):
    """What may change between those who wrote it and those who read it; the names are those of the contract without their prefix."""

    UNSPECIFIED = "UNSPECIFIED"
    ANY_SPLIT = "ANY_SPLIT"
    SAME_SPLIT = "SAME_SPLIT"
    SAME_RANKS = "SAME_RANKS"


def settled(said: Resharding, paths: Iterable[str]) -> Resharding:
    """Of a checkpoint of these files. Without DCP's metadata each rank has files of its own, whatever its program says."""
    has_metadata = any(posixpath.basename(path) == _METADATA for path in paths)
    return said if has_metadata else Resharding.SAME_RANKS
