"""Chunks that other copies on this node have already: found by their digest, and copied there instead of pulled again.

A digest is no right to read what it is of: whoever declares a dataset may name any. So a copy gives only to datasets whose readers may all
read its own. What it gives is compared like what any source gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux.data.manifest import Manifest
from whaleflux.errors import NotFound, StatusError
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.dataset_store import Copy, made_of

MAX_ASKED = 64  # copies whose readers are asked for, those first that have most
_CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this disk a chunk begins."""

    path: Path
    offset: int  # bytes


@dataclass(frozen=True, slots=True)
class Given:
    """`places` by SHA-256 of the chunk; `datasets` they are of; `cost`: the most that one of these cost, seconds for each byte."""

    places: Mapping[bytes, Place] = field(default_factory=dict)
    datasets: frozenset[str] = frozenset()
    cost: float = 0.0


def may_give(donor: inventory_pb2.Dataset, to: inventory_pb2.Dataset) -> bool:
    """Whether whoever may read `to` may read `donor`, as far as their records say."""
    if donor.HasField("credentials") and (donor.credentials.secret, donor.owner) != (to.credentials.secret, to.owner):
        return False
    if not donor.members:
        return True
    return donor.owner == to.owner and bool(to.members) and set(to.members) <= set(donor.members)


def shared(copy: Copy, wanted: frozenset[bytes]) -> dict[bytes, Place]:
    """Where a copy has chunks that are wanted."""
    size = copy.manifest.chunk_bytes
    return {
        digest: Place(copy.folder / file.path, number * size)
        for file in copy.manifest.files
        for number, digest in enumerate(file.chunks)
        if digest in wanted
    }


async def given(
    copies: Iterable[Copy], to: inventory_pb2.Dataset, wanted: Manifest, stub: inventory_pb2_grpc.InventoryServiceStub
) -> Given:
    """What whole copies give to a dataset; nothing of one whose readers are not known now."""
    having = await asyncio.to_thread(_having, copies, wanted)  # some 10,000 chunks of each copy
    places, donors, cost = dict[bytes, Place](), set[str](), 0.0
    with suppress(StatusError):  # who does not answer would have each of them waited for
        for copy, found in having[:MAX_ASKED]:
            if not found.keys() <= places.keys() and await _gives(copy, to, stub):
                places = {**found, **places}
                donors.add(copy.dataset)
                cost = max(cost, copy.cost)
    return Given(places, frozenset(donors), cost)


def _having(copies: Iterable[Copy], wanted: Manifest) -> list[tuple[Copy, dict[bytes, Place]]]:
    """Whole copies with chunks of it, those first that have most."""
    digests = frozenset(digest for file in wanted.files for digest in file.chunks)
    having = [(copy, found) for copy in copies if not copy.part and (found := shared(copy, digests))]
    return sorted(having, key=lambda one: -len(one[1]))


async def _gives(copy: Copy, to: inventory_pb2.Dataset, stub: inventory_pb2_grpc.InventoryServiceStub) -> bool:
    """Whether it is of the dataset that has its name now, and that one's readers allow it. Raises StatusError."""
    try:
        donor = await stub.GetDataset(inventory_pb2.GetDatasetRequest(name=copy.dataset), timeout=_CALL_S)
    except NotFound:
        return False
    same = (donor.manifest_digest, made_of(donor)) == (copy.manifest.digest, copy.made)
    return same and may_give(donor, to)
