"""Reading what the store has of checkpoints: their records, and the reports of pieces that lie beside them."""

from __future__ import annotations

from whaleflux import names
from whaleflux.errors import NotFound
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.reading import Read, read_all
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint import convert


async def existing(store: Store, key: str, name: str) -> Entry:
    """The checkpoint's record. Raises NotFound."""
    entry = await store.get(key)
    if entry is None:
        raise NotFound("checkpoint", name, "list what exists with: whaleflux checkpoints")
    return entry


async def whole(store: Store, entry: Entry) -> pb.Checkpoint:
    """The checkpoint with all pieces that were reported."""
    message = convert.decode(entry)
    message.pieces.extend(convert.pieces_of(await reports(store, message.name)))
    message.size_bytes = sum(piece.size_bytes for piece in message.pieces)
    return message


async def reports(store: Store, name: str) -> list[pb.ReportedPieces]:
    """What ranks have reported of it."""
    found = (await store.list(convert.pieces_prefix(name))).entries
    return [pb.ReportedPieces.FromString(entry.value) for entry in found]


async def of_job(store: Store, job: str) -> Read[pb.Checkpoint]:
    """Records of every checkpoint of a job."""
    return read_all((await store.list(scope(job))).entries, convert.decode)


def scope(parent: str) -> str:
    """The key prefix of a parent: a job, or all jobs of a queue or of all queues ("-")."""
    if parent in {"", "queues/-", "queues/-/jobs/-"}:
        return keys.CHECKPOINTS
    queue, job = names.split(parent.replace("/jobs/-", "/jobs/0"), "queues", "jobs", field="parent")
    return f"{keys.CHECKPOINTS}{queue}/" + ("" if parent.endswith("/jobs/-") else f"{job}/")
