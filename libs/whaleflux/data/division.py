"""Which files of a dataset are whose, when it is divided among the ranks of a job. Pure.

Files stand in order of their paths, and rank r of W reads those from r * N // W up to (r + 1) * N // W of the N that there are: runs of as many files
as the others', give or take one. Ranks of one node mostly stand beside one another, and so do their files: when there are more or fewer ranks, most
of what a node has is its own still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
LISTING = "files.json"  # in the folder that WHALEFLUX_DATAFILES_<NAME> names: all paths, in order, whoever reads them


def part_of(files: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The files of one rank."""
    count = len(files)
    return files[rank * count // world_size : (rank + 1) * count // world_size]
