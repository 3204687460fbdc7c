"""Which other ranks can read what these save: told with each save, so that a job is only re-planned for what its checkpoint allows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any


class Resharding(Enum):
    """What may change between those who save and those who restore; the names are those of the contract without their prefix."""

    ANY_SPLIT = "ANY_SPLIT"
    SAME_SPLIT = "SAME_SPLIT"
    SAME_RANKS = "SAME_RANKS"


def structure(model: Mapping[str, Any]) -> str:
    """What a rank's model consists of, whatever part of each tensor the rank has: names and whole shapes, as a digest."""
    parts = sorted((name, tuple(getattr(value, "shape", ()))) for name, value in model.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def resharding(structures: Sequence[str], *, positions_move: bool) -> Resharding:
    """`structures` of all ranks. Different ones are stages of a pipeline, whose optimizers know their own parameters alone.

    `positions_move`: where the ranks stand in the data can be shared out to others.
    """
    if not positions_move:
        return Resharding.SAME_RANKS
    return Resharding.ANY_SPLIT if len(set(structures)) == 1 else Resharding.SAME_SPLIT
